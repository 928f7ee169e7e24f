"""How far the preparation is: a bar on a terminal, lines in a log."""

import sys
import time
from collections.abc import Sequence
from typing import TextIO

import rich.console
import rich.progress

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
  """Silent, for a caller who does not look; it counts."""

  tokens = 0
  """Made so far."""
  steps: Sequence[str] = ()
  """What is to be begun, in order."""

  def begin(self, what: str, size: int) -> None:
    """Begins a step of so many bytes; of none, there is nothing to show."""

  def count(self, tokens: int, size: int) -> None:
    """Takes tokens and bytes just dealt with."""
    self.tokens += tokens

  def end(self) -> None:
    """Ends the step."""


class Shown(Progress):
  """Shown to a person.

  Args:
    file: A terminal or a log; by default stderr.
  """

  def __init__(self, file: TextIO | None = None):
    self._file = file or sys.stderr
    self._bar: rich.progress.Progress | None = None
    self._task = rich.progress.TaskID(0)
    self._what = ''
    self._total = 0
    self._size = 0
    self._tokens = 0
    self._begun = self._said = 0.0

  def begin(self, what: str, size: int) -> None:
    """As `Progress.begin`."""
    self.end()
    self._what, self._total = what, size
    if what in self.steps:
      number = self.steps.index(what) + 1
      self._what += f' (step {number} of {len(self.steps)})'
    self._size = self._tokens = 0
    self._begun = self._said = time.monotonic()
    if size and self._file.isatty():
      self._bar = rich.progress.Progress(
        rich.progress.TextColumn('{task.description}'),
        rich.progress.BarColumn(),
        rich.progress.DownloadColumn(),
        rich.progress.TextColumn('{task.fields[tokens]}'),
        rich.progress.TimeRemainingColumn(),
        console=rich.console.Console(file=self._file),
        transient=True,
      )
      self._task = self._bar.add_task(self._what, total=size, tokens='')
      self._bar.start()

  def count(self, tokens: int, size: int) -> None:
    """As `Progress.count`."""
    super().count(tokens, size)
    self._tokens += tokens
    self._size += size
    if self._bar is not None:
      self._bar.update(
        self._task, completed=self._size, tokens=self._speed().strip(' ,')
      )
    elif not self._total:
      return
    elif time.monotonic() >= self._said + _SECONDS_BETWEEN_LINES:
      self._said = time.monotonic()
      left = (self._said - self._begun) * (self._total / max(self._size, 1) - 1)
      print(
        f'{self._what}: {self._size / 1e6:,.0f} of'
        f' {self._total / 1e6:,.0f} MB,{self._speed()} about'
        f' {max(left, 0):,.0f} s left',
        file=self._file,
        flush=True,
      )

  def end(self) -> None:
    """As `Progress.end`."""
    if self._bar is not None:
      self._bar.stop()
      self._bar = None

  def _speed(self) -> str:
    if not self._tokens:
      return ''
    seconds = max(time.monotonic() - self._begun, 1e-9)
    return (
      f' {self._tokens / 1e6:,.1f}M tokens,'
      f' {self._tokens / seconds / 1e6:.2f}M a second,'
    )
