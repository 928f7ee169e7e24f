"""The directories of a run's checkpoints, each named by its step."""

import contextlib
import errno
import os
import re
import time

from etils import epath

from train import manifest, storage
from train.agreement import SharedError
from train.errors import UserError

TEMPORARY = '.orbax-checkpoint-tmp'
"""Ends a directory's name on a disk until Orbax has committed it."""


# TensorStore, Orbax, epath or gcsfs misread these: a backslash as a
# slash, '.__lock' as their own file, '/gs' as 'gs://', '?' as a path's end.
_MISREAD = re.compile(
  r'\\|\.__lock(?=/)|gs:(?=/)|^/(gs|s3|az|hf)(?=/)|[\ud800-\udfff]'
)
_MISREAD_IN_STORES = re.compile(r'[][*?#\\\x00-\x1f\x7f]')


def absolute(directory: epath.PathLike) -> epath.Path:
  """Returns the path as Orbax needs it.

  Raises:
    UserError: Orbax could not write there, or would write elsewhere.
  """
  path, misread = os.fspath(directory), _MISREAD_IN_STORES
  if storage.is_local(path):
    # Orbax drops '..' and what is before it, which may be a link.
    up = '..' in path.split('/')
    path = os.path.realpath(path) if up else os.path.abspath(path)
    misread = _MISREAD
  if found := misread.search(f'{path}/'):
    raise UserError(
      f'{path!r} cannot hold checkpoints: name it, and what is above it, '
      f'without {found[0]!r}'
    )
  return epath.Path(path)


def present(directory: epath.Path) -> list[tuple[int, bool]]:
  """The steps there, ascending, each with whether its manifest is there."""
  if not directory.exists():
    return []
  names = [path.name for path in directory.iterdir()]
  steps = sorted(int(name) for name in names if name.isdecimal())
  return [
    (step, (directory / str(step) / manifest.NAME).exists()) for step in steps
  ]


def prepare(directory: epath.Path, step: int) -> None:
  """Makes room for a step, and finds out at once whether a disk has any.

  Raises:
    OSError: there is none.
  """
  clear(directory)
  remove(directory, step)
  if storage.is_local(directory):
    (directory / f'{step}{TEMPORARY}').mkdir()


def clear(directory: epath.Path) -> None:
  """Makes it on a disk, or removes what Orbax has not committed there.

  On an object store there is nothing to make; Orbax writes to a step's
  directory from the start, which stays incomplete until a save replaces it.

  Raises:
    OSError: it cannot be written.
  """
  if not storage.is_local(directory):
    return
  directory.mkdir(parents=True, exist_ok=True)
  for path in directory.iterdir():
    if path.name.endswith(TEMPORARY):
      _remove(path)


def remove(directory: epath.Path, step: int) -> None:
  """Removes a step; half removed, it counts as incomplete.

  Raises:
    OSError: it cannot be removed.
  """
  path = directory / str(step)
  (path / manifest.NAME).unlink(missing_ok=True)
  _remove(path)


def discard(directory: epath.Path, step: int) -> None:
  """Removes what a save that failed has left, as far as that can be done."""
  with contextlib.suppress(Exception):
    remove(directory, step)
  with contextlib.suppress(Exception):
    clear(directory)


def explain(error: Exception, directory: epath.Path, verb: str) -> str:
  """As `storage.reason`, also of our own errors and of TensorStore's.

  Those are a ValueError, even where a disk is full.
  """
  if isinstance(error, (SharedError, manifest.DamagedError, UserError)):
    return str(error)
  if isinstance(error, ValueError):
    full = os.strerror(errno.ENOSPC) in str(error)
    error = OSError(errno.ENOSPC, '') if full else ValueError(first(error))
  return storage.reason(error, directory, verb)


def first(error: Exception) -> str:
  """TensorStore appends its whole specification, in brackets."""
  return str(error).strip().split('\n')[0].split(' [')[0][:300]


def _remove(path: epath.Path) -> None:
  """What TensorStore is still writing there may come back for a moment."""
  for attempt in range(5):
    try:
      path.rmtree(missing_ok=True)
      return
    except OSError:
      if attempt == 4:
        raise
      time.sleep(0.1)
