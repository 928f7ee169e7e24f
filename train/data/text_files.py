"""Documents from the user's own .txt, .jsonl and .json files."""

import contextlib
import glob
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator

from train import errors

SUFFIXES = ('.txt', '.jsonl', '.json')
# Longer .txt files are cut, so that some of a single book can be held out.
MAX_CHARACTERS = 10_000


def _refuse(message: str) -> errors.UserError:
  return errors.UserError(f'--data.files: {message}')


def find(pattern: str) -> list[pathlib.Path]:
  """Returns the files that a glob matches, sorted by path.

  Args:
    pattern: a glob; '**' matches any number of directories, '~' is the home.

  Raises:
    UserError: nothing matches, or a file has none of `SUFFIXES`.
  """
  matches = glob.glob(os.path.expanduser(pattern), recursive=True)
  paths = sorted(pathlib.Path(m) for m in matches if not os.path.isdir(m))
  if not paths:
    hint = f"; for all below it, give '{pattern}/**/*.txt'" if matches else ''
    raise _refuse(f'no file matches {pattern!r}{hint}')
  for path in paths:
    if path.suffix.lower() not in SUFFIXES:
      raise _refuse(
        f'{path} is none of {", ".join(SUFFIXES)}; let the glob name one'
      )
  return paths


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


class TextFiles:
  r"""Documents of text files, in the order of their paths.

  A .txt file is one document, its line ends made '\n', or several where it
  is longer than `MAX_CHARACTERS`. A line of a .jsonl or .json file is an
  object, its text one document. Blank documents are left out.
  """

  def __init__(self, pattern: str, text_field: str = 'text'):
    """Finds the files.

    Args:
      pattern: as for `find`.
      text_field: the key of the text in a line of JSON.

    Raises:
      UserError: as `find`.
    """
    self._paths = find(pattern)
    self._text_field = text_field

  def digest(self) -> str:
    """Returns a hash of what is read: every file's whole content, no dates.

    Raises:
      UserError: a file cannot be read.
    """
    parts: list[list[str]] = []
    for path in self._paths:
      with _reading(path), path.open('rb') as file:
        content = hashlib.file_digest(file, 'sha256').hexdigest()
      parts.append([path.suffix.lower(), content])
    description = ['text_files', MAX_CHARACTERS, self._text_field, parts]
    return hashlib.sha256(json.dumps(description).encode()).hexdigest()

  def __iter__(self) -> Iterator[str]:
    """Reads the documents.

    Raises:
      UserError: a file cannot be read, is not UTF-8 text, or has a line that
        is not a JSON object with a text; or all of them are blank.
    """
    empty = True
    for path in self._paths:
      read = _read_txt if path.suffix.lower() == '.txt' else self._read_json
      for text in read(path):
        if text.strip():
          empty = False
          yield text
    if empty:
      raise _refuse(
        f'no text in {len(self._paths)} file(s), the first {self._paths[0]}'
      )

  def _read_json(self, path: pathlib.Path) -> Iterator[str]:
    with _reading(path), path.open('rb') as file:
      for number, raw in enumerate(file, start=1):
        line = _decode(raw, f'{path}, line {number}')
        if line.strip():
          yield self._text(line, f'{path}, line {number}')

  def _text(self, line: str, place: str) -> str:
    try:
      record = json.loads(line)
    except (ValueError, RecursionError) as error:
      reason = getattr(error, 'msg', 'not readable')
      raise _refuse(
        f'{place} is not JSON ({reason}); each line must be one object'
      ) from error
    if not isinstance(record, dict):
      raise _refuse(f'{place} is not a JSON object')
    if self._text_field not in record:
      keys = ', '.join(sorted(record)[:8]) or 'none'
      raise _refuse(
        f'{place} has no field {self._text_field!r} (it has: {keys}); name the'
        ' one with the text with --data.text_field'
      )
    text = record[self._text_field]
    if not isinstance(text, str):
      raise _refuse(f'{place}: the field {self._text_field!r} is not a string')
    try:
      text.encode('utf-8')
    except UnicodeEncodeError as error:  # An escape such as '\ud800'.
      raise _refuse(
        f'{place}: half a surrogate pair, which is no character'
      ) from error
    return text


@contextlib.contextmanager
def _reading(path: pathlib.Path) -> Iterator[None]:
  """Names the file in an error of the operating system."""
  try:
    yield
  except OSError as error:
    reason = error.strerror or error
    raise _refuse(f'cannot read {path}: {reason}') from error


def _read_txt(path: pathlib.Path) -> list[str]:
  with _reading(path):
    raw = path.read_bytes()
  text = _decode(raw, str(path))
  return cut(text.replace('\r\n', '\n').replace('\r', '\n'))


def _decode(raw: bytes, place: str) -> str:
  """Decodes UTF-8, without its byte order mark where there is one."""
  try:
    text = raw.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    raise _refuse(
      f'{place} is not UTF-8 text (byte {error.start}: {error.reason})'
    ) from error
  if '\0' in text:
    raise _refuse(f'{place} is not text: it has NUL bytes')
  return text
