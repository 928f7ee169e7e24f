"""Where run directories lie: local disks, and object stores (`gs://`).

An object store has whole objects, written at once, where the last writer wins:
nothing is appended to, renamed, or made only where it was not there before.
"""

import errno
import functools
import glob
import importlib.util
import itertools
import logging
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from etils import epath

from train.errors import UserError

FULL = (errno.ENOSPC, errno.EDQUOT)

# Of a file system on which directories cannot be made durable, or by us.
_REFUSALS = (
  errno.EINVAL, errno.ENOTSUP, errno.ENOSYS, errno.EACCES, errno.EPERM,
)  # fmt: skip

# A bug keeps its traceback.
_NOT_OURS = (UserError, TypeError, AttributeError, NameError, AssertionError)

_CONNECT, _REQUEST = 20.0, 120.0  # Seconds to wait for an object store.


def directory(text: str) -> epath.Path:
  """A run directory as a user names it, ~ expanded.

  Raises:
    UserError: it is on a kind of storage that cannot hold runs, or what that
      kind needs is not installed.
  """
  scheme, remote, rest = text.partition('://')
  if not remote:
    return epath.Path(text).expanduser()
  if scheme != 'gs':
    raise UserError(
      f'{text}: a run directory is on a local disk, or gs://BUCKET/PATH'
    )
  bucket, _, path = rest.partition('/')
  if not (bucket and path.strip('/')):
    raise UserError(f'{text} names no directory in a bucket: gs://BUCKET/PATH')
  _prepare(text)
  return epath.Path(text)


def is_local(path: epath.PathLike) -> bool:
  """Whether a path is on a disk, which may be a network's."""
  return '://' not in os.fspath(path)


def matches(directory: epath.PathLike, pattern: str) -> Iterator[epath.Path]:
  """Yields the matches of a glob below a directory; its own name is literal."""
  return epath.Path(glob.escape(os.fspath(directory))).glob(pattern)


def write_atomically(path: Any, content: str | bytes) -> None:
  """Writes a file that is never seen half-written, on a disk durably.

  Args:
    path: A `pathlib.Path` or an `epath.Path`.
    content: All of it; text becomes UTF-8.
  """
  if isinstance(content, str):
    content = content.encode('utf-8')
  if not is_local(path):
    path.write_bytes(content)
    return
  path = pathlib.Path(path)
  temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
  try:
    with temporary.open('wb') as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)
  sync_directory(path.parent)


def make_directory(path: pathlib.Path) -> None:
  """Makes a directory on a disk, and those above it, durably."""
  above = path, *path.parents
  made = list(itertools.takewhile(lambda each: not each.exists(), above))
  path.mkdir(parents=True, exist_ok=True)
  for each in made:
    sync_directory(each.parent)


def sync_directory(path: pathlib.Path) -> None:
  """Makes a local directory's entries durable, where they can be."""
  try:
    entries = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
      os.fsync(entries)
    finally:
      os.close(entries)
  except OSError as error:
    if error.errno not in _REFUSALS:
      raise


class one_line_errors:  # noqa: N801 (a context manager reads as a verb)
  """Turns failures to write (or read) a path into a `UserError`.

  On a disk those of the system; of an object store's client, which has its own
  kinds of exceptions, all.
  """

  def __init__(self, path: epath.PathLike, verb: str = 'write'):
    self._path = path
    self._verb = verb

  def __enter__(self):
    return self

  def __exit__(self, kind, error, traceback):
    if not isinstance(error, Exception) or isinstance(error, _NOT_OURS):
      return
    if isinstance(error, OSError) or not is_local(self._path):
      message = reason(error, self._path, self._verb)
      if getattr(error, 'errno', None) in FULL:
        message += (
          ': free some and give the same command again; it continues from the '
          'last complete checkpoint'
        )
      raise UserError(message) from error


def is_full(error: BaseException) -> bool:
  """Whether a disk is full, or a quota.

  It is told by its text too: ArrayRecord's writer reports it as a
  `RuntimeError`.
  """
  number = getattr(error, 'errno', None)
  return number in FULL or os.strerror(errno.ENOSPC) in str(error)


def reason(error: Exception, path: epath.PathLike, verb: str = 'write') -> str:
  """What cannot be done to a path and why, in one line without a full stop."""
  number = getattr(error, 'errno', None)
  if number in FULL:
    return f'no space left to {verb} {path}'
  if number is not None:
    return f'cannot {verb} {path}: {os.strerror(number)}'
  if isinstance(error, FileNotFoundError):
    thing = 'bucket' if verb == 'write' else 'file'
    return f'cannot {verb} {path}: there is no such {thing}'
  text = ' '.join(str(error).split()) or type(error).__name__
  if getattr(error, 'code', None) in (401, '401'):
    text += ' (log in with: gcloud auth application-default login)'
  return f'cannot {verb} {path}: {text[:300]}'


@functools.cache
def _prepare(text: str) -> None:
  """Sets up the client of Google Cloud Storage."""
  if importlib.util.find_spec('gcsfs') is None:
    raise UserError(
      f"{text}: not installed: gcsfs; gs:// needs the 'gcs' extra: pip install "
      "-e '.[train,gcs]'"
    )
  # One client for all, whatever else is installed; plain objects are enough.
  os.environ.setdefault('EPATH_USE_TF', 'false')
  os.environ.setdefault('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')
  import aiohttp
  import fsspec.config

  for name in ('gcsfs', 'google.auth'):  # What fails is raised too.
    logging.getLogger(name).setLevel(logging.CRITICAL)
  for name in ('gcs', 'gs'):
    fsspec.config.conf.setdefault(name, {}).update(
      # Others write there too: TensorStore, and other processes.
      use_listings_cache=False,
      requests_timeout=aiohttp.ClientTimeout(_REQUEST, sock_connect=_CONNECT),
    )
