"""The processes of a run: how they agree, and end together.

All of them run the same program. What only one of them can know (whether a
file is there, whether a host's disk is full) passes through JAX's coordination
service before it decides what is run. With one process all of this is nothing.
"""

import atexit
import contextlib
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax

# `jax.distributed` has no public way to the store and the barriers that Orbax
# and JAX itself agree through.
from jax._src import distributed as jax_distributed

from train import beats, heartbeat, joining
from train.errors import UserError

LIMIT = 15 * 60
"""Seconds that one process waits for another that lives."""
PREPARING = 24 * 3600
"""The same where that one may be fetching and tokenizing a corpus."""

_INTERRUPTED, _BUG = 130, 1  # Exit statuses.
_LAST_WORDS = 20  # Seconds for a traceback and what runs at exit.

_rounds = itertools.count()  # All processes count alike.
_progress = beats.Progress()


@contextlib.contextmanager
def cluster(
  coordinator: str | None = None,
  processes: int | None = None,
  process: int | None = None,
) -> Iterator[None]:
  """Joins the processes of a run for as long as the program lives.

  Before anything touches a device. Where this process fails alone, or dies,
  the others end too instead of waiting for it.

  Args:
    coordinator: 'HOST:PORT' of process 0; with the next two, or else SLURM,
      Open MPI, GKE or a TPU VM is asked, and without these it is one process.
    processes: Their number; 1, alone, joins nothing.
    process: This one's number, from 0.

  Raises:
    UserError: the arguments do not fit together, or the port is taken.
  """
  joining.join(coordinator, processes, process)
  if not several():
    yield
    return
  beat = heartbeat.Heartbeat(
    client(),
    process_index(),
    process_count(),
    str(jax_distributed.global_state.coordinator_address),
    _progress,
  )
  try:
    yield
  except BaseException as error:
    if not (isinstance(error, UserError) and error.shared):
      _leave_alone(error, beat)
    else:
      _end(beat)
    raise
  _end(beat)


def client() -> Any:
  """JAX's, of the coordination service; None where there is one process."""
  return jax_distributed.global_state.client


def process_index() -> int:
  """The number of this one, from 0; JAX's own would start the backend."""
  return jax_distributed.global_state.process_id


def process_count() -> int:
  """How many there are; JAX's own would start the backend."""
  return jax_distributed.global_state.num_processes


def several() -> bool:
  """Whether this run has more than one process."""
  return jax.distributed.is_initialized()


def is_main() -> bool:
  """Whether this is the process that writes and prints."""
  return process_index() == 0


def progress(step: int) -> None:
  """Notes that this process has come to a step, or on within it.

  From the first call on, a run in which no process calls it for half an hour
  ends: it hangs. Called for each step, and within whatever may take long.
  """
  _progress.report(step)


def share(value: Any, limit: float = LIMIT) -> Any:
  """Process 0's value, which JSON can hold, in every process.

  Raises:
    UserError: it has none within so many seconds.
  """
  if not several():
    return value
  key = _new_key()
  if is_main():
    client().key_value_set(key, json.dumps(value))
  with _patience(lambda: [0], limit):
    milliseconds = _milliseconds(limit)
    return json.loads(client().blocking_key_value_get(key, milliseconds))


@contextlib.contextmanager
def together(limit: float = LIMIT) -> Iterator[None]:
  """Ends the block in every process at once; an error of one is all of theirs.

  Raises:
    UserError: in every process where there was one in any, or where one is not
      there within so many seconds of the first.
  """
  if not several():
    yield
    return
  failure = None
  try:
    yield
  except UserError as error:
    failure = error
  failures = _meet(_new_key(), limit, failure)
  if failures:
    # All the same where all see the same; else that of the first.
    message, status = failures[min(failures)]
    shared = UserError(message)
    shared.shared, shared.status = True, status
    raise shared from failure


def announce(fact: str) -> None:
  """Lets `announced` of that be true in all processes from now on."""
  client().key_value_set(f'gradpower/{fact}/x', '', allow_overwrite=True)


def announced(fact: str) -> bool:
  """Whether any process has announced it; asked in all, it is true in all."""
  return share(bool(client().key_value_dir_get(f'gradpower/{fact}')))


def _new_key() -> str:
  return f'gradpower/{next(_rounds)}'


def _milliseconds(seconds: float) -> int:
  return int(seconds * 1000)


def _meet(
  key: str, limit: float, failure: UserError | None = None
) -> dict[int, tuple[str, int]]:
  """Waits for all processes; returns what those that failed say.

  Returns:
    By process, the message and the status to exit with.
  """
  said = (str(failure), failure.status) if failure else ('', 0)
  client().key_value_set(f'{key}/{process_index()}', json.dumps(said))

  def arrived() -> dict[int, tuple[str, int]]:
    return {
      int(name.rpartition('/')[2]): tuple(json.loads(said))
      for name, said in client().key_value_dir_get(f'{key}/')
    }

  everyone = {*range(process_count())}
  with _patience(lambda: sorted(everyone - {*arrived()}), limit):
    client().wait_at_barrier(key, _milliseconds(limit))
  return {process: said for process, said in arrived().items() if said[0]}


@contextlib.contextmanager
def _patience(
  awaited: Callable[[], Iterable[int]], limit: float
) -> Iterator[None]:
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    if 'DEADLINE_EXCEEDED' not in str(error):
      raise
    names = beats.names(client(), awaited())
    raise UserError(f'waited {limit / 60:g} min in vain for {names}') from error


def _leave_alone(error: BaseException, beat: heartbeat.Heartbeat) -> None:
  """Has this process end without waiting for the others, and end them too.

  They may be in the middle of a collective, which nothing else ends.
  """
  if _of_another(error):
    beat.explain()
  status, said = _BUG, str(error).strip() or type(error).__name__
  if isinstance(error, UserError):
    status = error.status
  elif isinstance(error, KeyboardInterrupt):
    status, said = _INTERRUPTED, 'interrupted'
  beat.fail(said.splitlines()[0], status)
  told = time.monotonic()

  def leave():
    sys.stdout.flush()
    sys.stderr.flush()
    if is_main():  # The store is here: the others read it first.
      time.sleep(max(0.0, told + 2 * heartbeat.PERIOD - time.monotonic()))
    os._exit(status)

  atexit.register(leave)  # Before JAX's own, registered earlier.
  # What a library leaves running may keep Python from getting there.
  timer = threading.Timer(_LAST_WORDS, os._exit, [status])
  timer.daemon = True
  timer.start()


def _of_another(error: BaseException) -> bool:
  """Whether it may be that another process is gone.

  A collective that fails so raises whatever XLA's error is translated to.
  """
  if isinstance(error, UserError):
    return isinstance(error.__cause__, (RuntimeError, ValueError))
  return isinstance(error, Exception)


def _end(beat: heartbeat.Heartbeat) -> None:
  _meet('gradpower/end', LIMIT)
  beat.stop()
