"""Cells, the runs of an experiment, and the store that their results stay in.

A cell is one arm on one seed. What identifies it is what its numbers follow
from: configuration, seed and text; not where the text lies, how the work is
laid out, or when checkpoints are saved. So a store serves many comparisons,
and a cell that one of them has finished is finished for all.
"""

import dataclasses
import hashlib
import json
import pathlib
from typing import Any

from train import config as config_lib
from train import storage
from train.config import Config
from train.errors import UserError

DONE, DIVERGED = 'done', 'diverged'

# Of the configuration: what changes nothing, or nothing but rounding.
_FREE = ('accumulate', 'deterministic', 'keep', 'mesh', 'save_every')
# Of the data: the rest is in the hash of the text, vocabulary and split.
_OF_DATA = ('batch_size', 'layout', 'sequence_length', 'validation_tokens')
# Of a record: what is read of it, beside the loss.
_NEEDED = ('source_hash', 'validation', 'train', 'parameters', 'flops',
           'seconds', 'device', 'versions')  # fmt: skip

Record = dict[str, Any]
"""What is kept of a cell; docs/experiments.md has its fields."""


@dataclasses.dataclass(frozen=True)
class Cell:
  """One run of an experiment."""

  arm: str
  """The arm's name."""
  seed: int
  """Of parameters and data; the config's."""
  config: Config
  """Resolved: `train.loop.resolve`."""
  source_hash: str
  """Of its text, vocabulary and split."""

  @property
  def key(self) -> str:
    """Identifies the numbers that it gives."""
    return key(config_lib.to_dict(self.config), self.source_hash)

  @property
  def label(self) -> str:
    """For people."""
    return f'{self.arm} seed {self.seed}'


def key(config: dict[str, Any], source_hash: str) -> str:
  """Identifies a cell.

  Args:
    config: As of `train.config.to_dict`, of this version or an older one.
    source_hash: Of its text, vocabulary and split.

  Returns:
    16 hexadecimal digits.
  """
  config = config_lib.with_defaults(config)
  own = {name: value for name, value in config.items() if name not in _FREE}
  own['data'] = {name: config['data'][name] for name in _OF_DATA}
  text = json.dumps([own, source_hash], sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


class Store:
  """A directory of one small JSON file a cell, fit to be committed.

  Args:
    directory: Made when the first record is put.

  Raises:
    UserError: a file in it is not a cell's.
  """

  def __init__(self, directory: pathlib.Path):
    self.directory = directory
    self._records: dict[str, Record] = {}
    self._older: dict[str, Record] = {}  # By a key of when it was run.
    for path in sorted(directory.glob('*.json')):
      record = _read(path)
      # By what it says before its name: fields may be new since.
      self._older[path.stem] = record
      self._records[key(record['config'], record['source_hash'])] = record

  def get(self, key: str) -> Record | None:
    """Returns the record of a cell; None where it has not been run.

    Args:
      key: Of this version, or the one it was put by.
    """
    return self._records.get(key) or self._older.get(key)

  def put(self, key: str, record: Record) -> None:
    """Keeps a record.

    Raises:
      UserError: it cannot be written.
    """
    self._records[key] = record
    path = self.directory / f'{key}.json'
    with storage.one_line_errors(path):
      self.directory.mkdir(parents=True, exist_ok=True)
      storage.write_atomically(path, _text(record))

  def records(self) -> list[Record]:
    """All of them, in the order of their keys."""
    return [self._records[key] for key in sorted(self._records)]


def _read(path: pathlib.Path) -> Record:
  try:
    record = json.loads(path.read_text())
    config_lib.from_dict(record['config'])
    if record['status'] not in (DONE, DIVERGED):
      raise ValueError(f'the status is {record["status"]!r}')
    for name in _NEEDED:
      record[name]
    if record['status'] == DONE:
      float(record['validation_loss'])
  except (OSError, ValueError, LookupError, TypeError) as error:
    raise UserError(
      f'{path.parent} holds {path.name}, which is no record of a cell '
      f'({_reason(error)}): remove it, or name another --store'
    ) from error
  return record


def _reason(error: Exception) -> str:
  if isinstance(error, LookupError):
    return f'it has no {error.args[0]!r}'
  return str(error).partition('\n')[0] or type(error).__name__


def _text(record: Record) -> str:
  """JSON with a field a line, so that a difference can be read."""
  lines = [
    f'{json.dumps(name)}: {json.dumps(value, sort_keys=True)}'
    for name, value in record.items()
  ]
  return '{\n' + ',\n'.join(lines) + '\n}\n'
