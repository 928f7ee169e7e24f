"""The processes of a run: how they find each other, agree, and end together.

All of them run the same program. What only one of them can know (whether a
file is there, whether a host's disk is full) passes through JAX's coordination
service before it decides what is run. With one process all of this is nothing.
"""

import atexit
import contextlib
import itertools
import json
import logging
import os
import re
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

import jax

# `jax.distributed` has no public way to the store and the barriers that Orbax
# and JAX itself agree through, nor to what its detection would find.
from jax._src import clusters
from jax._src import distributed as jax_distributed

from train.errors import UserError

_MEET = 300  # Seconds: on a cluster, images are pulled meanwhile.
_LONG = 7 * 24 * 3600  # Seconds; a process that dies is noticed long before.
_ERROR, _INTERRUPTED, _BUG = 2, 130, 1  # Exit statuses.
_FAILURE = 'gradpower/failure'
_NOBODY = -1

_rounds = itertools.count()  # All processes count alike.
_told = threading.Event()  # That another process has failed.


@contextlib.contextmanager
def cluster(
  coordinator: str | None = None,
  processes: int | None = None,
  process: int | None = None,
) -> Iterator[None]:
  """Joins the processes of a run for as long as the program lives.

  Before anything touches a device. Where this process fails alone, the others
  end too instead of waiting for it.

  Args:
    coordinator: 'HOST:PORT' of process 0; with the next two, or else SLURM,
      Open MPI, GKE or a TPU VM is asked, and without these it is one process.
    processes: Their number; 1, alone, joins nothing.
    process: This one's number, from 0.

  Raises:
    UserError: the arguments do not fit together, or the port is taken.
  """
  _initialize(coordinator, processes, process)
  if not several():
    yield
    return
  watch = threading.Thread(target=_watch, daemon=True)
  watch.start()
  try:
    yield
  except BaseException as error:
    if not (isinstance(error, UserError) and error.shared):
      _leave_alone(error)
    else:
      _end(watch)
    raise
  _end(watch)


def several() -> bool:
  """Whether this run has more than one process."""
  return jax.distributed.is_initialized()


def is_main() -> bool:
  """Whether this is the process that writes and prints."""
  return _process() == 0


def share(value: Any) -> Any:
  """Process 0's value, which JSON can hold, in every process."""
  if not several():
    return value
  client, key = _client(), _new_key()
  if is_main():
    client.key_value_set(key, json.dumps(value))
  return json.loads(client.blocking_key_value_get(key, _LONG * 1000))


@contextlib.contextmanager
def together() -> Iterator[None]:
  """Ends the block in every process at once; an error of one is all of theirs.

  Raises:
    UserError: in every process where there was one in any.
  """
  if not several():
    yield
    return
  failure = None
  try:
    yield
  except UserError as error:
    failure = error
  client, key = _client(), _new_key()
  if failure is not None:
    client.key_value_set(f'{key}/{_process():08}', str(failure))
  client.wait_at_barrier(key, _LONG * 1000)
  if failures := client.key_value_dir_get(f'{key}/'):
    # All the same where all see the same; else that of the first.
    shared = UserError(min(failures)[1])
    shared.shared = True
    raise shared from failure


def _client() -> Any:
  return jax_distributed.global_state.client


def _process() -> int:
  """`jax.process_index()` would start the backend."""
  return jax_distributed.global_state.process_id


def _new_key() -> str:
  return f'gradpower/{next(_rounds)}'


def _initialize(coordinator, processes, process) -> None:
  given = {
    '--coordinator': coordinator,
    '--processes': processes,
    '--process': process,
  }
  missing = [name for name, value in given.items() if value is None]
  if not missing:
    _check(coordinator, processes, process)
  elif missing != list(given) and not (processes == 1 and len(missing) == 2):
    raise UserError(
      f'{", ".join(name for name in given if name not in missing)} without '
      f'{" and ".join(missing)}: give all three, or none to have the cluster '
      'found'
    )
  count = _detect() if processes is None else processes
  if count == 1:
    return
  if process == 0:
    _check_port(coordinator)
  with _patience(coordinator, count), warnings.catch_warnings():
    warnings.filterwarnings('ignore', 'Kubernetes environment detected')
    try:
      jax.distributed.initialize(
        coordinator, processes, process, initialization_timeout=2 * _MEET
      )
    except (RuntimeError, ValueError, TypeError) as error:
      reason = ' '.join(str(error).split())
      raise UserError(f'the processes cannot be joined: {reason}') from error
  if not is_main():
    logging.getLogger('train').setLevel(logging.ERROR)


def _check(coordinator, processes, process) -> None:
  told = re.fullmatch(r'(?:\[[0-9a-fA-F:]+\]|[^:\s]+):(\d{1,5})', coordinator)
  if told is None or not 0 < int(told[1]) < 2**16:
    raise UserError(f'--coordinator must be HOST:PORT, not {coordinator!r}')
  if process >= processes:
    raise UserError(
      f'--process ({process}) must be below --processes ({processes}): it '
      'counts from 0'
    )


def _detect() -> int:
  """How many processes a launcher that JAX knows has started; 1 if none."""
  environment = os.environ
  size = environment.get('OMPI_COMM_WORLD_SIZE', '1')
  if not size.isdecimal():
    raise UserError(
      f'OMPI_COMM_WORLD_SIZE must be a number of processes, not {size!r}'
    )
  if int(size) > 1 and 'OMPI_MCA_orte_hnp_uri' not in environment:
    raise UserError(
      'this Open MPI does not say where process 0 is: give --coordinator, '
      '--processes and --process (docs/launch.md)'
    )
  for kind in clusters.ClusterEnv._cluster_types:
    # Without an index of its own a pod is no part of a cluster: a notebook.
    if (
      kind.__name__ == 'K8sCluster'
      and 'JOB_COMPLETION_INDEX' not in environment
    ):
      continue
    try:
      if not kind.opt_in_only_method and kind.is_env_present():
        return kind.get_process_count()
    except (RuntimeError, ValueError) as error:
      reason = ' '.join(str(error).split())
      raise UserError(
        f'{kind.__name__} does not say how many processes there are '
        f'({reason}): give --coordinator, --processes and --process, or '
        '--processes 1'
      ) from error
  return 1


def _check_port(coordinator: str) -> None:
  """JAX may crash where it cannot listen."""
  port = int(coordinator.rpartition(':')[2])
  try:
    if socket.has_dualstack_ipv6():
      server = socket.create_server(
        ('', port), family=socket.AF_INET6, dualstack_ipv6=True
      )
    else:
      server = socket.create_server(('', port))
    server.close()
  except OSError as error:
    reason = error.strerror or error
    raise UserError(
      f'--coordinator: cannot listen on port {port} ({reason}): name another'
    ) from error


@contextlib.contextmanager
def _patience(coordinator: str | None, count: int) -> Iterator[None]:
  """Ends the program where the processes do not meet; JAX would abort."""
  where = f' at {coordinator}' if coordinator else ''

  def give_up():
    print(
      f'python -m train: error: the {count} processes did not all meet{where} '
      f'within {_MEET} s: are all of them started, with the same coordinator, '
      'and can they reach it?',
      file=sys.stderr,
      flush=True,
    )
    os._exit(_ERROR)

  timer = threading.Timer(_MEET, give_up)
  timer.daemon = True
  timer.start()
  # Python would only note a Ctrl-C until all are there.
  previous = signal.signal(signal.SIGINT, signal.SIG_DFL)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, previous)
    timer.cancel()


def _leave_alone(error: BaseException) -> None:
  """Has this process end without waiting for the others, and end them too.

  They may be in the middle of a collective, which nothing else ends.
  """
  if _told.is_set():  # Its error comes of another's, which has been said.
    time.sleep(_LONG)
  status = _BUG
  if isinstance(error, (UserError, KeyboardInterrupt)):
    status = _ERROR if isinstance(error, UserError) else _INTERRUPTED
  said = [_process(), status, str(error) or type(error).__name__]

  def leave():
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(RuntimeError):  # Another was first.
      _client().key_value_set(_FAILURE, json.dumps(said))
    if is_main():  # The store is here: the others read it first.
      time.sleep(1)
    os._exit(status)

  atexit.register(leave)  # Before JAX's own, registered earlier.


def _end(watch: threading.Thread) -> None:
  """All are done: no more failure will be told."""
  _client().wait_at_barrier('gradpower/end', _LONG * 1000)
  if is_main():
    _client().key_value_set(_FAILURE, json.dumps([_NOBODY, 0, '']))
  watch.join()  # A thread that waits outside of Python would not let it end.


def _watch() -> None:
  """Ends this process when another has failed alone."""
  said = _client().blocking_key_value_get(_FAILURE, _LONG * 1000)
  process, status, message = json.loads(said)
  if process in (_process(), _NOBODY):
    return
  _told.set()
  if is_main():
    print(
      f'python -m train: error: process {process}: {message}',
      file=sys.stderr,
      flush=True,
    )
    time.sleep(0.5)  # Without the store, the others would complain at length.
  os._exit(status)


def progress(step: int) -> None:
  """Says how far this process is."""
