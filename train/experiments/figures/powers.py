"""Fig. 2: the final loss along p."""

from collections.abc import Sequence

from train import charts, plots
from train.experiments.figure_page import Section
from train.experiments.figures import fits, shapes
from train.experiments.figures.design import (
  Design,
  Drawing,
  Request,
  against_one,
  at_powers,
  power_name,
)
from train.experiments.figures.results import Results

VARIES = ('optimizer.power',)
_POWERS = (0.8, 0.9, 1.0, 1.1, 1.2, 1.3)
_NOTES = (
  'The paper: p = 1.2 everywhere, chosen once on LLaMA-0.2B and C4 [P], where '
  'Adam has a learning rate of 1e-3 that AdamPower keeps [P].',
  'Inferred or chosen here: the powers between and beyond [?]. The learning '
  'rate is tuned for p = 1 and kept for all, as in the paper, so that a '
  'smaller effective step is part of what is seen: compare has the controls.',
)


def design(request: Request) -> Design:
  """One size, all powers."""
  size = request.size('dense_0.25m', 'llama_0.2b')
  cases = at_powers(size, size, request.config(size), _POWERS)
  return Design('Figure 2: powers', cases, against_one(size, _POWERS))


def draw(results: Results) -> Drawing:
  """The difference to p = 1 and the loss, along p."""
  size = results.design.cases[0].recipe
  names = [power_name(size, p) for p in _POWERS]
  best = fits.best_power(_POWERS, results.losses(names))
  told = 'not all powers are run' if best is None else f'p = {best.words}'
  caption = (
    f'Below 0 better than p = 1. {shapes.INTERVALS} {shapes.BEYOND} Minimum of '
    f'a parabola through all: {told}; in brackets the 95 % set of Fieller over '
    'seeds, which rests on the loss being a parabola in p.'
  )
  sections = [
    Section(
      'Difference to p = 1',
      caption,
      along_p(results, [(size, _POWERS)], ['']),
      shapes.pair_table(results.pairs),
    ),
    Section(
      'Final loss',
      'Means over seeds, each with its own 95 % interval. Part of its width is '
      'what a seed does to all arms alike.',
      _losses(results, names),
    ),
  ]
  values = {'best_power': as_json(best)}
  return Drawing(sections, _NOTES, values, [f'lowest loss: {told}'])


def as_json(best: fits.Vertex | None) -> dict[str, float | bool | None] | None:
  """A minimum, for results.json."""
  if best is None:
    return None
  bounded = abs(best.low) < float('inf')
  return {
    'best': best.best,
    'low': best.low if bounded else None,
    'high': best.high if bounded else None,
    'inside': best.inside,
  }


def along_p(
  results: Results,
  panels: Sequence[tuple[str, Sequence[float]]],
  names: Sequence[str],
) -> str:
  """Differences to p = 1 along p, a curve for each panel, as HTML.

  Args:
    results: Where the pairs are.
    panels: Prefix of the cases' names, and their powers.
    names: What panels are called; '' of a single one.
  """
  items: list[charts.Curve | plots.Dots] = []
  found, powers = [plots.Estimate(0.0)], []
  for run, (prefix, tried) in enumerate(panels):
    points = []
    for p in tried:
      y = plots.Estimate(0.0)
      if p != 1.0:
        pair = results.pair(power_name(prefix, p), power_name(prefix, 1.0))
        y = shapes.estimate(pair.paired)
      points.append((p, y))
      found.append(y)
      powers.append(p)
    line = [(p, y.value) for p, y in points]
    items.append(charts.Curve(run, line, 'soft'))
    shift = 5.0 * (run - (len(panels) - 1) / 2)
    items.append(plots.Dots(run, points, names[run], shift))
  if all(y.value == 0.0 or y.value != y.value for y in found):
    return ''
  drawn = plots.plot(
    'Paired difference of final loss to p = 1, along p.',
    charts.y_axis('Power p', powers),
    charts.y_axis(
      'Minus that of p = 1, nats a token', shapes.ends(found), symmetric=True
    ),
    items,
    zero=True,
  )
  return charts.legend(names) + drawn


def _losses(results: Results, names: Sequence[str]) -> str:
  points = [
    (p, shapes.mean_of(results.losses([name])[:, 0]))
    for p, name in zip(_POWERS, names, strict=True)
  ]
  y = charts.y_axis(
    'Final validation loss, nats a token', shapes.ends([y for _, y in points])
  )
  line = charts.Curve(0, [(p, y.value) for p, y in points], 'soft')
  return plots.plot(
    'Mean final loss along p.',
    charts.y_axis('Power p', _POWERS),
    y,
    [line, plots.Dots(0, points)],
  )
