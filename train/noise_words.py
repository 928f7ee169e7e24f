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
    f'{head}scale {_scale(float(found["noise_scale"]))}, {_best(line)}, '
    f'r({powers[other]:g}) = {r:.3g}, eps matters for {share:.1%} of elements '
    f'at p = {powers[at]:g}; {taken}'
  )


def advice(lines: Iterable[Mapping[str, Any]]) -> str:
  """Of a whole run, as read back by `train/run_log.py`; empty for no line."""
  lines = list(lines)
  if not lines:
    return ''
  telling = [line for line in lines if tells(line)]
  told = [line['overall']['power'] for line in telling]
  count = f'{len(lines)} measurement{"s" * (len(lines) != 1)}'
  if not told:
    return f'noise: {count}, none of which tells a power'
  if len(told) < len(lines):
    count += f', {len(told)} of which tell a power'
  ends = [found for line in telling if (found := at_end(line))]
  if len(ends) == len(told) and len(set(ends)) == 1:
    # Of values that are cut off, mean and deviation would mislead.
    return f'noise: {count}: u is best at p = {ends[0]} (advice; overall)'
  text = (
    f'noise: {count}: u is best at p = {statistics.fmean(told):.2f} on average'
  )
  if len(told) > 1:
    text += f', standard deviation {statistics.stdev(told):.2f}'
  if ends:
    text += f'; {len(ends)} of them lie where the grid of powers ends'
  return f'{text} (advice; overall)'


def tells(line: Mapping[str, Any]) -> bool:
  """Whether a power stands out in what `train/run_log.py` has read."""
  found = line['overall']
  return all(map(math.isfinite, (found['power'], found['power_error'])))


def at_end(line: Mapping[str, Any]) -> str:
  """What is told of a best power that the powers tried do not bound.

  Returns:
    Words for it; empty where it lies between them.
  """
  best, powers = float(line['overall']['power']), line['powers']
  for end, beyond in ((min(powers), 'below'), (max(powers), 'above')):
    if math.isclose(best, end):
      return f'{end:.2f} or {beyond}: the grid ends there'
  return ''


def _best(line: Mapping[str, Any]) -> str:
  found = line['overall']
  error = float(found['power_error'])
  if not math.isfinite(error):
    return 'u best at no p that stands out'
  best = at_end(line) or f'{float(found["power"]):.2f} +- {error:.2f}'
  return f'u best at p = {best} (advice; overall)'


def _scale(value: float) -> str:
  if not math.isfinite(value):
    return 'too large to tell'
  return f'{thousands(value)} examples'


def _nearest(powers: list[float], power: float) -> int:
  return min(range(len(powers)), key=lambda i: abs(powers[i] - power))
