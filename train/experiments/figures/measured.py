"""u(p) as a run has measured it of its own gradients."""

import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from train import charts, plots
from train.errors import UserError
from train.experiments.figure_page import Section
from train.run_log import read_run

_MOST_DRAWN = 20  # Diagnostics.


def section(
  run_dir: pathlib.Path, drifts: Mapping[str, Callable[[float], float]]
) -> tuple[Section, dict[str, Any]]:
  """Draws u(p) over u(1) beside that of known noise.

  Args:
    run_dir: Of a run with moments.
    drifts: By name of the noise, the same ratio at a power.

  Returns:
    The section, and what results.json holds.

  Raises:
    UserError: as for `diagnostics`.
  """
  lines = diagnostics(run_dir)
  powers = tuple(lines[0]['powers'])
  shares = [
    share
    for line in lines
    if tuple(line['powers']) == powers
    and (share := _over_one(powers, line['overall']['u'])) is not None
  ]
  heading = f'Measured: {run_dir.name}'
  if not shares:
    text = 'No diagnostic of this run could tell a signal from noise.'
    return Section(heading, text, ''), {'powers': list(powers), 'ratio': None}
  mean = np.mean(shares, 0)
  curves = [
    charts.Curve(0, list(zip(powers, share, strict=True)), 'faint')
    for share in shares[:: len(shares) // _MOST_DRAWN + 1]
  ]
  curves.append(
    charts.Curve(0, list(zip(powers, mean, strict=True)), 'marked', 'mean')
  )
  for run, kind in enumerate(drifts, start=1):
    points = [(p, drifts[kind](p)) for p in powers]
    curves.append(charts.Curve(run, points, 'dashed'))
  drawn = plots.plot(
    "u(p) over u(1) of a run's gradients, beside three kinds of noise.",
    charts.y_axis('Power p', powers),
    charts.y_axis(
      'u(p) / u(1)', [y for curve in curves for _, y in curve.points]
    ),
    curves,
  )
  text = (
    f'u(p) = |mean of phi_p| / rms of phi_p over u(1), as {len(shares)} '
    'diagnostics of the run had it over all parameters, and their mean: at the '
    'noise of a part of its batch, eps ignored. Dashed: the kinds of noise '
    'above, where noise drowns the mean.'
  )
  legend = charts.legend(['measured', *drifts])
  values = {'powers': list(powers), 'ratio': mean.tolist(), 'n': len(shares)}
  return Section(heading, text, legend + drawn), values


def diagnostics(run_dir: pathlib.Path) -> list[dict[str, Any]]:
  """What the diagnostics of a run found.

  Raises:
    UserError: the directory holds no run, or one without moments.
  """
  lines = list(read_run(run_dir.name, epath.Path(run_dir)).noise.values())
  if not lines:
    raise UserError(
      f'{run_dir} has no moments of gradients: run it with --noise 100, say'
    )
  return lines


def _over_one(
  powers: Sequence[float], u: Sequence[float | None]
) -> np.ndarray | None:
  """u(p) / u(1); None where there is none."""
  values = np.asarray([np.nan if x is None else x for x in u], np.float64)
  one = values[list(powers).index(1.0)]
  if not (one > 0 and np.isfinite(values).all()):
    return None
  return values / one
