"""Batches: for training, without end, and those that an evaluation scores."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

from train.data import layouts, order

Batch = Mapping[str, np.ndarray]


class Windows(Protocol):
  """A split of a prepared source; see `train.data.prepared.Windows`."""

  layout: str
  length: int

  def __len__(self) -> int:
    """Number of windows."""

  @property
  def starts(self) -> int:
    """Places at which `at` can begin."""

  def __getitems__(
    self, indices: Sequence[int] | np.ndarray
  ) -> dict[str, np.ndarray]:
    """Reads windows, as they are stored."""

  def at(self, starts: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
    """Reads windows of a stream from any token on."""


class Batches:
  """Batches without end; batch i depends on (seed, i) alone.

  In layout 'random' each row begins anywhere in the stream. In the others
  every epoch of a source takes each of its windows once, in an order of its
  own; a batch can span two epochs.
  """

  def __init__(
    self,
    sources: Sequence[Windows],
    batch_size: int,
    seed: int,
    stages: Sequence[tuple[int, Sequence[float]]] | None = None,
  ):
    """Reads nothing yet.

    Args:
      sources: At least one, of one layout and length, none without windows.
      batch_size: B, rows in a batch.
      seed: Any integer from 0.
      stages: The first step of each, ascending from 0, and the weight of each
        source in it; None for equal weights.
    """
    self._sources = sources
    self._batch_size = batch_size
    self._orders: list[order.Order] = [
      order.RandomOffsets(windows.starts, seed, number)
      if windows.layout == 'random'
      else order.Shuffle(len(windows), seed, number)
      for number, windows in enumerate(sources)
    ]
    self._mixture = order.Mixture(
      [
        (first_step * batch_size, weights)
        for first_step, weights in stages or [(0, [1.0] * len(sources))]
      ],
      seed,
    )

  def __getitem__(self, index: int) -> Batch:
    """Returns batch `index`; see `layouts.to_batch`."""
    return self.rows(index, range(self._batch_size))

  def rows(self, index: int, rows: Sequence[int] | np.ndarray) -> Batch:
    """Returns some rows of batch `index`, at least one, and reads no others.

    Raises:
      UserError: a source cannot be read.
    """
    n = index * self._batch_size + np.asarray(rows, np.int64)
    sources, numbers = self._mixture(n)
    places, pieces = [], []
    for source in np.unique(sources).tolist():
      place = np.flatnonzero(sources == source)
      places.append(place)
      pieces.append(self._read(source, numbers[place]))
    back = np.argsort(np.concatenate(places))
    arrays = {
      name: np.concatenate([piece[name] for piece in pieces])[back]
      for name in pieces[0]
    }
    return layouts.to_batch(self._sources[0].layout, arrays)

  def taken(self, steps: int) -> list[int]:
    """Returns how many rows of each source the first steps take."""
    return self._mixture.taken(steps * self._batch_size).tolist()

  def _read(self, source: int, numbers: np.ndarray) -> dict[str, np.ndarray]:
    """Reads a source's examples, in one read."""
    windows = self._sources[source]
    wanted = self._orders[source](numbers)
    if windows.layout == 'random':
      return windows.at(wanted)
    return windows.__getitems__(wanted)


def validation_batches(
  sources: Sequence[Windows], batch_size: int, max_targets: int
) -> list[dict[str, np.ndarray]]:
  """Returns the fixed batches that every evaluation scores.

  Of each source its first windows, as many as have no more than its share of
  `max_targets` targets, the same for each source; one window at least.

  Args:
    sources: Validation splits, of one layout and length, each with a window.
    batch_size: B.
    max_targets: Targets to score.

  Returns:
    What `layouts.to_batch` makes of B rows, always with 'weights', float32
    (B, T). Rows that fill up the last batch are all 0, weights too.

  Raises:
    UserError: a source cannot be read.
  """
  layout = sources[0].layout
  share = max_targets // len(sources)
  pieces = [_first_windows(windows, batch_size, share) for windows in sources]
  arrays = _concatenate(pieces)
  rows = layouts.to_batch(layout, arrays, weights=True)
  filler = -len(rows['tokens']) % batch_size
  padded = {
    name: np.pad(array, [(0, filler)] + [(0, 0)] * (array.ndim - 1))
    for name, array in rows.items()
  }
  return [
    {name: array[i : i + batch_size] for name, array in padded.items()}
    for i in range(0, len(padded['tokens']), batch_size)
  ]


def _first_windows(
  windows: Windows, at_once: int, max_targets: int
) -> dict[str, np.ndarray]:
  """Reads those before the targets exceed `max_targets`; one at least."""
  pieces: list[dict[str, np.ndarray]] = []
  counts = np.zeros(0, np.int64)
  while len(counts) < len(windows) and counts.sum() <= max_targets:
    stop = min(len(counts) + at_once, len(windows))
    piece = windows.__getitems__(np.arange(len(counts), stop))
    counts = np.append(counts, layouts.row_targets(windows.layout, piece))
    pieces.append(piece)
  kept = max(1, int((np.cumsum(counts) <= max_targets).sum()))
  return {n: array[:kept] for n, array in _concatenate(pieces).items()}


def _concatenate(
  pieces: Sequence[Mapping[str, np.ndarray]],
) -> dict[str, np.ndarray]:
  return {
    name: np.concatenate([piece[name] for piece in pieces])
    for name in pieces[0]
  }
