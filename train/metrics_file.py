"""A file of JSON objects, one a line, that outlives a full disk."""

import contextlib
import json
import os
import pathlib
import threading
import time
from collections.abc import Iterable
from typing import Any

from train import storage
from train.errors import UserError

_PATIENCE = 1.0  # Seconds between attempts to write to a disk that fails.


class MetricsFile:
  """Appends whole lines; those that cannot be written wait, in order.

  What a process that died left of a line is completed or dropped.

  Args:
    path: On a local disk; made with the first line.

  Raises:
    UserError: there is a file that cannot be read, or mended.
  """

  def __init__(self, path: pathlib.Path):
    self._path = path
    self.version = 0
    """Counts what this object has changed."""
    self._lock = threading.Lock()
    self._waiting = b''
    self._error: OSError | None = None
    self._again = 0.0  # When to try again.
    with storage.one_line_errors(path):
      found = self._read()
      if found and not found.endswith(b'\n'):
        self._replace(parse(found))
        self.version += 1
      self._size = len(self._read())

  @property
  def behind(self) -> str:
    """What waits to be written and why, in one line; empty where nothing."""
    with self._lock:
      if self._error is None:
        return ''
      count = self._waiting.count(b'\n')
      return (
        f'{storage.reason(self._error, self._path)}; {count} '
        f'line{"s" * (count != 1)} of it wait{"s" * (count == 1)} in memory'
      )

  def append(self, *lines: dict[str, Any]) -> None:
    """Adds lines, of what JSON can hold; never fails."""
    text = dumps(lines).encode()
    with self._lock:
      self._waiting += text
      self.version += 1
      if self._error is None or time.monotonic() >= self._again:
        self._write()

  def sync(self) -> None:
    """Makes all lines durable.

    Raises:
      UserError: they cannot be written.
    """
    with self._lock:
      self._write()
    if self.behind:
      raise UserError(self.behind)
    with storage.one_line_errors(self._path), self._path.open('ab') as file:
      os.fsync(file.fileno())
      storage.sync_directory(self._path.parent)

  def lines(self) -> list[dict[str, Any]]:
    """Every whole line."""
    return parse(self.content())

  def content(self) -> bytes:
    """All lines, also those that wait."""
    with self._lock:
      return self._read()[: self._size] + self._waiting

  def replace(self, lines: Iterable[dict[str, Any]]) -> None:
    """Puts other lines in the place of all there are.

    Raises:
      UserError: they cannot be written; then the old ones stay.
    """
    with self._lock, storage.one_line_errors(self._path):
      self._size = self._replace(lines)
      self.version += 1
      self._waiting, self._error = b'', None

  def _read(self) -> bytes:
    try:
      return self._path.read_bytes()
    except FileNotFoundError:
      return b''

  def _replace(self, lines: Iterable[dict[str, Any]]) -> int:
    text = dumps(lines)
    storage.write_atomically(self._path, text)
    return len(text.encode())

  def _write(self) -> None:
    """Appends what waits: all of it, or nothing."""
    if not self._waiting:
      return
    try:
      with self._path.open('ab', buffering=0) as file:
        self._size = min(self._size, file.tell())
        try:
          if file.tell() > self._size:  # A failed attempt has left something.
            file.truncate(self._size)
          rest = self._waiting
          while rest:
            rest = rest[file.write(rest) :]
        except OSError:
          with contextlib.suppress(OSError):
            file.truncate(self._size)
          raise
    except OSError as error:
      self._error, self._again = error, time.monotonic() + _PATIENCE
    else:
      self._size += len(self._waiting)
      self._waiting, self._error = b'', None


def dumps(lines: Iterable[dict[str, Any]]) -> str:
  """Lines as the file holds them."""
  return ''.join(json.dumps(line) + '\n' for line in lines)


def parse(content: bytes) -> list[dict[str, Any]]:
  """Every whole line; a run that died, or its machine, may damage some."""
  lines = []
  for text in content.decode(errors='replace').split('\n'):
    try:
      line = json.loads(text)
    except (ValueError, RecursionError):
      continue
    if isinstance(line, dict) and 'step' in line:
      lines.append(line)
  return lines
