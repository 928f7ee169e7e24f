"""Documents from JSON lines: one object a line, its text under one key."""

import dataclasses
import hashlib
import itertools
import json
import pathlib
import re
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from train import errors
from train.data import checks, compressed, local_file, source

PART = 2**26
"""Bytes of a part of a file that is not compressed, about."""
LONGEST = 8 * source.LARGEST
"""Bytes of a line; a longer one is passed over, and not kept in memory."""
# The first line of an array of objects, or of one object over several lines.
_NOT_LINES = re.compile(rb'(?:\xef\xbb\xbf)?\s*(\[\s*(\{.*)?|\{)\s*', re.DOTALL)


def parts(
  file: local_file.LocalFile, suffix: str, text_field: str, option: str
) -> Iterator['JsonLines']:
  """Cuts a file into parts that begin where a line does.

  Args:
    file: the file.
    suffix: as for `JsonLines.compression`; a compressed file is one part.
    text_field: the key of the text.
    option: the name of the option that sets it.

  Raises:
    UserError: the file cannot be read.
  """
  starts = [0] if suffix else _line_starts(file)
  for start, stop in itertools.pairwise([*starts, file.size]):
    yield JsonLines(file, suffix, start, stop, text_field, option)


def _line_starts(file: local_file.LocalFile) -> list[int]:
  """Returns the first beginning of a line in every `PART` bytes."""
  starts = [0]
  if file.size <= PART:
    return starts
  with file.open() as opened:
    while (position := (starts[-1] // PART + 1) * PART) < file.size:
      # A line that ends just before `position` begins there.
      position -= 1
      for block in local_file.blocks(opened, position, file.size):
        found = block.find(b'\n')
        position += len(block) if found < 0 else found + 1
        if found >= 0:
          break
      if position >= file.size:
        break
      starts.append(position)
  return starts


@dataclasses.dataclass(frozen=True)
class JsonLines:
  """The lines that begin in [start, stop)."""

  file: local_file.LocalFile
  compression: str
  """One of `compressed.SUFFIXES`, or ''."""
  start: int
  """Bytes, where lines begin; of a compressed file, all of them."""
  stop: int
  text_field: str
  """The key of the text."""
  option: str
  """The name of the option that sets it."""

  @property
  def name(self) -> str:
    """The file, and which of its bytes where they are not all."""
    if self.start == 0 and self.stop == self.file.size:
      return str(self.file.path)
    return f'{self.file.path}, bytes {self.start:,} to {self.stop:,}'

  @property
  def size(self) -> int:
    """Bytes to read."""
    return self.stop - self.start

  def digest(self) -> str:
    """Returns a hash of the bytes and of how they are read.

    Raises:
      UserError: the file cannot be read.
    """
    content = self.file.sha256(self.start, self.stop)
    description = ['json_lines', self.compression, self.text_field, content]
    return hashlib.sha256(json.dumps(description).encode()).hexdigest()

  def read(self, problems: source.Problems) -> Iterator[str]:
    """Reads the texts, line by line.

    Raises:
      UserError: the file cannot be read, or is JSON but not lines of it, or
        as `problems.found`.
    """
    with self.file.open() as file:
      yield from self._read(file, problems)

  def _read(self, file: BinaryIO, problems: source.Problems) -> Iterator[str]:
    path = self.file.path
    if self.compression:
      blocks = compressed.blocks(file, self.compression)
    else:
      blocks = local_file.blocks(file, self.start, self.stop)
    place = _Place(path, self.start)
    first = self.start == 0
    try:
      for place.line, raw in enumerate(lines(blocks), start=1):
        if raw is None:
          problems.found('giant', f'{place()} has more than {LONGEST:,} bytes')
        elif raw and not raw.isspace():
          if first and (found := _NOT_LINES.fullmatch(raw)):
            raise errors.UserError(_not_lines(path, found[1]))
          text = self._text(raw, place, problems)
          if text is not None:
            yield text
          first = False
    except compressed.DamagedError as error:
      # A compressed file is one part: the line is that of the whole file.
      after = f', after line {place.line}' if place.line else ''
      problems.found('truncated', f'{path} {error}{after}')

  def _text(
    self, raw: bytes, place: '_Place', problems: source.Problems
  ) -> str | None:
    line = checks.decoded(raw, place, problems, of_text_file=True)
    if line is None:
      return None
    if '\0' in line:
      hint = checks.encoding_hint(raw)
      problems.found(
        'encoding', f'{place()} is not text: it has NUL bytes{hint}'
      )
      return None
    try:
      record = json.loads(line)
    except (ValueError, RecursionError) as error:
      why = getattr(error, 'msg', 'not readable')
      problems.found(
        'json', f'{place()} is not JSON ({why}); each line must be one object'
      )
      return None
    if not isinstance(record, dict):
      problems.found('json', f'{place()} is not a JSON object')
      return None
    field = self.text_field
    if field not in record:
      problems.found(
        'field',
        f'{place()} has no field {field!r} (it has: {_names(record)}); name the'
        f' one with the text with {self.option}',
      )
      return None
    text = record[field]
    if not isinstance(text, str):
      problems.found('field', f'{place()}: the field {field!r} is not a string')
      return None
    return checks.document(text, place, problems)


class _Place:
  """A line, by its number in the whole file."""

  def __init__(self, path: pathlib.Path, start: int):
    self.line = 0
    self._path = path
    self._start = start
    self._before: int | None = None

  def __call__(self) -> str:
    if self._before is None:  # One pass, and only where something is wrong.
      with open(self._path, 'rb') as file:
        self._before = sum(
          block.count(b'\n')
          for block in local_file.blocks(file, 0, self._start)
        )
    return f'{self._path}, line {self._before + self.line}'


def _names(record: dict) -> str:
  """Returns the first keys of a record, for people."""
  keys = ', '.join(repr(key)[1:-1][:40] for key in sorted(record)[:8])
  return keys or 'none'


def _not_lines(path: pathlib.Path, raw: bytes) -> str:
  if raw.startswith(b'['):
    return (
      f'{path} is one JSON array, not one object a line: write it as lines,'
      " for instance with jq -c '.[]'"
    )
  return (
    f'{path} is a JSON object over several lines, not one object a line: write'
    ' it as lines, for instance with jq -c .'
  )


def lines(blocks: Iterable[bytes]) -> Iterator[bytes | None]:
  """Cuts bytes into lines, without their ends; None is a line too long.

  Of a line of more than `LONGEST` bytes no more than that is kept. Where
  `blocks` raises, what it gave of an unfinished line is lost.
  """
  kept: list[bytes] = []
  length = 0
  for block in blocks:
    *ends, rest = block.split(b'\n')
    for end in ends:
      if length + len(end) > LONGEST:
        yield None
      elif kept:
        yield b''.join((*kept, end))
      else:
        yield end
      kept, length = [], 0
    length += len(rest)
    if length > LONGEST:
      kept = []
    elif rest:
      kept.append(rest)
  if length > LONGEST:
    yield None
  elif length:
    yield b''.join(kept)
