"""What a person sees of a run: a live display, or plain lines in a log.

The lines of metrics.jsonl and events.jsonl come in; TensorBoard and Weights &
Biases get them too, where asked for (`train/sinks.py`).
"""

import contextlib
import dataclasses
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

import rich.text

from train import hardware, noise_words, panel, sinks
from train.config import Config, to_dict
from train.live import Live
from train.watch_options import WatchOptions

_SECONDS_BETWEEN_LINES = 10.0


class Monitor:
  """Shows one run.

  Args:
    name: Shown before the progress.
    config: The run.
    step: Taken before now.
    shown: Whether to show and pass on anything; one of several processes does.
    local: Directory for what others write: TensorBoard, Weights & Biases.
    watch: Who else gets the measurements.
    file: The terminal, or a log; lines are plain where it is not a terminal.

  Raises:
    UserError: what `watch` asks for is not installed, or cannot be begun.
  """

  def __init__(
    self,
    name: str,
    config: Config,
    step: int,
    *,
    shown: bool,
    local: pathlib.Path,
    watch: WatchOptions,
    file: TextIO | None = None,
  ):
    self._shown = shown
    self._file = sys.stderr if file is None else file
    self._terminal = (
      shown and self._file.isatty() and os.environ.get('TERM') != 'dumb'
    )
    self._view = panel.View(
      name, config.steps, step, memory_limit=hardware.memory_limit()
    )
    self._tokens_per_step = config.tokens_per_step
    self._power = config.optimizer.power
    self._noise_every = watch.noise
    # The first step to be shown, the last one, and when they were.
    self._first: tuple[int, float] | None = None
    self._last = step, time.monotonic()
    self._start = self._last_line = time.monotonic()
    self._saved: tuple[int, float] | None = None
    self._live: Live | None = None
    self._sinks: sinks.Sinks | None = None
    if shown and (watch.tensorboard or watch.wandb):
      self._sinks = sinks.Sinks(
        watch, local, name, to_dict(config), step, self.say
      )

  def train(self, line: Mapping[str, Any]) -> None:
    """Shows a step that is done.

    Args:
      line: Its line of metrics.jsonl; `tokens_per_second`, `data_seconds`,
        `mfu`, `memory`, `skipped` and what the optimizer measured are shown
        where they are.
    """
    if not self._shown:
      return
    now = time.monotonic()
    view = self._view
    view.line, view.step = line, line['step']
    view.losses.add(line['loss'])
    self._last = view.step, now
    self._first = self._first or self._last
    if 'tokens_per_second' in line:
      self._average(line)
    if self._sinks:
      self._sinks.put(line)
    if self._terminal:
      self._show()
    elif (
      view.step == view.steps or now - self._last_line > _SECONDS_BETWEEN_LINES
    ):
      self._last_line = now
      self.say(_in_short(self._now()))

  def validation(self, line: Mapping[str, Any]) -> None:
    """Shows an evaluation, with the steps that follow it."""
    self._view.validation = line['step'], line['loss']
    if self._sinks:
      self._sinks.put(line)

  def layers(self, line: Mapping[str, Any]) -> None:
    """Passes a step's statistics by layer on; there are too many to show."""
    if self._sinks:
      self._sinks.put(line)

  def noise(self, line: Mapping[str, Any]) -> None:
    """Shows a measurement of gradient noise.

    Args:
      line: Its line of metrics.jsonl.
    """
    if self._sinks:  # Of all tensors there are too many to draw.
      overall = line['overall'].items()
      by_power = {
        name: dict(zip(map(str, line['powers']), value, strict=True))
        if isinstance(value, list)
        else value
        for name, value in overall
      }
      self._sinks.put({
        'step': line['step'], 'split': 'noise', 'seconds': line['seconds'],
        **by_power,
      })  # fmt: skip
    rate = self._view.tokens_per_second
    step_seconds = self._tokens_per_step / rate if rate else None
    self.say(
      noise_words.measured(line, self._power, self._noise_every, step_seconds)
    )

  def event(self, event: Mapping[str, Any]) -> None:
    """Shows what has happened, where a person should know.

    Args:
      event: A line of events.jsonl.
    """
    kind, step = event['event'], event['step']
    if kind == 'saved':
      self._saved = step, time.monotonic()
      self._view.alert = ''
    elif kind == 'save_failed':
      self._view.alert = f'step {step} was not saved: {event["error"]}'
      self.say(self._view.alert)
    elif kind == 'fell_back':
      self.say(
        f'the checkpoint of step {event["refused"]} is not used: '
        f'{event["reason"]}'
      )
    elif kind == 'resumed':
      self.say(f'continues from step {step}')
    elif kind == 'skipped':
      self.say(
        f'step {step} changed nothing: {event["reason"]} (loss '
        f'{float(event["loss"]):.4g}, gradient norm '
        f'{float(event["grad_norm"]):.4g})'
      )

  def say(self, message: str) -> None:
    """Prints a line above the display."""
    if not self._shown:
      return
    line = f'{self._view.name}: {message}\n'
    if self._live:
      self._live.above(line)
      return
    # A log on a full disk is no reason to stop training.
    with contextlib.suppress(OSError):
      self._file.write(line)
      self._file.flush()

  def status(self, waiting: str) -> None:
    """Shows what the run is waiting for; nothing once it is empty."""
    self._view.status = waiting
    if waiting and self._terminal:
      self._show()

  def close(self, wait: bool = True) -> None:
    """Leaves the display as it stands.

    Args:
      wait: Until what is still to pass on to others is passed on.
    """
    try:
      if self._sinks and wait:
        self._sinks.close()
    finally:
      live, self._live = self._live, None
      if live:
        self._view.status = ''
        live.stop()

  def _show(self) -> None:
    if self._live is None:
      self._live = Live(self._file, self._draw)

  def _draw(self, width: int, height: int, unicode: bool) -> rich.text.Text:
    return panel.draw(self._now(), width, height, unicode)

  def _now(self) -> panel.View:
    """The view, with the times of this moment."""
    now, view = time.monotonic(), self._view
    saved = self._saved and (self._saved[0], now - self._saved[1])
    return dataclasses.replace(
      view, elapsed=now - self._start, left=self._left(now), saved=saved
    )

  def _left(self, now: float) -> float | None:
    """Seconds until the end, evaluations and saves among them."""
    (step, then), steps = self._last, self._view.steps
    if step == steps:
      return 0.0
    if self._first is None or step == self._first[0]:
      return None
    pace = (then - self._first[1]) / (step - self._first[0])
    return max(0.0, pace * (steps - step) - (now - then))

  def _average(self, line: Mapping[str, Any]) -> None:
    """Of what jumps from step to step, a mean over the last ten or so."""
    view, rate = self._view, line['tokens_per_second']
    view.tokens_per_second = _closer(view.tokens_per_second, rate)
    if 'mfu' in line:
      view.mfu = _closer(view.mfu, line['mfu'])
    if 'data_seconds' in line:
      share = line['data_seconds'] * rate / self._tokens_per_step
      view.data_share = _closer(view.data_share, share)


def _closer(mean: float | None, value: float) -> float:
  return value if mean is None else mean + 0.1 * (value - mean)


def _in_short(view: panel.View) -> str:
  """A view as a line of a log."""
  line = view.line
  parts = [f'step {view.step}/{view.steps}', f'loss {line["loss"]:.4f}']
  if view.validation:
    at, loss = view.validation
    parts.append(f'held-out {loss:.4f} at step {at}')
  for key, form in (
    ('learning_rate', 'lr {:.3g}'),
    ('grad_norm', 'norm {:.3g}'),
    ('clipped_norm', 'clipped {:.3g}'),
    ('powered_norm', 'powered {:.3g}'),
  ):
    if key in line:
      parts.append(form.format(line[key]))
  if view.tokens_per_second is not None:
    parts.append(f'{panel.thousands(view.tokens_per_second)} tok/s')
  if view.mfu is not None:
    parts.append(f'MFU {view.mfu:.1%}')
  if view.data_share is not None:
    parts.append(f'data {view.data_share:.1%}')
  if 'memory' in line:
    parts.append(panel.gibibytes(line['memory']))
  if line.get('skipped'):
    parts.append(f'skipped {line["skipped"]}')
  if view.left is not None:
    parts.append(f'{panel.clock(view.left)} left')
  return '  '.join(parts)
