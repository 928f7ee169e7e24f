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

# Fields that do not change the numbers, or only their rounding; or that the
# hash of text, tokenizer and split covers.
_FREE = {
  'accumulate', 'data.corpus', 'data.files', 'data.prepared', 'data.repeat',
  'data.skip_bad', 'data.text_field', 'data.tokenizer',
  'data.validation_fraction', 'data.vocab_size', 'deterministic', 'keep',
  'mesh', 'save_every',
}  # fmt: skip
# Fields that every key hashes. The list is frozen: each key of the committed
# evidence depends on it. A key hashes any later field where it is not at its
# default, which is how runs without that field were trained.
_ALWAYS = {
  'data.batch_size', 'data.layout', 'data.sequence_length',
  'data.validation_tokens', 'eval_every', 'guard.bad_steps', 'guard.spike',
  'model.balance_loss', 'model.d_expert', 'model.d_ff', 'model.d_model',
  'model.d_shared', 'model.dense_layers', 'model.dtype',
  'model.experts_per_token', 'model.family', 'model.init_std',
  'model.n_experts', 'model.n_heads', 'model.n_kv_heads', 'model.n_layers',
  'model.norm_eps', 'model.qkv_bias', 'model.remat', 'model.renormalize',
  'model.rope_scaling.factor', 'model.rope_scaling.high_freq_factor',
  'model.rope_scaling.low_freq_factor', 'model.rope_scaling.original_length',
  'model.rope_theta', 'model.router_z_loss', 'model.scan_layers',
  'model.sparse_step', 'model.tie_embeddings', 'model.vocab_size',
  'model.z_loss', 'optimizer.b1', 'optimizer.b2', 'optimizer.blockwise',
  'optimizer.clip_norm', 'optimizer.eps', 'optimizer.final_lr_ratio',
  'optimizer.learning_rate', 'optimizer.match_norm', 'optimizer.mu_dtype',
  'optimizer.name', 'optimizer.per_head', 'optimizer.power',
  'optimizer.power_eps', 'optimizer.schedule', 'optimizer.warmup_steps',
  'optimizer.weight_decay', 'seed', 'steps',
}  # fmt: skip
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
  own = _keyed(config, config_lib.defaults(config['model']['family']))
  text = json.dumps([own, source_hash], sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:16]


def _keyed(
  values: dict[str, Any], default: dict[str, Any], prefix: str = ''
) -> dict[str, Any]:
  """The fields that a key hashes."""
  own = {}
  for name, value in values.items():
    path = prefix + name
    if path in _FREE:
      continue
    if isinstance(value, dict):
      if inner := _keyed(value, default[name], f'{path}.'):
        own[name] = inner
    elif path in _ALWAYS or value != default[name]:
      own[name] = value
  return own


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
      f'({_reason(error)}): move it to another folder, or name another --store'
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
