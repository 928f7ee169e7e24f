"""Fig. 7: Example 4.1, in closed form, simulated, and with other noise."""

import functools
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import jax
import numpy as np

from train import charts, plots
from train.experiments import theory
from train.experiments.figure_page import Section
from train.experiments.figures import measured
from train.experiments.figures.design import Design, Drawing, Request
from train.experiments.figures.results import Results

VARIES = ()
TRAINS = False
_STEPS = 1_000_000
_POWERS = np.arange(10, 45) / 20  # 0.5 to 2.2.
_NOISES = (0.5, 2.0, 10.0, 100.0, 1000.0)
# Noise over mean, eps, best power: computed once in this project [I].
_CHECKS = (
  (2, 1e-8, 0.92), (3, 1e-8, 1.05), (5, 1e-8, 1.14), (10, 1e-8, 1.22),
  (30, 1e-8, 1.35), (100, 1e-8, 1.53), (1000, 1e-8, 2.03), (10, 1e-10, 1.59),
  (10, 1e-12, 1.96),
)  # fmt: skip
_MEAN = 1e-6
# Relative drift at p = 1.2 where noise drowns the mean [I].
_Kind: TypeAlias = Literal['uniform', 'gaussian', 'laplace']
_DRIFTS: Mapping[_Kind, float]
_DRIFTS = {'uniform': 1.065, 'gaussian': 0.996, 'laplace': 0.902}
_UNIFORM_SD = 3**-0.5  # Of noise of half-width 1.
_TOWARDS_NONE = 1e-300  # eps.
_WIDEST = 0.2  # Half an interval that is worth drawing.
_NOTES = (
  'The paper: g uniform in (mu - sigma, mu + sigma), mu = 1e-6, b1 0.9, b2 '
  '0.95, eps 1e-8; its figure has u_t at t = 1e6 against p for several sigma / '
  'mu, which are not known here [P][?]. High noise: p* > 1, between two bounds '
  '[P]; low noise: p* < 1 [N].',
  'A single u_t is one draw of a random number: where noise is high its '
  'standard deviation, near sqrt((1 - b1) / (1 + b1)) = 0.23 whatever t [I], '
  'is above its mean. Its shape along p shows anything only because all p '
  'share their draws. The average over all steps lies a little below the '
  'closed form, since the mean of a ratio is not the ratio of the means.',
  'What the example recommends rests on bounded noise and on eps: with heavier '
  'tails the gain at p = 1.2 is none or a loss, below. It says nothing of a '
  "network by itself: --noise-run draws a run's own gradients beside it.",
)


def design(request: Request) -> Design:
  """What is computed.

  Raises:
    UserError: the run has no moments.
  """
  if request.noise_run is not None:
    measured.diagnostics(request.noise_run)
  return Design(
    'Figure 7: Example 4.1',
    work=f'simulates {_STEPS:,} steps for {len(_POWERS)} powers at '
    f'{len(_NOISES)} noise ratios, and integrates: less than a minute',
  )


def draw(results: Results) -> Drawing:
  """The update along p, check values, and other noise."""
  request = results.request
  simulated = theory.simulate(
    jax.random.key(request.seeds[0]),
    _POWERS.tolist(),
    _NOISES,
    mean=_MEAN,
    steps=_STEPS,
  )
  checks = _checks()
  sections = [
    _along_p(simulated),
    _one_step(simulated),
    Section(
      'Check values',
      'The power of the greatest closed form, beside values computed '
      'independently [I], and the bounds of the paper [P], which are for sigma '
      'far above mu and far below 1.',
      '',
      [
        ['sigma / mu', 'eps', 'p*', 'check', 'p* minus check', 'bounds [P]'],
        *(
          [f'{c["noise"]:g}', f'{c["eps"]:g}', f'{c["best"]:.3f}',
           f'{c["check"]:.2f}', charts.signed(c['best'] - c['check'], 3),
           '{:.2f} to {:.2f}'.format(*c['bounds'])]
          for c in checks
        ),
      ],
    ),
    _kinds(),
    _best_by_noise(),
  ]  # fmt: skip
  notes = list(_NOTES)
  found = None
  if request.noise_run is not None:
    section, found = measured.section(
      request.noise_run,
      {kind: functools.partial(_drift, kind) for kind in _DRIFTS},
    )
    sections.append(section)
  values = {
    'powers': _POWERS.tolist(),
    'noises': list(_NOISES),
    'closed_form': [_closed(noise).tolist() for noise in _NOISES],
    'simulated': {
      'mean': simulated.mean.tolist(),
      'error': simulated.error.tolist(),
      'last': simulated.last.tolist(),
    },
    'checks': checks,
    'drift_at_1.2': {kind: _drift(kind, 1.2) for kind in _DRIFTS},
    'measured': found,
  }
  lines = [
    f'sigma / mu = {c["noise"]:g}, eps = {c["eps"]:g}: p* = {c["best"]:.3f}, '
    f'check {c["check"]:.2f}'
    for c in checks
  ]
  lines += [
    f'{kind} noise: step at p = 1.2 over that at 1 is '
    f'{_drift(kind, 1.2):.3f}, check {wanted:.3f}'
    for kind, wanted in _DRIFTS.items()
  ]
  return Drawing(sections, notes, values, lines)


def _closed(noise: float) -> np.ndarray:
  return theory.long_time_ratio(_POWERS, noise, mean=_MEAN)


def _drift(kind: _Kind, p: float) -> float:
  """Step at p over that at 1, eps ignored, where noise drowns the mean."""
  one, power = theory.long_time_ratio(
    np.array([1.0, p]), 1e3, mean=1.0, eps=_TOWARDS_NONE, kind=kind
  )
  return float(power / one)


def _checks() -> list[dict[str, Any]]:
  out = []
  for noise, eps, check in _CHECKS:
    best = theory.best_power(noise, 0.5, 4.0, mean=_MEAN, eps=eps)
    assert best is not None  # See the tests.
    bounds = theory.power_bounds(noise * _MEAN, eps)
    out.append({
      'noise': noise, 'eps': eps, 'best': round(best, 4), 'check': check,
      'bounds': [round(bound, 4) for bound in bounds],
    })  # fmt: skip
  return out


def _name(noise: float) -> str:
  return f'sigma / mu = {noise:g}'


def _along_p(simulated: theory.Simulation) -> Section:
  items: list[charts.Curve | plots.Dots] = []
  at_one = int(np.argmin(np.abs(_POWERS - 1)))
  for run, noise in enumerate(_NOISES):
    closed = _closed(noise)
    unit = closed[at_one]
    items.append(
      charts.Curve(run, list(zip(_POWERS, closed / unit, strict=True)))
    )
    points: list[tuple[float | plots.Estimate, float | plots.Estimate]] = []
    for i in range(0, len(_POWERS), 2):
      mean = simulated.mean[run, i] / unit
      reach = 1.96 * simulated.error[run, i] / unit
      if reach > _WIDEST:
        continue
      estimate = plots.Estimate(mean, mean - reach, mean + reach)
      points.append((float(_POWERS[i]), estimate))
    items.append(plots.Dots(run, points, _name(noise)))
  drawn = plots.plot(
    'The update along p, over its closed form at p = 1.',
    charts.Axis('Power p', _POWERS[0], _POWERS[-1]),
    charts.Axis('u / closed form at p = 1', 0, 1.6),
    items,
  )
  text = (
    'Lines: the closed form E phi_p / (sqrt(E phi_p^2) + eps). Dots: Adam '
    f'simulated, the average of u_t over {_STEPS:,} steps with its 95 % '
    f'interval; left out where that is wider than {_WIDEST:g} either way: '
    'there so many steps do not tell.'
  )
  legend = charts.legend([_name(noise) for noise in _NOISES])
  return Section('The update along p', text, legend + drawn)


def _one_step(simulated: theory.Simulation) -> Section:
  items = [
    charts.Curve(
      run, list(zip(_POWERS, simulated.last[run], strict=True)), 'marked',
      _name(noise),
    )
    for run, noise in enumerate(_NOISES)
  ]  # fmt: skip
  items += [
    charts.Curve(run, list(zip(_POWERS, _closed(noise), strict=True)), 'dotted')
    for run, noise in enumerate(_NOISES)
  ]
  drawn = plots.plot(
    f'u at step {_STEPS:,} along p.',
    charts.Axis('Power p', _POWERS[0], _POWERS[-1]),
    charts.y_axis(f'u at t = {_STEPS:,}', simulated.last.ravel().tolist()),
    items,
    zero=True,
  )
  text = (
    'As in the paper: u_t at one step, of one seed. Dotted: the closed form. '
    'Another seed moves a whole curve by more than p does where noise is high.'
  )
  legend = charts.legend([_name(noise) for noise in _NOISES])
  return Section(f'u at t = {_STEPS:,}', text, legend + drawn)


def _kinds() -> Section:
  curves = []
  for run, kind in enumerate(_DRIFTS):
    points = [(float(p), _drift(kind, float(p))) for p in _POWERS]
    curves.append(charts.Curve(run, points))
  drawn = plots.plot(
    'The step along p for three kinds of noise, over that at p = 1.',
    charts.Axis('Power p', _POWERS[0], _POWERS[-1]),
    charts.y_axis(
      'Step over that at p = 1', [y for c in curves for _, y in c.points]
    ),
    [charts.Curve(None, [(0.5, 1.0), (2.2, 1.0)], 'dotted'), *curves],  # type: ignore[arg-type]
  )
  return Section(
    'Other noise, eps ignored',
    'Where noise drowns the mean and eps does not matter, a larger power '
    'lengthens the step under uniform noise, hardly changes it under Gaussian '
    'noise near 1, and shortens it under Laplace noise.',
    charts.legend(list(_DRIFTS)) + drawn,
    [
      ['Noise', 'Step at p = 1.2 over p = 1', 'check [I]', 'difference'],
      *(
        [kind, f'{_drift(kind, 1.2):.3f}', f'{check:.3f}',
         charts.signed(_drift(kind, 1.2) - check, 3)]
        for kind, check in _DRIFTS.items()
      ),
    ],
  )  # fmt: skip


def _best_by_noise() -> Section:
  ratios = np.geomspace(0.3, 1000, 25)
  curves = []
  for run, kind in enumerate(_DRIFTS):
    width = _UNIFORM_SD if kind == 'uniform' else 1.0
    bests = [(float(x), _best(float(x / width), kind)) for x in ratios]
    points = [(x, best) for x, best in bests if best is not None]
    curves.append(charts.Curve(run, points))
  drawn = plots.plot(
    'The best power by noise for three kinds of noise.',
    charts.Axis(
      'Standard deviation of the noise over its mean', 0.3, 1000, log=True
    ),
    charts.y_axis('Best power p*', [p for c in curves for _, p in c.points]),
    [charts.Curve(None, [(0.3, 1.0), (1000.0, 1.0)], 'dotted'), *curves],  # type: ignore[arg-type]
  )
  return Section(
    'The best power by noise, eps = 1e-8',
    'With mu = 1e-6, powers from 0.1 to 3. Where a curve has no point the best '
    'of them is 0.1, and less may be better still. Of these three only uniform '
    'noise calls for a power above 1: there the best rises until eps stops it. '
    'Under Gaussian noise it comes up to 1 from below, under Laplace noise it '
    'stays far below.',
    charts.legend(list(_DRIFTS)) + drawn,
  )


def _best(noise: float, kind: _Kind) -> float | None:
  return theory.best_power(noise, 0.1, 3.0, mean=_MEAN, kind=kind)
