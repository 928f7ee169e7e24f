"""A run's directory: its configuration, vocabulary, metrics and checkpoints.

It is the interface between tools; `docs/cli.md` describes its files.
"""

import json
import math
import pathlib
import re
import shutil
import time
from typing import Any

import jax
from etils import epath

from train.config import Config, to_dict
from train.data import tokenizer as tokenizer_lib
from train.errors import UserError
from train.lock import FileLock, ObjectLock
from train.metrics_file import MetricsFile, parse
from train.mirror import Mirror, fetch
from train.run_facts import check_same, versions
from train.storage import (
  is_local,
  make_directory,
  one_line_errors,
  write_atomically,
)

_METRICS = 'metrics.jsonl'
_LINES = _METRICS, 'events.jsonl'

# What a directory holds before it is a run's, if it was cut off at birth.
_BORN: tuple[set[str], ...] = (
  set(),
  {'run.json'},
  *({'run.json', name} for name in tokenizer_lib.FILES),
)

# What a process killed in `write_atomically` leaves of a run's own files.
_LEFTOVER = re.compile(
  r'(config\.json|run\.json|tokenizer\.\w+|metrics\.jsonl|events\.jsonl)'
  r'\.\d+\.tmp'
)


class RunDir:
  """Opens or makes the directory of a run, and locks it until it is closed.

  Args:
    path: The directory.
    config: The resolved configuration.
    source_hash: Of the text, vocabulary and split.
    tokenizer: Its file is kept in the directory.
    writes: Whether this process makes and writes the directory; another has
      opened it before if not, and this one then only reads.

  Raises:
    UserError: the directory holds another run, another process has it open,
      or it cannot be written.
  """

  def __init__(
    self,
    path: epath.PathLike,
    config: Config,
    source_hash: str,
    tokenizer: tokenizer_lib.Tokenizer,
    *,
    writes: bool = True,
  ):
    self.path = epath.Path(path)
    self.moved: dict[str, Any] = {}
    """What has changed of where the run is done since it began: 'devices',
    'mesh', 'accumulate', and 'versions' with 'A -> B' by package."""
    self.local = pathlib.Path(self.path)
    """Where this process can write as on a local disk.

    The run directory; for one on an object store another, whose files `upload`
    and `close` bring to the same place there, where it is the one that writes.
    """
    self._writes = writes
    self._mirror: Mirror | None = None
    wanted = to_dict(config)
    with one_line_errors(self.path):
      if not writes:
        _check_shared(self.path)
        check_same(self.path, wanted, source_hash)
        if not is_local(self.path):
          self.local = fetch(self.path)
        return
      _check_not_foreign(self.path)
      self._lock = _lock(self.path)
      try:
        self._open(wanted, source_hash, tokenizer)
        if isinstance(self._lock, ObjectLock):
          self._mirror = Mirror(self.path, _LINES, self._lock)
          self.local = self._mirror.local
          files = self._mirror.files
        else:
          _remove_leftovers(self.local)
          files = {name: MetricsFile(self.local / name) for name in _LINES}
        self._metrics, self._events = files.values()
      except BaseException:
        self._lock.release()
        raise

  @property
  def checkpoints(self) -> epath.Path:
    """Where Orbax writes."""
    return self.path / 'checkpoints'

  @property
  def behind(self) -> str:
    """What cannot be written and why, in one line; empty where nothing."""
    if not self._writes:
      return ''
    if self._mirror:
      return self._mirror.behind
    return self._metrics.behind or self._events.behind

  def log(self, *lines: dict[str, Any]) -> None:
    """Adds lines to metrics.jsonl, with the time; a full disk has them wait.

    Raises:
      UserError: another run has taken the directory.
    """
    if self._writes:
      self._lock.check()
      self._metrics.append(*map(_stamped, lines))

  def event(self, kind: str, step: int, **facts: Any) -> None:
    """Adds to events.jsonl, the run's history, as `log` does.

    Raises:
      UserError: another run has taken the directory.
    """
    if self._writes:
      self._lock.check()
      self._events.append(_stamped({'event': kind, 'step': step, **facts}))
      self.upload()

  def confirm(self) -> None:
    """Makes sure that the directory is still this run's; from any thread.

    An object store is asked; on a disk it cannot be lost.

    Raises:
      UserError: another run has taken the directory, or the store cannot be
        asked.
    """
    if self._writes:
      with one_line_errors(self.path, 'read'):
        self._lock.confirm()

  def sync(self) -> None:
    """Makes all that was added durable: a checkpoint is about to rely on it.

    Raises:
      UserError: it cannot be written, or another run has taken the directory.
    """
    if not self._writes:
      return
    self._lock.check()
    if self._mirror:
      self._mirror.sync()
    else:
      self._metrics.sync()
      self._events.sync()

  def rewind(self, step: int, *, again: bool = False) -> None:
    """Drops what was logged after a step: it is about to be done again.

    Args:
      step: The last that stays.
      again: Whether it is evaluated once more: the validation lines of exactly
        this step go too.

    Raises:
      UserError: the disk cannot be written.
    """
    if not self._writes:
      return
    lines = self._metrics.lines()
    kept = [
      line
      for line in lines
      if line['step'] <= step
      and not _ends(line)
      and not (again and line['step'] == step and _validates(line))
    ]
    if kept != lines:
      self._metrics.replace(kept)

  def done(self) -> dict[str, Any] | None:
    """The line that ends a finished run; None where it has not finished."""
    for line in self.lines():
      if line.get('event') == 'done':
        return line
    return None

  def saved(self) -> int | None:
    """The last step that this process knows to have been saved, if any was."""
    if not self._writes:
      return None
    steps = [
      line['step']
      for line in self._events.lines()
      if line.get('event') == 'saved'
    ]
    return steps[-1] if steps else None

  def lines(self) -> list[dict[str, Any]]:
    """Every whole line of metrics.jsonl; a run that died may cut one off."""
    if self._writes:
      return self._metrics.lines()
    path = self.path / _METRICS
    with one_line_errors(path):
      return parse(path.read_bytes()) if path.exists() else []

  def upload(self) -> None:
    """Has what was written to `local` brought to an object store, if need be.

    In the background; what fails is told by `behind`, and tried again.
    """
    if self._mirror:
      self._mirror.upload()

  def close(self) -> None:
    """Writes what waits, and lets another run begin.

    Raises:
      UserError: something is still unwritten, or another run has taken the
        directory.
    """
    if not self._writes:
      if not is_local(self.path):
        shutil.rmtree(self.local, ignore_errors=True)
      return
    try:
      if self._mirror:
        self._mirror.close()
      else:
        self.sync()
    finally:
      self._lock.release()

  def _open(
    self,
    wanted: dict[str, Any],
    source_hash: str,
    tokenizer: tokenizer_lib.Tokenizer,
  ) -> None:
    path = self.path
    devices = f'{jax.device_count()} {jax.devices()[0].device_kind}'
    if (path / 'config.json').exists():
      self.moved = check_same(path, wanted, source_hash, devices)
      # An older version wrote no vocabulary.
      if not (path / tokenizer.file_name).exists():
        write_atomically(path / tokenizer.file_name, tokenizer.content)
      return
    facts = {
      'source_hash': source_hash,
      'versions': versions(),
      'devices': devices,
    }
    # config.json last: it marks a run directory as one.
    write_atomically(path / 'run.json', _dumps(facts))
    write_atomically(path / tokenizer.file_name, tokenizer.content)
    write_atomically(path / 'config.json', _dumps(wanted))


def _check_shared(path: epath.Path) -> None:
  if not (path / 'config.json').exists():
    raise UserError(
      f'process {jax.process_index()} does not see {path}: --run-dir must be '
      'on a disk that all processes share'
    )


def _check_not_foreign(path: epath.Path) -> None:
  """Also makes the directory, where there are such things."""
  if is_local(path):
    make_directory(pathlib.Path(path))
  elif not path.exists():
    return
  names = {entry.name for entry in path.iterdir() if entry.suffix != '.tmp'}
  names -= {'lock', 'lock.json'}
  if 'config.json' not in names and names not in _BORN:
    raise UserError(
      f'{path} is not empty and holds no config.json: name another --run-dir'
    )


def _lock(path: epath.Path) -> FileLock | ObjectLock:
  return FileLock(pathlib.Path(path)) if is_local(path) else ObjectLock(path)


def _remove_leftovers(path: pathlib.Path) -> None:
  for entry in path.iterdir():
    if _LEFTOVER.fullmatch(entry.name):
      entry.unlink()


def _stamped(line: dict[str, Any]) -> dict[str, Any]:
  values = {key: plain(value) for key, value in line.items()}
  return values | {'time': round(time.time(), 3)}


def _ends(line: dict[str, Any]) -> bool:
  return line.get('event') in ('done', 'stopped')


def _validates(line: dict[str, Any]) -> bool:
  return line.get('split') == 'validation'


def plain(value: Any) -> Any:
  """JSON has no words for non-finite numbers."""
  if isinstance(value, list):
    return [plain(inner) for inner in value]
  if isinstance(value, float) and not math.isfinite(value):
    return str(value)
  return value


def _dumps(value: Any) -> str:
  return json.dumps(value, indent=2) + '\n'
