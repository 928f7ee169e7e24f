"""Line charts as inline SVG whose text keeps its size at every page width.

The SVG is the plot area itself, as wide as its column: labels and markers sit
at percentages, so their size is in CSS pixels, and only the curves are
stretched (in a nested viewport, with strokes that do not scale). A chart that
scales as a picture would be unreadable on a phone or coarse on a desktop.
Colours are CSS classes, hence light, dark and print share one drawing.
"""

import dataclasses
import html
import math
from collections.abc import Mapping, Sequence

from train.series import Points, thin

# Okabe and Ito's colour-blind-safe hues, darkened or lightened until they
# read on white and on near-black; markers repeat the distinction in shape.
_LIGHT = ('#0072b2', '#d55e00', '#008f68', '#b0578d', '#997000', '#555')
_DARK = ('#56b4e9', '#f58a4b', '#2cc497', '#e39bc3', '#e6c14a', '#c8c8c8')
_MARKERS = (
  'M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z',
  'M-3.5-3.5h7v7h-7z',
  'M0-5L5 0L0 5L-5 0z',
  'M0-4.5L4.5 3.5h-9z',
  'M0 4.5L4.5-3.5h-9z',
)
_LINES: Mapping[int, str] = {}
_KINDS: Mapping[str, str] = {}

_RULES = """
/* Beside a figure with a longer caption the plot itself is taller. */
.plot { padding: 6px 22px 44px 58px; flex: 1; display: flex;
  flex-direction: column; }
.plot svg { display: block; width: 100%; }
.plot > svg { flex: 1 0 230px; overflow: visible; }
.wide .plot > svg { flex-basis: clamp(270px, 34vw, 400px); }
.plot text { font-size: 12px; fill: var(--soft);
  font-variant-numeric: tabular-nums; }
.y { text-anchor: end; }
.x { text-anchor: middle; }
.grid { stroke: var(--rule); }
.axis { stroke: var(--soft); }
.zero { stroke: var(--ink); stroke-width: 1.5; }
.line, .thick, .soft, .faint, .dashed, .dotted { fill: none;
  stroke: currentColor; stroke-width: 2; stroke-linejoin: round;
  stroke-linecap: round; }
.thick { stroke-width: 7; opacity: .6; }
.soft { stroke-width: 1.3; opacity: .8; }
.faint { stroke-width: 1; opacity: .22; }
.dashed { stroke-dasharray: 4 6; }
.dotted { stroke-width: 1.5; stroke-dasharray: 1 5; opacity: .8; }
.mark { fill: currentColor; stroke: var(--card); stroke-width: 1.2; }
.plain { color: var(--soft); }
.key .faint { opacity: .5; }
.key { display: inline-block; width: 30px; height: 12px; margin-right: 5px;
  vertical-align: -1px; }
.defs { position: absolute; width: 0; height: 0; }
"""


def _colours(palette: Sequence[str]) -> str:
  return ' '.join(f'--c{i}: {colour};' for i, colour in enumerate(palette))


LIGHT, DARK = _colours(_LIGHT), _colours(_DARK)
CSS = _RULES + ''.join(
  f'.c{i} {{ color: var(--c{i}); }}\n' for i in range(len(_LIGHT))
)
COLOURS = len(_LIGHT)
"""Runs that have a colour of their own; the next one has the first's."""
DEFS = (
  '<svg class="defs" aria-hidden="true"><defs>'
  + ''.join(f'<path id="m{i}" d="{d}"/>' for i, d in enumerate(_MARKERS))
  + '</defs></svg>'
)


@dataclasses.dataclass(frozen=True)
class Curve:
  """One curve: points sorted by x, whose y may be non-finite (a gap)."""

  run: int
  """Index of the run, which decides colour and marker."""
  points: Points
  style: str = 'line'
  """'line', 'thick', 'soft', 'faint', 'dashed', 'dotted', or 'marked' (a line
  with markers)."""
  name: str = ''
  """Named in the tooltip of a marker."""


@dataclasses.dataclass(frozen=True)
class Axis:
  """One axis: its title (with the unit), its range and its scale."""

  title: str
  low: float
  high: float
  log: bool = False
  plus: bool = False
  """Write + before positive ticks."""

  def place(self, value: float) -> float:
    """The value's place in the range: 0 at low, 1 at high."""
    low, high = self.low, self.high
    if self.log:
      if value <= 0:
        return -math.inf
      low, high, value = math.log(low), math.log(high), math.log(value)
    return (value - low) / (high - low)

  def ticks(self) -> list[tuple[float, str]]:
    """At most eight round values in the range, each with its label."""
    if self.log:
      powers = range(
        math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1
      )
      for digits in ((1, 2, 5), (1, 3), (1,)):
        values = [d * 10.0**power for power in powers for d in digits]
        values = [v for v in values if self.low <= v <= self.high]
        if len(values) <= 7:
          break
      else:
        values = values[:: len(values) // 6 + 1]
      if len(values) >= 3:
        return [(v, _short(v)) for v in values]
    span = self.high - self.low
    magnitude = 10.0 ** math.floor(math.log10(span / 5))
    step = next(
      m * magnitude for m in (1, 2, 5, 10) if span <= 6 * m * magnitude
    )
    first, last = (
      math.ceil(self.low / step),
      math.floor(self.high / step + 1e-9),
    )
    return [
      (n * step, self._label(n * step, step)) for n in range(first, last + 1)
    ]

  def _label(self, value: float, step: float) -> str:
    unit, suffix = 1.0, ''
    for unit_, suffix_ in ((1e12, 'T'), (1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
      if step < 1 or self.high < max(unit_, 1e4):
        continue
      unit, suffix = unit_, suffix_
      break
    places = max(0, -math.floor(math.log10(step / unit) + 1e-9))
    sign = '+' if self.plus and value > 0 else ''
    if suffix and not value:
      text = '0'
    elif places > 5 or abs(value) >= 1e15:
      text = f'{value:.2g}'
    else:
      text = f'{value / unit:,.{places}f}{suffix}'
    return sign + text.replace('-', '\N{MINUS SIGN}')


@dataclasses.dataclass(frozen=True)
class Categories:
  """A horizontal axis of names, each short: the place of a name is its index.

  Names that are long or many go into rows (`plots.rows`).
  """

  title: str
  names: Sequence[str]

  def place(self, value: float) -> float:
    """The value's place in the range: each name has an equal share."""
    return (value + 0.5) / len(self.names)

  def ticks(self) -> list[tuple[float, str]]:
    """The indices and their names."""
    return list(enumerate(self.names))


def _short(value: float) -> str:
  """A value on a logarithmic axis."""
  for unit, suffix in ((1e12, 'T'), (1e9, 'B'), (1e6, 'M'), (1e3, 'k')):
    if max(unit, 1e4) <= value < 1e15:
      return f'{value / unit:.4g}{suffix}'
  text = f'{value:.4g}'.replace('e+', 'e').replace('e0', 'e')
  return text.replace('e-0', 'e-').replace('-', '\N{MINUS SIGN}')


def signed(value: float, digits: int = 4) -> str:
  """The value with its sign, a true minus."""
  return f'{value:+.{digits}f}'.replace('-', '\N{MINUS SIGN}')


def y_axis(
  title: str,
  values: Sequence[float],
  *,
  zero: bool = False,
  symmetric: bool = False,
  log: bool = False,
) -> Axis | None:
  """An axis around the finite values with a margin; None without any.

  Args:
    title: what is measured and its unit.
    values: what must fit.
    zero: start at zero.
    symmetric: reach as far below zero as above, and write signs.
    log: logarithmic, over the positive values.
  """
  values = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
  if not values:
    return None
  low, high = min(values), max(values)
  if log:
    return Axis(title, low / 1.15, high * 1.15, log=True)
  if symmetric:
    high = 1.2 * max(map(abs, values)) or 1e-3
    return Axis(title, -high, high, plus=True)
  if zero:
    low, high = min(low, 0.0), max(high, 0.0)
  margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
  return Axis(title, low if zero else low - margin, high + margin)


def legend(
  names: Sequence[str],
  styles: Mapping[int, str] = _LINES,
  kinds: Mapping[str, str] = _KINDS,
) -> str:
  """What colours, markers and lines mean.

  Args:
    names: of the runs, each with its colour and marker; '' leaves one out.
    styles: of a run's line, where it is another than 'line'.
    kinds: a style and what it means, in whatever colour; of a single run in
      its own, and without its name.
  """
  alone = bool(kinds) and len(names) == 1
  items = [
    _item(colour(i), styles.get(i, 'line'), marker(i, '15', '6'), name)
    for i, name in enumerate(names)
    if name and not alone
  ]
  for style, meaning in kinds.items():
    marked = style == 'marked'
    mark = '<use class="mark" href="#m0" x="15" y="6"/>' if marked else ''
    line = 'line' if marked else style
    items.append(_item(colour(0) if alone else '', line, mark, meaning))
  return f'<ul class="legend">{"".join(items)}</ul>' if items else ''


def _item(colour_: str, style: str, mark: str, name: str) -> str:
  return (
    f'<li><svg class="key {colour_}" aria-hidden="true">'
    f'<line class="{style}" x1="1" x2="29" y1="6" y2="6"/>'
    f'{mark}</svg>{html.escape(name)}</li>'
  )


def chart(
  label: str,
  x: Axis | Categories,
  y: Axis | None,
  curves: Sequence[Curve],
  zero: bool = False,
  over: str = '',
  under: str = '',
) -> str:
  """One chart as HTML: the y axis's title above, the plot, ticks around it.

  Args:
    label: a sentence for readers who cannot see it.
    x: horizontal axis.
    y: vertical axis; None says that there is nothing finite to draw, and so
      nothing is drawn.
    curves: drawn in order, the later ones above.
    zero: draw a strong line at y = 0.
    over: SVG to draw over the curves, its places in percent.
    under: SVG to draw under the curves, its places as those of `spot`.
  """
  if y is None:
    return ''
  label = html.escape(label)
  frame, strokes, marks = [], [], []
  for value, text in y.ticks():
    place = percent(1 - y.place(value))
    frame.append(
      f'<line class="grid" x2="100%" y1="{place}" y2="{place}"/>'
      f'<text class="y" x="0" y="{place}" dx="-8" dy="4">{text}</text>'
    )
  for value, text in x.ticks():
    place = percent(x.place(value))
    frame.append(
      f'<line class="grid" x1="{place}" x2="{place}" y2="100%"/>'
      f'<text class="x" x="{place}" y="100%" dy="18">{html.escape(text)}</text>'
    )
  frame.append('<line class="axis" x2="100%" y1="100%" y2="100%"/>')
  if zero:
    place = percent(1 - y.place(0))
    frame.append(f'<line class="zero" x2="100%" y1="{place}" y2="{place}"/>')
  for curve in curves:
    points = thin(curve.points)
    style = 'line' if curve.style == 'marked' else curve.style
    strokes.append(
      f'<path class="{style} {colour(curve.run)}" '
      f'vector-effect="non-scaling-stroke" d="{_path(x, y, points)}"/>'
    )
    if curve.style == 'marked':
      marks += _marks(x, y, curve)
  return (
    f'<p class="axis-title">{html.escape(y.title)}</p><div class="plot">'
    f'<svg role="img" aria-label="{label}">{"".join(frame)}'
    '<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" height="100%">'
    f'{under}{"".join(strokes)}</svg>{over}{"".join(marks)}'
    f'<text class="x" x="50%" y="100%" dy="38">{html.escape(x.title)}</text>'
    '</svg></div>'
  )


def colour(run: int | None) -> str:
  """The CSS class that colours the run's curves; of None, grey."""
  return 'plain' if run is None else f'c{run % len(_LIGHT)}'


def percent(place: float) -> str:
  """A place in a range, 0 to 1, as a length in a drawing."""
  return f'{100 * place:.2f}%'


def spot(x: Axis | Categories, y: Axis, px: float, py: float) -> str:
  """A point as a place in the stretched viewport, 1000 by 1000."""
  # Far beyond the edges is as good as infinity, and shorter.
  across = min(max(1000 * x.place(px), -9999), 9999)
  up = min(max(1000 * (1 - y.place(py)), -9999), 9999)
  return f'{across:.1f} {up:.1f}'


def marker(
  run: int | None, x: str, y: str, style: str = 'mark', title: str = ''
) -> str:
  """The run's marker at a place, with a tooltip; grey for None."""
  title = f'<title>{html.escape(title)}</title>' if title else ''
  return (
    f'<use class="{style} {colour(run)}" href="#m{(run or 0) % len(_MARKERS)}" '
    f'x="{x}" y="{y}">{title}</use>'
  )


def _marks(x: Axis | Categories, y: Axis, curve: Curve) -> list[str]:
  # A long run has more evaluations than a chart has room for markers.
  every = max(1, len(curve.points) // 40)
  out = []
  for px, py in list(reversed(curve.points))[::every]:
    if math.isfinite(py) and 0 <= y.place(py) <= 1:
      title = f'{curve.name}: {py:.4f} at {px:,.0f}'
      at = percent(x.place(px)), percent(1 - y.place(py))
      out.append(marker(curve.run, *at, title=title))
  return out


def _path(x: Axis | Categories, y: Axis, points: Points) -> str:
  parts: list[str] = []
  pen_down = False
  for px, py in points:
    if not math.isfinite(py):
      pen_down = False
      continue
    parts.append(f'{"L" if pen_down else "M"}{spot(x, y, px, py)}')
    if not pen_down:
      parts.append('h0')  # a lone point between gaps still shows as a dot
    pen_down = True
  return ''.join(parts)
