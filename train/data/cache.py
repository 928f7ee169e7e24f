"""Cache directories that are whole or not there, whoever else is writing."""

import contextlib
import fcntl
import logging
import os
import pathlib
import shutil
import time
import uuid
from collections.abc import Callable, Iterator

from train import errors, storage

_logger = logging.getLogger('train.data')
_CLONE = pathlib.Path(__file__).resolve().parents[2]
_INCOMPLETE = '.incomplete-'
_ABANDONED_AFTER = 24 * 3600  # Seconds.


def default_directory() -> pathlib.Path:
  """`$GRADPOWER_CACHE`, or `cache/` at the root of the clone."""
  return pathlib.Path(os.environ.get('GRADPOWER_CACHE') or _CLONE / 'cache')


@contextlib.contextmanager
def one_line_errors(directory: pathlib.Path) -> Iterator[None]:
  """Turns failures to write under `directory` into a `UserError`.

  Raises:
    UserError: no space left, or no permission to write.
  """
  try:
    yield
  except (OSError, RuntimeError) as error:
    number = getattr(error, 'errno', None)
    if storage.is_full(error):
      raise errors.UserError(
        f'no space left to write the data cache in {directory}: free some, or'
        ' set GRADPOWER_CACHE to a directory on a larger disk'
      ) from error
    if isinstance(error, OSError) and number is not None:
      raise errors.UserError(
        f'cannot write the data cache in {directory}'
        f' ({os.strerror(number)}): set GRADPOWER_CACHE to a directory that'
        ' you can write'
      ) from error
    raise


@contextlib.contextmanager
def temporary_directory(parent: pathlib.Path) -> Iterator[pathlib.Path]:
  """A new directory in `parent`, gone afterwards unless it was moved away.

  Beside its destination, so that a move is one rename; with the user's umask,
  unlike `tempfile`, so that a cache can be shared. What runs that were killed
  have left in `parent` goes first.
  """
  parent.mkdir(parents=True, exist_ok=True)
  for leftover in parent.glob(f'{_INCOMPLETE}*'):
    if _is_abandoned(leftover):
      shutil.rmtree(leftover, ignore_errors=True)
  path = parent / f'{_INCOMPLETE}{uuid.uuid4().hex}'
  path.mkdir()
  try:
    yield path
  finally:
    shutil.rmtree(path, ignore_errors=True)


def _is_abandoned(path: pathlib.Path) -> bool:
  """Whether nothing in a temporary directory was touched for a day."""
  try:
    last = max(p.lstat().st_mtime for p in (path, *path.rglob('*')))
  except OSError:  # Its owner is just removing it.
    return False
  return time.time() - last > _ABANDONED_AFTER


@contextlib.contextmanager
def _turn(target: pathlib.Path) -> Iterator[None]:
  """Waits until no other process is building `target`."""
  target.parent.mkdir(parents=True, exist_ok=True)
  lock = target.with_name(f'.{target.name}.lock')
  with lock.open('w') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      _logger.info('waiting for another process to prepare %s', target)
      fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
      _logger.debug('no locks for %s', target)
    try:
      yield
    finally:
      # Who waits for it now finds the directory, or builds it unlocked.
      lock.unlink(missing_ok=True)


def build_once(
  target: pathlib.Path, build: Callable[[pathlib.Path], None]
) -> pathlib.Path:
  """Returns `target`, a directory that `build` has filled.

  It is filled under another name and then renamed, so a run that is killed
  leaves no half of it. Of several processes one builds and the others wait;
  where the file system has no locks, or they are not those of one machine, the
  first to end wins: all wrote the same.

  Args:
    target: the directory; where it exists, nothing is done.
    build: writes the contents into the empty directory that it is given.

  Raises:
    UserError: as `one_line_errors`.
  """
  if target.is_dir():
    return target
  with (
    one_line_errors(target.parent),
    _turn(target),
    temporary_directory(target.parent) as temporary,
  ):
    if target.is_dir():
      return target
    build(temporary)
    try:
      temporary.rename(target)
    except OSError:
      if not target.is_dir():
        raise
      _logger.info('another run prepared %s first', target)
  return target
