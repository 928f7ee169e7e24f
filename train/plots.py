"""What charts of experiments add to curves: bands, intervals, named rows.

A chart (`train/charts.py`) takes curves; `plot` takes bands and dots with
intervals as well, in any mix, and `rows` draws values under names, as a forest
plot does, so that long names read on a phone too.
"""

import dataclasses
import html
import itertools
import math
from collections.abc import Iterable, Sequence

from train import charts
from train.charts import Axis, Categories, Curve

_MOST_EDGES = 500  # Of a band; more are thinned.
_MOST_NAME = 38  # Letters of a row's name that fit a phone.
_LETTERS = 40  # Of a name and its text that fit one line of a phone.
_LINE = 17  # Pixels of a line of text in a row.

DEFS = (
  '<svg class="defs" aria-hidden="true"><defs>'
  '<path id="capx" d="M0-4v8"/><path id="capy" d="M-4 0h8"/>'
  '</defs></svg>'
)
CSS = """
.band { fill: currentColor; opacity: .17; }
.span, .cap { stroke: currentColor; stroke-width: 2; fill: none; }
.dot { fill: currentColor; opacity: .5; }
.join { stroke: var(--soft); stroke-width: 1; opacity: .45; }
.named { padding-left: 22px; }
.plot.named > svg { flex: none; }
.plot .name { fill: var(--ink); font-weight: 600; }
.plot .name, .plot .text { paint-order: stroke; stroke: var(--card);
  stroke-width: 4px; stroke-linejoin: round; }
.plot .right { text-anchor: end; }
"""


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A value and its interval, which is not drawn unless low < high."""

  value: float
  low: float = math.nan
  high: float = math.nan


@dataclasses.dataclass(frozen=True)
class Band:
  """A shaded range: (x, low, high) sorted by x; where not finite, a gap."""

  run: int
  """Decides the colour, as a curve's does."""
  edges: Sequence[tuple[float, float, float]]


@dataclasses.dataclass(frozen=True)
class Dots:
  """Markers, each with a vertical interval, a horizontal one, or both."""

  run: int
  """Decides colour and marker, as a curve's does."""
  points: Sequence[tuple[float | Estimate, float | Estimate]]
  name: str = ''
  """Named in the tooltip."""
  shift: float = 0.0
  """Pixels to the right, so that dots at one x lie beside one another."""


@dataclasses.dataclass(frozen=True)
class Row:
  """A name, and values under it."""

  name: str
  estimates: Sequence[Estimate]
  run: int | None = None
  """Decides colour and marker; None: grey."""
  text: str = ''
  """At the right of the name."""
  faint: Sequence[float] = ()
  """Single values behind the estimates, as small dots."""


def plot(
  label: str,
  x: Axis | Categories | None,
  y: Axis | None,
  items: Sequence[Curve | Band | Dots],
  zero: bool = False,
) -> str:
  """One chart of curves, bands and dots, as HTML.

  Args:
    label: a sentence for readers who cannot see it.
    x: horizontal axis; None, like y, says that nothing finite is there to be
      drawn, and so nothing is drawn.
    y: vertical axis.
    items: bands are drawn first, dots last, each in order.
    zero: draw a strong line at y = 0.
  """
  if x is None or y is None:
    return ''
  return charts.chart(
    label,
    x,
    y,
    [item for item in items if isinstance(item, Curve)],
    zero,
    over=''.join(_dots(x, y, item) for item in items if isinstance(item, Dots)),
    under=''.join(
      _band(x, y, item) for item in items if isinstance(item, Band)
    ),
  )


def rows(
  label: str,
  x: Axis | None,
  named: Sequence[Row],
  line: float | None = None,
  joined: bool = False,
) -> str:
  """Values along one axis, in a row for each name, as HTML.

  An interval that leaves the axis has no mark at that end.

  Args:
    label: a sentence for readers who cannot see it.
    x: the axis; None says that there is nothing finite to draw, and so nothing
      is drawn.
    named: the rows from above.
    line: where to draw a strong upright line.
    joined: join the i-th estimates of neighbouring rows.
  """
  if x is None or not named:
    return ''
  lines = 1 + any(
    row.text and len(row.name[:_MOST_NAME]) + len(row.text) > _LETTERS
    for row in named
  )
  height = _LINE * lines + 26
  bottom = height * len(named) + 4
  parts = [
    f'<line class="grid" x1="{at}" x2="{at}" y2="{bottom}"/>'
    f'<text class="x" x="{at}" y="{bottom}" dy="18">{text}</text>'
    for at, text in ((charts.percent(x.place(v)), t) for v, t in x.ticks())
  ]
  parts.append(
    f'<line class="axis" x2="100%" y1="{bottom}" y2="{bottom}"/>'
    f'<text class="x" x="50%" y="{bottom}" dy="38">{html.escape(x.title)}'
    '</text>'
  )
  if line is not None and 0 <= x.place(line) <= 1:
    at = charts.percent(x.place(line))
    parts.append(f'<line class="zero" x1="{at}" x2="{at}" y2="{bottom}"/>')
  levels = [height * i + _LINE * lines + 11 for i in range(len(named))]
  if joined:
    parts += _joins(x, named, levels)
  for row, level in zip(named, levels, strict=True):
    parts += _row(x, row, level, level - _LINE * lines + 4, lines)
  return (
    f'<div class="plot named"><svg role="img" aria-label="{html.escape(label)}"'
    f' height="{bottom}">{"".join(parts)}</svg></div>'
  )


def figure(head: str, text: str, body: str, *, wide: bool = False) -> str:
  """A figure with its caption, as HTML; empty where body is.

  Args:
    head: its heading.
    text: the caption.
    body: HTML: a legend if need be, and a plot.
    wide: as wide as the page, instead of half.
  """
  if not body:
    return ''
  return (
    f'<figure class="{"wide" if wide else "half"}"><figcaption>'
    f'<h3>{html.escape(head)}</h3>{html.escape(text)}</figcaption>{body}'
    '</figure>'
  )


def _band(x: Axis | Categories, y: Axis, band: Band) -> str:
  edges = band.edges[:: len(band.edges) // _MOST_EDGES + 1]
  if edges and edges[-1] != band.edges[-1]:
    edges = [*edges, band.edges[-1]]
  path = ''
  whole = itertools.groupby(edges, lambda edge: all(map(math.isfinite, edge)))
  for finite, stretch in whole:
    if not finite:
      continue
    stretch_ = list(stretch)
    tops = [charts.spot(x, y, at, high) for at, _, high in stretch_]
    feet = [charts.spot(x, y, at, low) for at, low, _ in reversed(stretch_)]
    path += f'M{"L".join([*tops, *feet])}z'
  colour = charts.colour(band.run)
  return f'<path class="band {colour}" d="{path}"/>' if path else ''


def _estimate(value: float | Estimate) -> Estimate:
  return value if isinstance(value, Estimate) else Estimate(value)


def _dots(x: Axis | Categories, y: Axis, dots: Dots) -> str:
  parts: list[str] = []
  for px, py in dots.points:
    across, up = _estimate(px), _estimate(py)
    at, level = x.place(across.value), y.place(up.value)
    if not (math.isfinite(at) and math.isfinite(level)):
      continue
    if 0 <= at <= 1:
      here = charts.percent(at)
      ends = [(here, charts.percent(1 - v), end) for v, end in _ends(y, up)]
      parts += _span(ends, dots.run, 'y')
    if 0 <= level <= 1:
      here = charts.percent(1 - level)
      ends = [(charts.percent(v), here, end) for v, end in _ends(x, across)]
      parts += _span(ends, dots.run, 'x')
    if 0 <= at <= 1 and 0 <= level <= 1:
      where = (
        x.names[round(across.value)]
        if isinstance(x, Categories)
        else _words(across)
      )
      title = f'{dots.name}: {_words(up)} at {where}'.removeprefix(': ')
      places = charts.percent(at), charts.percent(1 - level)
      parts.append(charts.marker(dots.run, *places, title=title))
  shift = f' transform="translate({dots.shift:g} 0)"' if dots.shift else ''
  return f'<g{shift}>{"".join(parts)}</g>' if parts else ''


def _words(estimate: Estimate) -> str:
  text = f'{estimate.value:.5g}'
  if estimate.low < estimate.high:
    text += f' ({estimate.low:.5g} to {estimate.high:.5g})'
  return text.replace('-', '\N{MINUS SIGN}')


def _ends(
  axis: Axis | Categories, estimate: Estimate
) -> list[tuple[float, bool]]:
  """Both ends of what is to be seen of the interval, and if it ends there."""
  if not estimate.low < estimate.high:
    return []
  low, high = axis.place(estimate.low), axis.place(estimate.high)
  if high < 0 or low > 1:
    return []
  return [(max(low, 0.0), low >= 0), (min(high, 1.0), high <= 1)]


def _span(
  ends: Sequence[tuple[str, str, bool]], run: int | None, cap: str
) -> Iterable[str]:
  """A line between the ends, and a short one across where it ends there."""
  if not ends:
    return
  colour = charts.colour(run)
  (x1, y1, _), (x2, y2, _) = ends
  yield (
    f'<line class="span {colour}" x1="{x1}" x2="{x2}" y1="{y1}" y2="{y2}"/>'
  )
  for x, y, is_end in ends:
    if is_end:
      yield f'<use class="cap {colour}" href="#cap{cap}" x="{x}" y="{y}"/>'


def _row(
  x: Axis, row: Row, level: int, text_at: int, lines: int
) -> Iterable[str]:
  name, title = row.name, ''
  if len(name) > _MOST_NAME:
    # Names that begin alike are told apart by their ends.
    half = _MOST_NAME // 2
    name, title = (
      f'{name[:half]}\N{HORIZONTAL ELLIPSIS}{name[1 - half :]}',
      name,
    )
  whole = f'<title>{html.escape(title)}</title>' if title else ''
  colour = charts.colour(row.run)
  for value in row.faint:
    if 0 <= x.place(value) <= 1:
      at = charts.percent(x.place(value))
      yield f'<circle class="dot {colour}" r="3" cx="{at}" cy="{level}"/>'
  for estimate in row.estimates:
    ends = [
      (charts.percent(v), str(level), end) for v, end in _ends(x, estimate)
    ]
    yield from _span(ends, row.run, 'x')
  for estimate in row.estimates:
    if 0 <= x.place(estimate.value) <= 1:
      at = charts.percent(x.place(estimate.value))
      words = f'{row.name}: {_words(estimate)}'
      yield charts.marker(row.run, at, str(level), title=words)
  yield f'<text class="name" y="{text_at}">{html.escape(name)}{whole}</text>'
  if row.text:
    place = f'y="{text_at + _LINE}"' if lines > 1 else f'x="100%" y="{text_at}"'
    side = '' if lines > 1 else ' right'
    yield f'<text class="text{side}" {place}>{html.escape(row.text)}</text>'


def _joins(
  x: Axis, named: Sequence[Row], levels: Sequence[int]
) -> Iterable[str]:
  """Lines from row to row, past a row that lacks the value."""
  for i in range(max(len(row.estimates) for row in named)):
    found = [
      (x.place(row.estimates[i].value), level)
      for row, level in zip(named, levels, strict=True)
      if i < len(row.estimates)
    ]
    found = [(place, level) for place, level in found if 0 <= place <= 1]
    for (a, above), (b, below) in itertools.pairwise(found):
      yield (
        f'<line class="join" x1="{charts.percent(a)}" '
        f'x2="{charts.percent(b)}" y1="{above}" y2="{below}"/>'
      )
