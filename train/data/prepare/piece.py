"""What a part of a source becomes in between: files of plain numbers.

A piece is a directory of raw arrays, one a file, little-endian, and a summary,
which is written last.
"""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import BinaryIO

import numpy as np

from train.data import layouts

_SUMMARY = 'piece.json'


@dataclasses.dataclass
class Summary:
  """What a piece holds."""

  digest: str = ''
  """Of the part of the source."""
  units: int = 0
  """Tokens of a contiguous layout's stream; rows of another."""
  targets: int = 0
  """In its rows; of a contiguous layout's, that is known of all together."""
  documents: dict[str, int] = dataclasses.field(default_factory=dict)
  """By split."""
  tokens: dict[str, int] = dataclasses.field(default_factory=dict)
  """By split: with an end-of-text after each document."""
  skipped: dict[str, int] = dataclasses.field(default_factory=dict)
  """Documents left out, by kind."""
  problems: list[str] = dataclasses.field(default_factory=list)
  """What was wrong with the first of them."""

  def write(self, piece: pathlib.Path) -> None:
    """Completes a piece."""
    text = json.dumps(dataclasses.asdict(self), indent=2)
    (piece / _SUMMARY).write_text(text, 'utf-8')


def summary(piece: pathlib.Path) -> Summary:
  """Returns what a complete piece holds."""
  return Summary(**json.loads((piece / _SUMMARY).read_text('utf-8')))


class Columns:
  """Appends arrays to files of a piece, one for each name.

  Args:
    piece: The directory.
  """

  def __init__(self, piece: pathlib.Path):
    self._piece = piece
    self._files: dict[str, BinaryIO] = {}

  def __enter__(self) -> 'Columns':
    return self

  def __exit__(self, *unused) -> None:
    for file in self._files.values():
      file.close()

  def append(self, arrays: Mapping[str, np.ndarray]) -> None:
    """Adds to each file; the dtype of a name must stay the same."""
    for name, array in arrays.items():
      if name not in self._files:
        self._files[name] = (self._piece / name).open('wb')
      little = array.dtype.newbyteorder('<')
      self._files[name].write(np.ascontiguousarray(array, little).data)


def column(
  piece: pathlib.Path,
  name: str,
  dtype: np.typing.DTypeLike,
  start: int = 0,
  count: int = -1,
) -> np.ndarray:
  """Reads `count` numbers of a file from number `start` on; -1: to its end.

  A file that nothing was appended to is not there, and empty.
  """
  kind = np.dtype(dtype).newbyteorder('<')
  path = piece / name
  if not path.exists():
    return np.zeros(0, kind)
  return np.fromfile(path, kind, count, offset=start * kind.itemsize)


class Rows:
  """The rows of some pieces, one after the other, whatever the layout.

  Args:
    pieces: With the units that each holds.
    layout: One of `layouts.LAYOUTS`.
    sequence_length: T.
    dtype: Of the tokens.
  """

  def __init__(
    self,
    pieces: Mapping[pathlib.Path, int],
    layout: str,
    sequence_length: int,
    dtype: np.dtype,
  ):
    self._pieces = tuple(pieces)
    self._ends = np.cumsum([0, *pieces.values()])
    self._contiguous = layout in layouts.CONTIGUOUS
    self._length = sequence_length
    self._features = layouts.features(layout, sequence_length, dtype)

  def __len__(self) -> int:
    units = int(self._ends[-1])
    if self._contiguous:
      return max(0, units - 1) // self._length
    return units

  def read(self, start: int, stop: int) -> dict[str, np.ndarray]:
    """Returns rows [start, stop): arrays (stop - start, ...)."""
    if not self._contiguous:
      return {name: self._units(name, start, stop) for name in self._features}
    T = self._length
    stream = self._units('tokens', start * T, stop * T + 1)
    # Neighbours share a token.
    windows = np.lib.stride_tricks.sliding_window_view(stream, T + 1)[::T]
    return {'tokens': windows}

  def _units(self, name: str, start: int, stop: int) -> np.ndarray:
    shape, dtype = self._features[name]
    row = () if self._contiguous else shape
    size = int(np.prod(row, dtype=np.int64))
    found = []
    first = int(np.searchsorted(self._ends, start, 'right')) - 1
    for i in range(first, len(self._pieces)):
      begin = max(start, int(self._ends[i]))
      end = min(stop, int(self._ends[i + 1]))
      if begin >= stop:
        break
      if end > begin:
        offset = (begin - int(self._ends[i])) * size
        found.append(
          column(self._pieces[i], name, dtype, offset, (end - begin) * size)
        )
    return np.concatenate(found).reshape(-1, *row)
