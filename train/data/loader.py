"""Windows of a token stream, and batches of windows through Grain."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import grain
import numpy as np

Batch = Mapping[str, np.ndarray]


class Batches(Protocol):
  """An endless sequence of batches with random access."""

  def __getitem__(self, index: int) -> Batch:
    """Returns batch `index`, any number from 0."""


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


def train_batches(windows: Windows, batch_size: int, seed: int) -> Batches:
  """Returns shuffled batches without end; batch i depends on (seed, i) alone.

  Every epoch takes each window once, in an order of its own; a batch can span
  two epochs. Any batch is found without passing over those before it: Grain
  shuffles by a cipher on the index, not by a table.

  Args:
    windows: at least one window.
    batch_size: B, windows in a batch.
    seed: any integer from 0.

  Returns:
    A sequence of `{'tokens': int32 (B, T + 1)}`.
  """
  # Grain seeds epoch e with seed + e: neighbouring seeds would be one order,
  # an epoch apart. A hash sets them far apart.
  spread = int(np.random.SeedSequence(seed).generate_state(1, np.uint32)[0])
  # Indices are batched rather than windows, and read at one go: Grain's batch
  # asks its parent for one element after the other.
  return (
    grain.MapDataset.range(len(windows))
    .shuffle(seed=spread)
    .repeat(None)
    .batch(batch_size)
    .map(windows.__getitems__)
  )


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
