"""Files and directories that are there whole, durably, or not at all."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator

from train import errors, storage

_TEMPORARY = '.tmp'


@contextlib.contextmanager
def writing(directory: pathlib.Path) -> Iterator[None]:
  """Turns failures to write below `directory` into a `UserError`.

  Raises:
    UserError: no space left, or no permission to write.
  """
  try:
    yield
  except (OSError, RuntimeError) as error:
    number = getattr(error, 'errno', None)
    if storage.is_full(error):
      raise errors.UserError(
        f'no space left to write {directory}: free some and give the same'
        ' command again; it goes on from here'
      ) from error
    if isinstance(error, OSError) and number is not None:
      raise errors.UserError(
        f'cannot write {directory}: {os.strerror(number)}'
      ) from error
    raise


@contextlib.contextmanager
def new_directory(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A directory to fill, which is renamed to `path` when that is done."""
  temporary = path.with_name(path.name + _TEMPORARY)
  shutil.rmtree(temporary, ignore_errors=True)
  temporary.mkdir()
  yield temporary
  for file in temporary.iterdir():
    sync(file)
  storage.sync_directory(temporary)
  temporary.rename(path)
  storage.sync_directory(path.parent)


def sync(path: pathlib.Path) -> None:
  """Makes a file's content durable."""
  with path.open('rb') as file:
    os.fsync(file.fileno())


def move(source: pathlib.Path, target: pathlib.Path) -> None:
  """Moves a complete file to its place, durably."""
  sync(source)
  source.replace(target)
  storage.sync_directory(target.parent)
