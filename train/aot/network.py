"""How long collectives take on the links between chips, at full rate."""

from typing import Any

import numpy as np
from jax.sharding import Mesh

from train.aot import hlo
from train.aot.chips import Chip

# How libtpu marks a collective around one ring, whatever the dimensions.
_ONE_RING = '"emitter":"1D'

# Google Cloud's page on the TPU7x: the link to the die beside is six times as
# fast as one to a neighbour.
_OTHER_DIE = 6


class Network:
  """The links of a mesh of devices, real or described.

  Args:
    mesh: The devices.
    chip: Theirs.
  """

  def __init__(self, mesh: Mesh, chip: Chip):
    self._chip = chip
    devices = list(mesh.devices.flat)
    self._places = np.array([_place(device) for device in devices])
    self._slices = np.array(
      [getattr(device, 'slice_index', 0) or 0 for device in devices]
    )
    extent = self._places.max(axis=0) + 1
    self._rings = chip.rings(extent[: chip.dimensions].tolist())

  def seconds(
    self,
    instruction: hlo.Instruction,
    kind: str,
    size: int,
    groups: np.ndarray,
  ) -> float:
    """Time of one run, without latency.

    Within a slice a device sends what it has to along all dimensions that its
    group extends over, both ways where they are rings; or along one ring
    through them all, where the compiler says so. An all-reduce is a
    reduce-scatter and an all-gather. A permutation is taken for one of the two
    that a loop runs at once around a ring, in both directions. Between slices,
    each device sends its share of what its slice holds.

    Args:
      instruction: The collective.
      kind: Its kind.
      size: Bytes of the whole array, on one device.
      groups: Its groups of devices, or pairs.
    """
    members = groups[0]
    link, outside = self._chip.link_bandwidth, self._chip.dcn_bandwidth
    slices = len(set(self._slices[members].tolist()))
    inner = len(members) // slices
    if kind == 'collective-permute':
      return size / (2 * link if slices == 1 else outside)
    passes = 2 if kind == 'all-reduce' else 1
    total = 0.0
    if inner > 1:
      rate = link * self._links(members)
      if _ONE_RING in instruction.attributes and inner > 2:
        rate = min(rate, 2 * link)
      total += passes * size * (inner - 1) / inner / rate
    if slices > 1:
      total += passes * size / inner * (slices - 1) / slices / outside
    return total

  def seconds_between_slices(self, kind: str, size: int) -> float:
    """Time of one exchange of every device with its peers in other slices.

    Args:
      kind: Of collective.
      size: Bytes that a device has.
    """
    slices = len(set(self._slices.tolist()))
    passes = 2 if kind == 'all-reduce' else 1
    return passes * size * (slices - 1) / slices / self._chip.dcn_bandwidth

  def _links(self, members: np.ndarray) -> int:
    """Links that each of a group's members sends along at once."""
    places = self._places[members]
    links = 0
    for at in np.flatnonzero((places != places[0]).any(axis=0)):
      if at < self._chip.dimensions:
        links += 2 if self._rings[at] else 1
      elif len(members) == 2:  # The two dies of a chip.
        links += _OTHER_DIE
    return max(1, links)


def _place(device: Any) -> list[int]:
  """Where a device is: three coordinates of its chip, and its core."""
  coordinates = getattr(device, 'coords', [0, 0, 0])
  return [*coordinates, getattr(device, 'core_on_chip', 0)]
