"""When a run saves: as often as asked, and again after a save that failed.

A save runs beside the steps. Where it fails the run goes on, says so at once
and tries again, later each time. Several processes decide alike: what process 0
knows passes to the others at steps that all of them can tell.
"""

import time
from collections.abc import Callable
from typing import Any

from train import distributed
from train.checkpoint import Checkpoints, Outcome
from train.errors import UserError
from train.run_dir import RunDir

_FIRST_PAUSE = 2.0  # Seconds before another try; twice as long each time,
_DOUBLINGS = 7  # so often: 4 minutes.
_LAST_TRIES = 5  # Of a state that is not to change any more.


class Saver:
  """The saves of one run.

  Args:
    checkpoints: Where to.
    directory: Whose lines a checkpoint relies on.
    tell: Called as `RunDir.event`, with each outcome.
    every: Steps between saves.
    step: The last one saved; 0 for none.
  """

  def __init__(
    self,
    checkpoints: Checkpoints,
    directory: RunDir,
    tell: Callable[..., None],
    every: int,
    step: int,
  ):
    self.step = step
    """Of the newest save that was begun."""
    self.complete = step
    """Of the newest that is complete, as far as is known; 0 for none."""
    self._checkpoints = checkpoints
    self._directory = directory
    self._tell = tell
    self._every = every
    # Several processes agree on how a save went at every so many steps.
    self._agree_every = max(1, every // 10) if distributed.several() else 1
    self._open = False  # Whether they have not yet; in all of them alike.
    self._under_way = False
    self._error = ''  # Of the last save.
    self._failures, self._failed_at = 0, 0.0

  def due(self, step: int) -> bool:
    """Whether to save after this step; to be asked once after each."""
    if distributed.is_main():
      self._report(self._checkpoints.finished())  # Said at once.
    regular = step % self._every == 0
    if self._open and (regular or step % self._agree_every == 0):
      verdict = distributed.share(self._verdict())
      self._open = verdict != 'complete'
      if verdict in ('failed', 'again'):
        return verdict == 'again'
    return regular

  def save(
    self, step: int, state: Any, validation_loss: float | None = None
  ) -> None:
    """Starts a save, if this step has none; its outcome is heard of later."""
    self._report(self._checkpoints.wait())  # Of the save before.
    distributed.progress(step)
    if step == self.step and not self._error:
      return
    self.step, self._open = step, True
    if error := self._unwritten():
      self._report([Outcome(step, 0.0, 0, error)])
      return
    self._under_way = True
    self._checkpoints.save(step, state, validation_loss)

  def finish(
    self,
    step: int,
    state: Any,
    validation_loss: float | None = None,
    *,
    hurry: bool = False,
  ) -> None:
    """Saves and waits until it is complete.

    Args:
      step: The last one.
      state: After it.
      validation_loss: Of it, if known.
      hurry: Whether one failure is enough: the machine is about to be taken.

    Raises:
      UserError: it cannot be saved.
    """
    tries = 1 if hurry else _LAST_TRIES
    for i in range(tries):
      self.save(step, state, validation_loss)
      self._report(self._checkpoints.wait())
      if not self._error:
        return
      if i + 1 < tries:
        time.sleep(_FIRST_PAUSE * 2**i)
    with distributed.together():
      raise UserError(
        f'{self._error}: step {step} is not saved. Mend that and give the same '
        'command again; it continues from '
        + (f'step {self.complete}' if self.complete else 'the beginning')
      )

  def close(self) -> None:
    """Waits for a save under way, and tells how it went."""
    self._report(self._checkpoints.wait())

  def _verdict(self) -> str:
    """On the last save: 'under way', 'complete', 'failed', or 'again'."""
    if self._under_way:
      return 'under way'
    if not self._error:
      return 'complete'
    pause = _FIRST_PAUSE * 2 ** min(self._failures - 1, _DOUBLINGS)
    over = time.monotonic() - self._failed_at >= pause
    return 'again' if over else 'failed'

  def _unwritten(self) -> str:
    """What keeps the lines before a checkpoint from being durable; or ''."""
    error = ''
    try:
      self._directory.sync()
    except UserError as failure:
      error = str(failure)
    return distributed.share(error)

  def _report(self, outcomes: list[Outcome]) -> None:
    for outcome in outcomes:
      self._under_way, self._error = False, outcome.error
      if outcome.error:
        self._failures += 1
        self._failed_at = time.monotonic()
        self._tell('save_failed', outcome.step, error=outcome.error)
        continue
      self.complete, self._failures = outcome.step, 0
      self._tell(
        'saved',
        outcome.step,
        seconds=round(outcome.seconds, 3),
        bytes=outcome.bytes,
      )
