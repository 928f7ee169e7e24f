"""What a directory is to hold: as asked for, and as it is cut into files."""

import dataclasses
import hashlib
import itertools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from train import errors, storage
from train.data import source as source_lib
from train.data import stats as stats_lib
from train.data import tokenizer as tokenizer_lib

NAME = 'prepared'
"""Of the TFDS dataset."""

_PLAN = 'plan.json'
_FILE_BYTES = 2**28
_UNKNOWN = 'unknown'


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is asked for; two that are equal give the same bytes.

  Whether bad documents are left out is no part of it: where there are none it
  changes nothing.
  """

  format: int
  layout: str
  sequence_length: int
  validation_fraction: float
  tokenizer: str
  """Its hash, or how many tokens to train one of."""
  text: str
  """Hash of the source's listing."""

  def digest(self) -> str:
    """Identifies it: a hash."""
    return _hash(dataclasses.asdict(self))


def plan(
  source: source_lib.Source,
  tokenizer: tokenizer_lib.Tokenizer | int,
  request: source_lib.Request,
) -> Plan:
  """Returns what is asked for.

  Raises:
    UserError: the source cannot be listed.
  """
  return Plan(
    format=stats_lib.FORMAT,
    layout=request.layout,
    sequence_length=request.sequence_length,
    validation_fraction=request.validation_fraction,
    tokenizer=(
      f'{tokenizer} tokens, of this text'
      if isinstance(tokenizer, int)
      else tokenizer.digest()
    ),
    text=_hash(source.listing()),
  )


def completed(
  out: pathlib.Path, wanted: Plan, skip_bad: bool
) -> stats_lib.Stats | None:
  """Returns what a directory holds, if that is just what is wanted.

  Args:
    out: The directory; it may not be there.
    wanted: What is asked for.
    skip_bad: Whether bad documents may have been left out.

  Raises:
    UserError: it holds something else.
  """
  path = out / stats_lib.FILE
  try:
    stats = stats_lib.Stats.from_json(path.read_text('utf-8'))
  except FileNotFoundError:
    return None
  except (OSError, ValueError) as error:
    raise errors.UserError(
      f'cannot read {path} ({error}): name another directory, or remove this'
    ) from error
  if stats.request != wanted.digest():
    given = ' ' not in wanted.tokenizer
    found = Plan(
      format=stats.format,
      layout=stats.layout,
      sequence_length=stats.sequence_length,
      validation_fraction=stats.validation_fraction,
      # How large a vocabulary was asked for is not known any more.
      tokenizer=stats.tokenizer_hash if given else wanted.tokenizer,
      text='' if given else _UNKNOWN,
    )
    raise errors.UserError(f'{out} was prepared {_difference(found, wanted)}')
  if stats.skipped and not skip_bad:
    raise errors.UserError(
      f'{out} was prepared without {sum(stats.skipped.values()):,} bad'
      ' documents: say again that they are to be left out, or name another'
      ' directory'
    )
  return stats


def begun(work: pathlib.Path, wanted: Plan) -> bool:
  """Whether a directory holds the beginning of what is wanted.

  Raises:
    UserError: it holds that of something else.
  """
  path = work / _PLAN
  try:
    found = Plan(**json.loads(path.read_text('utf-8')))
  except FileNotFoundError:
    return False
  except (OSError, ValueError, TypeError) as error:
    raise errors.UserError(
      f'cannot read {path} ({error}): remove {work.parent} and begin anew'
    ) from error
  if found != wanted:
    raise errors.UserError(
      f'{work.parent} was begun {_difference(found, wanted)}'
    )
  return True


def begin(work: pathlib.Path, wanted: Plan) -> None:
  """Writes down what is wanted."""
  text = json.dumps(dataclasses.asdict(wanted), indent=2) + '\n'
  storage.write_atomically(work / _PLAN, text)


def _difference(found: Plan, wanted: Plan) -> str:
  for field, what in (
    ('format', 'by another version of this program'),
    ('layout', 'in the layout {}, not {}'),
    ('sequence_length', 'for windows of {} tokens, not {}'),
    ('validation_fraction', 'with {} of the documents held out, not {}'),
    ('tokenizer', 'with another tokenizer'),
    ('text', 'from other text'),
  ):
    ours, theirs = getattr(wanted, field), getattr(found, field)
    if ours != theirs:
      difference = what.format(theirs, ours)
      if theirs == _UNKNOWN:
        difference += ' or with another tokenizer'
      return f'{difference}: name another directory, or remove this one'
  raise ValueError('they are the same')


def _hash(value: Any) -> str:
  return hashlib.sha256(json.dumps(value).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Shard:
  """A file of records: some rows of a split."""

  split: str
  number: int
  of: int
  start: int
  """The first row."""
  stop: int
  """The row after the last."""
  size: int
  """Bytes of its records, for the progress."""

  @property
  def name(self) -> str:
    """Of the file, as TFDS has it."""
    ending = f'{self.number:05d}-of-{self.of:05d}'
    return f'{NAME}-{self.split}.array_record-{ending}'


def shards(split: str, rows: int, record_size: int) -> list[Shard]:
  """Cuts a split's rows into files of about 256 MB."""
  most = max(1, _FILE_BYTES // record_size)
  count = -(-rows // most)
  bounds = [min(i * most, rows) for i in range(count + 1)]
  return [
    Shard(split, i, count, start, stop, (stop - start) * record_size)
    for i, (start, stop) in enumerate(itertools.pairwise(bounds))
  ]


def source_hash(digests: Sequence[str]) -> str:
  """Returns the hash of a source, from those of its parts."""
  return _hash(list(digests))
