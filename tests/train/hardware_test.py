import dataclasses
import types

import jax
import pytest

from models import accounting
from models.config import LlamaConfig
from train import hardware
from train.aot.chips import CHIPS
from train.config import Config
from train.gpus import GPUS

_CONFIG = Config(
  model=LlamaConfig(vocab_size=512, d_model=64, n_layers=2, dtype='bfloat16')
)


@pytest.fixture
def devices(monkeypatch):
  """Sets what JAX says that there is: devices with these memory statistics."""

  def set_devices(kind, *stats, platform='gpu'):
    found = [
      types.SimpleNamespace(
        platform=platform, device_kind=kind, memory_stats=lambda each=each: each
      )
      for each in stats
    ]
    monkeypatch.setattr(jax, 'devices', lambda: found)
    monkeypatch.setattr(jax, 'local_devices', lambda: found)
    monkeypatch.setattr(jax, 'device_count', lambda: len(found))

  hardware._peak_rate.cache_clear()
  yield set_devices
  hardware._peak_rate.cache_clear()


def test_every_gpu_and_every_tpu_has_its_peak():
  for gpu in GPUS.values():
    for kind in gpu.kinds:
      assert hardware.PEAKS[kind] == gpu.peak_flops
  assert set(hardware._TPU_KINDS.values()) == set(CHIPS)
  assert hardware.PEAKS['TPU v5'] == CHIPS['v5p'].peak_flops


def test_mfu_is_of_all_devices(devices):
  devices('NVIDIA H100 80GB HBM3', None, None, None, None)
  flops = accounting.flops_per_token(_CONFIG.model, 128)
  at_peak = 4 * 989e12 / flops
  assert hardware.mfu(_CONFIG, at_peak) == pytest.approx(1)
  assert hardware.mfu(_CONFIG, 0.4 * at_peak) == pytest.approx(0.4)


@pytest.mark.parametrize('kind, platform, dtype', [
  ('cpu', 'cpu', 'bfloat16'),
  ('NVIDIA of the future', 'gpu', 'bfloat16'),
  ('NVIDIA H100 80GB HBM3', 'gpu', 'float32'),
])  # fmt: skip
def test_no_mfu_where_the_peak_is_not_known(devices, kind, platform, dtype):
  devices(kind, None, platform=platform)
  model = dataclasses.replace(_CONFIG.model, dtype=dtype)
  config = dataclasses.replace(_CONFIG, model=model)
  assert hardware.mfu(config, 1e6) is None


def test_memory_is_of_the_fullest_device(devices):
  full = {'peak_bytes_in_use': 7, 'bytes_limit': 20, 'num_allocs': 3}
  devices('x', {'peak_bytes_in_use': 5, 'bytes_limit': 10}, full)
  assert hardware.memory() == 7
  assert hardware.memory_limit() == 10


@pytest.mark.parametrize('stats', [None, {}, {'bytes_in_use': 3}])
def test_memory_is_of_the_process_where_devices_do_not_say(devices, stats):
  devices('cpu', stats, platform='cpu')
  # This process holds JAX: that is more than 50 MB, and less than a terabyte.
  assert 50e6 < hardware.memory() < 1e12
  assert hardware.memory_limit() is None


def test_a_device_may_have_no_limit(devices):
  devices('x', {'peak_bytes_in_use': 5})
  assert hardware.memory() == 5
  assert hardware.memory_limit() is None


def test_memory_grows_with_what_is_used():
  before = hardware.memory()
  kept = b'x' * (before + 2**28)
  assert hardware.memory() >= before + 2**27
  del kept
