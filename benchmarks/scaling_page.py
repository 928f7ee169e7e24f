"""The points of `benchmarks.scaling` as charts on one page."""

from collections.abc import Sequence
from typing import Any

from train import charts

_STYLE = """
:root { --page: #fff; --card: #fff; --ink: #1c1f23; --soft: #5b626b;
  --rule: #dfe2e6; %s }
body { margin: 0; padding: 20px 24px; background: var(--page);
  color: var(--ink); font: 14px/1.45 system-ui, sans-serif; }
main { display: grid; grid-template-columns: 1fr 1fr; gap: 18px 30px;
  max-width: 1120px; }
h1 { font-size: 18px; margin: 0 0 2px; grid-column: 1 / -1; }
h2 { font-size: 14px; margin: 0; }
p { margin: 2px 0; color: var(--soft); }
.axis-title { font-size: 12px; margin: 6px 0 0; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 16px;
  margin: 4px 0 0; padding: 0; font-size: 12px; }
"""


def page(points: Sequence[dict[str, Any]]) -> str:
  """HTML without scripts or anything to load.

  Args:
    points: As `benchmarks.scaling` writes them, by number of devices.
  """
  last = points[-1]
  seconds = {
    'step': lambda p: p['predicted_seconds'],
    'compute': lambda p: p['seconds']['compute'],
    'memory': lambda p: p['seconds']['memory'],
    'network': lambda p: p['seconds']['network_blocking'],
  }
  axes = sorted({c['axis'] for p in points for c in p['collectives']})
  figures = [
    _figure(
      points,
      'Predicted step',
      'A flat line is perfect weak scaling.',
      'milliseconds',
      {n: lambda p, f=f: 1e3 * f(p) for n, f in seconds.items()},
    ),
    _figure(
      points,
      'Memory of a chip',
      'Parameters and moments are shared by at most 64 chips.',
      'GB',
      {
        'peak': lambda p: p['bytes_per_device']['peak'] / 1e9,
        'arguments': lambda p: p['bytes_per_device']['arguments'] / 1e9,
      },
    ),
    _figure(
      points,
      'Collectives',
      'Bytes of whole arrays, a chip and step, by mesh axes.',
      'GB',
      {
        axis: lambda p, axis=axis: sum(
          c['bytes'] / 1e9 for c in p['collectives'] if c['axis'] == axis
        )
        for axis in axes
      },
    ),
    _figure(
      points,
      'Predicted MFU',
      "The model's operations over the peak, recomputation not counted.",
      'percent',
      {'MFU': lambda p: 100 * p['predicted_mfu']},
    ),
  ]
  return (
    '<!doctype html><html lang="en"><meta charset="utf-8">'
    '<title>Weak scaling, predicted</title>'
    f'<style>{_STYLE % charts.LIGHT}{charts.CSS}</style>{charts.DEFS}<main>'
    f'<h1>Weak scaling to {last["devices"]:,} chips, predicted by compiling'
    '</h1>'
    f'{"".join(figures)}</main></html>\n'
  )


def _figure(points, title, text, unit, series) -> str:
  x = charts.Axis(
    'v5p chips', points[0]['devices'] / 1.2, points[-1]['devices'] * 1.2, True
  )
  values = {
    name: [(p['devices'], f(p)) for p in points] for name, f in series.items()
  }
  every = [y for line in values.values() for _, y in line]
  plot = charts.chart(
    f'{title} by the number of chips.',
    x,
    charts.y_axis(unit, every, zero=True),
    [
      charts.Curve(i, line, 'marked', name)
      for i, (name, line) in enumerate(values.items())
    ],
  )
  return (
    f'<section><h2>{title}</h2><p>{text}</p>{plot}'
    f'{charts.legend(list(values))}</section>'
  )
