"""How long cells take: before they are run, and while they are."""

import heapq
import json
import math
import os
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence

from models import accounting
from train.config import Config
from train.experiments.cells import Cell, Record
from train.recipe_table import cost

_LIKE = 2.0  # Times the steps, up to which cells are alike.
_FIXED = 20.0  # Seconds of start and compilation, where no record tells.
_TAIL = 1 << 16  # Bytes of metrics.jsonl that are looked through.
_NAMED = 4  # Cells under way that a line names.


def makespan(seconds: Sequence[float], workers: int) -> float:
  """When tasks are done that workers take one after another, in order."""
  ends = [0.0] * workers
  for each in seconds:
    heapq.heapreplace(ends, ends[0] + each)
  return max(ends)


def flops(config: Config) -> float:
  """Of training and of all evaluations."""
  d = config.data
  evaluations = math.ceil(config.steps / config.eval_every)
  scored = accounting.flops_per_token(
    config.model, d.sequence_length, backward=False
  )
  return cost(config).flops + evaluations * d.validation_tokens * scored


def seconds_each(
  cells: Sequence[Cell],
  records: Sequence[Record],
  device: str,
  probe: Callable[[Config], float | None],
) -> tuple[list[float], str] | None:
  """Guesses how long cells take, from start to end.

  Args:
    cells: To be run.
    records: Of cells that were. Those of the same shape and about as many steps
      count: the first steps of a run are slow, and a short run has few others.
    device: As a record of such a cell would name it.
    probe: Times a step; None where that cannot be done.

  Returns:
    Seconds of each, and how that is known; None where it is not.
  """
  known = [r for r in records if r['seconds'] and r['device'] == device]
  out, counted, rate = [], 0, None
  for cell in cells:
    like = [record for record in known if _alike(cell.config, record)]
    counted = max(counted, len(like))
    if like:
      out.append(statistics.median(_whole(cell.config, r) for r in like))
      continue
    if rate is None:  # Of one shape it is timed, and taken for all.
      step = probe(cell.config)
      if step is None:
        return None
      rate = cost(cell.config).flops / cell.config.steps / step
    out.append(_FIXED + flops(cell.config) / rate)
  how = (
    [f'as in {counted} cell{"s" * (counted != 1)} before'] if counted else []
  )
  how += ['from a few steps timed'] if rate else []
  return out, ' and '.join(how)


def _alike(config: Config, record: Record) -> bool:
  d = record['config']['data']
  ratio = record['config']['steps'] / config.steps
  return (
    record['parameters'] == cost(config).parameters.total
    and d['batch_size'] * d['sequence_length'] == config.tokens_per_step
    and 1 / _LIKE <= ratio <= _LIKE
  )


def _whole(config: Config, record: Record) -> float:
  """Seconds of a cell, by a record of one like it."""
  steps = record['seconds'] * config.steps / record['config']['steps']
  if 'wall' in record:
    return steps + max(0.0, record['wall'] - record['seconds'])
  # An older record: its evaluations as fast as its steps.
  return _FIXED + steps * flops(config) / cost(config).flops


class Progress:
  """How far cells have come that are under way, by their runs' metrics.

  Args:
    cells: To be run, in this order.
    runs: Where their run directories lie, here or on a disk that is shared.
    workers: How many are run at once.
  """

  def __init__(self, cells: Sequence[Cell], runs: pathlib.Path, workers: int):
    self._cells = {cell.key: cell for cell in cells}
    self._runs = runs
    self._workers = max(1, min(workers, len(cells)))
    self._work = {key: flops(cell.config) for key, cell in self._cells.items()}
    self._steps = dict.fromkeys(self._cells, 0)
    self._done: set[str] = set()
    self._look()
    self._before = sum(self._partial().values())
    self._start = time.monotonic()

  def end(self, key: str) -> None:
    """Notes that a cell is done."""
    self._done.add(key)

  def line(self) -> str:
    """What is under way, for people."""
    self._look()
    begun = list(self._cells)[: len(self._done) + self._workers]
    now = [self._place(key) for key in begun if key not in self._done]
    more = [f'{len(now) - _NAMED} more'] if len(now) > _NAMED else []
    parts = [
      f'{len(self._done)} of {len(self._cells)} cells done',
      ', '.join([*now[:_NAMED], *more]),
    ]
    left = self.left()
    if left is not None:
      parts.append(f'about {duration(left)} left')
    return '; '.join(filter(None, parts))

  def left(self) -> float | None:
    """Seconds until all are done, as it seems; None while nothing tells."""
    self._look()
    partial = self._partial()
    work = sum(self._work[key] for key in self._done) + sum(partial.values())
    if self._done and not partial:
      # Nothing is seen of those under way: about to end as well.
      work *= max(1.0, self._workers / len(self._done))
    spent = time.monotonic() - self._start
    if not (work > self._before and spent):
      return None
    rate = (work - self._before) / spent / self._workers
    rest = [
      self._work[key] - partial.get(key, 0.0)
      for key in self._cells
      if key not in self._done
    ]
    return makespan(rest, self._workers) / rate

  def _look(self) -> None:
    for key in self._cells.keys() - self._done:
      step = _last_step(self._runs / key / 'metrics.jsonl')
      self._steps[key] = self._steps[key] if step is None else step

  def _partial(self) -> dict[str, float]:
    """Work that is done of cells that are not."""
    return {
      key: self._work[key] * step / self._cells[key].config.steps
      for key, step in self._steps.items()
      if step and key not in self._done
    }

  def _place(self, key: str) -> str:
    cell, step = self._cells[key], self._steps[key]
    if not step:
      return f'{cell.label} starts'
    return f'{cell.label} at step {step:,} of {cell.config.steps:,}'


def _last_step(path: pathlib.Path) -> int | None:
  """Of the last training step on record; None where there is none."""
  try:
    with path.open('rb') as file:
      size = file.seek(0, os.SEEK_END)
      file.seek(max(0, size - _TAIL))
      lines = file.read().splitlines()
  except OSError:
    return None
  for line in reversed(lines):
    try:
      found = json.loads(line)
      if found['split'] == 'train':
        return int(found['step'])
    except (ValueError, LookupError, TypeError):  # Cut off, or an event.
      continue
  return None


def duration(seconds: float) -> str:
  """For people: '40 s', '12 min', '3.4 h'."""
  if seconds < 90:
    return f'{seconds:.0f} s'
  if seconds < 5400:
    return f'{seconds / 60:.0f} min'
  return f'{seconds / 3600:.1f} h'
