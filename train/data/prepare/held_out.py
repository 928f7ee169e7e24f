"""Held-out documents of all parts: in the order of their hashes, laid out."""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np

from train.data import layouts, source
from train.data.prepare import files, piece, tokenize_part

NAME = 'held-out'
"""Of the piece."""


def order(pieces: Sequence[pathlib.Path]) -> np.ndarray:
  """Returns the held-out documents' order: numbers (D,), over all pieces.

  By the sha256 of their text, equal ones in the order of the source: so the
  first of them are a fair sample.
  """
  hashes = np.concatenate(
    [piece.column(path, tokenize_part.HASHES, np.uint8) for path in pieces]
  ).reshape(-1, 32)
  words = hashes.view('>u8')
  return np.lexsort(words.T[::-1])


@dataclasses.dataclass(frozen=True)
class LayOut:
  """Writes the piece of the held-out documents, unless that is there."""

  pieces: tuple[pathlib.Path, ...]
  request: source.Request
  end: int
  dtype: np.dtype
  work: pathlib.Path

  def __call__(self) -> pathlib.Path:
    """Returns the piece."""
    path = self.work / NAME
    if not path.is_dir():
      with files.writing(self.work.parent), files.new_directory(path) as new:
        self._write(new)
    return path

  def _write(self, path: pathlib.Path) -> None:
    chosen = order(self.pieces)
    tokens = _Gather(
      self.pieces, tokenize_part.LENGTHS, tokenize_part.HELD_OUT, self.dtype
    )
    sketches = _Gather(
      self.pieces,
      f'validation_{tokenize_part.COUNTS}',
      f'validation_{tokenize_part.SKETCHES}',
      np.dtype(np.uint64),
    )
    summary = piece.Summary()
    with piece.Columns(path) as columns:
      if self.request.layout in layouts.CONTIGUOUS:
        columns.append({'tokens': np.asarray([self.end], self.dtype)})
        summary.units += 1
      for documents in tokens.groups(chosen):
        columns.append(
          tokenize_part.lay_out(
            self.request, *tokens.read(documents), self.end, summary
          )
        )
        values, counts = sketches.read(documents)
        columns.append(
          {
            f'validation_{tokenize_part.SKETCHES}': values,
            f'validation_{tokenize_part.COUNTS}': counts,
          }
        )
    summary.write(path)


class _Gather:
  """Numbers of some documents, out of files that hold those of all.

  Args:
    pieces: Where the files are; documents are numbered over all of them.
    counts: The file with how many numbers there are of each document.
    values: The file with the numbers.
    dtype: Of these.
  """

  def __init__(
    self,
    pieces: Sequence[pathlib.Path],
    counts: str,
    values: str,
    dtype: np.dtype,
  ):
    self._pieces = pieces
    self._values = values
    self._dtype = dtype
    found = [piece.column(path, counts, np.int64) for path in pieces]
    self._first = np.cumsum([0, *map(len, found)])
    self._counts = np.concatenate(found)
    self._starts = np.concatenate([np.cumsum(each) - each for each in found])

  def groups(self, documents: np.ndarray) -> Iterator[np.ndarray]:
    """Cuts them into what can be read at once."""
    first = total = 0
    for i, count in enumerate(self._counts[documents].tolist()):
      total += count
      if i + 1 - first == layouts.GROUP or total >= tokenize_part.GROUP_TOKENS:
        yield documents[first : i + 1]
        first, total = i + 1, 0
    yield documents[first:]

  def read(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns numbers (N,), those of one after another, and counts (D,)."""
    owners = np.searchsorted(self._first, documents, 'right') - 1
    found = [
      piece.column(
        self._pieces[owner],
        self._values,
        self._dtype,
        int(self._starts[document]),
        int(self._counts[document]),
      )
      for owner, document in zip(owners, documents, strict=True)
    ]
    return tokenize_part.joined(found, self._dtype)
