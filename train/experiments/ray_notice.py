"""What tasks on a cluster ask, each from its own machine: is it time to end?

Ray's own cancellation can miss a task that is about to begin (seen with Ray
2.60: it is in no queue any more and does not run yet; then it runs to its end).
What is asked for again and again cannot be missed.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import ray

_ASK = 1.0  # Seconds between questions.


class Notice:
  """An actor: a process of the cluster's, for one run of the engine."""

  def __init__(self):
    self.told = False
    self.begun: set[int] = set()

  def ask(self, task: int) -> bool:
    """Returns whether a task is to end, or not to begin."""
    if not self.told:
      self.begun.add(task)
    return self.told

  def tell(self) -> set[int]:
    """Has tasks end; returns those that have begun."""
    self.told = True
    return self.begun


def told(notice: Any, task: int) -> bool:
  """Whether a task is to end, as it asks itself; no, where nobody answers."""
  # Ray would give the core of a task that waits by `ray.get` to another one.
  with contextlib.suppress(ray.exceptions.RayError):
    return notice.ask.remote(task).future().result()
  return False


@contextlib.contextmanager
def heard(notice: Any, task: int) -> Iterator[None]:
  """Sends this process a SIGTERM, once, as soon as its task is to end."""
  over = threading.Event()

  def ask():
    while not over.wait(_ASK):
      if told(notice, task):
        if not over.is_set():
          os.kill(os.getpid(), signal.SIGTERM)
        return

  thread = threading.Thread(target=ask, daemon=True)
  thread.start()
  try:
    yield
  finally:
    over.set()
    thread.join()
