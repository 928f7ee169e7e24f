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
      matches = _index(self.held_out).matches(
        tokenize_part.sketches(task.piece, 'train')
      )
      found = {
        'train_documents': matches.train_documents,
        'validation_documents': matches.validation_documents.tolist(),
        'examples': matches.examples,
      }
      with files.writing(task.piece.parent.parent):
        storage.write_atomically(path, json.dumps(found))
    count(0, task.size)


def summary(documents: int, pieces: list[pathlib.Path]) -> dict[str, Any]:
  """Returns what stats.json says, of held-out documents and all pieces."""
  return near_duplicates.summary(documents, map(_read, pieces))


def _read(path: pathlib.Path) -> near_duplicates.Matches:
  found = json.loads(_path(path).read_text('utf-8'))
  return near_duplicates.Matches(
    train_documents=found['train_documents'],
    validation_documents=np.asarray(found['validation_documents'], np.int64),
    examples=[tuple(example) for example in found['examples']],
  )


def _path(path: pathlib.Path) -> pathlib.Path:
  return path.with_name(f'{path.name}.near-duplicates.json')


@functools.lru_cache(1)
def _index(held_out: pathlib.Path) -> near_duplicates.Index:
  """Made once in a process."""
  return near_duplicates.Index(tokenize_part.sketches(held_out, 'validation'))
