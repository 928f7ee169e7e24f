"""Published speeds of devices, for model FLOPs utilisation."""

from train.aot.chips import CHIPS
from train.gpus import GPUS

# A TPU generation by `device_kind`. A core of a TPU7x is a device to JAX, and
# in `CHIPS`.
_TPU_KINDS = {
  'TPU v4': 'v4',
  'TPU v5 lite': 'v5e',
  'TPU v5e': 'v5e',
  'TPU v5': 'v5p',
  'TPU v5p': 'v5p',
  'TPU v6 lite': 'v6e',
  'TPU v6e': 'v6e',
  'TPU7x': 'tpu7x',
}

PEAKS = {
  **{kind: gpu.peak_flops for gpu in GPUS.values() for kind in gpu.kinds},
  **{kind: CHIPS[name].peak_flops for kind, name in _TPU_KINDS.items()},
}
"""Operations a second of dense bfloat16 products by `device_kind`."""


def peak(platform: str, device: str, dtype: str) -> tuple[float | None, str]:
  """Looks a device up.

  Args:
    platform: As `jax.Device.platform` has it.
    device: Its `device_kind`.
    dtype: Of the model.

  Returns:
    Published bfloat16 operations a second; or None, and why.
  """
  if platform == 'cpu':
    return None, 'a CPU has no published peak'
  if device not in PEAKS:
    return None, f'the peak of {device} is not known here'
  if dtype != 'bfloat16':
    return None, f'the peak is of bfloat16, the model of {dtype}'
  return PEAKS[device], ''
