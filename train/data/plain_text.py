"""Documents from .txt files."""

import codecs
import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from train.data import checks, compressed, local_file, source

MAX_CHARACTERS = 10_000
"""Longer files are cut, so that some of a single book can be held out."""
PART = 2**26
"""Bytes of the files of a part, at most, unless it is one file."""
PART_FILES = 4096


def cut(text: str, limit: int = MAX_CHARACTERS) -> list[str]:
  """Cuts a long text into pieces that joined give it back.

  Each piece but the last has between `limit / 2` and `limit` characters, and
  ends after the last blank line there, else line, else space, else anywhere.
  """
  pieces = []
  start = 0
  while len(text) - start > limit:
    stop = start + limit
    for separator in ('\n\n', '\n', ' '):
      found = text.rfind(separator, start + limit // 2, stop)
      if found >= 0:
        stop = found + len(separator)
        break
    pieces.append(text[start:stop])
    start = stop
  return [*pieces, text[start:]]


def parts(
  files: Iterable[tuple[local_file.LocalFile, str]],
) -> Iterator['PlainText']:
  """Joins neighbouring files to parts; a compressed one is a part alone.

  Args:
    files: with what they are compressed by, as for `PlainText.compression`.
  """
  run: list[local_file.LocalFile] = []
  size = 0
  for file, compression in files:
    full = size + file.size > PART or len(run) == PART_FILES
    if run and (full or compression):
      yield PlainText(tuple(run), '')
      run, size = [], 0
    if compression:
      yield PlainText((file,), compression)
    else:
      run.append(file)
      size += file.size
  if run:
    yield PlainText(tuple(run), '')


@dataclasses.dataclass(frozen=True)
class PlainText:
  r"""Files, each a document, cut where it is longer than `MAX_CHARACTERS`.

  Line ends become '\n'. Of a cut file, pieces that are blank are left out.
  """

  files: tuple[local_file.LocalFile, ...]
  compression: str
  """One of `compressed.SUFFIXES`, or ''."""

  @property
  def name(self) -> str:
    """The first and the last file."""
    first, last = self.files[0].path, self.files[-1].path
    return str(first) if first == last else f'{first} to {last}'

  @property
  def size(self) -> int:
    """Bytes to read."""
    return sum(file.size for file in self.files)

  def digest(self) -> str:
    """Returns a hash of the bytes and of how they are read.

    Raises:
      UserError: a file cannot be read.
    """
    content = [file.sha256() for file in self.files]
    description = ['plain_text', MAX_CHARACTERS, self.compression, content]
    return hashlib.sha256(json.dumps(description).encode()).hexdigest()

  def read(self, problems: source.Problems) -> Iterator[str]:
    """Reads the texts, file by file.

    Raises:
      UserError: a file cannot be read, or as `problems.found`.
    """
    for file in self.files:
      with file.open() as opened:
        # Twice, so that never the whole file is in memory.
        if self._is_document(opened, file, problems):
          opened.seek(0)
          for piece in _pieces(self._whole_texts(opened)):
            if piece and not piece.isspace():
              yield piece

  def _is_document(
    self,
    opened: BinaryIO,
    file: local_file.LocalFile,
    problems: source.Problems,
  ) -> bool:
    """Whether there is a text in the file; tells what is wrong with it."""
    blank = True
    try:
      for text in self._texts(opened):
        if '\0' in text:
          hint = checks.encoding_hint(text.encode())
          raise _NotTextError(f'is not text: it has NUL bytes{hint}')
        blank = blank and (not text or text.isspace())
    except _NotTextError as error:
      problems.found('encoding', f'{file.path} {error}')
      return False
    except compressed.DamagedError as error:
      problems.found('truncated', f'{file.path} {error}')
      return not blank
    if blank:
      problems.found('empty', f'{file.path}: the text is blank')
    return not blank

  def _whole_texts(self, opened: BinaryIO) -> Iterator[str]:
    """As `_texts`, to where the file is damaged, of which was told."""
    with contextlib.suppress(compressed.DamagedError):
      yield from self._texts(opened)

  def _texts(self, opened: BinaryIO) -> Iterator[str]:
    """Reads the text, some of it at a time."""
    if self.compression:
      blocks = compressed.blocks(opened, self.compression)
    else:
      blocks = iter(lambda: opened.read(local_file.BLOCK), b'')
    decoder = codecs.getincrementaldecoder('utf-8')()
    line_ends = io.IncrementalNewlineDecoder(None, translate=True)
    position = 0
    beginning = True
    for block in itertools.chain(blocks, [b'']):
      # Some bytes of a character may be left of the block before.
      first = position - len(decoder.getstate()[0])
      try:
        text = decoder.decode(block, final=not block)
      except UnicodeDecodeError as error:
        raise _NotTextError(
          f'is not UTF-8 text (byte {first + error.start}: {error.reason})'
          f'{checks.encoding_hint(block)}'
        ) from error
      position += len(block)
      if beginning and text:
        text = text.removeprefix('\ufeff')  # A byte order mark.
        beginning = False
      yield line_ends.decode(text, final=not block)


class _NotTextError(Exception):
  """A file of other bytes; says which."""


def _pieces(texts: Iterable[str]) -> Iterator[str]:
  """Cuts a text that comes in several as `cut` does the whole of it."""
  rest = ''
  for text in texts:
    *done, rest = cut(rest + text)
    yield from done
  yield rest
