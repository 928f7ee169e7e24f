"""A program in an environment of its own, read line by line."""

import collections
import contextlib
import os
import queue
import re
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class PeerError(Exception):
  """A peer could not be run; the message is one line and names it."""


class Peer(Protocol):
  """A training program that runs in turn with others."""

  @property
  def name(self) -> str:
    """What it is, for a table."""

  @property
  def facts(self) -> dict[str, Any]:
    """'versions', and 'start_seconds' from its start to steps taken."""

  def block(self, steps: int) -> float:
    """Takes steps and waits for them.

    Returns:
      Seconds a step.

    Raises:
      PeerError: it has ended, or says nothing.
    """

  def close(self) -> None:
    """Ends it."""


class Process:
  """Starts a program.

  Args:
    name: For messages.
    command: The program and its arguments.
    environment: Its variables.

  Raises:
    PeerError: it cannot be started.
  """

  def __init__(
    self, name: str, command: Sequence[str], environment: Mapping[str, str]
  ):
    self._name = name
    self._lines: queue.Queue[tuple[str | None, float]] = queue.Queue()
    self._last: collections.deque[str] = collections.deque(maxlen=20)
    try:
      # In a session of its own: Ctrl-C is for us, who then close it.
      self._process = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors='replace',
        start_new_session=True,
      )
    except OSError as error:
      raise PeerError(f'{name}: {command[0]}: {error.strerror}') from error
    self._reader = threading.Thread(target=self._read, daemon=True)
    self._reader.start()

  def _read(self) -> None:
    assert self._process.stdout is not None
    for line in self._process.stdout:
      self._lines.put((line.rstrip('\n'), time.perf_counter()))
    self._lines.put((None, time.perf_counter()))

  def send(self, line: str) -> None:
    """Writes a line to its standard input.

    Raises:
      PeerError: it has ended.
    """
    assert self._process.stdin is not None
    try:
      self._process.stdin.write(line + '\n')
      self._process.stdin.flush()
    except OSError:
      raise PeerError(f'{self._name}: it has ended{self._why()}') from None

  def wait_for(
    self, pattern: re.Pattern[str], seconds: float
  ) -> tuple[re.Match[str], float]:
    """Reads on until a line matches.

    Args:
      pattern: To search for.
      seconds: To wait at most.

    Returns:
      The match, and the `time.perf_counter()` at which the line came.

    Raises:
      PeerError: it ends first, or takes longer.
    """
    deadline = time.monotonic() + seconds
    while True:
      try:
        line, came = self._lines.get(
          timeout=max(0.0, deadline - time.monotonic())
        )
      except queue.Empty:
        raise PeerError(
          f'{self._name}: no answer in {seconds:.0f} s{self._why()}'
        ) from None
      if line is None:
        self._lines.put((None, came))
        raise PeerError(f'{self._name}: it has ended{self._why()}')
      if line.strip():
        self._last.append(line.strip())
      if match := pattern.search(line):
        return match, came

  def discard(self) -> None:
    """Forgets the lines that have come."""
    while not self._lines.empty():
      line, came = self._lines.get()
      if line is None:
        self._lines.put((None, came))
        return

  def pause(self) -> None:
    """Stops it where it is."""
    self._signal(signal.SIGSTOP)

  def resume(self) -> None:
    """Lets it go on."""
    self._signal(signal.SIGCONT)

  def _signal(self, number: int) -> None:
    if self._process.poll() is None:
      os.killpg(self._process.pid, number)

  def _why(self) -> str:
    """The line that most likely says what went wrong."""
    lines = [line for line in self._last if 'Error' in line] or self._last
    return f': {lines[-1]}' if lines else ''

  def close(self) -> None:
    """Kills it with all its children; again does nothing."""
    self._signal(signal.SIGKILL)
    self._process.wait()
    self._reader.join(timeout=10)
    for pipe in (self._process.stdin, self._process.stdout):
      if pipe is not None:
        with contextlib.suppress(OSError):  # It never reads what is left.
          pipe.close()


def environment(**variables: str) -> dict[str, str]:
  """Ours without what is meant for our JAX, and with more variables."""
  kept = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(('JAX_', 'XLA_'))
  }
  return kept | variables
