"""Norms of layers over a run as heat maps, and of each parameter as a table."""

import html
import math
from collections.abc import Mapping, Sequence

from train import charts
from train.run_log import RunLog

Norms = Mapping[str, Mapping[str, float]]

_COLUMNS = 48  # Measurements in a heat map, evenly spread.
_ROW = 16  # Pixels.
_LEVELS = 12  # Shades of a heat map.

_MAPS = {
  'grad_norm': 'Gradient, before clipping',
  'powered_norm': 'Gradient, after the power',
  'update_norm': 'Update, over the parameters',
  'param_norm': 'Parameters',
}


def draw(runs: Sequence[RunLog]) -> str:
  """A figure for each run with per-layer statistics, as HTML."""
  several = len(runs) > 1
  return '\n'.join(
    _figure(i, run, several) for i, run in enumerate(runs) if run.layers
  )


def _figure(i: int, run: RunLog, several: bool) -> str:
  steps = list(run.layers)
  count = min(len(steps), _COLUMNS)
  shown = [steps[n * len(steps) // count] for n in range(count)][:-1]
  shown.append(steps[-1])
  columns = [_by_layer(run.layers[step]) for step in shown]
  layers = sorted({layer for column in columns for layer in column}, key=_depth)
  maps = ''.join(
    _heat(title, i, layers, [{
      layer: _value(norms, name) for layer, norms in column.items()
    } for column in columns])
    for name, title in _MAPS.items()
  )  # fmt: skip
  of = html.escape(f', {run.name}') if several else ''
  last = f'step {steps[-1]:,}'
  first = f'step {steps[0]:,}' if len(steps) > 1 else 'that alone'
  return (
    f'<figure class="wide"><figcaption><h3>Norms by layer{of}</h3>From {first} '
    f'at the left to {last} at the right; the stronger the colour, the larger, '
    'on a log scale of each map.</figcaption>'
    f'<div class="heats">{maps}</div>{_table(run.layers[steps[-1]], last)}'
    '</figure>'
  )


def _by_layer(parameters: Norms) -> dict[str, dict[str, float]]:
  """Norms of each layer's parameters together."""
  squares: dict[str, dict[str, float]] = {}
  for path, norms in parameters.items():
    parts = path.split('.')
    numbered = len(parts) > 1 and parts[0] == 'layers'
    sums = squares.setdefault('.'.join(parts[: 1 + numbered]), {})
    for name, norm in norms.items():
      sums[name] = sums.get(name, 0.0) + norm * norm
  return {
    layer: {name: math.sqrt(total) for name, total in sums.items()}
    for layer, sums in squares.items()
  }


def _depth(layer: str) -> tuple[int, int, str]:
  """Orders layers as a token passes through them."""
  kind, _, number = layer.partition('.')
  order = {'embedding': 0, 'layers': 1, 'norm': 2, 'head': 3}.get(kind, 4)
  return order, int(number) if number.isdecimal() else 0, layer


def _value(norms: Mapping[str, float], name: str) -> float:
  value = norms.get(name, math.nan)
  if name == 'update_norm':
    whole = norms.get('param_norm', math.nan)
    return value / whole if whole else math.nan
  return value


def _heat(
  title: str,
  run: int,
  layers: Sequence[str],
  columns: Sequence[Mapping[str, float]],
) -> str:
  """One map: a row for each layer, a column for each measurement."""
  values = [v for column in columns for v in column.values() if _drawn(v)]
  if not values:
    return ''
  low, high = math.log(min(values)), math.log(max(values))
  span = high - low or 1.0
  shades: dict[int, str] = {}
  width = 1000 / len(columns)
  for n, column in enumerate(columns):
    for row, layer in enumerate(layers):
      value = column.get(layer, math.nan)
      if _drawn(value):
        level = min(int((math.log(value) - low) / span * _LEVELS), _LEVELS - 1)
        shades[level] = shades.get(level, '') + (
          f'M{width * n:.1f} {row}h{width:.1f}v1h-{width:.1f}z'
        )
  cells = ''.join(
    f'<path opacity="{_opacity(level):.2f}" d="{path}"/>'
    for level, path in sorted(shades.items())
  )
  names = ''.join(
    f'<text class="y" x="0" dx="-8" y="{_ROW * row + 12}">'
    f'{html.escape(layer.replace("layers.", "layer "))}</text>'
    for row, layer in enumerate(layers)
  )
  ends = min(values), max(values)
  label = html.escape(f'{title}, from {ends[0]:.3g} to {ends[1]:.3g}')
  height, colour = _ROW * len(layers), charts.colour(run)
  ramp = ''.join(
    f'<rect x="{charts.percent(level / _LEVELS)}" height="8" '
    f'width="{charts.percent(1 / _LEVELS)}" opacity="{_opacity(level):.2f}"/>'
    for level in range(_LEVELS)
  )
  return (
    f'<div class="heat"><h4>{html.escape(title)}</h4>'
    f'<div class="rows"><svg role="img" aria-label="{label}" '
    f'class="{colour}" height="{height}">{names}<svg height="100%" '
    f'viewBox="0 0 1000 {len(layers)}" preserveAspectRatio="none">{cells}</svg>'
    f'</svg></div><p><span>{ends[0]:.2g}</span>'
    f'<svg class="ramp {colour}">{ramp}</svg>'
    f'<span>{ends[1]:.2g}</span></p></div>'
  )


def _opacity(level: int) -> float:
  return 0.06 + 0.94 * level / (_LEVELS - 1)


def _drawn(value: float) -> bool:
  return math.isfinite(value) and value > 0


def _table(parameters: Norms, when: str) -> str:
  rows = ''.join(
    f'<tr><th scope="row"><code>{html.escape(path)}</code></th>'
    + ''.join(
      f'<td>{norms[name]:.4g}</td>' if name in norms else '<td></td>'
      for name in ('param_norm', 'grad_norm', 'powered_norm', 'update_norm')
    )
    + '</tr>'
    for path, norms in sorted(parameters.items(), key=lambda item: item[0])
  )
  heads = ''.join(
    f'<th scope="col">{head}</th>'
    for head in ('Parameter', 'Norm', 'Gradient', 'Powered', 'Update')
  )
  return (
    f'<details><summary>Each parameter at {when}</summary><div class="norms" '
    'role="region" tabindex="0" aria-label="Norms of each parameter"><table>'
    f'<caption>Norms at {when}</caption><thead><tr>{heads}</tr></thead>'
    f'<tbody>{rows}</tbody></table></div></details>'
  )
