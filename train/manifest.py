"""The digests of a checkpoint's files, written when all of them are complete.

Orbax does not notice a bit that flips inside an array's data.
"""

import datetime
import errno
import hashlib
import json
import math
import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from etils import epath

from train import storage

NAME = 'manifest.json'
VERSION = 1

_BLOCK = 2**22  # Bytes.
_THREADS = 8  # hashlib works without Python's lock.

_SECONDS, _RATE = 600, 20e6  # A slow disk's bytes a second.


class DamagedError(Exception):
  """A checkpoint is not what was saved; the text says why, in a few words."""


def seconds(size: int) -> float:
  """How long processes that write or read so many bytes are waited for."""
  return _SECONDS + size / _RATE


def list_files(directory: epath.Path) -> list[str]:
  """The paths below a checkpoint's directory, its manifest excepted, sorted."""
  return sorted(set(_below(directory, '')) - {NAME})


def digests(
  directory: epath.Path, names: Iterable[str], *, flush: bool = False
) -> dict[str, dict[str, Any]]:
  """Reads files.

  Args:
    directory: A checkpoint's.
    names: Relative to it.
    flush: Whether a disk has to have them, too.

  Returns:
    For each its 'bytes' and 'sha256', a hexadecimal number.

  Raises:
    OSError: one cannot be read.
  """
  waiting = iter(list(names))  # Of a list: threads may share it.
  found: dict[str, dict[str, Any]] = {}
  errors: list[Exception] = []

  def work() -> None:
    try:
      for name in waiting:
        found[name] = _digest(directory / name, flush)
    except Exception as error:
      errors.append(error)

  # Those of a pool would keep a program from ending.
  threads = [
    threading.Thread(target=work, daemon=True) for _ in range(_THREADS)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  if errors:
    raise errors[0]
  return found


def write(
  directory: epath.Path,
  step: int,
  files: Mapping[str, Any],
  validation_loss: float | None,
  facts: Mapping[str, Any],
) -> None:
  """Makes a checkpoint complete.

  Args:
    directory: Its own.
    step: How many were taken.
    files: As `digests` returns them.
    validation_loss: Nats a token; None where unknown.
    facts: What else to tell of the run.

  Raises:
    OSError: it cannot be written.
  """
  if validation_loss is not None and not math.isfinite(validation_loss):
    validation_loss = None
  now = datetime.datetime.now(datetime.UTC)
  content = {
    'version': VERSION,
    'step': step,
    'validation_loss': validation_loss,
    'saved_at': now.isoformat(timespec='seconds'),
    **facts,
    'data': {**facts.get('data', {}), 'next_batch': step},
    'files': dict(sorted(files.items())),
  }
  if storage.is_local(directory):
    for folder in {os.path.dirname(name) for name in files}:
      _flush_path(directory / folder)
  storage.write_atomically(
    directory / NAME, json.dumps(content, indent=1) + '\n'
  )
  if storage.is_local(directory):
    for folder in (directory, directory.parent):
      _flush_path(folder)


def read(directory: epath.Path, step: int) -> dict[str, Any]:
  """A checkpoint's manifest.

  Raises:
    DamagedError: there is none, or it is not that of this step.
    OSError: it cannot be read.
  """
  try:
    text = (directory / NAME).read_bytes()
  except (FileNotFoundError, NotADirectoryError) as error:
    raise DamagedError(f'no {NAME}: its save was cut off') from error
  try:
    content = json.loads(text)
    if content['version'] != VERSION:
      raise DamagedError(f'{NAME} is of version {content["version"]}')
    if content['step'] != step:
      raise DamagedError(f'{NAME} is of step {content["step"]}')
    for entry in content['files'].values():
      if not isinstance(entry['bytes'], int) or 'sha256' not in entry:
        raise KeyError('files')
    return content
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise DamagedError(f'{NAME} is damaged') from error


def check(directory: epath.Path, files: Mapping[str, Any]) -> None:
  """Compares files with what they were.

  Args:
    directory: A checkpoint's.
    files: Some of its manifest's.

  Raises:
    DamagedError: one is missing or another.
    OSError: one cannot be read.
  """
  try:
    found = digests(directory, files)
  except (FileNotFoundError, NotADirectoryError) as error:
    missing = [name for name in files if not (directory / name).exists()]
    raise DamagedError(f'{(missing or ["a file"])[0]} is missing') from error
  for name, entry in files.items():
    if found[name]['bytes'] != entry['bytes']:
      raise DamagedError(
        f'{name} has {found[name]["bytes"]} bytes, not {entry["bytes"]}'
      )
    if found[name]['sha256'] != entry['sha256']:
      raise DamagedError(f'{name} is not what was written')


def _below(folder: epath.Path, prefix: str) -> Iterator[str]:
  for path in folder.iterdir():
    if path.is_dir():
      yield from _below(path, f'{prefix}{path.name}/')
    else:
      yield f'{prefix}{path.name}'


def _digest(path: epath.Path, flush: bool) -> dict[str, Any]:
  digest, size = hashlib.sha256(), 0
  with path.open('rb') as file:
    if flush and storage.is_local(path):
      _flush(file.fileno())
    while block := file.read(_BLOCK):
      digest.update(block)
      size += len(block)
  return {'bytes': size, 'sha256': digest.hexdigest()}


def _flush_path(path: epath.Path) -> None:
  number = os.open(path, os.O_RDONLY)
  try:
    _flush(number)
  finally:
    os.close(number)


def _flush(number: int) -> None:
  try:
    os.fsync(number)
  except OSError as error:
    # Not every file system can, for folders or for what is open to read.
    if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
      raise
