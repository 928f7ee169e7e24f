"""Moments on a horizontal axis: ticks in lanes, rules, and small signs.

Marks that would touch are drawn as one, so that hundreds stay legible and the
page small; its tooltip tells how many there are.
"""

import dataclasses
import html
from collections.abc import Iterable, Sequence

from train import charts

_CLOSEST = 1 / 300
"""Of the axis: marks nearer to the first of a group join it."""

CROSSES = 1 / 120
"""Likewise, of the crosses over a chart."""

_MANY = 10  # Rules in a chart that would drown its curves if they were strong.
_ROW, _GAP = 10, 10  # Pixels of a run's row in a lane, and between lanes.

DEFS = (
  '<svg class="defs" aria-hidden="true"><defs>'
  '<path id="skip" d="M-3.5-3.5L3.5 3.5M-3.5 3.5L3.5-3.5"/>'
  '</defs></svg>'
)


@dataclasses.dataclass(frozen=True)
class Mark:
  """Something at one place of an axis, or over a stretch of it."""

  at: float
  title: str
  """Its tooltip."""
  until: float | None = None
  """Where a stretch ends."""
  count: int = 1
  """How many it stands for."""


@dataclasses.dataclass(frozen=True)
class Lane:
  """A named strip, with a row for each run."""

  name: str
  rows: Sequence[Sequence[Mark]]
  """Marks of each run, in the order of the runs."""
  sign: str = 'tick'
  """'tick', 'skip' (a cross) or 'bar' (stretches)."""


def grouped(
  x: charts.Axis, marks: Iterable[Mark], closest: float = _CLOSEST
) -> list[Mark]:
  """Marks in order, those that would touch joined into one stretch."""
  groups: list[list[Mark]] = []
  for mark in sorted(marks, key=lambda mark: mark.at):
    if groups and x.place(mark.at) - x.place(groups[-1][0].at) < closest:
      groups[-1].append(mark)
    else:
      groups.append([mark])
  return [
    group[0]
    if len(group) == 1
    else Mark(
      group[0].at,
      f'{len(group):,} drawn as one: from {group[0].title} to '
      f'{group[-1].title}',
      group[-1].at,
      len(group),
    )
    for group in groups
  ]


def lanes(x: charts.Axis, strips: Sequence[Lane]) -> str:
  """The strips above one another, as wide as a chart below with the same axis.

  Strips without a mark are left out.
  """
  strips = [strip for strip in strips if any(strip.rows)]
  heights = [_ROW * len(strip.rows) + _GAP for strip in strips]
  whole = sum(heights)
  parts = [
    f'<line class="grid" x1="{at}" x2="{at}" y2="{whole}"/>'
    for at in (charts.percent(x.place(value)) for value, _ in x.ticks())
  ]
  top = 0
  for strip, height in zip(strips, heights, strict=True):
    middle = top + (height - _GAP) / 2 + 4
    parts.append(f'<text class="y" dx="-8" y="{middle}">{strip.name}</text>')
    for i, row in enumerate(strip.rows):
      draw = _bar if strip.sign == 'bar' else _sign
      y = top + _ROW * i
      parts += [draw(x, y, i, mark, strip.sign) for mark in row]
    top += height
  label = ', '.join(
    f'{sum(mark.count for row in strip.rows for mark in row):,} {strip.name}'
    for strip in strips
  )
  return (
    f'<div class="lanes"><svg role="img" aria-label="Marks: {label}." '
    f'height="{whole}">{"".join(parts)}</svg></div>'
  )


def rules(x: charts.Axis, run: int, marks: Iterable[Mark]) -> str:
  """A dashed line from top to bottom at each mark, in the run's colour."""
  groups = grouped(x, marks, 1 / 120)
  style = f'rule {charts.colour(run)}{" many" * (len(groups) > _MANY)}'
  return ''.join(
    f'<line class="{style}" x1="{at}" x2="{at}" y2="100%">{_title(mark)}</line>'
    for mark in groups
    for at in [charts.percent(x.place(mark.at))]
  )


def crosses(x: charts.Axis, run: int, marks: Iterable[Mark]) -> str:
  """A cross above the axis at each mark, each run's at a height of its own."""
  return ''.join(
    f'<use class="skip {charts.colour(run)}" href="#skip" y="100%" '
    f'x="{charts.percent(x.place(mark.at))}" '
    f'transform="translate(0 {-8 - 10 * run})">{_title(mark)}</use>'
    for mark in grouped(x, marks, CROSSES)
  )


def _title(mark: Mark) -> str:
  return f'<title>{html.escape(mark.title)}</title>'


def _bar(x: charts.Axis, y: int, run: int, mark: Mark, _: str) -> str:
  end = mark.at if mark.until is None else mark.until
  first, last = x.place(mark.at), x.place(end)
  return (
    f'<rect class="bar {charts.colour(run)}" x="{charts.percent(first)}" '
    f'y="{y}" width="{charts.percent(max(last - first, 0.002))}" '
    f'height="{_ROW - 2}">{_title(mark)}</rect>'
  )


def _sign(x: charts.Axis, y: int, run: int, mark: Mark, sign: str) -> str:
  at = charts.percent(x.place(mark.at))
  if sign == 'skip':
    return (
      f'<use class="skip {charts.colour(run)}" href="#skip" x="{at}" '
      f'y="{y + (_ROW - 2) / 2}">{_title(mark)}</use>'
    )
  return (
    f'<line class="tick {charts.colour(run)}" x1="{at}" x2="{at}" y1="{y}" '
    f'y2="{y + _ROW - 2}">{_title(mark)}</line>'
  )
