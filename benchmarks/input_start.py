"""What a run pays at its start, and what memory reading takes over time.

Each is measured in a process of its own.
"""

import multiprocessing
import pathlib
import statistics
import time
from collections.abc import Callable
from multiprocessing import connection
from typing import Any

import numpy as np

from train.data import loader, order, prefetch
from train.data import prepared as prepared_lib

FAR = 10**9
"""Rows into a run; also windows of the simulated index."""
FLAT = 1.0
"""MB a minute: 1.4 GB a day."""

_PROCESSES = 3
_CALLS = 20
_STATUS = pathlib.Path('/proc/self/status')


def order_alone(batch: int) -> dict[str, dict[str, float]]:
  """Times the order of `FAR` windows, of a batch `FAR` rows on, without data.

  Returns:
    By kind of order: `first`, seconds to make it and find the rows of one
    batch; `batch`, seconds of a later one, the median.
  """
  kinds: dict[str, Callable[[], Callable[[np.ndarray], Any]]] = {
    'Shuffle': lambda: order.Shuffle(FAR, seed=0),
    'RandomOffsets': lambda: order.RandomOffsets(FAR, seed=0),
    'Mixture': lambda: order.Mixture([(0, [3, 1])], seed=0),
  }
  found = {}
  for name, make in kinds.items():
    seconds = []
    start = time.perf_counter()
    made = make()
    for call in range(_CALLS):
      made(FAR + call * batch + np.arange(batch))
      now = time.perf_counter()
      seconds.append(now - start)
      start = now
    found[name] = {
      'first': seconds[0],
      'batch': statistics.median(seconds[1:]),
    }
  return found


def start(directory: pathlib.Path, batch: int) -> list[dict[str, float]]:
  """Times the way from a directory to the first batch, in new processes.

  Returns:
    For step 0 and one `FAR` rows on: `step`; `open`, seconds to open the
    directory, and `first_batch`, from then on to the batch; medians.
  """
  found = []
  for step in (0, FAR // batch):
    taken = [
      _in_process(_start, directory, batch, step) for _ in range(_PROCESSES)
    ]
    found.append({
      'step': step,
      'open': statistics.median(opened for opened, _ in taken),
      'first_batch': statistics.median(first for _, first in taken),
    })  # fmt: skip
  return found


def memory(
  directory: pathlib.Path, batch: int, minutes: float
) -> dict[str, Any]:
  """Reads as fast as it goes, and looks at the memory of the process.

  Returns:
    `minutes` and `batches` that were read; `megabytes`, resident at the start,
    after the first batch, and after each minute; `anonymous_megabytes`, the
    same without pages of files; `slope`, of those in MB a minute, fitted to a
    sample a second after the first tenth of the time; `flat`, whether it is
    below `FLAT`.
  """
  batches, samples = _in_process(_memory, directory, batch, minutes)
  table = np.asarray(samples)
  seconds, resident, anonymous = table.T
  marks = np.searchsorted(
    seconds, 60 * np.arange(1, int(minutes) + 1), side='right'
  )
  shown = sorted({0, *(marks - 1).tolist(), len(seconds) - 1})
  late = seconds >= min(6 * minutes, seconds[-2])
  slope = np.polyfit(seconds[late] / 60, anonymous[late], 1)[0]
  return {
    'minutes': minutes,
    'batches': batches,
    'seconds': [round(s, 1) for s in seconds[shown].tolist()],
    'megabytes': resident[shown].tolist(),
    'anonymous_megabytes': anonymous[shown].tolist(),
    'slope': float(slope),
    'flat': bool(abs(slope) < FLAT),
  }


def _in_process(function: Callable[..., Any], *arguments: Any) -> Any:
  """Calls a function in a new process; returns what it sends."""
  context = multiprocessing.get_context('spawn')
  pipe, far = context.Pipe(duplex=False)
  made = context.Process(target=function, args=(far, *arguments))
  made.start()
  far.close()
  try:
    return pipe.recv()
  finally:
    pipe.close()
    made.join()


def _batches(directory: pathlib.Path, batch: int) -> loader.Batches:
  windows = prepared_lib.Prepared(directory).windows('train')
  return loader.Batches([windows], batch, seed=0)


def _start(
  pipe: connection.Connection, directory: pathlib.Path, batch: int, step: int
) -> None:
  begun = time.perf_counter()
  batches = _batches(directory, batch)
  opened = time.perf_counter()
  batches.rows(step, range(batch))
  pipe.send((opened - begun, time.perf_counter() - opened))


def _memory(
  pipe: connection.Connection,
  directory: pathlib.Path,
  batch: int,
  minutes: float,
) -> None:
  batches = _batches(directory, batch)
  samples = []
  i = 0
  with prefetch.Prefetch(lambda i: batches.rows(i, range(batch)), 0) as reader:
    reader.next(0)
    begun = time.perf_counter()
    samples.append((0.0, *_resident()))
    while (now := time.perf_counter() - begun) < 60 * minutes:
      i += 1
      reader.next(i)
      if now >= samples[-1][0] + 1:
        samples.append((now, *_resident()))
    samples.append((60 * minutes, *_resident()))
  pipe.send((i, samples))


def _resident() -> tuple[float, float]:
  """Returns megabytes of this process: all that is resident, anonymous."""
  found = dict(line.split(':', 1) for line in _STATUS.read_text().splitlines())
  kilobytes = [int(found[name].split()[0]) for name in ('VmRSS', 'RssAnon')]
  return kilobytes[0] / 1024, kilobytes[1] / 1024
