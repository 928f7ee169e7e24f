"""Which checkpoints of a run stay."""

import math
from collections.abc import Mapping

from train.config import KeepConfig


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
