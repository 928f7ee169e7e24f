"""Which example comes n-th: pure functions of a seed and of n, without state.

n is the number of an example in the run, step * batch_size + row. All take an
int64 array of them and find any without passing over those before it.
"""

import functools
from collections.abc import Sequence
from typing import Protocol

import grain
import numpy as np

BLOCK = 10_000
"""Examples in which the shares of a mixture are exact."""

# Windows from which on Grain's cipher finds one in microseconds.
_FEW = 2**12
# Of splitmix64, a hash of a counter: https://doi.org/10.1145/2660193.2660195
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


class Order(Protocol):
  """Says where in a source its n-th example is."""

  def __call__(self, n: np.ndarray) -> np.ndarray:
    """Returns int64 (k,) of int64 (k,)."""


class Shuffle:
  """Every window once an epoch, in an order of the epoch's own.

  Grain shuffles by a cipher on the index, not by a table. The cipher is of 16
  bits at least and is tried until it falls on a window: of few windows each
  takes up to milliseconds to find, and those are sorted by a hash instead.

  Args:
    count: Windows, at least one.
    seed: Any integer from 0.
    source: Number of the source, so that each has orders of its own.
  """

  def __init__(self, count: int, seed: int, source: int = 0):
    self._count = count
    sequence = _sequence(seed, source)
    self._key = sequence.generate_state(1, np.uint64)[0]
    # Grain seeds epoch e with seed + e: neighbouring seeds would be one order,
    # an epoch apart. A hash sets them far apart.
    spread = int(sequence.generate_state(1, np.uint32)[0])
    self._many = grain.MapDataset.range(count).shuffle(seed=spread).repeat()

  def __call__(self, n: np.ndarray) -> np.ndarray:
    """Returns the window of each example: int64 (k,) of int64 (k,)."""
    if self._count < _FEW:
      return self._sorted(n)
    return np.asarray([self._many[i] for i in n.tolist()], np.int64)

  def _sorted(self, n: np.ndarray) -> np.ndarray:
    epochs, places = np.divmod(n, self._count)
    epochs, row = np.unique(epochs, return_inverse=True)
    first = epochs[:, None] * self._count
    hashes = _hash(self._key, first + np.arange(self._count))
    return np.argsort(hashes, axis=1, kind='stable')[row, places]


class RandomOffsets:
  """Any place of a stream, drawn anew for each example, with replacement.

  Example n begins at h(seed, n) mod count, where h is splitmix64: the n-th
  number of a generator of 64 bits that can be asked for any n. That no count
  divides 2**64 favours some places by less than count / 2**64.

  Args:
    count: Places at which a window can begin, at least one.
    seed: Any integer from 0.
    source: As for `Shuffle`.
  """

  def __init__(self, count: int, seed: int, source: int = 0):
    self._count = np.uint64(count)
    self._key = _sequence(seed, source).generate_state(1, np.uint64)[0]

  def __call__(self, n: np.ndarray) -> np.ndarray:
    """Returns the start of each example: int64 (k,) of int64 (k,)."""
    return (_hash(self._key, n) % self._count).astype(np.int64)


class Mixture:
  """Examples of several sources in given shares, which can change with n.

  A stage is cut into blocks of `BLOCK` examples. In each block the sources
  have exactly their `shares`, in an order that is the block's own: any run of
  examples has about those shares. A source's own examples go on from block to
  block and from stage to stage, none left out and none taken twice.

  Grain's `MapDataset.mix` was not taken: it has one set of weights for the
  whole run, rounds them (`int(100 * weight / least)`), and repeats one fixed
  pattern of sources, the same in every batch.

  Args:
    stages: The first example of each, ascending from 0, and the weight of each
      source in it: one for every source, 0 or more, not all 0.
    seed: Any integer from 0.
  """

  def __init__(self, stages: Sequence[tuple[int, Sequence[float]]], seed: int):
    self._starts = np.asarray([start for start, _ in stages], np.int64)
    if self._starts[0] != 0 or (np.diff(self._starts) <= 0).any():
      raise ValueError(f'stages must ascend from 0: {self._starts.tolist()}')
    self._shares = np.stack([shares(weights) for _, weights in stages])
    self._keys = [
      # Unlike the key of any source, which has one number.
      _sequence(seed, 0, stage).generate_state(1, np.uint64)[0]
      for stage in range(len(stages))
    ]
    self._block = functools.lru_cache(maxsize=4)(self._make_block)
    first = np.zeros_like(self._shares[0])
    self._first = [first]
    for stage, length in enumerate(np.diff(self._starts).tolist()):
      self._first.append(self._first[stage] + self._taken(stage, length))

  def __call__(self, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Finds whose each example is, and its number among those of that source.

    Args:
      n: int64 (k,).

    Returns:
      Number of the source, and of the example in it: both int64 (k,).
    """
    if self._shares.shape[1] == 1:
      return np.zeros_like(n), n
    stages = np.searchsorted(self._starts, n, side='right') - 1
    blocks, places = np.divmod(n - self._starts[stages], BLOCK)
    sources, numbers = np.empty_like(n), np.empty_like(n)
    for stage, block in sorted(
      set(zip(stages.tolist(), blocks.tolist(), strict=True))
    ):
      here = np.flatnonzero((stages == stage) & (blocks == block))
      source_of, rank_of = self._block(stage, block)
      source = source_of[places[here]]
      before = self._first[stage] + block * self._shares[stage]
      sources[here] = source
      numbers[here] = before[source] + rank_of[places[here]]
    return sources, numbers

  def taken(self, examples: int) -> np.ndarray:
    """Returns how many of the first examples are each source's: int64 (K,)."""
    stage = int(np.searchsorted(self._starts, examples, side='right')) - 1
    length = examples - int(self._starts[stage])
    return self._first[stage] + self._taken(stage, length)

  def _taken(self, stage: int, length: int) -> np.ndarray:
    """Of the first `length` examples of a stage: int64 (K,)."""
    blocks, rest = divmod(length, BLOCK)
    source_of, _ = self._block(stage, blocks)
    counts = self._shares[stage]
    partial = np.bincount(source_of[:rest], minlength=len(counts))
    return blocks * counts + partial

  def _make_block(
    self, stage: int, block: int
  ) -> tuple[np.ndarray, np.ndarray]:
    """Whose each example of a block is, and its rank there: int64 (BLOCK,)."""
    counts = self._shares[stage]
    n = block * BLOCK + np.arange(BLOCK)
    order = np.argsort(_hash(self._keys[stage], n), kind='stable')
    source_of = np.repeat(np.arange(len(counts)), counts)[order]
    by_source = np.argsort(source_of, kind='stable')
    rank_of = np.empty(BLOCK, np.int64)
    first = np.cumsum(counts) - counts
    rank_of[by_source] = np.arange(BLOCK) - np.repeat(first, counts)
    return source_of, rank_of


def shares(weights: Sequence[float]) -> np.ndarray:
  """Divides a block by weight, by the method of the largest remainder.

  Args:
    weights: (K,), 0 or more, not all 0.

  Returns:
    int64 (K,), which add up to `BLOCK`.
  """
  weight = np.asarray(weights, np.float64)
  if not (np.isfinite(weight).all() and (weight >= 0).all() and weight.any()):
    raise ValueError(f'these are no weights: {weights}')
  # By the largest first: no sum of weights is too large for a float.
  weight = weight / weight.max()
  quotas = weight * BLOCK / weight.sum()
  counts = np.floor(quotas).astype(np.int64)
  missing = BLOCK - int(counts.sum())
  largest = np.argsort(counts - quotas, kind='stable')[:missing]
  counts[largest] += 1
  return counts


def _sequence(seed: int, *path: int) -> np.random.SeedSequence:
  """Source 0 has the seed itself: so it is alone or in a mixture."""
  return np.random.SeedSequence(seed, spawn_key=() if path == (0,) else path)


def _hash(key: np.uint64, n: np.ndarray) -> np.ndarray:
  """splitmix64 of a key and int64 (k,): uint64 (k,)."""
  x = key + (n.astype(np.uint64) + np.uint64(1)) * _GOLDEN
  x = (x ^ (x >> np.uint64(30))) * _MIX_1
  x = (x ^ (x >> np.uint64(27))) * _MIX_2
  return x ^ (x >> np.uint64(31))
