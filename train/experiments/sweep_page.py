"""What a sweep has come to: a table, a file, and a page."""

import dataclasses
import math
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from train import charts, plots
from train.config import Config
from train.experiments import comparison, figure_page, paired
from train.experiments.comparison import ArmResult
from train.recipe_table import cost

_SIZE = 'size'
_LOSS = 'Final held-out loss, nats a token'
_MOST_ROWS = 40  # Of a drawing; the table has all.
_APART = 4.0  # Pixels, of intervals at one value.
_LOG = 8  # Values so many times apart are shown on a logarithmic axis.
_CHANCE = (
  'The lowest of several means is low by chance too, the more so the more '
  'points there are: its distance to others is to be measured on other seeds.'
)
_ENDS = ('Bars: 95 % intervals of the mean over seeds, which the seeds of two '
         'points share.')  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Point:
  """A point of the sweep, on all seeds."""

  result: ArmResult
  """Under the point's name; its overrides are those asked for."""
  values: Mapping[str, Any]
  """Of all fields that any point sets, by short name; None where the family of
  the model has no such field."""
  config: Config
  """Of one of the seeds, resolved."""
  held_out: str = ''
  """Identifies what the loss is of: text, vocabulary, split, tokens."""

  @property
  def losses(self) -> list[float]:
    """Of the finished seeds; empty where a cell diverged."""
    return [] if self.result.diverged() else list(self.result.losses().values())

  @property
  def estimate(self) -> plots.Estimate:
    """The mean over seeds and its 95 % interval; nan without any."""
    if not self.losses:
      return plots.Estimate(math.nan)
    mean, reach = paired.interval(np.asarray(self.losses)[:, None])
    return plots.Estimate(
      float(mean[0]), float((mean - reach)[0]), float((mean + reach)[0])
    )


@dataclasses.dataclass(frozen=True)
class Sweep:
  """All that a page shows."""

  title: str
  points: Sequence[Point]
  notes: Sequence[str] = ()
  command: str = ''
  """What runs it again."""

  @property
  def compares(self) -> bool:
    """Whether all points have losses of the same held-out text."""
    return len({point.held_out for point in self.points}) == 1

  @property
  def ranked(self) -> list[Point]:
    """From the lowest mean up; then those that have none.

    As they were given where they do not compare.
    """
    if not self.compares:
      return list(self.points)
    known = [point for point in self.points if point.losses]
    known.sort(key=lambda point: point.estimate.value)
    return known + [point for point in self.points if not point.losses]

  @property
  def best(self) -> Point | None:
    """Of the lowest mean; None until all have finished the same seeds.

    None too where they do not compare.
    """
    if not self.compares:
      return None
    best = comparison.lowest([point.result for point in self.points])
    return next((p for p in self.points if p.result is best), None)


def to_json(sweep: Sweep) -> dict[str, Any]:
  """What results.json holds; docs/experiments.md describes it."""
  best = sweep.best
  return {
    'title': sweep.title,
    'best': best and best.result.name,
    'points': [_point_json(point) for point in sweep.points],
    'notes': list(sweep.notes),
    'command': sweep.command,
  }


def _point_json(point: Point) -> dict[str, Any]:
  mean, n = point.estimate, len(point.losses)
  return {
    'name': point.result.name,
    'overrides': dict(point.result.overrides),
    'parameters': cost(point.config).parameters.total,
    'steps': point.config.steps,
    'tokens': point.config.steps * point.config.tokens_per_step,
    'n': n,
    'mean': mean.value if n else None,
    'sd': float(np.std(point.losses, ddof=1)) if n > 1 else None,
    'ci95': [mean.low, mean.high] if n > 1 else None,
    'diverged': point.result.diverged(),
    'seeds': {
      str(seed): {
        'validation_loss': record and record['validation_loss'],
        'status': record['status'] if record else 'not run',
      }
      for seed, record in point.result.seeds.items()
    },
  }


def rows(sweep: Sweep) -> list[list[str]]:
  """A table of all points: the heads, and the best first."""
  heads = ['point', 'n', 'mean', '95 % interval', 'sd', 'behind the best']
  return [heads, *(_row(point, sweep.best) for point in sweep.ranked)]


def _row(point: Point, best: Point | None) -> list[str]:
  numbers = _point_json(point)
  name = numbers['name']
  if numbers['diverged']:
    name = f'{name} ({numbers["diverged"]} diverged)'
  if numbers['mean'] is None:
    return [name, str(len(point.result.losses())), *['-'] * 4]
  low, high = numbers['ci95'] or (None, None)
  behind = '-'
  if point is best:
    behind = 'best'
  elif best is not None and (d := _behind(point, best)) is not None:
    behind = f'{d.mean:.4f}'
    if d.ci95:
      behind += f' ({d.ci95[0]:+.4f} to {d.ci95[1]:+.4f})'
  return [
    name,
    str(numbers['n']),
    f'{numbers["mean"]:.4f}',
    '-' if low is None else f'{low:.4f} to {high:.4f}',
    '-' if numbers['sd'] is None else f'{numbers["sd"]:.4f}',
    behind,
  ]


def _behind(point: Point, best: Point) -> paired.Paired | None:
  """In pairs of a seed: what it adds to both is taken away."""
  ours, theirs = point.result.losses(), best.result.losses()
  seeds = sorted(ours.keys() & theirs.keys())
  return paired.difference(
    [ours[seed] for seed in seeds], [theirs[seed] for seed in seeds]
  )


def text(sweep: Sweep) -> str:
  """The table, for a terminal."""
  if not any(point.result.losses() for point in sweep.points):
    return '  no cell is finished yet'
  lines = rows(sweep)
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return '\n'.join(
    '  '
    + '  '.join(
      cell.ljust(width) if i == 0 else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(line, widths, strict=True))
    ).rstrip()
    for line in lines
  ) + ''.join(f'\n{edge}' for edge in edges(sweep))


def write(path: pathlib.Path, sweep: Sweep) -> None:
  """Writes a self-contained page.

  Raises:
    UserError: it cannot be written.
  """
  sections = [_all(sweep)]
  for name in dict.fromkeys(n for point in sweep.points for n in point.values):
    if section := _against(sweep, name):
      sections.append(section)
  notes = [*sweep.notes, _CHANCE]
  found = []
  if best := sweep.best:
    found = [f'Lowest: {best.result.name}, {_told(best)}.', *edges(sweep)]
  if sweep.command:
    notes.append(f'Made by: {sweep.command}')
  figure_page.write(path, sweep.title, sections, notes, found=found)


def _told(point: Point) -> str:
  """Its mean, for people."""
  mean, n = point.estimate, len(point.losses)
  text = f'{mean.value:.4f}'
  if n > 1:
    text += f' (95 % {mean.low:.4f} to {mean.high:.4f})'
  return f'{text} over {n} {"seed" if n == 1 else "seeds"}'


def edges(sweep: Sweep) -> list[str]:
  """Where the best point lies at an end of what was tried, in sentences.

  A field of two values compares them, all but the learning rate.
  """
  best = sweep.best
  out: list[str] = []
  if best is None:
    return out
  for name in best.values:
    if name == _SIZE or not all(_is_number(p, name) for p in sweep.points):
      continue
    tried = sorted({_number(point, name) for point in sweep.points})
    at = _number(best, name)
    if len(tried) < (2 if name == 'lr' else 3) or tried[0] < at < tried[-1]:
      continue
    way = 'below' if at == tried[0] else 'above'
    out.append(
      f'The best {name} of those tried, {at:g}, is the '
      f'{"lowest" if way == "below" else "highest"} of them: a better one may '
      f'lie {way}.'
    )
  return out


def _all(sweep: Sweep) -> figure_page.Section:
  shown = [point for point in sweep.ranked if point.losses][:_MOST_ROWS]
  axis = charts.y_axis(_LOSS, list(_reaches(shown)))
  named = [
    plots.Row(
      point.result.name,
      [point.estimate],
      run=0 if point is sweep.best else None,
      text=f'{point.estimate.value:.4f}',
      faint=point.losses if len(point.losses) > 1 else (),
    )
    for point in shown
  ]
  first = 'The lowest mean first; s' if sweep.compares else 'S'
  caption = f'{first}mall dots are seeds. {_ENDS}'
  if len(sweep.points) > len(shown) == _MOST_ROWS:
    caption += f' The first {_MOST_ROWS} of {len(sweep.points)}.'
  return figure_page.Section(
    'All points',
    caption,
    plots.rows(f'{_LOSS}, of each point', axis, named),
    rows(sweep),
  )


def _reaches(points: Iterable[Point]) -> Iterable[float]:
  for point in points:
    yield from point.losses
    mean = point.estimate
    yield from (mean.low, mean.high)


def _against(sweep: Sweep, name: str) -> figure_page.Section | None:
  """The loss against a field; None where it is no number, or does not vary."""
  points = [point for point in sweep.points if _is_number(point, name)]
  values = sorted({_number(point, name) for point in points})
  if len(values) < 2:
    return None
  curves: dict[str, list[Point]] = {}
  others = [
    other
    for other in points[0].values
    if other != name and len({repr(p.values[other]) for p in points}) > 1
  ]
  for point in points:
    if point.losses:
      key = ' '.join(f'{other}={point.values[other]}' for other in others)
      curves.setdefault(key, []).append(point)
  caption = _ENDS
  many = len(curves) > charts.COLOURS
  if any(
    len({point.held_out for point in members}) > 1
    for members in ([points] if many else curves.values())
  ):
    return None  # No curve through losses that do not compare.
  if many:
    caption = (
      f'At each {name} the lowest mean over {" and ".join(others)}. {_ENDS}'
    )
    curves = {'': _lowest(name, points)}
  title = 'Parameters' if name == _SIZE else name
  low, high = values[0], values[-1]
  x = charts.y_axis(title, values, log=low > 0 and high / low >= _LOG)
  y = charts.y_axis(
    _LOSS, list(_reaches(p for c in curves.values() for p in c))
  )
  drawn: list[charts.Curve | plots.Dots] = []
  for i, (key, members) in enumerate(curves.items()):
    means = [
      (_number(point, name), point.estimate)
      for point in sorted(members, key=lambda point: _number(point, name))
    ]
    drawn += [
      charts.Curve(i, [(at, mean.value) for at, mean in means]),
      plots.Dots(i, means, key, shift=_APART * (i - (len(curves) - 1) / 2)),
    ]
  plot = plots.plot(f'{_LOSS}, against {title}', x, y, drawn)
  legend = charts.legend(list(curves)) if len(curves) > 1 else ''
  return figure_page.Section(
    f'Against {title}', caption, legend + plot if plot else ''
  )


def _is_number(point: Point, name: str) -> bool:
  value = point.values[name]
  is_number = isinstance(value, int | float) and not isinstance(value, bool)
  return name == _SIZE or is_number


def _number(point: Point, name: str) -> float:
  if name == _SIZE:
    return float(cost(point.config).parameters.total)
  return float(point.values[name])


def _lowest(name: str, points: Sequence[Point]) -> list[Point]:
  best: dict[float, Point] = {}
  for point in points:
    at = _number(point, name)
    known = best.get(at)
    if point.losses and (
      known is None or point.estimate.value < known.estimate.value
    ):
      best[at] = point
  return list(best.values())
