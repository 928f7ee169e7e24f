"""What GPUs can do, from NVIDIA's data sheets."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Gpu:
  """A model of GPU."""

  label: str
  """For people."""
  peak_flops: float
  """Operations a second of dense bfloat16 products."""
  kinds: tuple[str, ...]
  """As `jax.Device.device_kind` has it."""


GPUS = {
  'a100': Gpu(
    'A100', 312e12, ('NVIDIA A100-SXM4-40GB', 'NVIDIA A100-SXM4-80GB')
  ),
  'h100': Gpu('H100', 989e12, ('NVIDIA H100 80GB HBM3',)),
  'h100_pcie': Gpu('H100 PCIe', 756e12, ('NVIDIA H100 PCIe',)),
  'h200': Gpu('H200', 989e12, ('NVIDIA H200',)),
}
