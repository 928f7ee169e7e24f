"""AdagradPower on a stochastic convex problem, its rate fitted."""

from typing import Any

import jax
import numpy as np
from scipy import stats

from train import charts, plots
from train.experiments import theory
from train.experiments.figure_page import Section
from train.experiments.figures.design import Design, Drawing, Request
from train.experiments.figures.results import Results

VARIES = ()
TRAINS = False
_POWERS = (0.5, 0.75, 1.0, 1.2)
_STEPS, _REPEATS, _EXPONENT = 100_000, 8, 4.0
_RELATIVE = 0.1
# Additive noise by name.
_CASES = {'low noise': 0.0, 'high noise': 1.0}
_NOTES = (
  'The paper: theta <- theta - eta phi_p(g) / sqrt(v + eps), v the sum of '
  'phi_p(g)^2 [P]; a rate of T^(-1/(p+1)) instead of T^(-1/2) for p < 1 where '
  'noise is low [N].',
  f'Here f(theta) = |theta|^{_EXPONENT:g} / {_EXPONENT:g} from theta = 1, '
  f"gradients f' (1 + {_RELATIVE:g} x) + sigma y, x and y uniform in (-1, 1), "
  'sigma = 0 for low noise and 1 for high, eta = 0.1: a problem of ours [?].',
  "The paper's rates are bounds for the worst problem of a class; a single "
  'problem can be faster at every p, and one that is shows neither that the '
  'bound is tight nor that the power helps elsewhere. Fits are straight lines '
  'in log-log; where gaps do not lie on one, an exponent means little.',
)


def design(request: Request) -> Design:
  """What is computed."""
  del request
  return Design(
    'AdagradPower',
    work=f'{_STEPS:,} steps of {_REPEATS} repeats at {len(_POWERS)} powers, '
    'twice: seconds',
  )


def draw(results: Results) -> Drawing:
  """Gaps over steps, and exponents."""
  key = jax.random.key(results.request.seeds[0])
  sections, rates, lines = [], {}, []
  for name, noise in _CASES.items():
    gaps = theory.adagrad_power_gaps(
      key,
      _POWERS,
      exponent=_EXPONENT,
      relative_noise=_RELATIVE,
      noise=noise,
      steps=_STEPS,
      repeats=_REPEATS,
    )
    rates[name] = _rates(gaps)
    sections.append(_section(name, gaps, rates[name]))
    for p in _POWERS:
      low, high = rates[name][f'{p:g}']['averaged_ci95']
      lines.append(
        f'{name}, p = {p:g}: averaged iterate T^-r, r = '
        f'{rates[name][f"{p:g}"]["averaged"]:.3f} ({low:.3f} to {high:.3f}); '
        f'bound of the paper {_bound(p)}'
      )
  values = {'rates': rates, 'steps': _STEPS, 'repeats': _REPEATS}
  return Drawing(sections, _NOTES, values, lines)


def _bound(p: float) -> str:
  return f'{1 / (p + 1):.3f}' if p < 1 else '0.5' if p == 1 else '-'


def _rates(gaps: theory.Gaps) -> dict[str, dict]:
  """Exponents with their 95 % intervals over repeats, by power."""
  t = stats.t.ppf(0.975, _REPEATS - 1)
  out = {}
  for i, p in enumerate(_POWERS):
    entry: dict[str, Any] = {}
    for name, by_power in (('averaged', gaps.averaged), ('last', gaps.last)):
      rate, error = theory.fitted_rate(gaps.steps, by_power[i])
      entry[name] = rate
      entry[f'{name}_ci95'] = [rate - t * error, rate + t * error]
    out[f'{p:g}'] = entry
  return out


def _section(name: str, gaps: theory.Gaps, rates: dict[str, dict]) -> Section:
  steps = gaps.steps.tolist()
  items: list[charts.Curve | plots.Band] = []
  shown: list[float] = []
  for run, by_repeat in enumerate(gaps.averaged):
    # Gaps spread over decades: their median.
    low, middle, high = np.quantile(by_repeat, (0.25, 0.5, 0.75), axis=0)
    points = zip(steps, middle.tolist(), strict=True)
    items.append(
      charts.Curve(run, list(points), 'marked', f'p = {_POWERS[run]:g}')
    )
    edges = zip(steps, low.tolist(), high.tolist(), strict=True)
    items.append(plots.Band(run, list(edges)))
    shown += [*low.tolist(), *high.tolist()]
  drawn = plots.plot(
    f'The gap of the averaged iterate over steps, {name}.',
    charts.Axis('Steps T', steps[0], steps[-1], log=True),
    charts.y_axis('f minus its minimum', shown, log=True),
    items,
  )

  def fitted(p: float, which: str) -> str:
    entry = rates[f'{p:g}']
    low, high = entry[f'{which}_ci95']
    return f'{entry[which]:.3f} ({low:.3f} to {high:.3f})'

  return Section(
    f'The gap over steps, {name}',
    'Of the average of all iterates; lines: medians of '
    f'{_REPEATS} repeats, shaded: the middle half. The table has r of T^-r, '
    'fitted, with 95 % intervals over repeats.',
    charts.legend([f'p = {p:g}' for p in _POWERS]) + drawn,
    [
      ['p', 'r, averaged iterate', 'r, last iterate', 'bound of the paper [N]'],
      *(
        [f'{p:g}', fitted(p, 'averaged'), fitted(p, 'last'), _bound(p)]
        for p in _POWERS
      ),
    ],
  )
