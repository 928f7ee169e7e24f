"""Processes that do tasks one after another, each on its own share of cores.

Several small runs, a core each, give a CPU more to do than one on all cores
(docs/lab-log.md). A worker ends with its parent, however that ends. It hears of
signals from its parent alone: a terminal and a scheduler send them to all
processes, and to a run a second one means "at once".
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
_STOP = signal.SIGUSR2  # From the parent: to a task it is a SIGTERM.

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

    In processes, a signal is passed on as a SIGTERM, and no task is begun after
    it; those under way end as they see fit, and a second signal kills them. How
    many cores a task has follows from the number of workers, not of tasks, so
    that it gives the same bits whatever else is left to do.

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
      shares = _shares(self.workers)[: len(tasks)]
      pool = _Pool(function, shares)
      try:
        yield from pool.do(tasks)
      finally:
        self.signal = pool.signal
        pool.close()


class _DiedError(UserError):
  """A process has ended before its task."""


class _Worker:
  """The near end of a process."""

  def __init__(self, context, function, cores):
    self.pipe, far = context.Pipe()
    self.process = context.Process(target=_serve, args=(function, far, cores))
    self.process.start()
    far.close()
    self.task: int | None = None
    self.told = False
    """That it is to stop."""

  def give(self, task: Task) -> None:
    """Sends a task; whether the process is there, `result` tells."""
    with contextlib.suppress(OSError):
      self.pipe.send(task)

  def stop(self) -> None:
    """Tells the task under way, once, to end."""
    if self.task is not None and not self.told:
      self.told = True
      with contextlib.suppress(OSError):  # It has ended.
        os.kill(self.process.pid, _STOP)

  def result(self) -> Any:
    """What the task under way has come to.

    Raises:
      UserError: of the task, or a `_DiedError`.
    """
    try:
      kind, value = self.pipe.recv()
    except (EOFError, OSError):
      self.process.join()
      raise _DiedError(
        'a worker process has died '
        f'({_death(self.process.exitcode)}): give the same command again, with '
        'fewer --jobs if memory was short'
      ) from None
    return unpack(kind, value)


class _Pool:
  """Workers, and the signals that they are passed."""

  def __init__(self, function: Callable[..., Any], shares: Sequence[set[int]]):
    context = multiprocessing.get_context('spawn')
    self.signal = ''
    with no_interrupts():
      # Processes inherit it, and so do threads that imports make there.
      before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
      try:
        self.workers = [_Worker(context, function, share) for share in shares]
      finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)

  def do(self, tasks: Sequence[Task]) -> Iterator[tuple[int, Any]]:
    waiting = list(enumerate(tasks))[::-1]
    idle = list(self.workers)
    with listening(self._pass_on):
      while True:
        while waiting and idle and not self.signal:
          worker = idle.pop(0)
          worker.task, task = waiting.pop()
          worker.give(task)
          if self.signal:  # It came just before there was a task to stop.
            worker.stop()
        busy = {w.pipe: w for w in self.workers if w.task is not None}
        if not busy:
          return
        for pipe in connection.wait(list(busy), _LOOK):
          worker = busy[pipe]
          i, worker.task = worker.task, None
          assert i is not None
          try:
            result = worker.result()
          except _DiedError:
            if self.signal:  # It was starting, or this is the second signal.
              continue
            raise
          idle.append(worker)
          if isinstance(result, str):
            self._stop(result)
          else:
            yield i, result

  def _pass_on(self, name: str) -> None:
    if self.signal:
      for worker in self.workers:
        worker.process.kill()
    self._stop(name)

  def _stop(self, name: str) -> None:
    self.signal = self.signal or name
    for worker in self.workers:
      worker.stop()

  def close(self) -> None:
    """Ends the workers; those under way save first."""
    for worker in self.workers:
      worker.stop()
      worker.pipe.close()
    for worker in self.workers:
      worker.process.join()


@contextlib.contextmanager
def listening(hear: Callable[[str], None]) -> Iterator[None]:
  """Passes the names of signals on that ask to stop, those not ignored."""

  def note(number, frame):
    del frame
    hear(signal.Signals(number).name)

  previous = {
    number: signal.signal(number, note)
    for number in _SIGNALS
    if signal.getsignal(number) is not signal.SIG_IGN
  }
  try:
    yield
  finally:
    for number, handler in previous.items():
      signal.signal(number, handler)


def _shares(count: int) -> list[set[int]]:
  """The cores of each of so many workers; empty where that cannot be said.

  As many for each: what differs in cores differs in rounding.
  """
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
  signal.signal(_STOP, _as_sigterm)
  if cores:
    os.sched_setaffinity(0, cores)
  os.environ['TOKENIZERS_PARALLELISM'] = 'false'
  threading.Thread(target=_end_with_parent, daemon=True).start()
  with contextlib.suppress(EOFError, OSError):
    while True:
      pipe.send(outcome(function, pipe.recv()))


def _as_sigterm(number, frame) -> None:
  """Does what the task under way does on a SIGTERM."""
  del number
  handler = signal.getsignal(signal.SIGTERM)
  if not callable(handler):  # There is nothing to save, or nothing under way.
    os._exit(1)
  handler(signal.SIGTERM, frame)


def _end_with_parent() -> None:
  parent = multiprocessing.parent_process()
  assert parent is not None
  parent.join()
  os.kill(os.getpid(), _STOP)


def outcome(function: Callable[..., Any], task: Task) -> tuple[str, Any]:
  """Does a task, elsewhere than where it is waited for.

  Returns:
    What `unpack` makes of it, as can be pickled.
  """
  try:
    return 'done', function(*task)
  except UserError as error:
    return 'error', (str(error), error.status)
  except Exception:
    return 'bug', traceback.format_exc()


def unpack(kind: str, value: Any) -> Any:
  """Returns the result of a task, given its `outcome`.

  Raises:
    UserError: of the task.
    RuntimeError: with its traceback, for any other error.
  """
  if kind == 'error':
    message, status = value
    error = UserError(message)
    error.status = status
    raise error
  if kind == 'bug':
    raise RuntimeError(f'in a worker process:\n{value}')
  return value
