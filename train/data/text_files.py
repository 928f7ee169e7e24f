"""The user's own files: text, JSON lines and Parquet, also compressed."""

import glob
import itertools
import os
import pathlib
from collections.abc import Iterator, Sequence

from train import errors
from train.data import compressed, json_lines, local_file, plain_text, source

_JSON = ('.jsonl', '.json', '.ndjson')
_FORMS = ('.txt', *_JSON)
_PARQUET = '.parquet'
OPTIONS = ('--files', '--text-field')


def find(pattern: str, option: str = OPTIONS[0]) -> list[pathlib.Path]:
  """Returns the files that a glob matches, sorted by path.

  Args:
    pattern: A glob; '**' matches any number of directories, '~' is the home.
    option: The name of the option that gave it.

  Raises:
    UserError: nothing matches, or a file is of a kind that is not read.
  """
  matches = glob.glob(os.path.expanduser(pattern), recursive=True)
  paths = sorted(pathlib.Path(m) for m in matches if not os.path.isdir(m))
  if not paths:
    hint = f"; for all below it, give '{pattern}/**/*.txt'" if matches else ''
    raise errors.UserError(f'{option}: no file matches {pattern!r}{hint}')
  for path in paths:
    if _kind(path) is None:
      raise errors.UserError(
        f'{option}: {path} is none of {", ".join(_FORMS)} (also with'
        f' {", ".join(compressed.SUFFIXES)} after it) and {_PARQUET}; let the'
        ' glob name one'
      )
  return paths


def _kind(path: pathlib.Path) -> tuple[str, str] | None:
  """Returns the suffix of the form, and of the compression or ''."""
  name = path.name.lower()
  compression = next((s for s in compressed.SUFFIXES if name.endswith(s)), '')
  form = pathlib.Path(name.removesuffix(compression)).suffix
  if form in _FORMS or (form == _PARQUET and not compression):
    return form, compression
  return None


class TextFiles:
  """Documents of files, in the order of their paths.

  A .txt file is one document, or several where it is long
  (`train.data.plain_text`). A line of a .jsonl, .json or .ndjson file is an
  object, its text one document (`json_lines`). A row of a .parquet file is
  one (`parquet`).
  """

  def __init__(
    self,
    pattern: str,
    text_field: str = 'text',
    options: tuple[str, str] = OPTIONS,
  ):
    """Finds the files.

    Args:
      pattern: As for `find`.
      text_field: The key of the text in a line of JSON, or its column.
      options: The names of the options that gave the two, for messages.

    Raises:
      UserError: as `find`, or a file cannot be looked at.
    """
    self._text_field = text_field
    self._option = options[1]
    self._files = [
      local_file.LocalFile.find(path) for path in find(pattern, options[0])
    ]

  def parts(self) -> Sequence[source.Part]:
    """Returns the parts, about 64 MiB each where a file can be cut.

    Raises:
      UserError: a file cannot be read, or is Parquet without such a column, or
        there is nothing in any of them.
    """
    kinds = ((file, *(_kind(file.path) or ('', ''))) for file in self._files)
    parts = [
      part
      for is_text, files in itertools.groupby(kinds, lambda k: k[1] == '.txt')
      for part in self._parts(is_text, files)
    ]
    if not any(part.size for part in parts):  # None: Parquet without a row.
      first, *others = self._files
      more = f' and {len(others):,} more files' if others else ''
      raise errors.UserError(f'there is no document in {first.path}{more}')
    return parts

  def _parts(
    self,
    is_text: bool,
    files: Iterator[tuple[local_file.LocalFile, str, str]],
  ) -> Iterator[source.Part]:
    if is_text:
      yield from plain_text.parts((file, how) for file, _, how in files)
      return
    for file, form, compression in files:
      if form == _PARQUET:
        from train.data import parquet  # Half a second.

        yield from parquet.parts(file, self._text_field, self._option)
      else:
        yield from json_lines.parts(
          file, compression, self._text_field, self._option
        )

  def listing(self) -> list[list[str | int]]:
    """Returns the name and size of every file."""
    return [[file.path.name, file.size] for file in self._files]
