"""A directory while it is prepared: whose it is, and what is left of it."""

import contextlib
import fcntl
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Iterator

from train import errors, lock
from train.data import local_file
from train.data.prepare import files

_logger = logging.getLogger('train.data')

WORK = '.work'
"""What is in between, gone when all is done."""
_LOCK = 'lock'


def check_directory(out: pathlib.Path) -> None:
  """Checks that there can be a prepared directory of this name.

  Raises:
    UserError: a file has this name or one above, or the name is not UTF-8.
  """
  local_file.check_name(out, '--out')
  for path in (out, *out.parents):
    # Not its methods: they raise where one may not look.
    if os.path.exists(path) and not os.path.isdir(path):
      where = '' if path == out else f'{out}: '
      raise errors.UserError(f'--out {where}{path} is a file: name a directory')


def check_free(out: pathlib.Path) -> None:
  """Raises: UserError: there is something that is not from here."""
  if not (out / WORK).is_dir() and out.is_dir() and any(out.iterdir()):
    raise errors.UserError(
      f'{out} is not empty: name another directory, or one that is not there'
    )


@contextlib.contextmanager
def alone(work: pathlib.Path) -> Iterator[None]:
  """Keeps a second process out of a directory; the kernel knows ends.

  Raises:
    UserError: another one is at work there.
  """
  path = work / _LOCK
  with files.writing(work.parent):
    number = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
  with os.fdopen(number, 'r+') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise errors.UserError(
        f'{work.parent} is being prepared by {lock.who(file.read())}: wait for'
        ' it to end, or name another directory'
      ) from None
    except OSError:  # A file system without locks.
      _logger.debug('no locks in %s', work)
    file.truncate(0)
    file.write(json.dumps(lock.holder()))
    file.flush()
    yield


def discard(out: pathlib.Path) -> None:
  """Removes what was begun and can come to nothing."""
  shutil.rmtree(out / WORK, ignore_errors=True)
  with contextlib.suppress(OSError):
    out.rmdir()
