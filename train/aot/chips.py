"""What TPUs can do, from public documents.

Rates are of a device, which is what JAX calls one: a whole chip, except that a
TPU7x has two, each with a TensorCore and half of the memory.

Sources: the pages on each generation in Google Cloud's TPU documentation [G],
"How to Scale Your Model", chapter 2, by J. Austin and others [S], and Google's
announcements of Ironwood [I]. A clock [C] is the peak over the operations in a
cycle that the compiler's own estimate of a large product comes close to; for v4
and v5p it is the published one.
"""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Chip:
  """A device of a TPU generation."""

  name: str
  """As topologies are named."""
  peak_flops: float
  """bfloat16 operations a second."""
  flops_per_cycle: int
  """Of all its matrix units."""
  hbm_bytes: int
  """Memory, of which the compiler keeps a part for itself."""
  hbm_bandwidth: float
  """Bytes a second."""
  link_bandwidth: float
  """Bytes a second that one link to a neighbour carries each way."""
  dcn_bandwidth: float
  """Bytes a second that it sends to other slices."""
  dimensions: int
  """Of the network between its neighbours."""
  ring: int
  """Multiples of this make dimensions rings; see `rings`."""
  config: str = 'default'
  """The compiler's name for the way that its cores are used."""

  @property
  def clock(self) -> float:
    """Cycles a second."""
    return self.peak_flops / self.flops_per_cycle

  def rings(self, shape: Sequence[int]) -> list[bool]:
    """Which dimensions of a slice are rings; the others are lines.

    In two dimensions each by itself, in three all or none.
    """
    closed = [size % self.ring == 0 for size in shape]
    if self.dimensions == 3:
      return [all(closed)] * 3
    return closed


_GB, _GIB = 10**9, 2**30

CHIPS = {
  chip.name: chip
  for chip in (
    # Peak, memory [G]; links, network [S]; clock 1.05 GHz. Two cores as one.
    Chip(
      'v4', 275e12, 2**18, 32 * _GIB, 1.2e12, 4.5e10, 6.25e9, 3, 4, 'megacore'
    ),
    # Peak, memory [G]; links, network [S]; clock 1.5 GHz [C].
    Chip('v5e', 197e12, 2**17, 16 * _GIB, 8.1e11, 4.5e10, 3.125e9, 2, 16),
    # Peak, memory [G]; links, network [S]; clock 1.75 GHz. Two cores as one.
    Chip(
      'v5p', 459e12, 2**18, 95 * _GIB, 2.765e12, 9e10, 6.25e9, 3, 4, 'megacore'
    ),
    # Peak, memory [G]; links, network [S]; clock 1.75 GHz [C].
    Chip('v6e', 918e12, 2**19, 32 * _GIB, 1.638e12, 9e10, 1.25e10, 2, 16),
    # Half of a chip's 2307 TFLOP/s, 192 GiB [G], 7.37 TB/s and 1.2 TB/s over
    # six links both ways [I]; clock 2.2 GHz [C]. Its network between slices was
    # not found: that of v6e is taken.
    Chip('tpu7x', 1153.5e12, 2**19, 96 * _GIB, 3.685e12, 5e10, 6.25e9, 3, 4),
  )
}
