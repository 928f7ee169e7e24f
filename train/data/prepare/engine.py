"""Engines: how jobs are done, in this process or in several."""

import concurrent.futures
import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import process
from multiprocessing import connection, resource_tracker
from typing import Any, Protocol

from train import errors
from train.data.prepare import progress as progress_lib

Job = Callable[[Any, Callable[[int, int], None]], None]
"""Does a task, and tells tokens and bytes as it goes.

What comes of it are files: done again after a kill, it finds them. It can be
pickled, and so can a task.
"""

_SECONDS_BETWEEN_LOOKS = 0.25


class Engine(Protocol):
  """Does the tasks of a job, in any order."""

  def run(
    self, job: Job, tasks: Sequence[Any], progress: progress_lib.Progress
  ) -> None:
    """Returns when all are done.

    Raises:
      UserError: as the job, or a process has died.
    """


class Local:
  """Processes of this machine.

  Args:
    workers: How many; one is this process itself.
  """

  def __init__(self, workers: int):
    self._workers = workers

  def run(
    self, job: Job, tasks: Sequence[Any], progress: progress_lib.Progress
  ) -> None:
    """As `Engine.run`."""
    workers = min(self._workers, len(tasks))
    if workers > 1:
      _run_processes(job, tasks, workers, progress)
      return
    for task in tasks:
      job(task, progress.count)


def _run_processes(
  job: Job,
  tasks: Sequence[Any],
  workers: int,
  progress: progress_lib.Progress,
) -> None:
  # Not forked: the libraries of this process have threads.
  context = multiprocessing.get_context('spawn')
  counts = context.Array('q', 2)
  # Workers hold the end to read: they end when this process closes its end,
  # which it does however it dies.
  ear, mouth = context.Pipe(duplex=False)
  executor = concurrent.futures.ProcessPoolExecutor(
    workers, context, _begin, (job, counts, ear)
  )
  done = False
  try:
    with no_interrupts():
      waiting = {executor.submit(_do, task) for task in tasks}
    seen = [0, 0]
    while waiting:
      ended, waiting = concurrent.futures.wait(
        waiting,
        _SECONDS_BETWEEN_LOOKS,
        concurrent.futures.FIRST_EXCEPTION,
      )
      now = counts[:]
      progress.count(now[0] - seen[0], now[1] - seen[1])
      seen = now
      for future in ended:
        future.result()
    done = True
  except process.BrokenProcessPool as error:
    raise errors.UserError(
      'a worker process has died, most likely for want of memory: give the'
      ' same command again, `prepare` with fewer --workers'
    ) from error
  finally:
    if not done:  # One that is still starting would tell of what is gone.
      for worker in multiprocessing.active_children():
        worker.kill()
    mouth.close()
    executor.shutdown(cancel_futures=True)
    ear.close()


@contextlib.contextmanager
def no_interrupts() -> Iterator[None]:
  """Processes started meanwhile leave Ctrl-C to this one."""
  resource_tracker.ensure_running()  # Which would let signals through again.
  heard: list[int] = []
  before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
  # Another thread may take it, and Python then acts on it in the main one.
  main = threading.current_thread() is threading.main_thread()
  if main:
    previous = signal.signal(
      signal.SIGINT, lambda number, _: heard.append(number)
    )
  try:
    yield
  finally:
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    if main:
      signal.signal(signal.SIGINT, previous)
  if heard:
    raise KeyboardInterrupt


_job: Job
_counts: Any


def _begin(job: Job, counts: Any, ear: connection.Connection) -> None:
  """Sets a worker up."""
  global _job, _counts
  # A worker is one of as many as there are cores.
  os.environ['TOKENIZERS_PARALLELISM'] = 'false'
  threading.Thread(target=_end_with_parent, args=(ear,), daemon=True).start()
  _job, _counts = job, counts


def _end_with_parent(ear: connection.Connection) -> None:
  with contextlib.suppress(EOFError, OSError):
    ear.recv()
  os._exit(1)


def _do(task: Any) -> None:
  _job(task, _count)


def _count(tokens: int, size: int) -> None:
  with _counts.get_lock():
    _counts[0] += tokens
    _counts[1] += size
