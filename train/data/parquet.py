"""Documents from one column of Parquet files."""

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from train import errors
from train.data import checks, compressed, local_file, source

PART = 2**26
"""Bytes of a part, not compressed, unless it is one row group."""
_ROWS = 256
_MAGIC = b'PAR1'


@dataclasses.dataclass(frozen=True)
class Parquet:
  """Neighbouring row groups; one text a row."""

  file: local_file.LocalFile
  column: str
  groups: tuple[int, ...]
  """Their numbers; none where the file has no readable footer."""
  first_row: int
  """Rows of the file before them."""
  size: int
  """Bytes of them, not compressed."""

  @property
  def name(self) -> str:
    """The file, and which of its row groups."""
    if not self.groups:
      return str(self.file.path)
    first, last = self.groups[0], self.groups[-1]
    return f'{self.file.path}, row groups {first} to {last}'

  def digest(self) -> str:
    """Returns a hash of the file, the row groups and how they are read.

    Of the whole file: pyarrow (26.0) ends the process, and raises nothing,
    where it is asked for the place of a column in some damaged files.

    Raises:
      UserError: the file cannot be read.
    """
    description = ['parquet', self.column, self.groups, _sha256(self.file)]
    return hashlib.sha256(json.dumps(description).encode()).hexdigest()

  def read(self, problems: source.Problems) -> Iterator[str]:
    """Reads the texts, row by row.

    Raises:
      UserError: the file cannot be read, or as `problems.found`.
    """
    with self.file.open() as file:
      row = self.first_row
      place = lambda: f'{self.file.path}, row {row}'
      try:
        for raw in self._values(file):
          row += 1
          text = self._text(raw, place, problems)
          if text is not None:
            yield text
      except compressed.DamagedError as error:
        after = f', after row {row}' if row else ''
        problems.found('truncated', f'{self.file.path} {error}{after}')

  def _text(
    self, raw: bytes | None, place: checks.Place, problems: source.Problems
  ) -> str | None:
    if raw is None:
      problems.found('field', f'{place()}: {self.column!r} is null')
      return None
    text = checks.decoded(raw, place, problems)
    return None if text is None else checks.document(text, place, problems)

  def _values(self, opened: BinaryIO) -> Iterator[bytes | None]:
    if not self.groups:
      if opened.read(len(_MAGIC)) != _MAGIC:
        raise compressed.DamagedError('is not a Parquet file')
      raise compressed.DamagedError('is damaged, or ends in the middle')
    with _open(self.file, opened) as file:
      batches = file.iter_batches(
        _ROWS, self.groups, [self.column], use_threads=False
      )
      while True:
        with _damage(self.file):
          batch = next(batches, None)
          if batch is None:
            return
          # As bytes: of strings, one bad byte would spoil the batch.
          values = batch.column(0).cast(pa.large_binary()).to_pylist()
        yield from values


def parts(
  file: local_file.LocalFile, column: str, option: str
) -> Iterator[Parquet]:
  """Joins neighbouring row groups to parts.

  Args:
    file: The file; where it is damaged, one part tells so when it is read.
    column: The name of the column with the text.
    option: The name of the option that sets it.

  Raises:
    UserError: the file cannot be read, or has no such column of text.
  """
  try:
    with file.open() as opened, _open(file, opened) as parquet:
      _check_column(file, parquet.schema_arrow, column, option)
      groups = _groups(file, parquet.metadata)
  except compressed.DamagedError:
    yield Parquet(file, column, (), 0, file.size)
    return
  first = row = rows = size = 0
  for number, (group_rows, group_size) in enumerate(groups):
    if number > first and size + group_size > PART:
      yield Parquet(file, column, tuple(range(first, number)), row, size)
      first, row, rows, size = number, row + rows, 0, 0
    rows += group_rows
    size += group_size
  if groups:
    yield Parquet(file, column, tuple(range(first, len(groups))), row, size)


def _groups(
  file: local_file.LocalFile, metadata: pq.FileMetaData
) -> list[tuple[int, int]]:
  """Returns the rows and the bytes of every row group."""
  with _damage(file):
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    return [(group.num_rows, max(0, group.total_byte_size)) for group in groups]


@functools.lru_cache(maxsize=4)
def _sha256(file: local_file.LocalFile) -> str:
  """Returns the hash of a file, once for all the parts that a worker reads."""
  return file.sha256()


def _check_column(
  file: local_file.LocalFile, schema: pa.Schema, column: str, option: str
) -> None:
  if column not in schema.names:
    names = ', '.join(repr(name)[1:-1][:40] for name in schema.names[:8])
    raise errors.UserError(
      f'{file.path} has no column {column!r} (it has: {names or "none"}); name'
      f' the one with the text with {option}'
    )
  kind = schema.field(column).type
  value = kind.value_type if pa.types.is_dictionary(kind) else kind
  tests = ('string', 'large_string', 'string_view', 'binary', 'large_binary')
  if not any(getattr(pa.types, f'is_{test}')(value) for test in tests):
    raise errors.UserError(
      f'{file.path}: the column {column!r} is not text, but {kind}; name the'
      f' one with the text with {option}'
    )


@contextlib.contextmanager
def _open(
  file: local_file.LocalFile, opened: BinaryIO
) -> Iterator[pq.ParquetFile]:
  with _damage(file):
    # Without pre_buffer it holds a page, not the row group.
    parquet = pq.ParquetFile(opened, pre_buffer=False)
  yield parquet


@contextlib.contextmanager
def _damage(file: local_file.LocalFile) -> Iterator[None]:
  """Tells what pyarrow says of damage from what the machine could not do.

  Raises:
    DamagedError: the file is damaged.
    UserError: there is not enough memory, which damage may have asked for.
    OSError: with an errno, as the file's.
  """
  try:
    yield
  except MemoryError as error:  # Also pyarrow's.
    raise errors.UserError(compressed.too_much_memory(file.path)) from error
  except (OSError, ValueError, pa.ArrowException) as error:
    if getattr(error, 'errno', None) is not None:
      raise
    why = str(error).strip().split('\n')[0][:200]
    raise compressed.DamagedError(f'is damaged ({why})') from error
