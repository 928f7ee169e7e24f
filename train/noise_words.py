"""What measurements of gradient noise say to a person, in a line."""

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from train.panel import thousands

_PAPERS = 1.2  # Its power, whose r(p) is told where the run has none.


def measured(
  line: Mapping[str, Any],
  power: float,
  every: int,
  step_seconds: float | None,
) -> str:
  """Of one measurement.

  Args:
    line: Of metrics.jsonl, its split 'noise'.
    power: The run's.
    every: Steps from one measurement to the next.
    step_seconds: What a step takes; None where that is not known yet.
  """
  found, powers = line['overall'], line['powers']
  taken = f'took {line["seconds"]:.2g} s'
  if step_seconds:
    steps = line['seconds'] / step_seconds
    taken += (
      f', as {steps:.1f} steps, {steps / (every + steps):.1%} of the time'
    )
  head = f'noise at step {line["step"]}: '
  if not math.isfinite(float(found['signal'])):
    return f'{head}the gradient is not finite; {taken}'
  at = _nearest(powers, power)
  other = at if powers[at] != 1 else _nearest(powers, _PAPERS)
  r = float(found['step_ratio'][other])
  share = float(found['eps_share'][at])
  return (
    f'{head}scale {_scale(float(found["noise_scale"]))}, {_best(found)}, '
    f'r({powers[other]:g}) = {r:.3g}, eps matters for {share:.1%} of elements '
    f'at p = {powers[at]:g}; {taken}'
  )


def advice(lines: Iterable[Mapping[str, Any]]) -> str:
  """Of a whole run, as read back by `train/run_log.py`; empty for no line."""
  lines = list(lines)
  if not lines:
    return ''
  told = [line['overall']['power'] for line in lines if tells(line)]
  count = f'{len(lines)} measurement{"s" * (len(lines) != 1)}'
  if not told:
    return f'noise: {count}, none of which tells a power'
  if len(told) < len(lines):
    count += f', {len(told)} of which tell a power'
  text = (
    f'noise: {count}: u is best at p = {statistics.fmean(told):.2f} on average'
  )
  if len(told) > 1:
    text += f', standard deviation {statistics.stdev(told):.2f}'
  return f'{text} (advice; overall)'


def tells(line: Mapping[str, Any]) -> bool:
  """Whether a power stands out in what `train/run_log.py` has read."""
  found = line['overall']
  return all(map(math.isfinite, (found['power'], found['power_error'])))


def _best(found: Mapping[str, Any]) -> str:
  error = float(found['power_error'])
  if not math.isfinite(error):
    return 'u best at no p that stands out'
  best = float(found['power'])
  return f'u best at p = {best:.2f} +- {error:.2f} (advice; overall)'


def _scale(value: float) -> str:
  if not math.isfinite(value):
    return 'too large to tell'
  return f'{thousands(value)} examples'


def _nearest(powers: list[float], power: float) -> int:
  return min(range(len(powers)), key=lambda i: abs(powers[i] - power))
