"""The figures of a report: which curves, in which range, and what they mean."""

import dataclasses
import html
import math
from collections.abc import Iterable, Sequence

from train import charts, noise_words, series, timeline
from train.lives import lives
from train.run_log import RunLog, paired_difference, x_key


@dataclasses.dataclass(frozen=True)
class _Measure:
  """Something that each step measures, drawn as it is and as a mean."""

  key: str
  head: str
  title: str
  """Of the vertical axis, with the unit."""
  scale: float = 1.0
  log: bool = False
  text: str = 'Faint: each measurement; full: a centred mean.'
  mean: bool = True
  """False draws each measurement alone."""


_NORMS = (
  _Measure('grad_norm', 'before clipping', 'Global norm (log scale)', log=True),
  _Measure('clipped_norm', 'after clipping', 'Global norm (log scale)',
           log=True),
  _Measure('powered_norm', 'after the power', 'Global norm (log scale)',
           log=True),
)  # fmt: skip
_SPEED = (
  _Measure('tokens_per_second', 'Throughput', 'Tokens per second'),
  _Measure('mfu', 'Model FLOPs utilisation', 'Percent of the published peak',
           100.0),
  _Measure('data_seconds', 'Waiting for data', 'Milliseconds a step', 1e3),
  _Measure('memory', 'Memory', 'GiB, the most since the last start', 1 / 2**30,
           text='Of the fullest device, or of the process on a CPU.',
           mean=False),
)  # fmt: skip
_EXPERTS = (
  _Measure('expert_load_max', 'Load of the busiest expert',
           'Tokens over an even share',
           text='In the layer worst off. 1 is even.'),
  _Measure('router_entropy', 'Entropy of routing', 'Nats a token',
           text='In the layer where it is lowest.'),
)  # fmt: skip


_NOISE_SCALE = _Measure('noise_scale', '', 'Examples (log scale)', log=True)
_KINDS = {
  'marked': 'validation',
  'soft': 'training, a centred mean',
  'faint': 'training, each measurement',
}


def draw(runs: Sequence[RunLog], base: RunLog) -> str:
  """All figures over steps that the runs have data for, as HTML."""
  x = x_key(runs)
  end = max((at for run in runs for at, _ in _losses(run, x)), default=0)
  title = 'Step' if x == 'step' else 'Training tokens'
  x_axis = charts.Axis(title, 0, end or 1)
  out = [_loss(runs, x, x_axis)]
  if len(runs) > 1:
    out.append(_difference(runs, base, x, x_axis))
  out.append(_learning_rate(runs, x, x_axis))
  if len(runs) == 1:
    out.append(_norms(runs[0], x, x_axis))
  else:
    out += [
      _noisy(runs, x, x_axis, dataclasses.replace(
        norm, head=f'Gradient norm {norm.head}'
      ))
      for norm in _NORMS
    ]  # fmt: skip
  out += [_noisy(runs, x, x_axis, measure) for measure in (*_SPEED, *_EXPERTS)]
  out += _advice(runs, x, x_axis)
  return '\n'.join(filter(None, out))


def over_time(runs: Sequence[RunLog]) -> str:
  """The figure over wall-clock time; empty where no line has a time."""
  if not (plot := timeline.draw(runs)):
    return ''
  text = 'Bars: from each start to the last sign of life.'
  if any(len(lives(run)) > 1 for run in runs):
    text += (
      ' Upright lines: restarts. What a run had done after the save that it '
      'went on from is lost and done again; evaluations among it are not on '
      'record.'
    )
  return _figure('Time', text, _legend(runs), plot, wide=True)


def _losses(run: RunLog, x: str) -> list[tuple[float, float]]:
  return [*run.series('loss', x), *run.series('loss', x, 'validation')]


def _legend(runs: Sequence[RunLog]) -> str:
  """The runs' names, which a single run does without."""
  return charts.legend([run.name for run in runs]) if len(runs) > 1 else ''


def _figure(
  head: str, text: str, legend: str, body: str, *, wide: bool = False
) -> str:
  if not body:
    return ''
  return (
    f'<figure class="{"wide" if wide else "half"}"><figcaption>'
    f'<h3>{head}</h3>{html.escape(text)}</figcaption>{legend}{body}</figure>'
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
    fit += [series.quantile(late, 0.002), series.quantile(late, 0.995)]
    fit += _from(0.1, held_out, x_axis)
    curves += [
      (0, charts.Curve(i, train, 'faint')),
      (1, charts.Curve(i, series.smooth(train), 'soft')),
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
    over=timeline.on_steps(runs, x_axis, x),
  )
  text = 'The range fits all but the first tenth.'
  if any(run.resumed for run in runs):
    text += ' Upright lines: restarts.'
  if crosses := timeline.skips(runs, x_axis, x):
    text += f' {crosses}'
  legend = charts.legend([run.name for run in runs], kinds=_KINDS)
  return _figure('Loss', text, legend, plot, wide=True)


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
  legend = charts.legend(['' if run is base else run.name for run in runs])
  return _figure('Paired difference of validation loss', text, legend, plot)


def _learning_rate(runs: Sequence[RunLog], x: str, x_axis: charts.Axis) -> str:
  rates = [run.series('learning_rate', x) for run in runs]
  if not any(rates):
    return ''
  values = [y for points in rates for _, y in points]
  plot = charts.chart(
    f'Learning rate by {x}.',
    x_axis,
    charts.y_axis('Learning rate', values, zero=True),
    # Of equal schedules the first still shows, on both sides of the last.
    [
      charts.Curve(i, points, 'line' if i or len(runs) == 1 else 'thick')
      for i, points in enumerate(rates)
    ],
  )
  text = 'Wide: the first arm, so that an equal schedule does not hide it.'
  return _figure(
    'Learning rate', text if len(runs) > 1 else '', _legend(runs), plot
  )


def _norms(run: RunLog, x: str, x_axis: charts.Axis) -> str:
  """The three norms of a single run in one figure."""
  points = [run.series(norm.key, x) for norm in _NORMS]
  if not any(points):
    return ''
  heads = [
    norm.head if found else ''
    for norm, found in zip(_NORMS, points, strict=True)
  ]
  styles = {1: 'dashed'}  # Where nothing is clipped the two are equal.
  plot = charts.chart(
    f'Gradient norms by {x}: {", ".join(filter(None, heads))}.',
    x_axis,
    _range(points, [], _NORMS[0]),
    [charts.Curve(i, points[i], 'faint') for i in (0, 2)]
    + [
      charts.Curve(i, series.smooth(found), styles.get(i, 'line'))
      for i, found in enumerate(points)
    ],
  )
  legend = charts.legend(heads, styles)
  return _figure('Gradient norms', _NORMS[0].text, legend, plot)


def _noisy(
  runs: Sequence[RunLog], x: str, x_axis: charts.Axis, measure: _Measure
) -> str:
  """A measure of all runs: each measurement, and a mean."""
  points = [
    [(at, measure.scale * y) for at, y in run.series(measure.key, x)]
    for run in runs
  ]
  if not any(points):
    return ''
  means = [series.smooth(found) if measure.mean else found for found in points]
  plot = charts.chart(
    f'{measure.head} by {x}.',
    x_axis,
    _range(points, means, measure),
    [charts.Curve(i, found, 'faint') for i, found in enumerate(points)]
    + [charts.Curve(i, mean) for i, mean in enumerate(means)],
  )
  return _figure(measure.head, measure.text, _legend(runs), plot)


def _advice(runs: Sequence[RunLog], x: str, x_axis: charts.Axis) -> list[str]:
  """Where noise was measured: the power it advises, and its scale."""

  def points(key: str) -> list[list[tuple[float, float]]]:
    return [
      [
        (at, line['overall'][key])
        for step, line in run.noise.items()
        # Tokens, where runs differ in them, are a train line's to know.
        if (at := run.train.get(step, {}).get(x)) is not None
        and math.isfinite(line['overall'][key])
        and (key != 'power' or noise_words.tells(line))
      ]
      for run in runs
    ]

  powers, scales = points('power'), points('noise_scale')
  every = [y for found in powers for _, y in found]
  ends, told = _grid_ends(runs, x_axis)
  return [
    _figure(
      'Advised power',
      'Where u(p) of all tensors is greatest; none where nothing stands out.'
      + told,
      _legend(runs),
      charts.chart(
        f'Advised power by {x}.',
        x_axis,
        charts.y_axis('p', every),
        [*ends, *_marked(runs, powers)],
      ),
    ),
    _figure(
      'Gradient noise scale',
      'Noise of an example over the squared gradient; none where the noise '
      'hides it.',
      _legend(runs),
      charts.chart(
        f'Gradient noise scale by {x}.',
        x_axis,
        _range(scales, [], _NOISE_SCALE),
        _marked(runs, scales),
      ),
    ),
  ]


def _grid_ends(
  runs: Sequence[RunLog], x_axis: charts.Axis
) -> tuple[list[charts.Curve], str]:
  """Lines where advised powers are cut off, and what they are."""
  ends = {
    (i, line['overall']['power'])
    for i, run in enumerate(runs)
    for line in run.noise.values()
    if noise_words.tells(line) and noise_words.at_end(line)
  }
  lines = [
    charts.Curve(i, [(x_axis.low, end), (x_axis.high, end)], 'dashed')
    for i, end in sorted(ends)
  ]
  told = ' Dashed: the grid of powers ends there; the best may lie beyond.'
  return lines, told if lines else ''


def _marked(
  runs: Sequence[RunLog], points: Sequence[charts.Points]
) -> list[charts.Curve]:
  return [
    charts.Curve(i, found, 'marked', run.name)
    for i, (run, found) in enumerate(zip(runs, points, strict=True))
  ]


def _range(
  points: Sequence[charts.Points],
  means: Sequence[charts.Points],
  measure: _Measure,
) -> charts.Axis | None:
  values = [y for found in points for _, y in found]
  if not measure.log:
    top = series.quantile(values, 0.995)
    peak = series.quantile((y for found in means for _, y in found), 1.0)
    # A mean fits too, unless an outlier far beyond all else is in it.
    top = max(top, peak) if peak <= 2 * top else top
    values = [min(y, top) for y in values]
  return charts.y_axis(
    measure.title, values, zero=not measure.log, log=measure.log
  )
