"""A run over wall-clock time, and what befell it, on either axis."""

import itertools
from collections.abc import Sequence

from train import charts, marks, series
from train.lives import Life, clock, duration, lives, unit_of
from train.marks import Lane, Mark
from train.run_log import Event, RunLog


def draw(runs: Sequence[RunLog]) -> str:
  """Step against time, above it when each run lived, saved, failed ...

  Returns:
    Strips and the plot below them, as HTML; empty where no line has a time.
  """
  told = [lives(run) for run in runs]
  first = [found[0].points[0][0] if found else 0.0 for found in told]
  spans = [
    found[-1].last[0] - began
    for found, began in zip(told, first, strict=True)
    if found
  ]
  if not spans:
    return ''
  unit, size = unit_of(spans)
  since = 'the run began' if len(runs) == 1 else 'each run began'
  x = charts.Axis(f'{unit} since {since}', 0, max(spans) / size or 1.0)
  clocks = [_Clock(at, size) for at in first]
  curves, rules = [], ''
  for i, (found, time) in enumerate(zip(told, clocks, strict=True)):
    few = max(4, 400 // max(1, len(found)))
    for life in found:
      points = [(time(at), float(step)) for at, step in life.points]
      curves.append(charts.Curve(i, series.thin(points, few)))
    gaps = list(itertools.pairwise(found))
    for before, after in gaps:
      ends = before.last, after.points[0]
      points = [(time(at), float(step)) for at, step in ends]
      curves.append(charts.Curve(i, points, 'dotted'))
    rules += marks.rules(x, i, [_restart(time, *gap) for gap in gaps])
  steps = [y for curve in curves for _, y in curve.points]
  strips = marks.lanes(x, _lanes(x, runs, told, clocks))
  return strips + charts.chart(
    f'Steps over time: {"; ".join(map(_sentence, runs, told))}.',
    x,
    charts.y_axis('Step', [0.0, *steps], zero=True),
    curves,
    over=rules,
  )


def on_steps(runs: Sequence[RunLog], x: charts.Axis, key: str) -> str:
  """Restarts and skipped steps, to be drawn over a chart.

  Args:
    runs: in their order on the page.
    x: the chart's axis.
    key: what it counts, 'step' or 'tokens'.
  """
  out = ''
  for i, run in enumerate(runs):
    rate = _rate(run, key)
    restarts = [Mark(step * rate, _from(step)) for step in run.resumed]
    out += marks.rules(x, i, restarts)
    out += marks.crosses(x, i, _skips(run, key))
  return out


def skips(runs: Sequence[RunLog], x: charts.Axis, key: str) -> str:
  """What the crosses of `on_steps` are, as a sentence; empty without any."""
  marked = [_skips(run, key) for run in runs]
  count = sum(map(len, marked))
  if not count:
    return ''
  drawn = sum(len(marks.grouped(x, m, marks.CROSSES)) for m in marked)
  some = ', some drawn as one' if drawn < count else ''
  return f'Crosses: skipped steps ({count:,}{some}).'


def _skips(run: RunLog, key: str) -> list[Mark]:
  rate = _rate(run, key)
  return [
    Mark(event.step * rate, _skipped(event)) for event in _of(run, 'skipped')
  ]


def _rate(run: RunLog, key: str) -> float:
  return 1.0 if key == 'step' else _tokens_a_step(run)


class _Clock:
  """Places a moment on the axis: units since the run began."""

  def __init__(self, began: float, size: float):
    self._began, self._size = began, size

  def __call__(self, at: float) -> float:
    return (at - self._began) / self._size


def _lanes(
  x: charts.Axis,
  runs: Sequence[RunLog],
  told: Sequence[Sequence[Life]],
  clocks: Sequence[_Clock],
) -> list[Lane]:
  def lane(name: str, kinds: Sequence[str], sign: str = 'tick') -> Lane:
    rows = [
      marks.grouped(x, [
        Mark(time(event.time), f'{_TITLES[event.kind](event)}, {_at(event)}')
        for kind in kinds
        for event in _of(run, kind)
        if event.time is not None
      ], 1 / 300 if sign == 'tick' else 1 / 80)
      for run, time in zip(runs, clocks, strict=True)
    ]  # fmt: skip
    return Lane(name, rows, sign)

  alive = [
    [_alive(time, life) for life in found]
    for found, time in zip(told, clocks, strict=True)
  ]
  evals = [
    marks.grouped(
      x,
      [
        Mark(
          time(m['time']),
          f'step {m["step"]:,} evaluated: {m["loss"]:.4f}, '
          f'{clock(m["time"])} UTC',
        )
        for m in run.validation.values()
        if 'time' in m
      ],
    )
    for run, time in zip(runs, clocks, strict=True)
  ]
  return [
    Lane('alive', alive, 'bar'),
    lane('saves', ['saved']),
    Lane('evals', evals),
    lane('skips', ['skipped'], 'skip'),
    lane('fails', ['save_failed', 'fell_back', 'failed'], 'skip'),
  ]


def _of(run: RunLog, kind: str) -> list[Event]:
  return [event for event in run.events if event.kind == kind]


def _at(event: Event) -> str:
  return f'{clock(event.time or 0.0)} UTC'


def _alive(time: _Clock, life: Life) -> Mark:
  start, (last, step) = life.start, life.last
  title = (
    f'{start.kind} at step {start.step:,}, {_at(start)}; '
    f'{_ENDED.get(life.end, life.end)} at step {step:,}, {clock(last)} UTC: '
    f'{duration(life.seconds)}'
  )
  return Mark(time(life.points[0][0]), title, time(last))


def _restart(time: _Clock, before: Life, after: Life) -> Mark:
  at, step = after.points[0]
  silence = duration(at - before.last[0])
  return Mark(time(at), f'{_from(step)}, {silence} after the last sign of life')


def _from(step: int) -> str:
  return f'resumed from step {step:,}' if step else 'began again'


def _saved(event: Event) -> str:
  size, seconds = event.facts.get('bytes'), event.facts.get('seconds')
  how = ''
  if isinstance(size, int | float) and isinstance(seconds, int | float):
    how = f' ({size / 1e6:,.1f} MB in {seconds:.1f} s)'
  return f'step {event.step:,} saved{how}'


def _skipped(event: Event) -> str:
  return f'step {event.step:,} skipped ({event.facts.get("reason", "?")})'


_ENDED = {'open': 'last seen'}

_TITLES = {
  'saved': _saved,
  'skipped': _skipped,
  'save_failed': lambda event: f'step {event.step:,} not saved',
  'failed': lambda event: f'failed at step {event.step:,}',
  'fell_back': lambda event: (
    f'checkpoint {event.facts.get("refused", "?")} refused'
  ),
}


def _sentence(run: RunLog, found: Sequence[Life]) -> str:
  if not found:
    return f'{run.name} has no times'
  spent = duration(sum(life.seconds for life in found))
  end = _ENDED.get(found[-1].end, found[-1].end)
  return f'{run.name} {end} after {spent} alive in {len(found):,}'


def _tokens_a_step(run: RunLog) -> float:
  rates = [
    m['tokens'] / m['step']
    for m in run.train.values()
    if 'tokens' in m and m['step']
  ]
  return rates[-1] if rates else 0.0
