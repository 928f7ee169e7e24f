import jax
import numpy as np
import pytest

from train import feed
from train.config import MeshConfig
from train.mesh import batch_sharding, make_mesh

MESHES = [
  MeshConfig(),
  MeshConfig(data=1, fsdp=8),
  MeshConfig(data=1, tensor=8),
  MeshConfig(fsdp=2, tensor=2),
  MeshConfig(expert=4, tensor=2),
]


@pytest.mark.parametrize('config', MESHES, ids=str)
def test_one_process_feeds_all(config):
  mesh = make_mesh(config)
  give = feed.Feed(mesh, 16)
  np.testing.assert_array_equal(give.rows, np.arange(16))
  batch = {'tokens': np.arange(48).reshape(16, 3), 'weights': np.ones(16)}
  for name, array in give(batch).items():
    assert array.sharding == batch_sharding(mesh)
    np.testing.assert_array_equal(array, batch[name])


class SomeDevices:
  """A sharding as a process sees it that has only some of the devices."""

  is_fully_addressable = False

  def __init__(self, sharding, devices):
    self.sharding = sharding
    self.devices = devices

  def addressable_devices_indices_map(self, shape):
    held = self.sharding.addressable_devices_indices_map(shape)
    return {device: held[device] for device in self.devices}


@pytest.mark.parametrize('processes', [1, 2, 4, 8])
@pytest.mark.parametrize('config', MESHES, ids=str)
def test_a_process_reads_what_its_devices_hold(monkeypatch, config, processes):
  whole = batch_sharding(make_mesh(config))
  placed = []
  monkeypatch.setattr(
    feed.jax,
    'make_array_from_single_device_arrays',
    lambda shape, _, parts: placed.append((shape, parts)),
  )
  seen = []
  for devices in np.array_split(jax.devices(), processes):
    view = SomeDevices(whole, devices)
    monkeypatch.setattr(feed, 'batch_sharding', lambda _, view=view: view)
    give = feed.Feed(None, 16)
    held = view.addressable_devices_indices_map((16,))
    wanted = {r for (span,) in held.values() for r in range(16)[span]}
    assert give.rows.tolist() == sorted(wanted)  # Each once.
    seen += give.rows.tolist()

    # Each device gets its own rows, in the order of the batch.
    give({'tokens': give.rows[:, None] * 10})
    shape, parts = placed.pop()
    assert shape == (16, 1)
    for device, part in zip(devices, parts, strict=True):
      assert part.devices() == {device}
      np.testing.assert_array_equal(
        part[:, 0], 10 * np.arange(16)[held[device]]
      )
  assert set(seen) == set(range(16))
  if config.tensor == 1:
    assert len(seen) == 16
