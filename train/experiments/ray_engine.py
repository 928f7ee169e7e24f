"""Ray as an engine: the same cells, on as many machines as a cluster has.

Every machine has this clone at the same path, or its packages installed, and
makes its own copy of the text. A cell whose machine is lost is run again, from
its last checkpoint where the machines share the directory of its run.
"""

import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax

from train import distributed
from train.errors import UserError
from train.experiments import experiment, workers
from train.experiments.cells import Cell

try:
  import ray

  from train.experiments import ray_notice
except ImportError as error:
  raise UserError(
    "Ray is not installed: pip install -e '.[train,ray]'"
  ) from error

_LOOK = 0.5  # Seconds between looks for a signal.
_CONNECT = 10.0  # Seconds; Ray itself tries for minutes.
_RETRIES = 3  # Of a cell whose process or machine is lost.
_SAVING = 60.0  # Seconds for the others, once a cell has failed.
_LONGEST_MESSAGE = 300


class Ray:
  """Does tasks on the cluster of RAY_ADDRESS, or on one of this machine.

  A task has one accelerator of a cluster that has any, else one CPU.

  Raises:
    UserError: there is no such cluster.
  """

  def __init__(self):
    self.signal = ''
    """The name of the one that has stopped it."""
    if distributed.several():
      raise UserError('--engine ray goes with a single process')
    if not ray.is_initialized():
      _connect(os.environ.get('RAY_ADDRESS', ''))
    there = ray.cluster_resources()
    self._kind = next(
      (k for k in ('GPU', 'TPU') if there.get(k, 0) >= 1), 'CPU'
    )
    self.workers = max(1, int(there.get(self._kind, 1)))
    """Tasks that the cluster has room for."""
    if self._kind != 'CPU':  # This process trains nothing.
      jax.config.update('jax_platforms', 'cpu')

  def run(
    self, function: Callable[..., Any], tasks: Sequence[workers.Task]
  ) -> Iterator[tuple[int, Any]]:
    """As `workers.Local.run`, in any order."""
    remote = ray.remote(_do).options(max_retries=_RETRIES, **self._needs())
    where = os.getcwd(), self._kind == 'CPU'
    notice: Any = ray.remote(num_cpus=0)(ray_notice.Notice).remote()
    waiting = {
      remote.remote(function, task, *where, notice, i): i
      for i, task in enumerate(tasks)
    }
    heard: list[str] = []
    try:
      with workers.listening(heard.append):
        while waiting:
          ended, _ = ray.wait(list(waiting), timeout=_LOOK)
          for ref in ended:
            i = waiting.pop(ref)
            try:
              result = workers.unpack(*ray.get(ref))
            except ray.exceptions.RayError as error:
              if heard:  # It had not begun, or this is the second signal.
                continue
              raise UserError(f'Ray: a cell is lost: {_line(error)}') from error
            if isinstance(result, str):
              if not heard:  # Else it is the answer to what was heard here.
                heard.append(result)
            else:
              yield i, result
          if heard and not self.signal:
            self.signal = heard[0]
            _stop(waiting, notice)
          if len(heard) > 1:
            _cancel(waiting, force=True)
    finally:
      if len(heard) > 1:
        _cancel(waiting, force=True)
      elif waiting:
        _stop(waiting, notice)
        ray.wait(list(waiting), num_returns=len(waiting), timeout=_SAVING)
      ray.kill(notice)

  def _needs(self) -> dict[str, Any]:
    """What a task takes; on an accelerator, a process of its own.

    Which accelerator it is to use, a process is told once.
    """
    if self._kind == 'GPU':
      return {'num_cpus': 1, 'num_gpus': 1, 'max_calls': 1}
    if self._kind == 'TPU':
      return {'num_cpus': 1, 'resources': {'TPU': 1}, 'max_calls': 1}
    return {'num_cpus': 1}


def _connect(address: str) -> None:
  host, colon, port = address.rpartition('/')[2].rpartition(':')
  try:
    if colon and port.isdigit():
      socket.create_connection((host, int(port)), _CONNECT).close()
    ray.init(log_to_driver=False, logging_level=logging.ERROR)
  except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
    at = f' at RAY_ADDRESS={address}' if address else ''
    raise UserError(f'Ray: no cluster{at}: {_line(error)}') from error


def _stop(waiting: dict[Any, int], notice: Any) -> None:
  """Has tasks that have begun save and end, and no other begin."""
  begun: set[int] = set()
  with contextlib.suppress(ray.exceptions.RayError):
    begun = ray.get(notice.tell.remote(), timeout=_CONNECT)
  # To those that have begun, a cancellation would be a second signal.
  _cancel([ref for ref, i in waiting.items() if i not in begun], force=False)


def _cancel(refs: Iterable[Any], *, force: bool) -> None:
  for ref in refs:
    with contextlib.suppress(ray.exceptions.RayError):
      ray.cancel(ref, force=force)


def _line(error: BaseException) -> str:
  lines = str(error).split('\n')
  text = next((line for line in reversed(lines) if line.strip()), '')
  return f'{type(error).__name__}: {text.strip()}'[:_LONGEST_MESSAGE]


def _do(
  function: Callable[..., Any],
  task: workers.Task,
  place: str,
  on_cpu: bool,
  notice: Any,
  number: int,
) -> tuple[str, Any]:
  """The far end; a task that is told to end hears a SIGTERM."""
  if ray_notice.told(notice, number):
    return 'done', signal.SIGTERM.name
  with contextlib.suppress(OSError):
    os.chdir(place)
  os.environ['TOKENIZERS_PARALLELISM'] = 'false'
  if on_cpu:
    os.environ['NPROC'] = '1'  # XLA's threads; the other cores are others'.
  with ray_notice.heard(notice, number):
    return workers.outcome(_checked, (function, task))


def _checked(function: Callable[..., Any], task: workers.Task) -> Any:
  for cell in task:
    if isinstance(cell, Cell):
      found = experiment.cell(cell.arm, cell.config).source_hash
      if found != cell.source_hash:
        raise UserError(
          f'{cell.label}: on {socket.gethostname()} the text, vocabulary or '
          f'split is another ({found[:10]}) than here '
          f'({cell.source_hash[:10]}): give all machines the same files'
        )
  return function(*task)
