"""One run in a directory at a time."""

import contextlib
import fcntl
import json
import logging
import os
import pathlib
import socket
import threading
import time
import uuid
from typing import Any, NoReturn

from etils import epath

from train import storage
from train.errors import UserError

_logger = logging.getLogger('train')
_NAME = 'lock'

_BEAT = 10.0  # Seconds between beats.
_STALE = 60.0  # Seconds without one after which a run is taken to have ended.
_LISTEN = 2.5  # Beats listened for at least: another host's clock may be wrong.
_SETTLE = 3.0  # Seconds in which two that begin at once see each other.


class FileLock:
  """Of a directory on a disk: the kernel frees it when the process dies.

  Args:
    directory: There already.
    option: Names it on the command line.

  Raises:
    UserError: another run holds it, or the disk cannot be written.
  """

  def __init__(self, directory: pathlib.Path, option: str = '--run-dir'):
    path = directory / _NAME
    self._option = option
    with storage.one_line_errors(directory):
      self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
      try:
        self._take(directory)
        size = os.pwrite(self._file, json.dumps(holder()).encode(), 0)
        os.truncate(self._file, size)
      except BaseException:
        os.close(self._file)
        raise

  def check(self) -> None:
    """It cannot be lost."""

  def confirm(self) -> None:
    """It cannot be lost."""

  def release(self) -> None:
    """Lets another run begin."""
    if self._file >= 0:
      os.close(self._file)
      self._file = -1

  def _take(self, directory: pathlib.Path) -> None:
    try:
      fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      found = who(os.pread(self._file, 4096, 0))
      raise UserError(in_use(directory, found, self._option)) from None
    except OSError as error:  # A file system without locks.
      _logger.warning(
        'warning: %s cannot be locked (%s): see that no other run writes it',
        directory,
        os.strerror(error.errno or 0),
      )


class ObjectLock:
  """Of a directory on an object store: an object that is rewritten all along.

  Nothing can be made exclusively there. Whoever begins writes its own token
  over what it takes to be free, and has it if no other has done so a while
  later; a run that finds another's token has lost it, and ends.

  Raises:
    UserError: another run holds it, or the store cannot be written.
  """

  def __init__(self, directory: epath.Path):
    self._directory = directory
    self._path = directory / f'{_NAME}.json'
    self._token = uuid.uuid4().hex
    self._holder = holder() | {'machine': _machine(), 'token': self._token}
    self._taken_by = ''
    self._released = threading.Event()
    with storage.one_line_errors(directory):
      self._wait_for_another()
      self._beat()
      time.sleep(_SETTLE)
      if self._lost():
        self._refuse(self._taken_by)
    self._thread = threading.Thread(target=self._keep, daemon=True)
    self._thread.start()

  def check(self) -> None:
    """Looks whether it is still held.

    Raises:
      UserError: another run has taken it.
    """
    if self._taken_by:
      raise UserError(
        f'{self._directory} has been taken over by {self._taken_by}: this run '
        'ends, that one goes on'
      )

  def confirm(self) -> None:
    """As `check`, but asks the store."""
    self._lost()
    self.check()

  def release(self) -> None:
    """Lets another run begin; where that fails, it can a minute later."""
    if self._released.is_set():
      return
    self._released.set()
    self._thread.join(_BEAT)
    with contextlib.suppress(Exception):
      if not self._lost():
        self._path.unlink(missing_ok=True)

  def _wait_for_another(self) -> None:
    """Until what is there is old enough, or gone, or beats."""
    found = self._read()
    if not found or _has_died(found):
      return
    beat = found.get('beat')
    age = time.time() - beat if isinstance(beat, int | float) else 0.0
    wait = min(max(_STALE - age, _LISTEN * _BEAT), _STALE)
    end = time.monotonic() + wait
    _logger.info(
      '%s was in use by %s %d s ago: waits %d s to see whether it still is',
      self._directory,
      who(json.dumps(found)),
      max(age, 0),
      wait,
    )
    while (left := end - time.monotonic()) > 0:
      time.sleep(min(_BEAT / 4, left))
      if not (now := self._read()):
        return
      if now != found:
        self._refuse(who(json.dumps(now)))

  def _refuse(self, holder: str) -> NoReturn:
    raise UserError(in_use(self._directory, holder))

  def _keep(self) -> None:
    while not self._released.wait(_BEAT):
      # What fails now is tried again at the next beat.
      with contextlib.suppress(Exception):
        if self._lost():
          return
        self._beat()

  def _beat(self) -> None:
    self._path.write_text(json.dumps(self._holder | {'beat': time.time()}))

  def _lost(self) -> bool:
    found = self._read()
    if found.get('token', self._token) != self._token:
      self._taken_by = who(json.dumps(found))
    return bool(self._taken_by)

  def _read(self) -> dict[str, Any]:
    try:
      found = json.loads(self._path.read_text())
    except (FileNotFoundError, ValueError):
      return {}
    return found if isinstance(found, dict) else {}


def holder() -> dict[str, Any]:
  """The process that asks, as a lock names it."""
  return {
    'host': socket.gethostname(),
    'pid': os.getpid(),
    'started': round(time.time(), 3),
  }


def who(content: bytes | str) -> str:
  """Names whoever a lock's content names."""
  try:
    found = json.loads(content)
    return f'process {found["pid"]} on {found["host"]}'
  except (ValueError, TypeError, KeyError):
    return 'another process'


def in_use(
  directory: epath.PathLike, holder: str, option: str = '--run-dir'
) -> str:
  """Says to a second run that it cannot have the directory."""
  return (
    f'{directory} is in use by {holder}: wait for it to end, or name another '
    f'{option}'
  )


def _machine() -> str:
  """Where a process number means what it means here."""
  try:
    boot = pathlib.Path('/proc/sys/kernel/random/boot_id').read_text().strip()
    return f'{boot} {os.readlink("/proc/self/ns/pid")}'
  except OSError:
    return socket.gethostname()


def _has_died(found: dict[str, Any]) -> bool:
  """Whether a lock's holder was here and is no more."""
  pid = found.get('pid')
  if found.get('machine') != _machine() or type(pid) is not int or pid < 1:
    return False
  try:
    os.kill(pid, 0)
  except ProcessLookupError:
    return True
  except OSError:
    return False
  return False
