"""Moments of gradients that a run with --noise has measured."""

import math
import pathlib

from train.errors import UserError
from train.run_log import read_run


def step_ratios(run_dir: pathlib.Path) -> dict[float, float]:
  """r(p) by p, as `gradpower_optax.noise` has it, the mean over the run.

  It is that of an eighth of a batch or less, from as few gradients, where what
  Adam sees is the batch: at p = 1.2 right to about 0.005 under Gaussian and
  Laplace's noise ten times the signal, to 0.03 where it is less or bounded.

  Raises:
    UserError: the directory holds no run, or one without moments.
  """
  log = read_run(run_dir.name, run_dir)
  found: dict[float, list[float]] = {}
  for line in log.noise.values():
    overall = line['overall']
    for p, r in zip(line['powers'], overall['step_ratio'], strict=True):
      found.setdefault(float(p), []).append(float(r))
  if not found:
    raise UserError(
      f'{run_dir} has no moments of gradients: run it with --noise 100, say'
    )
  return {p: math.fsum(r) / len(r) for p, r in found.items()}
