"""Fig. 4: a mixture of experts under wsd, and its loss spikes."""

import math
from collections.abc import Sequence

import numpy as np

from train import charts, plots
from train.errors import UserError
from train.experiments import paired
from train.experiments.cells import Record
from train.experiments.figure_page import Section
from train.experiments.figures import shapes
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

VARIES = ('optimizer.power', 'optimizer.schedule')
_POWERS = (1.0, 1.2)
_SIDE = 3  # Points on either side, whose median a spike rises above.
_TIMES = 6.0
_LEAST = 0.02  # Nats.
_NOTES = (
  'The paper: Qwen2-MoE-2B under wsd ends 0.028 lower with p = 1.2 than with '
  'Adam, and the loss spikes of Adam nearly vanish [N]. What it counts as a '
  'spike is not known [?], nor are the shapes of its experts [?].',
  'A spike here: a stretch of points of the recorded training loss that lie '
  f'above the median of the {_SIDE} on either side by {_TIMES:g} robust '
  'standard deviations (1.4826 times the median absolute deviation from it, of '
  f"the same seed at p = 1) and by {_LEAST:g} nats at least. A record's points "
  'are means over equal spans, about a hundred in a run: a spike of a '
  'single step shows divided by the steps of its span, so small and short '
  'ones are not seen.',
)


def design(request: Request) -> Design:
  """One mixture of experts, both powers.

  Raises:
    UserError: the size is a dense model's.
  """
  size = request.size('moe_0.35m', 'qwen2_moe_2b')
  config = request.config(size, schedule='wsd')
  if not is_sparse(config):
    raise UserError(f'figure 4 takes a mixture of experts, which {size} is not')
  cases = at_powers(size, size, config, _POWERS)
  pairs = against_one(size, _POWERS)
  return Design('Figure 4: experts under wsd', cases, pairs)


def draw(results: Results) -> Drawing:
  """Curves of both, their difference, and spikes."""
  size = results.design.cases[0].recipe
  names = [power_name(size, p) for p in _POWERS]
  pair = results.pairs[0]
  counts = _counts(results, names)
  change = paired.difference(
    [b for _, b in counts.values()], [a for a, _ in counts.values()]
  )
  told = _told(counts, change)
  sections = [
    shapes.curves(
      'Validation loss',
      results,
      [(n, f'p = {p:g}', i) for i, (n, p) in enumerate(zip(names, _POWERS,
       strict=True))],
    ),
    Section(
      'What p = 1.2 changes',
      f'Final loss, left of 0 the power is better. {shapes.INTERVALS}',
      shapes.differences(
        'Paired difference of final loss.',
        [('p = 1.2 minus p = 1', pair.paired, 1)],
      ),
      shapes.pair_table(results.pairs),
    ),
    shapes.gain_curves(
      'p = 1.2 minus p = 1 over time', results, [(pair, 'p = 1.2', 1)]
    ),
    Section(
      'Training loss and its spikes',
      f'Every seed; {told}.',
      _training(results, names),
      [['Seed', 'Spikes, p = 1', 'Spikes, p = 1.2'],
       *([str(s), str(a), str(b)] for s, (a, b) in counts.items())],
    ),
  ]  # fmt: skip
  values = {
    'spikes': {str(seed): list(both) for seed, both in counts.items()},
    'spikes_difference': change
    and {'n': change.n, 'mean': change.mean, 'ci95': change.ci95},
  }
  return Drawing(sections, _NOTES, values, [f'spikes: {told}'])


def _told(
  counts: dict[int, tuple[int, int]], change: paired.Paired | None
) -> str:
  if change is None:
    return 'no seed is finished at both powers'
  a, b = (sum(column) for column in zip(*counts.values(), strict=True))
  text = f'{a} at p = 1 and {b} at p = 1.2 in {change.n} seeds'
  return text if a or b else f'{text}: nothing to compare'


def _counts(
  results: Results, names: Sequence[str]
) -> dict[int, tuple[int, int]]:
  """Spikes of both arms by seed."""
  out = {}
  base, arm = (results.arms[name] for name in names)
  for seed in sorted(base.losses().keys() & arm.losses().keys()):
    one, other = base.seeds[seed], arm.seeds[seed]
    assert one is not None and other is not None
    scale = spread(_loss(one))
    out[seed] = spikes(_loss(one), scale), spikes(_loss(other), scale)
  return out


def _loss(record: Record) -> np.ndarray:
  """Training loss at the points of a record; nan where it was not finite."""
  return np.asarray(
    [math.nan if loss is None else loss for _, _, loss in record['train']]
  )


def _rises(losses: np.ndarray) -> np.ndarray:
  """Each point above the median of its neighbours; nan without any."""
  out = np.full(len(losses), math.nan)
  for i in range(_SIDE, len(losses) - _SIDE):
    near = np.r_[losses[i - _SIDE : i], losses[i + 1 : i + 1 + _SIDE]]
    near = near[np.isfinite(near)]
    if len(near):
      out[i] = losses[i] - np.median(near)
  return out


def spread(losses: np.ndarray) -> float:
  """Robust standard deviation of how points depart from their neighbours."""
  rises = _rises(losses)
  rises = rises[np.isfinite(rises)]
  if not len(rises):
    return 0.0
  return float(1.4826 * np.median(np.abs(rises - np.median(rises))))


def spikes(losses: np.ndarray, scale: float) -> int:
  """Counts stretches of points far above the median of their neighbours.

  Args:
    losses: (k,) points of a training curve; one that is not finite counts as
      high.
    scale: As `spread` has it.
  """
  least = max(_TIMES * scale, _LEAST)
  high = (_rises(losses) > least) | ~np.isfinite(losses)
  return int((high & ~np.r_[False, high[:-1]]).sum())


def _training(results: Results, names: Sequence[str]) -> str:
  curves, late, most = [], [], 0.0
  for run, name in enumerate(names):
    for record in results.arms[name].seeds.values():
      if record is None or not record['train']:
        continue
      points = [
        (float(tokens), math.nan if loss is None else loss)
        for _, tokens, loss in record['train']
      ]
      curves.append(charts.Curve(run, points, 'soft'))
      most = max(most, points[-1][0])
      late += [loss for at, loss in points if at >= 0.1 * points[-1][0]]
  return charts.legend([f'p = {p:g}' for p in _POWERS]) * bool(
    curves
  ) + plots.plot(
    'Training loss of every seed.',
    charts.Axis('Training tokens', 0, most or 1.0),
    charts.y_axis('Training loss, nats a token', late),
    curves,
  )
