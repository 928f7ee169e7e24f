"""What a person sees of a run: a progress bar, or plain lines in a log."""

import sys
import time
from typing import TextIO

import tqdm

_SECONDS_BETWEEN_LINES = 10.0


class Display:
  """Progress of one run.

  Args:
    name: Shown before the progress.
    steps: Of the whole run.
    step: Taken before now.
    shown: Whether to show anything; one of several processes does.
    file: The terminal, or a log; lines are plain where it is not a terminal.
  """

  def __init__(
    self,
    name: str,
    steps: int,
    step: int,
    shown: bool = True,
    file: TextIO | None = None,
  ):
    self._shown = shown
    self._file = sys.stderr if file is None else file
    self._name = name
    self._steps = steps
    self._first = step
    self._start = self._last_line = time.monotonic()
    self._validation = ''
    self._rate: float | None = None  # A mean over the last ten steps or so.
    self._bar = None
    if shown and self._file.isatty():
      self._bar = tqdm.tqdm(
        total=steps, initial=step, desc=name, unit='step', file=self._file,
        bar_format='{desc} {bar} {n_fmt}/{total_fmt}{postfix} '
        '[{elapsed}<{remaining}]', dynamic_ncols=True,
      )  # fmt: skip

  def train(self, step: int, loss: float, tokens_per_second: float) -> None:
    """Shows a step that is done."""
    if not self._shown:
      return
    if self._rate is None:
      self._rate = tokens_per_second
    self._rate += 0.1 * (tokens_per_second - self._rate)
    numbers = (
      f'loss {loss:.3f}{self._validation} {_thousands(self._rate)} tok/s'
    )
    if self._bar is not None:
      self._bar.set_postfix_str(numbers, refresh=False)
      self._bar.update(step - self._bar.n)
      return
    now = time.monotonic()
    if step == self._steps or now - self._last_line > _SECONDS_BETWEEN_LINES:
      self._last_line = now
      pace = (now - self._start) / max(1, step - self._first)
      left = _clock(pace * (self._steps - step))
      self.say(f'step {step}/{self._steps}  {numbers}  {left} left')

  def validation(self, loss: float) -> None:
    """Shows an evaluation with the steps that follow it."""
    self._validation = f' (held-out {loss:.3f})'

  def say(self, message: str) -> None:
    """Prints a line above the bar."""
    if not self._shown:
      return
    line = f'{self._name}: {message}'
    if self._bar is not None:
      self._bar.write(line, file=self._file)
    else:
      print(line, file=self._file, flush=True)

  def close(self) -> None:
    """Leaves the bar as it stands."""
    if self._bar is not None:
      self._bar.close()


def _thousands(number: float) -> str:
  return f'{number / 1e3:.1f}k' if number >= 1e3 else f'{number:.0f}'


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}' if hours else (
    f'{minutes}:{seconds:02}'
  )  # fmt: skip
