"""Windows of a token stream, and batches of windows in Grain's order."""

from collections.abc import Mapping, Sequence
from typing import Any

import grain
import numpy as np

Batch = Mapping[str, np.ndarray]


class Windows:
  """Cuts a stream into windows of `length` inputs and their targets.

  Window i holds tokens [i * length, (i + 1) * length], both ends included:
  the last token is a target here and an input in window i + 1. So each token
  but the stream's first is a target once. What is left at the end, fewer than
  `length` targets, is in no window.
  """

  def __init__(self, stream: np.ndarray, length: int):
    """Wraps `stream`, (tokens,), of which nothing is read yet."""
    self._stream = stream
    self._length = length
    self._offsets = np.arange(length + 1)

  def __len__(self) -> int:
    return max(0, len(self._stream) - 1) // self._length

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    """Returns `tokens`, int32 (length + 1,)."""
    return {'tokens': self.__getitems__([index])['tokens'][0]}

  def __getitems__(
    self, indices: Sequence[int] | np.ndarray
  ) -> dict[str, np.ndarray]:
    """Returns `tokens`, int32 (len(indices), length + 1), in one read."""
    starts = np.asarray(indices, np.int64) * self._length
    tokens = self._stream[starts[:, None] + self._offsets]
    return {'tokens': tokens.astype(np.int32)}


class Batches:
  """Shuffled batches without end; batch i depends on (seed, i) alone.

  Every epoch takes each window once, in an order of its own; a batch can span
  two epochs. Any batch is found without passing over those before it: Grain
  shuffles by a cipher on the index, not by a table.
  """

  def __init__(self, windows: Windows, batch_size: int, seed: int):
    """Reads nothing yet.

    Args:
      windows: at least one window.
      batch_size: B, windows in a batch.
      seed: any integer from 0.
    """
    # Grain seeds epoch e with seed + e: neighbouring seeds would be one order,
    # an epoch apart. A hash sets them far apart.
    spread = int(np.random.SeedSequence(seed).generate_state(1, np.uint32)[0])
    self._windows = windows
    self._batch_size = batch_size
    self._order = (
      grain.MapDataset.range(len(windows)).shuffle(seed=spread).repeat(None)
    )

  def __getitem__(self, index: int) -> Batch:
    """Returns batch `index`, `{'tokens': int32 (B, T + 1)}`."""
    return self.rows(index, range(self._batch_size))

  def rows(self, index: int, rows: Sequence[int] | np.ndarray) -> Batch:
    """Returns some rows of batch `index`, and reads no others."""
    first = index * self._batch_size
    # One read: what is in Grain's order are numbers, not the windows.
    chosen = [self._order[first + int(row)] for row in rows]
    return self._windows.__getitems__(chosen)


def validation_batches(
  stream: np.ndarray, length: int, batch_size: int, max_targets: int
) -> list[dict[str, Any]]:
  """Returns the fixed batches that every evaluation scores.

  Windows are in order. Of the targets, the first `max_targets` of the stream
  have weight 1, each in one place; padding, in the last window and to fill
  the last batch, has weight 0 and tokens 0.

  Args:
    stream: (tokens,).
    length: T, tokens that the model sees at once.
    batch_size: B.
    max_targets: at most this many targets are scored.

  Returns:
    A list of `{'tokens': int32 (B, T + 1), 'weights': float32 (B, T)}`.
  """
  targets = min(max(0, len(stream) - 1), max_targets)
  batch_targets = batch_size * length
  count = -(-targets // batch_targets)
  padded = np.zeros(count * batch_targets + 1, np.int32)
  scored = stream[: targets + 1]
  padded[: len(scored)] = scored
  weights = (np.arange(count * batch_targets) < targets).astype(np.float32)
  windows = Windows(padded, length)
  return [
    {
      **windows.__getitems__(np.arange(batch_size) + i * batch_size),
      'weights': weights.reshape(count, batch_size, length)[i],
    }
    for i in range(count)
  ]
