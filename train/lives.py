"""When a run was alive: from each start to the last sign of life after it."""

import bisect
import dataclasses
import datetime
from collections.abc import Sequence

from train.run_log import Event, RunLog

_STARTS = ('began', 'resumed')
_ENDS = ('stopped', 'failed', 'done')
# What a process says while it lives. A checkpoint is refused before a start is
# told, by the process that is about to go on.
_SIGNS = ('saved', 'save_failed', 'skipped', *_ENDS)


@dataclasses.dataclass
class Life:
  """From one start of a run's process to its end, as far as is known."""

  start: Event
  """'began' or 'resumed'."""
  points: list[tuple[float, int]]
  """(unix seconds, steps taken), neither ever falling; never empty.

  Those after the save that the next life went on from are lost: they were
  done again.
  """
  end: str = 'died'
  """'done', 'stopped', 'failed', 'died' (another life followed), or 'open' (no
  end on record: going on, or died)."""

  @property
  def last(self) -> tuple[float, int]:
    """The last sign of life: unix seconds, steps taken."""
    return self.points[-1]

  @property
  def seconds(self) -> float:
    """Between the first and the last sign of life."""
    return self.points[-1][0] - self.points[0][0]


def lives(run: RunLog) -> list[Life]:
  """All lives of a run in order; none where its lines have no time."""
  measured = [*run.train.values(), *run.validation.values()]
  marks = [(m['time'], int(m['step']), '') for m in measured if 'time' in m] + [
    (event.time, event.step, event.kind)
    for event in run.events
    if event.time is not None and event.kind in _SIGNS
  ]
  marks.sort(key=lambda mark: mark[0])
  starts = [
    event
    for event in run.events
    if event.time is not None and event.kind in _STARTS
  ]
  starts.sort(key=lambda event: event.time or 0.0)
  times = [event.time for event in starts if event.time is not None]
  if marks and not (times and times[0] <= marks[0][0]):
    # An older run, or a copy without its history.
    first = marks[0][0]
    starts.insert(0, Event('began', 0, first, {}))
    times.insert(0, first)
  out = [
    Life(start, [(at, start.step)])
    for start, at in zip(starts, times, strict=True)
  ]
  for at, step, kind in marks:
    life = out[bisect.bisect_right(times, at) - 1]
    life.points.append((at, max(step, life.points[-1][1])))
    if kind in _ENDS:
      life.end = kind
  if out and out[-1].end == 'died':
    out[-1].end = 'open'
  return out


def beginning(run: RunLog) -> float | None:
  """Unix seconds of the first sign of life; None where nothing has a time."""
  found = lives(run)
  return found[0].points[0][0] if found else None


def alive(run: RunLog) -> tuple[float, float]:
  """Seconds alive, and seconds from the first to the last sign of life."""
  found = lives(run)
  if not found:
    return 0.0, 0.0
  whole = found[-1].last[0] - found[0].points[0][0]
  return sum(life.seconds for life in found), whole


def duration(seconds: float) -> str:
  """A length of time in two units, '5 h 12 min'."""
  whole = round(abs(seconds))
  for unit, size, smaller, part in (
    ('d', 86400, 'h', 3600),
    ('h', 3600, 'min', 60),
    ('min', 60, 's', 1),
  ):
    if whole >= size:
      rest = whole % size // part
      text = f'{whole // size:,} {unit}'
      return f'{text} {rest} {smaller}' if rest else text
  return f'{whole} s'


def clock(seconds: float) -> str:
  """A moment, in unix seconds, as a date and a time of day, UTC."""
  moment = datetime.datetime.fromtimestamp(seconds, datetime.UTC)
  return moment.strftime('%Y-%m-%d %H:%M:%S')


def unit_of(seconds: Sequence[float]) -> tuple[str, float]:
  """What lengths of time are best counted in, and its seconds."""
  longest = max(seconds, default=0.0)
  if longest <= 180:
    return 'Seconds', 1.0
  if longest <= 3 * 3600:
    return 'Minutes', 60.0
  return ('Hours', 3600.0) if longest <= 96 * 3600 else ('Days', 86400.0)
