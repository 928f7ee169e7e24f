"""Published speeds of devices, for model FLOPs utilisation."""

# Operations a second of dense bfloat16 products by `device_kind`, as published.
PEAKS = {
  'NVIDIA A100-SXM4-40GB': 312e12,
  'NVIDIA A100-SXM4-80GB': 312e12,
  'NVIDIA H100 80GB HBM3': 989e12,
  'NVIDIA H100 PCIe': 756e12,
  'NVIDIA H200': 989e12,
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,
  'TPU v5': 459e12,
  'TPU v5p': 459e12,
  'TPU v6 lite': 918e12,
}


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
