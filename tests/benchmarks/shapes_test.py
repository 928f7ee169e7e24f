import pytest

from benchmarks import shapes
from models import accounting
from train import hardware


def test_the_default_is_the_peers_shape():
  counts = accounting.parameters(shapes.DEFAULT)
  assert round(counts.total / 1e6, 1) == 16.9
  flops = 8 * 256 * accounting.flops_per_token(shapes.DEFAULT, 256)
  assert flops == pytest.approx(1.8e11, rel=0.05)


@pytest.mark.parametrize('platform, device, dtype, peak, reason', [
  ('gpu', 'NVIDIA H100 80GB HBM3', 'bfloat16', 989e12, ''),
  ('tpu', 'TPU v5 lite', 'bfloat16', 197e12, ''),
  ('tpu', 'TPU7x', 'bfloat16', 2307e12 / 2, ''),  # One of two cores.
  ('gpu', 'NVIDIA H100 80GB HBM3', 'float32', None, 'of bfloat16'),
  ('gpu', 'NVIDIA T1', 'bfloat16', None, 'NVIDIA T1 is not known'),
  ('cpu', 'cpu', 'bfloat16', None, 'a CPU'),
])  # fmt: skip
def test_the_peak_of_a_device(platform, device, dtype, peak, reason):
  found, missing = hardware.peak(platform, device, dtype)
  assert found == peak
  assert reason in missing
  assert bool(missing) == (peak is None)
