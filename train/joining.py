"""How the processes of a run find each other, before any touches a device."""

import contextlib
import logging
import os
import re
import signal
import socket
import sys
import threading
import warnings
from collections.abc import Iterator

import jax

# `jax.distributed` has no public way to what its detection would find.
from jax._src import clusters
from jax._src import distributed as jax_distributed

from train.errors import UserError

_logger = logging.getLogger('train')
_MEET = 300  # Seconds: on a cluster, images are pulled meanwhile.
_SAY = 5  # Seconds after which a process says that it waits.
# Seconds until JAX itself aborts a process that hears nothing of the others; it
# is `train/heartbeat.py` that does so in time where process 0 lives.
_HEARTBEAT = 50


def join(
  coordinator: str | None, processes: int | None, process: int | None
) -> None:
  """Joins the processes that the options name, or else those of a launcher.

  Args:
    coordinator: 'HOST:PORT' of process 0, or all three are None.
    processes: Their number; 1, alone, joins nothing.
    process: This one's number.

  Raises:
    UserError: the arguments do not fit together, or the port is taken.
  """
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
  if coordinator is not None and process == 0:
    _check_port(coordinator)
  with _meeting(coordinator, count), warnings.catch_warnings():
    warnings.filterwarnings('ignore', 'Kubernetes environment detected')
    try:
      jax.distributed.initialize(
        coordinator,
        processes,
        process,
        initialization_timeout=2 * _MEET,
        heartbeat_timeout_seconds=_HEARTBEAT,
        shutdown_timeout_seconds=_HEARTBEAT,
      )
    except (RuntimeError, ValueError, TypeError) as error:
      reason = ' '.join(str(error).split())
      raise UserError(f'the processes cannot be joined: {reason}') from error
  if jax_distributed.global_state.process_id:
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
def _meeting(coordinator: str | None, count: int) -> Iterator[None]:
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
    os._exit(2)

  def say():
    _logger.info('waits for all of the %d processes to meet%s', count, where)

  timers = [threading.Timer(_SAY, say), threading.Timer(_MEET, give_up)]
  for timer in timers:
    timer.daemon = True
    timer.start()
  # Python would only note a Ctrl-C until all are there.
  previous = signal.signal(signal.SIGINT, signal.SIG_DFL)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, previous)
    for timer in timers:
      timer.cancel()
