"""Between the steps: near-duplicates across the splits, a part at a time."""

import dataclasses
import functools
import json
import pathlib
from typing import Any

import numpy as np

from train import storage
from train.data import near_duplicates
from train.data.prepare import files, tokenize_part

SAMPLE = 2**18
"""Held-out documents that are looked at, at most: 0.2 GB in each process."""


@dataclasses.dataclass(frozen=True)
class Task:
  """A piece whose training documents are looked up."""

  piece: pathlib.Path
  size: int
  """Bytes of the part, for the progress."""


@dataclasses.dataclass(frozen=True)
class FindDuplicates:
  """Writes what a piece has in common with the held-out documents."""

  held_out: pathlib.Path
  """The piece of these."""

  def __call__(self, task: Task, count: tokenize_part.Count) -> None:
    """Raises: UserError: the disk cannot be written."""
    path = _path(task.piece)
    if not path.exists():
      matches = self._index.matches(tokenize_part.sketches(task.piece, 'train'))
      found = {
        'train_documents': matches.train_documents,
        'validation_documents': matches.validation_documents.tolist(),
        'examples': matches.examples,
      }
      with files.writing(task.piece.parent.parent):
        storage.write_atomically(path, json.dumps(found))
    count(0, task.size)

  @functools.cached_property
  def _index(self) -> near_duplicates.Index:
    """Made when it is first needed: once in a process."""
    return near_duplicates.Index(
      tokenize_part.sketches(self.held_out, 'validation', SAMPLE)
    )


def summary(documents: int, pieces: list[pathlib.Path]) -> dict[str, Any]:
  """Returns what stats.json says of the parts, and of how many held out.

  Args:
    documents: How many are held out; the first `SAMPLE` are looked at, which
      the order by hash makes a fair sample.
    pieces: All of the parts, done.
  """
  looked_at = min(documents, SAMPLE)
  found = near_duplicates.summary(looked_at, map(_read, pieces))
  return {'looked_at': looked_at, **found}


def _read(path: pathlib.Path) -> near_duplicates.Matches:
  found = json.loads(_path(path).read_text('utf-8'))
  return near_duplicates.Matches(
    train_documents=found['train_documents'],
    validation_documents=np.asarray(found['validation_documents'], np.int64),
    examples=[tuple(example) for example in found['examples']],
  )


def _path(path: pathlib.Path) -> pathlib.Path:
  return path.with_name(f'{path.name}.near-duplicates.json')
