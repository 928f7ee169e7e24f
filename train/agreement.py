"""What all processes of a run must see alike although each acts by itself.

Unlike `distributed.together` it may be used away from the main thread: each
agreement has keys of its own in JAX's coordination store, and no collective.
"""

import itertools
import json
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import jax
from jax._src import distributed as jax_distributed

LIMIT = 600
"""Seconds that one process waits for another, at most."""
MARGIN = 30
"""Process 0 decides so much earlier than the others give up."""

_logger = logging.getLogger('train')
_names = itertools.count()  # All processes count alike.


class SharedError(Exception):
  """Something failed in one process at least; the text is the same in all."""


class Agreement:
  """A series of points that each process comes to, one after the other.

  Made by all processes in the same order.
  """

  def __init__(self, say: Callable[[Exception], str]):
    """Begins one.

    Args:
      say: Makes one line of an exception.
    """
    self._say = say
    self.name = f'gradpower/agreement/{next(_names)}'
    """Its own, and the same in all processes."""
    self._points = itertools.count()

  def meet(self, what: str, action: Callable[[], Any]) -> list[Any]:
    """Does something in every process and waits until all have done it.

    Args:
      what: For those who wait too long: 'writing the manifest'.
      action: Its result is one that JSON holds.

    Returns:
      In process 0 the results of all, elsewhere that of process 0 alone.

    Raises:
      SharedError: in all, where it raised an `Exception` in one, which was the
        first of its number, or did not end in time.
    """
    try:
      failure, result = '', action()
    except Exception as error:
      _logger.debug('%s', what, exc_info=True)
      failure, result = self._say(error), None
    failure, results = self._exchange(what, [failure, result])
    if failure:
      raise SharedError(failure)
    return results

  def fail(self, what: str, error: Exception) -> NoReturn:
    """Comes to where the others are, or will be, with a failure.

    Raises:
      SharedError: in all.
    """

    def action():
      raise error

    self.meet(what, action)
    raise error  # Not reached.

  def forget(self) -> None:
    """Frees the store's memory, once all have begun another agreement."""
    if count() > 1 and process() == 0:
      _client().key_value_delete(f'{self.name}/')

  def _exchange(self, what: str, mine: list[Any]) -> tuple[str, list[Any]]:
    if count() == 1:
      return mine[0], [mine[1]]
    key = f'{self.name}/{next(self._points)}'
    _client().key_value_set(f'{key}/{process()}', json.dumps(mine))
    if process() == 0:
      failure, results = self._collect(key, what)
      verdict = json.dumps([failure, results[0] if results else None])
      _client().key_value_set(f'{key}/verdict', verdict)
      return failure, results
    # Process 0 decides within the limit once it has come.
    if _get(f'{key}/0', LIMIT) is None:
      mine = [f'process 0 was waited for {LIMIT} s ({what})', None]
      _client().key_value_set(
        f'{key}/{process()}', json.dumps(mine), allow_overwrite=True
      )
      return mine[0], []
    if (verdict := _get(f'{key}/verdict', LIMIT)) is None:
      return f'process 0 does not answer ({what})', []
    return verdict[0], [verdict[1]]

  def _collect(self, key: str, what: str) -> tuple[str, list[Any]]:
    """In process 0: the first failure, and the results."""
    seconds = LIMIT - MARGIN
    end = time.monotonic() + seconds
    failures, results = [], []
    for number in range(count()):
      told = _get(f'{key}/{number}', max(end - time.monotonic(), 0.01))
      if told is None:
        told = [f'process {number} was waited for {seconds} s ({what})', None]
      failures.append(told[0])
      results.append(told[1])
    return next(filter(None, failures), ''), results


def count() -> int:
  """The number of processes."""
  return jax_distributed.global_state.num_processes or 1


def process() -> int:
  """The number of this one, from 0."""
  return jax_distributed.global_state.process_id or 0


def in_main(action: Callable[..., Any], *args: Any) -> Any:
  """What it returns in process 0; None elsewhere, where it is not done."""
  return action(*args) if process() == 0 else None


def share(items: Sequence[Any]) -> Sequence[Any]:
  """Those of them that are this process's to work on."""
  return items[process() :: count()]


def _get(key: str, seconds: float) -> Any:
  """What was told under a key; None where it does not come in time."""
  try:
    told = _client().blocking_key_value_get(key, int(seconds * 1000))
  except jax.errors.JaxRuntimeError:
    _logger.debug('%s', key, exc_info=True)
    return None
  return json.loads(told)


def _client() -> Any:
  return jax_distributed.global_state.client
