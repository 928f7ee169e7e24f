"""Processes that do tasks one after another, each on its own share of cores.

Several small runs, a core each, give a CPU more to do than one on all cores
(docs/lab-log.md). A worker ends with its parent, however that ends.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from typing import Any

from train.data.prepare.engine import no_interrupts
from train.errors import UserError

_LOOK = 0.5  # Seconds between looks for a signal.
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Task = tuple[Any, ...]


class Local:
  """Does tasks in processes of this machine.

  Args:
    workers: How many; one is this process itself.
  """

  def __init__(self, workers: int):
    self.workers = workers
    self.signal = ''
    """The name of the one that has stopped it."""

  def run(
    self, function: Callable[..., Any], tasks: Sequence[Task]
  ) -> Iterator[tuple[int, Any]]:
    """Does tasks, in their order or several at once.

    In processes, a signal is passed on, and no task is begun after it; those
    under way end as they see fit, and a second signal ends them at once.

    Args:
      function: Importable; its result, and a task, can be pickled. A string
        names the signal that has stopped it.
      tasks: Its arguments.

    Yields:
      Number of the task and its result, as they end; of those not stopped.

    Raises:
      UserError: of a task; the others are stopped. Or a process has died.
    """
    if self.workers == 1:
      for i, task in enumerate(tasks):
        result = function(*task)
        if isinstance(result, str):
          self.signal = result
          return
        yield i, result
    elif tasks:
      pool = _Pool(function, min(self.workers, len(tasks)))
      try:
        yield from pool.do(tasks)
      finally:
        self.signal = pool.signal
        pool.close()


class _Worker:
  """The near end of a process."""

  def __init__(self, context, function, cores):
    self.pipe, far = context.Pipe()
    self.process = context.Process(target=_serve, args=(function, far, cores))
    self.process.start()
    far.close()
    self.task: int | None = None

  def result(self) -> Any:
    """What the task under way has come to.

    Raises:
      UserError: of the task; or the process has died.
    """
    try:
      kind, value = self.pipe.recv()
    except (EOFError, OSError):
      self.process.join()
      raise UserError(
        'a worker process has died '
        f'({_death(self.process.exitcode)}): give the same command again, with '
        'fewer --jobs if memory was short'
      ) from None
    if kind == 'error':
      message, status = value
      error = UserError(message)
      error.status = status
      raise error
    if kind == 'bug':
      raise RuntimeError(f'in a worker process:\n{value}')
    return value


class _Pool:
  """Workers, and the signals that they are passed."""

  def __init__(self, function: Callable[..., Any], count: int):
    context = multiprocessing.get_context('spawn')
    shares = _shares(count)
    self.signal = ''
    with no_interrupts():
      self.workers = [_Worker(context, function, share) for share in shares]

  def do(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Any]]:
    waiting = list(enumerate(tasks))[::-1]
    idle = list(self.workers)
    with self._listening():
      while True:
        while waiting and idle and not self.signal:
          worker = idle.pop(0)
          worker.task, task = waiting.pop()
          worker.pipe.send(task)
        busy = {w.pipe: w for w in self.workers if w.task is not None}
        if not busy:
          return
        for pipe in connection.wait(list(busy), _LOOK):
          worker = busy[pipe]  # type: ignore[index]
          i, worker.task = worker.task, None
          try:
            result = worker.result()
          except UserError:
            if self.signal:  # It was starting: there was nothing to save.
              continue
            raise
          idle.append(worker)
          if not isinstance(result, str):
            yield i, result

  @contextlib.contextmanager
  def _listening(self) -> Iterator[None]:
    previous = {
      number: signal.signal(number, self._pass_on)
      for number in _SIGNALS
      if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
      yield
    finally:
      for number, handler in previous.items():
        signal.signal(number, handler)

  def _pass_on(self, number, frame):
    del frame
    self.signal = self.signal or signal.Signals(number).name
    self._terminate()

  def _terminate(self) -> None:
    for worker in self.workers:
      if worker.task is not None:
        worker.process.terminate()

  def close(self) -> None:
    """Ends the workers; those under way save first."""
    self._terminate()
    for worker in self.workers:
      worker.pipe.close()
    for worker in self.workers:
      worker.process.join()


def _shares(count: int) -> list[set[int]]:
  """The cores of each of so many workers; empty where that cannot be said."""
  if not hasattr(os, 'sched_getaffinity'):
    return [set()] * count
  cores = sorted(os.sched_getaffinity(0))
  each = max(1, len(cores) // count)
  return [
    {cores[(i * each + k) % len(cores)] for k in range(each)}
    for i in range(count)
  ]


def _death(code: int | None) -> str:
  if code is not None and code < 0:
    return signal.Signals(-code).name
  return f'exit status {code}'


def _serve(function, pipe, cores) -> None:
  """The far end: does what comes until nothing can come any more."""
  # A terminal signals all processes; the parent passes on what it hears.
  signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
  if cores:
    os.sched_setaffinity(0, cores)
  os.environ['TOKENIZERS_PARALLELISM'] = 'false'
  threading.Thread(target=_end_with_parent, daemon=True).start()
  with contextlib.suppress(EOFError, OSError):
    while True:
      pipe.send(_outcome(function, pipe.recv()))


def _outcome(function, task) -> tuple[str, Any]:
  try:
    return 'done', function(*task)
  except UserError as error:
    return 'error', (str(error), error.status)
  except Exception:
    return 'bug', traceback.format_exc()


def _end_with_parent() -> None:
  parent = multiprocessing.parent_process()
  assert parent is not None
  parent.join()
  os.kill(os.getpid(), signal.SIGTERM)
