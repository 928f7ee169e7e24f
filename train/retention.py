"""Which checkpoints of a run stay."""

import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Mapping

from etils import epath

from train import manifest, step_dirs
from train.config import KeepConfig

_logger = logging.getLogger('train')


def kept(
  losses: Mapping[int, float | None], keep: KeepConfig, newest: int
) -> set[int]:
  """The steps to keep.

  Args:
    losses: Of each complete one, on the held-out split; None where it was not
      evaluated.
    keep: The rules.
    newest: The step just saved, which stays. Those after it are of a past that
      the run has gone back behind, and go.
  """
  past = sorted(step for step in losses if step <= newest)
  steps = {newest, *past[-keep.last :]}
  scored = [
    (loss, -step)  # Of equals the latest.
    for step in past
    if (loss := losses[step]) is not None and math.isfinite(loss)
  ]
  if keep.best and scored:
    steps.add(-min(scored)[1])
  if keep.every:
    steps.update(step for step in past if step % keep.every == 0)
  return steps


class Keeper:
  """Removes what the rules do not keep; in process 0."""

  def __init__(
    self, directory: epath.Path, keep: KeepConfig, confirm: Callable[[], None]
  ):
    """Looks at nothing yet.

    Args:
      directory: Of all checkpoints.
      keep: The rules.
      confirm: Called before each removal; raises where it is not ours to do.
    """
    self._confirm = confirm
    self._directory = directory
    self._keep = keep
    self._losses: dict[int, float | None] = {}  # Of complete ones.
    self._damaged: set[int] = set()

  def refuse(self, steps: Iterable[int]) -> None:
    """Counts steps as damaged: in the rules they are not there."""
    self._damaged.update(steps)

  def saved(self, step: int, validation_loss: float | None) -> None:
    """Removes surplus ones, now that a step is complete.

    Where that cannot be done it warns; they go after the next save.
    """
    try:
      self._damaged.discard(step)
      self._read_losses()
      self._losses[step] = validation_loss
      keep = kept(self._losses, self._keep, step)
      for other, _ in step_dirs.present(self._directory):
        if other not in keep:
          self._confirm()
          self._losses.pop(other, None)
          step_dirs.remove(self._directory, other)
    except Exception as error:
      _logger.warning(
        'warning: %s', step_dirs.explain(error, self._directory, 'write')
      )

  def _read_losses(self) -> None:
    """Those of checkpoints that an earlier start of the run has saved."""
    for step, complete in step_dirs.present(self._directory):
      if complete and step not in self._losses.keys() | self._damaged:
        with contextlib.suppress(manifest.DamagedError):
          content = manifest.read(self._directory / str(step), step)
          self._losses[step] = content['validation_loss']
