"""Ctrl-C, SIGTERM, a lost terminal: a run saves and ends after its step."""

import atexit
import itertools
import os
import signal
import sys

from jax.experimental import multihost_utils

from train import distributed

# Of all runs of a program: what JAX agrees on is a number of questions asked.
_questions = itertools.count(1)
_CTRL_C = 'interrupted'
_AT_ONCE = 130  # The exit status of a second signal.


class Interrupt:
  """Notes the first Ctrl-C, SIGTERM or SIGHUP; the second ends all at once.

  Of several processes each may be the one that is signalled: JAX, which
  listens for SIGTERM from when they are joined, lets all of them stop after
  the same step. Until then it alone hears a SIGTERM, however often.
  """

  def __init__(self):
    self.received: str | None = None
    """The signal's name; with several processes, once they agree: 'SIGINT'
    where any was sent one."""
    self._noted: str | None = None

  def __enter__(self):
    mine = [signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # Under nohup.
      mine.append(signal.SIGHUP)
    if not distributed.several():
      mine.append(signal.SIGTERM)
    self._previous = {
      number: signal.signal(number, self._note) for number in mine
    }
    return self

  def __exit__(self, *_):
    for number, handler in self._previous.items():
      signal.signal(number, handler)

  def stop(self) -> bool:
    """Whether to stop before the next step; asked once before each of them."""
    if distributed.several() and (
      multihost_utils.reached_preemption_sync_point(next(_questions))
    ):
      self._noted = 'SIGINT' if distributed.announced(_CTRL_C) else 'SIGTERM'
      self.received = self._noted
      signal.signal(signal.SIGTERM, self._note)
      self._previous[signal.SIGTERM] = signal.SIG_IGN  # All is saved then.
    return self.received is not None

  def _note(self, number, frame):
    del frame
    if self._noted:
      raise KeyboardInterrupt
    self._noted = signal.Signals(number).name
    if distributed.several():
      if number == signal.SIGINT:
        distributed.announce(_CTRL_C)
      os.kill(os.getpid(), signal.SIGTERM)
    else:
      self.received = self._noted


def skip_exit() -> None:
  """Has the program, once it exits, end without waiting for what still runs.

  Threads that write a checkpoint would be waited for, or abort Python's end.
  """
  atexit.register(_leave)


def _leave() -> None:
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(_AT_ONCE)
