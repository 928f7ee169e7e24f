"""Fig. 1: final loss against parameters, dense and with experts."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from train import charts, ladder, paper, plots
from train.errors import UserError
from train.experiments.figure_page import Section
from train.experiments.figures import fits, shapes
from train.experiments.figures.design import (
  Design,
  Drawing,
  Request,
  against_one,
  at_powers,
  is_sparse,
  power_name,
)
from train.experiments.figures.results import Results

VARIES = ('optimizer.power',)
_POWERS = (1.0, 1.2)
_LAPTOP = ('dense_0.1m', 'dense_0.25m', 'dense_0.5m', *ladder.SPARSE)
_MARGIN = 1.02
_FAMILIES = ('dense', 'experts')
_NOTES = (
  'The paper: LLaMA and Qwen2-MoE of up to 2B parameters, about 20 tokens a '
  'parameter [P]; p = 1.2 ends 0.022 below Adam at LLaMA-2B and 0.028 '
  'below at Qwen2-MoE-2B, one run each [N].',
  'Inferred or chosen here: shapes of all but the 0.2B LLaMA [I][?], learning '
  'rates of all but that [?], cosine for dense models and wsd for experts [?].',
)


def design(request: Request) -> Design:
  """All sizes, both powers.

  Raises:
    UserError: a size is named twice, or is no recipe.
  """
  sizes = request.sizes or request.by_scale(_LAPTOP, paper.NAMES)
  cases, pairs = [], []
  for size in sizes:
    if list(sizes).count(size) > 1:
      raise UserError(f'--sizes names {size} twice')
    config = request.config(size)
    if is_sparse(config) and 'optimizer.schedule' not in request.fields:
      config = request.config(size, schedule='wsd')
    cases += at_powers(size, size, config, _POWERS)
    pairs += against_one(size, _POWERS)
  return Design('Figure 1: scaling', cases, pairs)


def draw(results: Results) -> Drawing:
  """Losses with their fits, and the difference by size."""
  sections, values, lines = [], {}, []
  for run, family in enumerate(_FAMILIES):
    sizes = _sizes(results, sparse=bool(run))
    if not sizes:
      continue
    section, fitted, line = _law(results, family, sizes)
    sections.append(section)
    lines.append(line)
    values[family] = fitted
  return Drawing([*sections, _gains(results)], _NOTES, {'fits': values}, lines)


def _sizes(results: Results, *, sparse: bool) -> list[str]:
  """Recipes of a family, from small to large."""
  found = {
    case.recipe: results.parameters(case.name)
    for case in results.design.cases
    if is_sparse(case.config) == sparse
  }
  return sorted(found, key=lambda name: found[name])


def _names(size: str) -> list[str]:
  return [power_name(size, p) for p in _POWERS]


def _law(
  results: Results, family: str, sizes: Sequence[str]
) -> tuple[Section, dict[str, Any], str]:
  by_size = {size: results.losses(_names(size)) for size in sizes}
  by_size = {size: found for size, found in by_size.items() if len(found)}
  heading = f'Final loss against parameters, {family}'
  if not by_size:
    return Section(heading, 'No size is finished.', ''), {}, f'{family}: -'
  counts = [results.parameters(_names(size)[0]) for size in by_size]
  dots, items = [], []
  for run, p in enumerate(_POWERS):
    points: list[tuple[float | plots.Estimate, float | plots.Estimate]] = [
      (float(n), shapes.mean_of(losses[:, run]))
      for n, losses in zip(counts, by_size.values(), strict=True)
    ]
    dots.append(plots.Dots(run, points, f'p = {p:g}', shift=6 * run - 3))
  found = None
  if len(counts) > 1:
    at = np.geomspace(min(counts) / 1.2, max(counts) * 1.2, 60)
    found = fits.scaling(counts, list(by_size.values()), at)
    items = _fitted(found)
  seen = shapes.ends(
    [
      y
      for each in dots
      for _, y in each.points
      if isinstance(y, plots.Estimate)
    ]
  )
  y = charts.Axis(
    'Final validation loss, nats a token',
    min(seen) / _MARGIN,
    max(seen) * _MARGIN,
    log=True,
  )
  x = charts.Axis('Parameters', min(counts) / 1.2, max(counts) * 1.2, log=True)
  text, line, values = _told(family, found)
  drawn = charts.legend([f'p = {p:g}' for p in _POWERS])
  drawn += plots.plot(f'{heading}, with fits.', x, y, [*items, *dots])
  return Section(heading, text, drawn), values, line


def _fitted(found: fits.Scaling) -> list[charts.Curve | plots.Band]:
  items: list[charts.Curve | plots.Band] = []
  at = found.at.tolist()
  for run, curve in enumerate(found.law.at(found.at).tolist()):
    items.append(charts.Curve(run, list(zip(at, curve, strict=True)), 'soft'))
    if found.low is not None and found.high is not None:
      low, high = found.low[run].tolist(), found.high[run].tolist()
      items.append(plots.Band(run, list(zip(at, low, high, strict=True))))
  return items


def _told(
  family: str, found: fits.Scaling | None
) -> tuple[str, str, dict[str, Any]]:
  """The fit as a caption, a line of the terminal, and JSON."""
  if found is None:
    return 'One size: no fit.', f'{family}: one size, no fit', {}
  law = found.law
  kind = (
    f'L = E + A N^-alpha, E = {law.floor:.3f} shared by both'
    if law.floor
    else 'L = A N^-alpha, a straight line here: with fewer than '
    f'{fits.SIZES_FOR_FLOOR} sizes an irreducible loss E cannot be told from a '
    'smaller exponent'
  )
  alphas = []
  for i, p in enumerate(_POWERS):
    text = f'alpha = {law.alpha[i]:.4f}'
    if found.alpha is not None:
      low, high = found.alpha[:, i]
      text += f' ({low:.4f} to {high:.4f})'
    alphas.append(f'p = {p:g}: {text}')
  ends = found.steeper
  if ends is not None:
    alphas.append(
      f'difference {charts.signed(law.alpha[-1] - law.alpha[0])} '
      f'({" to ".join(map(charts.signed, ends))})'
    )
  text = f'Fitted: {kind}. {"; ".join(alphas)}. ' + (
    'No size has two seeds: there is no band.'
    if found.low is None
    else 'Bands and intervals: the law fitted again to means redrawn with the '
    'spread of seeds, 95 %; they do not hold what the law itself misses.'
  )
  values = {
    'floor': law.floor,
    'floor_fitted': bool(law.floor),
    'alpha': dict(zip(map(str, _POWERS), law.alpha.tolist(), strict=True)),
    'alpha_ci95': None if found.alpha is None else found.alpha.T.tolist(),
    'alpha_difference': float(law.alpha[-1] - law.alpha[0]),
    'alpha_difference_ci95': None if ends is None else ends.tolist(),
  }
  return text, f'{family}: {"; ".join(alphas)}', values


def _gains(results: Results) -> Section:
  dots, counts, found, names = [], [], [], []
  for run, family in enumerate(_FAMILIES):
    points: list[tuple[float | plots.Estimate, float | plots.Estimate]] = []
    for size in _sizes(results, sparse=bool(run)):
      one, power = _names(size)
      y = shapes.estimate(results.pair(power, one).paired)
      points.append((float(results.parameters(one)), y))
      counts.append(results.parameters(one))
      found.append(y)
    dots.append(plots.Dots(run, points, family))
    names.append(family if points else '')
  x = charts.Axis('Parameters', min(counts) / 1.3, max(counts) * 1.3, log=True)
  y_axis = charts.y_axis(
    'p = 1.2 minus p = 1, nats a token', shapes.ends(found), symmetric=True
  )
  drawn = plots.plot(
    'Paired difference of final loss by parameters.', x, y_axis, dots, zero=True
  )
  return Section(
    'What the power changes, by size',
    f'Below 0 the power is better. {shapes.INTERVALS} {shapes.BEYOND}',
    drawn and charts.legend(names) + drawn,
    shapes.pair_table(results.pairs),
  )
