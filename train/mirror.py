"""What a run on an object store keeps on a local disk, and uploads."""

import pathlib
import shutil
import tempfile
import threading
from collections.abc import Iterable, Iterator

from etils import epath

from train import storage
from train.errors import UserError
from train.lock import ObjectLock
from train.metrics_file import MetricsFile

_EVERY = 30.0  # Seconds between uploads, and one more for each megabyte.
_PAUSE = 2.0  # At least: a store takes the same object once a second.

# What others keep in a run directory from one start to the next.
_FILES = ('wandb-id',)
_DIRECTORIES = ('autotune',)


class Mirror:
  """A local directory whose files are brought to an object store.

  Args:
    remote: The run directory.
    files: Names of files of lines.
    lock: Of the run directory; what is lost is not written.

  Raises:
    UserError: the store cannot be read.
  """

  def __init__(
    self, remote: epath.Path, files: tuple[str, ...], lock: ObjectLock
  ):
    self._remote = remote
    self._lock = lock
    self.local = fetch(remote, files)
    """The directory; goes when all is uploaded."""
    self._error = ''
    self._busy = threading.Lock()
    self._wake = threading.Event()
    self._closing = threading.Event()
    self.files = {name: MetricsFile(self.local / name) for name in files}
    """Those of lines."""
    self._sent: dict[str, object] = dict.fromkeys(files, 0) | {
      name: self._version(name) for name in self._names() if name not in files
    }
    self._thread = threading.Thread(target=self._keep, daemon=True)
    self._thread.start()

  @property
  def behind(self) -> str:
    """What could not be uploaded and why, in one line; empty where nothing."""
    error = self._error
    return error and f'{error}; it is kept in {self.local} and tried again'

  def upload(self) -> None:
    """Has all that is new uploaded, in the background."""
    self._wake.set()

  def sync(self) -> None:
    """Uploads the files of lines.

    Raises:
      UserError: it failed, or another run has taken the directory.
    """
    self._push(self.files)
    self._lock.check()
    if self._error:
      raise UserError(self.behind)

  def close(self) -> None:
    """Uploads all, then removes the local directory.

    Raises:
      UserError: it failed; the directory stays.
    """
    if self._closing.is_set():
      return
    self._closing.set()
    self._wake.set()
    self._thread.join()
    self._push(self._names())
    if self._error:
      raise UserError(f'{self._error}; it is kept in {self.local}')
    shutil.rmtree(self.local, ignore_errors=True)

  def _keep(self) -> None:
    size = 0
    while not self._closing.wait(_PAUSE):
      self._wake.wait(_EVERY + size / 2**20)
      self._wake.clear()
      if not self._closing.is_set():
        size = self._push(self._names())

  def _names(self) -> list[str]:
    found = (
      str(path.relative_to(self.local))
      for path in self.local.rglob('*')
      if path.is_file() and path.suffix != '.tmp'
    )
    return [*self.files, *(name for name in found if name not in self.files)]

  def _push(self, names: Iterable[str]) -> int:
    """Uploads what has changed; what fails is tried again the next time.

    Returns:
      The bytes that were uploaded.
    """
    with self._busy:
      size, error = 0, ''
      for name in names:
        try:
          size += self._push_one(name)
        except UserError as failure:
          error = str(failure)
        except Exception as failure:  # Of the store's client: of any kind.
          error = storage.reason(failure, self._remote / name)
      self._error = error
      return size

  def _push_one(self, name: str) -> int:
    file = self.files.get(name)
    try:
      version = self._version(name)
      if version == self._sent.get(name):
        return 0
      content = file.content() if file else (self.local / name).read_bytes()
    except FileNotFoundError:  # It has gone since it was listed.
      return 0
    self._lock.confirm()
    (self._remote / name).write_bytes(content)
    self._sent[name] = version
    return len(content)

  def _version(self, name: str) -> object:
    """Other than before wherever the content is."""
    if name in self.files:
      return self.files[name].version
    stat = (self.local / name).stat()
    return stat.st_mtime_ns, stat.st_size


def fetch(remote: epath.Path, files: Iterable[str] = ()) -> pathlib.Path:
  """A new local directory, with what a run reads of its remote one.

  Args:
    remote: The run directory.
    files: Names of files wanted beside those that others than `RunDir` read.

  Raises:
    UserError: the store cannot be read.
  """
  local = pathlib.Path(tempfile.mkdtemp(prefix='gradpower-'))
  try:
    with storage.one_line_errors(remote):
      for path in _to_fetch(remote, files):
        to = local / path.relative_to(remote)
        to.parent.mkdir(exist_ok=True)
        to.write_bytes(path.read_bytes())
  except BaseException:
    shutil.rmtree(local)
    raise
  return local


def _to_fetch(remote: epath.Path, files: Iterable[str]) -> Iterator[epath.Path]:
  for name in (*files, *_FILES):
    if (remote / name).exists():
      yield remote / name
  for name in _DIRECTORIES:
    if (remote / name).exists():
      yield from (remote / name).iterdir()
