import types

import numpy as np
import pytest

from train.aot.chips import CHIPS
from train.aot.hlo import Instruction
from train.aot.network import Network

LINK = CHIPS['v5p'].link_bandwidth


def network(shape, slices=1, cores=1, chip='v5p'):
  """Of slices as libtpu describes them, every device in one axis."""
  shape = (*shape, *(1,) * (3 - len(shape)))
  devices = [
    types.SimpleNamespace(coords=list(at), core_on_chip=core, slice_index=n)
    for n in range(slices)
    for at in np.ndindex(*shape)
    for core in range(cores)
  ]
  mesh = types.SimpleNamespace(devices=np.array(devices, object))
  return Network(mesh, CHIPS[chip])


def instruction(attributes=''):
  return Instruction('x', 'f32[1]', 'all-gather', '', attributes, False)


@pytest.mark.parametrize(
  ('shape', 'members', 'kind', 'seconds'),
  [
    # Three dimensions that are rings, two links each.
    ((4, 4, 4), range(64), 'all-gather', 63 / 64 / (6 * LINK)),
    ((4, 4, 4), range(64), 'all-reduce', 2 * 63 / 64 / (6 * LINK)),
    ((4, 4, 4), range(4), 'reduce-scatter', 3 / 4 / (2 * LINK)),
    # Lines.
    ((4, 4, 2), range(32), 'all-gather', 31 / 32 / (3 * LINK)),
    ((2, 2, 2), range(2), 'all-gather', 1 / 2 / LINK),
    ((4, 4, 4), range(2), 'collective-permute', 1 / (2 * LINK)),
  ],
)
def test_seconds_of_a_byte(shape, members, kind, seconds):
  groups = np.array([list(members)])
  got = network(shape).seconds(instruction(), kind, 1, groups)
  assert got == pytest.approx(seconds)


def test_one_ring_has_two_links():
  marked = instruction('backend_config={"emitter":"1DAllGatherOnMajorDim"}')
  groups = np.arange(64)[None]
  got = network((4, 4, 4)).seconds(marked, 'all-gather', 1, groups)
  assert got == pytest.approx(63 / 64 / (2 * LINK))


def test_between_slices_each_device_sends_its_share():
  groups = np.arange(128)[None]
  got = network((4, 4, 4), slices=2).seconds(
    instruction(), 'all-reduce', 64 * 10**6, groups
  )
  inside = 2 * 64e6 * 63 / 64 / (6 * LINK)
  outside = 2 * 1e6 / 2 / CHIPS['v5p'].dcn_bandwidth
  assert got == pytest.approx(inside + outside)


def test_two_dies_of_a_chip_are_nearer_than_neighbours():
  whole = network((2, 2, 1), cores=2, chip='tpu7x')
  dies, chips = (
    whole.seconds(instruction(), 'all-gather', 1, np.array([pair]))
    for pair in ([0, 1], [0, 2])
  )
  assert dies == pytest.approx(chips / 6)
