"""A file of the user's, which must not change while it is read."""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import sys
from collections.abc import Iterator
from typing import BinaryIO

from train import errors

BLOCK = 2**20
"""Bytes read at once."""


@dataclasses.dataclass(frozen=True)
class LocalFile:
  """A file as it was found."""

  path: pathlib.Path
  size: int
  """Bytes."""
  modified: int
  """When it was written last, in ns since 1970."""

  @classmethod
  def find(cls, path: pathlib.Path) -> 'LocalFile':
    """Looks at the file.

    Raises:
      UserError: it is not there, or may not be looked at.
    """
    with _one_line(path):
      found = os.stat(path)
    return cls(path, found.st_size, found.st_mtime_ns)

  @contextlib.contextmanager
  def open(self) -> Iterator[BinaryIO]:
    """Opens it for reading.

    Raises:
      UserError: it cannot be read, or it is not as it was found, now or when
        all is read.
    """
    with _one_line(self.path):
      self._check()
      with open(self.path, 'rb') as file:
        yield file
      self._check()

  def _check(self) -> None:
    if LocalFile.find(self.path) != self:
      raise errors.UserError(
        f'{self.path} changed while it was being read; run again'
      )

  def sha256(self, start: int = 0, stop: int | None = None) -> str:
    """Returns the hash of its bytes, or of those in [start, stop).

    Raises:
      UserError: as `open`.
    """
    digest = hashlib.sha256()
    with self.open() as file:
      for block in blocks(file, start, self.size if stop is None else stop):
        digest.update(block)
    return digest.hexdigest()


def blocks(file: BinaryIO, start: int, stop: int) -> Iterator[bytes]:
  """Reads the bytes in [start, stop), some at a time."""
  file.seek(start)
  while start < stop:
    block = file.read(min(BLOCK, stop - start))
    if not block:  # It is shorter now, and said to have changed.
      break
    start += len(block)
    yield block


def check_name(path: str | pathlib.Path, option: str) -> None:
  """Checks that TFDS and ArrayRecord can open a name.

  They take names as UTF-8, and report sound files of other names as damaged.

  Raises:
    UserError: the name is not UTF-8, or Python reads names in another encoding.
  """
  name, encoding = os.fspath(path), sys.getfilesystemencoding()
  # Bytes that the encoding lacks are surrogates, which UTF-8 lacks.
  if os.fsencode(name) != name.encode('utf-8', 'replace'):
    reason = (
      'the name is not UTF-8: rename it'
      if encoding == 'utf-8'
      else f'names are read as {encoding} here: set PYTHONUTF8=1 in the'
      ' environment, which reads them as UTF-8'
    )
    raise errors.UserError(f'{option} {path}: {reason}')


@contextlib.contextmanager
def _one_line(path: pathlib.Path) -> Iterator[None]:
  """Names the file in an error of the operating system."""
  try:
    yield
  except OSError as error:
    reason = error.strerror or error
    raise errors.UserError(f'cannot read {path}: {reason}') from error
