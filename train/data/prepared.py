"""What `python -m train prepare` wrote, read again: windows at random."""

import functools
import json
import logging
import pathlib
import resource
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from train import errors
from train.data import layouts, local_file, vocabulary
from train.data import stats as stats_lib
from train.data import tokenizer as tokenizer_lib

_AGAIN = 'run "python -m train prepare" again'
_DAMAGED = f'bring it back from a copy, or remove the directory and {_AGAIN}'


def _is_news(record: logging.LogRecord) -> bool:
  """Whether a line of array_record's is of use.

  It asks for groups of one record, file by file; `prepare` has a reason for
  larger ones, in `write_records`.
  """
  return 'group size' not in record.getMessage()


logging.getLogger('absl').addFilter(_is_news)


class DamagedError(errors.UserError):
  """A file is missing, or is not as it was written."""


class Prepared:
  """A directory of records, checked as far as can be without reading them.

  Args:
    directory: As `python -m train prepare --out` had it.
    option: Where the user named it, for errors.

  Raises:
    DamagedError: one of its files is missing or damaged.
    UserError: it is not there, not whole, or of something else.
  """

  stats: stats_lib.Stats
  """What is in it."""

  def __init__(
    self, directory: str | pathlib.Path, option: str = '--data.prepared'
  ):
    self.directory = pathlib.Path(directory).expanduser()
    local_file.check_name(self.directory, option)
    self._option = option
    self.stats = self._read_stats()
    self._check_files()
    self._builder = self._open()

  @functools.cached_property
  def tokenizer(self) -> tokenizer_lib.Tokenizer:
    """What made the tokens.

    Raises:
      DamagedError: it is not the one.
      UserError: its library is not installed.
    """
    path = self.directory / self.stats.tokenizer
    try:
      found = tokenizer_lib.from_content(
        self.stats.tokenizer, path.read_bytes()
      )
    except FileNotFoundError as error:
      raise self._missing(path.name) from error
    except (OSError, KeyError, vocabulary.NotATokenizerError) as error:
      raise self._damaged(path.name, error) from error
    if found.digest() != self.stats.tokenizer_hash:
      raise self._damaged(
        path.name,
        'it is not the one that made the tokens, or an older version of this'
        ' program gave other ids to unknown text',
      )
    return found

  def windows(self, split: str) -> 'Windows':
    """Returns the windows of 'train' or 'validation'."""
    data_source = self._builder.as_data_source(split)
    info = self._builder.info.splits[split]
    return Windows(
      self.stats.layout,
      self.stats.sequence_length,
      data_source,
      np.cumsum(info.shard_lengths),
      [pathlib.Path(path) for path in info.filepaths],
    )

  def _error(self, message: str) -> errors.UserError:
    return errors.UserError(f'{self._option} {self.directory}: {message}')

  def _damaged(self, name: str, why: Any) -> DamagedError:
    message = f'{name} is damaged ({_line(why)}): {_DAMAGED}'
    return DamagedError(f'{self._option} {self.directory}: {message}')

  def _missing(self, name: str) -> DamagedError:
    message = f'{name} is missing: {_DAMAGED}'
    return DamagedError(f'{self._option} {self.directory}: {message}')

  def _read_stats(self) -> stats_lib.Stats:
    path = self.directory / stats_lib.FILE
    try:
      text = path.read_text('utf-8')
    except FileNotFoundError as error:
      raise self._no_stats() from error
    except NotADirectoryError as error:
      raise self._error('not a directory') from error
    except OSError as error:
      raise self._error(f'cannot be read ({error.strerror})') from error
    except UnicodeDecodeError as error:
      raise self._damaged(stats_lib.FILE, error) from error
    try:
      return stats_lib.Stats.from_json(text)
    except json.JSONDecodeError as error:
      raise self._damaged(stats_lib.FILE, error) from error
    except ValueError as error:
      raise self._error(
        f'{stats_lib.FILE}: {_line(error)}: prepare the text again, into'
        ' another directory'
      ) from error

  def _no_stats(self) -> errors.UserError:
    if not self.directory.exists():
      return self._error(
        'no such directory: make it with "python -m train prepare"'
      )
    records = self.directory.glob('prepared-*.array_record-*')
    if (self.directory / '.work').exists() or any(records):
      return self._error(
        f'"python -m train prepare" was cut off there: {_AGAIN}, the same'
        ' command goes on'
      )
    return self._error(
      'not what "python -m train prepare" writes: there is no'
      f' {stats_lib.FILE} in it'
    )

  def _check_files(self) -> None:
    for name, size in self.stats.files.items():
      path = self.directory / name
      try:
        found = path.stat().st_size
      except FileNotFoundError as error:
        raise self._missing(name) from error
      except OSError as error:
        raise self._error(
          f'{name} cannot be read ({error.strerror})'
        ) from error
      if found != size:
        raise self._damaged(name, f'it has {found:,} bytes instead of {size:,}')

  def _open(self) -> tfds.core.DatasetBuilder:
    """Opens it as TFDS does, which must find what stats.json says."""
    for name in ('dataset_info.json', 'features.json'):
      if not (self.directory / name).exists():
        raise self._missing(name)
    name = 'dataset_info.json or features.json'
    try:
      builder = tfds.builder_from_directory(self.directory)
      features = {
        key: (tuple(feature.shape), np.dtype(feature.np_dtype))
        for key, feature in builder.info.features.items()
      }
      counts = {
        split: (info.num_examples, [pathlib.Path(p) for p in info.filepaths])
        for split, info in builder.info.splits.items()
      }
    except Exception as error:  # Of JSON, of protobuf, of TFDS: many kinds.
      raise self._damaged(name, error) from error
    wanted = layouts.features(
      self.stats.layout,
      self.stats.sequence_length,
      layouts.token_dtype(self.stats.padded_vocab_size),
    )
    files = sorted(path.name for _, paths in counts.values() for path in paths)
    if (
      features != wanted
      or {split: count for split, (count, _) in counts.items()}
      != self.stats.windows
      or files != sorted(self.stats.files)
    ):
      raise self._damaged(name, f'it says other than {stats_lib.FILE}')
    _allow_open_files(len(files))
    return builder


class Windows:
  """The records of a split, read by number, many at once.

  Several threads can read at a time.

  Args:
    layout: One of `layouts.LAYOUTS`.
    length: T.
    data_source: Their arrays, as `as_data_source` of TFDS gives them.
    ends: The number of the record after the last of each file.
    paths: The files.
  """

  def __init__(
    self,
    layout: str,
    length: int,
    data_source: Any,
    ends: np.ndarray,
    paths: Sequence[pathlib.Path],
  ):
    self.layout = layout
    self.length = length
    self._data_source = data_source
    self._ends = ends
    self._paths = paths

  def __len__(self) -> int:
    return len(self._data_source)

  @property
  def starts(self) -> int:
    """Places at which `at` can begin: (W - 1) * T + 1, of a stream."""
    return max(0, (len(self) - 1) * self.length + 1)

  def __getitems__(
    self, indices: Sequence[int] | np.ndarray
  ) -> dict[str, np.ndarray]:
    """Reads records, in one go.

    Args:
      indices: Of n records, at least one, in any order.

    Returns:
      Arrays as they are stored, (n, ...); see `layouts.features`.

    Raises:
      UserError: a file is damaged, which is told by checksums.
    """
    numbers = np.asarray(indices, np.int64)
    if not ((numbers >= 0) & (numbers < len(self))).all():
      raise IndexError(f'there are {len(self):,} windows')
    rows = self._read(numbers.tolist())
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

  def at(self, starts: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
    """Reads windows of a stream that begin at any of its tokens.

    Window k of `__getitems__` is the one at k * T.

    Args:
      starts: (n,), each in [0, `starts`).

    Returns:
      `tokens` (n, T + 1), as they are stored.

    Raises:
      UserError: as `__getitems__`.
    """
    start = np.asarray(starts, np.int64)
    if not ((start >= 0) & (start < self.starts)).all():
      raise IndexError(f'windows begin at {self.starts:,} places')
    record, offset = np.divmod(start, self.length)
    # One that begins with its record needs no second one.
    pairs = np.stack([record, record + (offset > 0)])
    needed, place = np.unique(pairs, return_inverse=True)
    tokens = self.__getitems__(needed)['tokens']
    first, second = place.reshape(pairs.shape)
    # Neighbours share a token.
    both = np.concatenate([tokens[first], tokens[second, 1:]], axis=1)
    columns = offset[:, None] + np.arange(self.length + 1)
    return {'tokens': np.take_along_axis(both, columns, axis=1)}

  def _read(self, numbers: list[int]) -> list[dict[str, np.ndarray]]:
    try:
      return self._data_source.__getitems__(numbers)
    except Exception as error:  # Riegeli's, protobuf's, TFDS's: many kinds.
      raise self._unreadable(numbers, error) from error

  def _unreadable(
    self, numbers: list[int], error: Exception
  ) -> errors.UserError:
    """Finds the file at fault: the error does not always name it."""
    for number in numbers:
      if failure := _failure(self._data_source.__getitems__, [number]):
        file = int(np.searchsorted(self._ends, number, side='right'))
        return errors.UserError(
          f'{self._paths[file]} cannot be read ({_line(failure)}); if it is'
          f' damaged, {_DAMAGED}'
        )
    # Once only: the disk's or the network's.
    return errors.UserError(
      f'{self._paths[0].parent} cannot be read ({_line(error)})'
    )


def open_all(
  directories: Sequence[str | pathlib.Path], option: str = '--data.prepared'
) -> list[Prepared]:
  """Opens directories that are to be mixed.

  With one held-out fraction, a text has the same side in all of them. With two,
  one directory would train on texts that the other scores.

  Raises:
    UserError: as `Prepared`; or they do not fit together.
  """
  opened = [Prepared(directory, option) for directory in directories]
  first = opened[0]
  for other in opened[1:]:
    for name, facts in (
      ('sequence length', [p.stats.sequence_length for p in (first, other)]),
      ('layout', [layouts.stored(p.stats.layout) for p in (first, other)]),
      ('tokenizer', [p.stats.tokenizer_hash for p in (first, other)]),
      (
        'the same text could be trained on and held out, with'
        ' --validation-fraction',
        [p.stats.validation_fraction for p in (first, other)],
      ),
    ):
      if facts[0] != facts[1]:
        here, there = (str(fact)[:12] for fact in facts)
        raise errors.UserError(
          f'{option}: {first.directory} and {other.directory} cannot be mixed:'
          f' {name} {here} and {there}; prepare one of them again like the'
          ' other'
        )
  return opened


def _allow_open_files(count: int) -> None:
  """Files of records stay open: of many, more than a shell may allow."""
  allowed, most = resource.getrlimit(resource.RLIMIT_NOFILE)
  wanted = allowed + count
  if most != resource.RLIM_INFINITY:
    wanted = min(wanted, most)
  if allowed not in (resource.RLIM_INFINITY, wanted):
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


def _failure(read: Callable[[list[int]], Any], numbers: list[int]) -> Any:
  """What goes wrong in a read; None if nothing does."""
  try:
    read(numbers)
  except Exception as error:  # As in `_read`.
    return error
  return None


def _line(why: Any) -> str:
  """The first line of an error, without what Riegeli says of where it was."""
  lines = str(why).strip().splitlines() or [type(why).__name__]
  return lines[0].split('; ')[0]
