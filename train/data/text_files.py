"""The user's own files: text, JSON lines and Parquet, also compressed."""

import functools
import glob
import heapq
import itertools
import logging
import os
import pathlib
import re
from collections.abc import Collection, Iterable, Iterator, Sequence

from train import errors
from train.data import compressed, json_lines, local_file, plain_text, source

_JSON = ('.jsonl', '.json', '.ndjson')
_FORMS = ('.txt', *_JSON)
_PARQUET = '.parquet'
OPTIONS = ('--files', '--text-field')

_logger = logging.getLogger('train.data')

# One or more '**' components; several in a row match what one does.
_DEEP = re.compile(r'(?<![^/])(?:\*\*/+)*\*\*(?:/+|$)')


def find(pattern: str, option: str = OPTIONS[0]) -> list[pathlib.Path]:
  """Returns the files that a glob matches, sorted by path.

  A file with several names, by symbolic links, is taken once: by a name with a
  suffix that is read, then the fewest links in it, then the first in order.
  Pipes, sockets and devices are left out. A warning says how many names were
  left out.

  Args:
    pattern: A glob; '**' matches any number of directories, '~' is the home.
    option: The name of the option that gave it.

  Raises:
    UserError: nothing matches, or a file is of a kind that is not read.
  """
  pattern = os.path.expanduser(pattern)
  again: set[str] = set()
  closed: set[str] = set()
  matches = set(_matches(pattern, again, closed))
  others = {m for m in matches if not os.path.isfile(m) and os.path.exists(m)}
  folders = {name for name in others if os.path.isdir(name)}
  files: dict[str, str] = {}
  names = sorted(
    (_kind(pathlib.Path(name)) is None, links, name, real)
    for links, name, real in _places(matches - others)
  )
  for _, _, name, real in names:
    if files.setdefault(real, name) != name:
      again.add(name)
  _warn(option, 'other names of what is read already', again)
  _warn(option, 'pipes, sockets or devices', others - folders)
  _warn(option, 'folders that cannot be read', closed)
  paths = sorted(map(pathlib.Path, files.values()))
  if not paths:
    raise errors.UserError(
      f'{option}: no file matches {pattern!r}{_hint(pattern, bool(folders))}'
    )
  for path in paths:
    if _kind(path) is None:
      raise errors.UserError(
        f'{option}: {path} is none of {", ".join(_FORMS)} (also with'
        f' {", ".join(compressed.SUFFIXES)} after it) and {_PARQUET}; let the'
        ' glob name one'
      )
  return paths


def _matches(pattern: str, again: set[str], closed: set[str]) -> Iterator[str]:
  """Yields what `glob.glob` matches, without following loops of links.

  Args:
    pattern: The glob.
    again: A set that the links which '**' does not follow are added to.
    closed: A set that folders which cannot be read are added to.
  """
  deep = _DEEP.search(pattern)
  if not deep:
    yield from glob.iglob(pattern)
    return
  above = pattern[: deep.start()]
  below = pattern[deep.end() :] if deep[0].endswith('/') else '*'
  for top in glob.glob(above) if above else ['']:
    for folder in _folders(top, again, closed):
      inner = os.path.join(glob.escape(folder), below)
      yield from _matches(inner, again, closed)


def _folders(top: str, again: set[str], closed: set[str]) -> Iterator[str]:
  """Yields a folder and all below it, each once, by the fewest links.

  Args:
    top: The folder.
    again: A set that links to folders which were seen before, or to one above
      the top, are added to.
    closed: A set that folders which cannot be read are added to.
  """
  seen = set(map(str, pathlib.Path(os.path.realpath(top)).parents))
  heap = [(0, top)]
  while heap:
    links, folder = heapq.heappop(heap)
    real = os.path.realpath(folder)
    if real in seen:
      again.add(folder)
      continue
    seen.add(real)
    yield folder
    try:
      with os.scandir(folder or '.') as entries:
        for entry in entries:
          path = os.path.join(folder, entry.name)
          link = entry.is_symlink()
          is_folder = os.path.isdir(path) if link else entry.is_dir()
          if is_folder and not entry.name.startswith('.'):
            heapq.heappush(heap, (links + link, path))
    except NotADirectoryError:
      pass
    except OSError:
      closed.add(folder)


def _places(names: Iterable[str]) -> Iterator[tuple[int, str, str]]:
  """Yields the number of links in each name, the name, and its real path."""
  of_folder = functools.cache(
    lambda path: (_links(path), os.path.realpath(path))
  )
  for name in names:
    links, above = of_folder(os.path.dirname(name))
    if os.path.islink(name):
      yield links + 1, name, os.path.realpath(name)
    else:
      yield links, name, os.path.join(above, os.path.basename(name))


def _links(path: str) -> int:
  above = os.path.dirname(path)
  return os.path.islink(path) + (_links(above) if above != path else 0)


def _warn(option: str, what: str, names: Collection[str]) -> None:
  """Warns of names that are left out, with an example."""
  if names:
    more = f' and {len(names) - 1:,} more' if len(names) > 1 else ''
    _logger.warning('%s: left out, as %s: %s%s', option, what, min(names), more)


def _hint(pattern: str, is_folder: bool) -> str:
  """Suggests another pattern in place of one that matches no file."""
  if is_folder:
    return f"; for all below it, give '{pattern}/**/*.txt'"
  literal = pattern.replace('[', '[[]')
  if literal != pattern and any(_matches(literal, set(), set())):
    return f"; a name with brackets is written '{literal}'"
  return ''


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
