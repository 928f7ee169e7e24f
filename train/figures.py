"""The figures of a report: which curves, in which range, and what they mean."""

import html
import math
from collections.abc import Iterable, Sequence

from train import charts
from train.run_log import RunLog, paired_difference, x_key


def draw(runs: Sequence[RunLog], base: RunLog) -> str:
  """All figures that the runs have data for, as HTML."""
  x = x_key(runs)
  end = max(at for run in runs for at, _ in _losses(run, x))
  title = 'Step' if x == 'step' else 'Training tokens'
  x_axis = charts.Axis(title, 0, end or 1)
  out = [_loss(runs, x, x_axis)]
  if len(runs) > 1:
    out.append(_difference(runs, base, x, x_axis))
  out += [
    _learning_rate(runs, x, x_axis),
    _noisy(runs, x, x_axis, 'grad_norm'),
    _noisy(runs, x, x_axis, 'tokens_per_second'),
  ]
  return '\n'.join(out)


def _losses(run: RunLog, x: str) -> list[tuple[float, float]]:
  return [*run.series('loss', x), *run.series('loss', x, 'validation')]


def _figure(head: str, text: str, names: Sequence[str], body: str) -> str:
  return (
    f'<figure class="{"wide" if head == "Loss" else "half"}"><figcaption>'
    f'<h3>{head}</h3>{html.escape(text)}</figcaption>{charts.legend(names)}'
    f'{body}</figure>'
  )


def _from(
  share: float, points: Iterable[tuple[float, float]], x_axis: charts.Axis
) -> list[float]:
  """The finite values after a share of the x range; before it, if none is."""
  finite = [(at, y) for at, y in points if math.isfinite(y)]
  late = [y for at, y in finite if at >= share * x_axis.high]
  return late or [y for _, y in finite]


def _loss(runs: Sequence[RunLog], x: str, x_axis: charts.Axis) -> str:
  curves, fit = [], []
  for i, run in enumerate(runs):
    train = run.series('loss', x)
    held_out = run.series('loss', x, 'validation')
    # Without the fall from the loss at initialisation, which would flatten
    # all that follows, and without single outliers.
    late = _from(0.1, train, x_axis)
    fit += [charts.quantile(late, 0.002), charts.quantile(late, 0.995)]
    fit += _from(0.1, held_out, x_axis)
    curves += [
      (0, charts.Curve(i, train, 'faint')),
      (1, charts.Curve(i, charts.smooth(train), 'soft')),
      (2, charts.Curve(i, held_out, 'marked', run.name)),
    ]
  # Above where it began a run has diverged; how far is of no interest.
  firsts = [y for run in runs for _, y in _losses(run, x)[:1]]
  top = max((y for y in firsts if math.isfinite(y)), default=math.inf)
  fit = [min(y, top) for y in fit]
  ends = (
    f'{run.name} ends at {points[-1][1]:.4f}'
    for run in runs
    if (points := run.series('loss', x, 'validation'))
  )
  plot = charts.chart(
    f'Training and validation loss by {x}; validation: {"; ".join(ends)}.',
    x_axis,
    charts.y_axis('Loss, nats per token', fit),
    [curve for _, curve in sorted(curves, key=lambda pair: pair[0])],
  )
  text = (
    'With markers: validation. Thin: training, a centred mean; faint: each '
    'training measurement. The range fits all but the first tenth.'
  )
  return _figure('Loss', text, [run.name for run in runs], plot)


def _difference(
  runs: Sequence[RunLog], base: RunLog, x: str, x_axis: charts.Axis
) -> str:
  pairs = {
    i: paired_difference(run, base, x)
    for i, run in enumerate(runs)
    if run is not base
  }
  every = [point for points in pairs.values() for point in points]
  ends = (
    f'{runs[i].name} {charts.signed(points[-1][1])}'
    for i, points in pairs.items()
    if points
  )
  plot = charts.chart(
    f'Validation loss minus that of {base.name}; last: {"; ".join(ends)}.',
    x_axis,
    charts.y_axis(
      'Difference, nats per token', _from(0.2, every, x_axis), symmetric=True
    ),
    [
      charts.Curve(i, points, 'marked', runs[i].name)
      for i, points in pairs.items()
    ],
    zero=True,
  )
  where = 'the same step' if x == 'step' else 'equal tokens'
  text = (
    f'Arm minus {base.name} at {where}: below zero the arm is better. The '
    'range fits all but the first fifth.'
  )
  names = ['' if run is base else run.name for run in runs]
  return _figure('Paired difference of validation loss', text, names, plot)


def _learning_rate(runs: Sequence[RunLog], x: str, x_axis: charts.Axis) -> str:
  series = [run.series('learning_rate', x) for run in runs]
  if not any(series):
    return ''
  values = [y for points in series for _, y in points]
  plot = charts.chart(
    f'Learning rate by {x}.',
    x_axis,
    charts.y_axis('Learning rate', values, zero=True),
    # Of equal schedules the first still shows, on both sides of the last.
    [
      charts.Curve(i, points, 'line' if i else 'thick')
      for i, points in enumerate(series)
    ],
  )
  text = 'Wide: the first arm, so that an equal schedule does not hide it.'
  if len(runs) == 1:
    text = ''
  return _figure('Learning rate', text, [run.name for run in runs], plot)


def _noisy(
  runs: Sequence[RunLog], x: str, x_axis: charts.Axis, key: str
) -> str:
  """Gradient norm or throughput: each measurement, and a mean."""
  series = [run.series(key, x) for run in runs]
  if not any(series):
    return ''
  values = [y for points in series for _, y in points]
  if key == 'grad_norm':
    head = 'Gradient norm'
    y_axis = charts.y_axis('Global norm (log scale)', values, log=True)
  else:
    head = 'Throughput'
    top = charts.quantile(values, 0.995)
    y_axis = charts.y_axis(
      'Tokens per second', [min(y, top) for y in values], zero=True
    )
  plot = charts.chart(
    f'{head} by {x}.',
    x_axis,
    y_axis,
    [charts.Curve(i, points, 'faint') for i, points in enumerate(series)]
    + [charts.Curve(i, charts.smooth(p)) for i, p in enumerate(series)],
  )
  text = 'Faint: each measurement; full: a centred mean.'
  return _figure(head, text, [run.name for run in runs], plot)
