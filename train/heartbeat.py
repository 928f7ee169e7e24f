"""How the processes of a run hear that one of them is gone, or that all hang.

Each posts a beat every second to the store of JAX's coordination service,
which process 0 keeps; process 0 listens, and ends the run where one falls
silent. JAX would notice too, but later, without a host's name, and by aborting.
"""

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import jax

from train import beats

GONE = 1
"""The exit status where another process is gone, or all hang."""

PERIOD = 1.0  # Seconds from beat to beat.
# So many in a row that process 0 does not take: it is gone.
_UNANSWERED = 5
# Seconds of silence: Python, which beats, may be held up by a long call.
_SILENT = 30.0
# The same where there is an error to explain, and the run ends in any case.
_SUSPECT = 5.0
# Without a step, an evaluation or whatever else counts as progress.
_HUNG = 30 * 60.0

_FAILURE = 'gradpower/failure'


class Heartbeat:
  """A thread that beats, and ends this process where the run has failed.

  Args:
    client: JAX's, of the coordination service.
    process: This one's number.
    processes: How many there are.
    address: 'HOST:PORT' of process 0.
    progress: Is told, by this process, what the others hear.
  """

  def __init__(
    self,
    client: Any,
    process: int,
    processes: int,
    address: str,
    progress: beats.Progress,
  ):
    self._client = client
    self._address = address
    self._process = process
    self._progress = progress
    self._number = 0
    self._listener = beats.Listener(processes, time.monotonic())
    self._failed = threading.Event()
    self._stopped = threading.Event()
    self._leaving = threading.Lock()
    self._posted = 0.0  # When process 0 took the last beat.
    self._post()
    if process:
      beats.wait_for(client, 0, seconds=60)
      self._main = beats.names(client, [0])
      self._on_abort = _on_abort(self._explain_abort)
    self._thread = threading.Thread(target=self._run, daemon=True)
    self._thread.start()

  def fail(self, message: str, status: int) -> None:
    """Ends all other processes; process 0 prints the line."""
    self._tell(f'process {self._process}: {message}', status, self._process)

  def explain(self) -> None:
    """Ends this process if an error in it comes of another that is gone.

    Such an error may come before it is known who is: returns when all have
    been heard again, so that the error is this process's own.
    """
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # Process 0 is gone.
      before = beats.read(self._client)
      until = time.monotonic() + _SUSPECT
      silent = list(before)
      while silent and time.monotonic() < until:
        time.sleep(PERIOD / 4)
        heard = beats.read(self._client)
        silent = [i for i in silent if heard[i] == before[i]]
      if not silent and not self._failed.is_set():
        return
      if silent:
        self._tell(f'{beats.names(self._client, silent)} is gone', GONE)
    time.sleep(_SILENT)  # The thread says what it is, and ends all.

  def stop(self) -> None:
    """All are done; no more failure will be told."""
    self._stopped.set()
    self._thread.join()

  def _run(self) -> None:
    unanswered = 0
    while not self._stopped.wait(PERIOD):
      try:
        self._post()
        failures = self._client.key_value_dir_get(_FAILURE)
        if not self._process and not failures:
          self._listen()
      except jax.errors.JaxRuntimeError:
        unanswered += 1
        if not self._process or self._stopped.is_set():
          continue
        if unanswered >= _UNANSWERED or _refuses(self._address):
          self._without_main()
      else:
        unanswered = 0
        for _, failure in failures:
          self._follow(**json.loads(failure))

  def _post(self) -> None:
    self._number += 1
    beats.post(self._client, self._process, self._number, self._progress)
    self._posted = time.monotonic()

  def _listen(self) -> None:
    """Process 0 looks for those that are gone, or for all that hang."""
    now = time.monotonic()
    self._listener.hear(beats.read(self._client), now)
    if silent := self._listener.silent(_SILENT, now):
      names = beats.names(self._client, silent)
      self._tell(f'{names} is gone: not heard for {_SILENT:g} s', GONE)
    elif behind := self._listener.hung(_HUNG, now):
      step = self._listener.beats[behind[0]].step
      self._tell(
        f'no progress in any process for {_HUNG / 60:g} min; furthest '
        f'behind, at step {step}: {beats.names(self._client, behind)}',
        GONE,
      )

  def _tell(self, message: str, status: int, by: int | None = None) -> None:
    said = {'message': message, 'status': status, 'by': by}
    # Else another was first, or process 0 is gone, which the thread sees.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      self._client.key_value_set(f'{_FAILURE}/first', json.dumps(said))

  def _follow(self, message: str, status: int, by: int | None) -> None:
    """Ends this process, unless it is itself that failed, and ends its way."""
    self._failed.set()
    if by == self._process:
      return
    if self._process:
      self._leave('', status)
    _say(message)
    time.sleep(2 * PERIOD)  # Without the store, others would abort.
    self._leave('', status)

  def _explain_abort(self) -> None:
    """JAX aborts where process 0 is gone; else the abort takes its course."""
    silent = time.monotonic() - self._posted > _UNANSWERED * PERIOD
    if silent or _refuses(self._address):
      self._without_main()

  def _without_main(self) -> None:
    self._leave(f'{self._main} is gone', GONE)

  def _leave(self, message: str, status: int) -> None:
    with self._leaving:
      if message:
        _say(message)
      os._exit(status)


def _say(message: str) -> None:
  print(f'python -m train: error: {message}', file=sys.stderr, flush=True)


def _refuses(address: str) -> bool:
  """Whether the machine is there, but nobody listens."""
  host, _, port = address.rpartition(':')
  try:
    socket.create_connection((host.strip('[]'), int(port)), timeout=5).close()
  except ConnectionError:
    return True
  except OSError:  # Such as a network that is down for a moment.
    pass
  return False


def _on_abort(explain: Callable[[], None]) -> Any:
  """Has a function called in an abort: no handler of Python's would run then.

  Returns:
    What must be kept for as long as the program lives.
  """
  handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(lambda _: explain())
  ctypes.CDLL(None).signal(signal.SIGABRT, handler)
  return handler
