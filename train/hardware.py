"""The devices as a run sees them: memory in use, published speed, MFU."""

import functools
import resource
import sys

import jax

from models import accounting
from models.config import DecoderConfig
from train.aot.chips import CHIPS
from train.config import Config
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


def mfu(config: Config, tokens_per_second: float) -> float | None:
  """Model FLOPs utilisation on all of JAX's devices.

  Args:
    config: The run, its vocabulary resolved.
    tokens_per_second: Of the whole run.

  Returns:
    The share, below 1, of the devices' published peak that the model's
    operations (`models.accounting.flops_per_token`) take; None where `peak`
    knows none.
  """
  peak_rate = _peak_rate(config.model, config.data.sequence_length)
  return tokens_per_second / peak_rate if peak_rate else None


@functools.cache
def _peak_rate(model: DecoderConfig, length: int) -> float | None:
  """Tokens a second of a run that does nothing but the model's products."""
  device = jax.devices()[0]
  flops, _ = peak(device.platform, device.device_kind, model.dtype)
  if flops is None:
    return None
  return flops * jax.device_count() / accounting.flops_per_token(model, length)


def memory() -> int:
  """Most bytes that this process has used so far.

  Of its fullest device; of the process itself where devices do not say, as
  CPUs do not.
  """
  used = [stats['peak_bytes_in_use'] for stats in _stats()]
  if used:
    return max(used)
  resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  return resident * (1 if sys.platform == 'darwin' else 1024)


def memory_limit() -> int | None:
  """Bytes that JAX may use of a device; None where devices do not say."""
  limits = [stats['bytes_limit'] for stats in _stats() if stats['bytes_limit']]
  return min(limits, default=None)


def _stats() -> list[dict[str, int]]:
  """Of the devices of this process that count their memory."""
  stats = (device.memory_stats() for device in jax.local_devices())
  wanted = ('peak_bytes_in_use', 'bytes_limit')
  return [
    {key: found.get(key, 0) for key in wanted}
    for found in stats
    if found and 'peak_bytes_in_use' in found
  ]
