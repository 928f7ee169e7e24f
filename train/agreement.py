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

from train import distributed
from train.errors import UserError

LIMIT = 600
"""Seconds that one process waits for another, if nothing else is said."""
MARGIN = 30
"""Process 0 decides so much earlier than the others give up."""

_logger = logging.getLogger('train')
_names = itertools.count()  # All processes count alike.


class SharedError(Exception):
  """Something failed in one process at least; it is the same in all."""

  def __init__(self, message: str, kind: str = ''):
    """Tells of it.

    Args:
      message: One line.
      kind: The name of the exception's class there; empty where a process did
        not come.
    """
    super().__init__(message)
    self.kind = kind


class LostError(UserError):
  """What the others have agreed on cannot be known: this process has to end."""


class Agreement:
  """A series of points that each process comes to, one after the other.

  Made by all processes in the same order.
  """

  def __init__(self, say: Callable[[Exception], str], limit: float = LIMIT):
    """Begins one.

    Args:
      say: Makes one line of an exception.
      limit: Seconds that one process waits for another; more than `MARGIN`.
    """
    self._say = say
    self._limit = limit
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
      LostError: process 0 did not come, or does not say what it has decided.
    """
    failure: list[str] = []
    result = None
    try:
      result = action()
    except Exception as error:
      _logger.debug('%s', what, exc_info=True)
      failure = [self._say(error), type(error).__name__]
    failure, results = self._exchange(what, failure, result)
    if failure:
      raise SharedError(*failure)
    return results

  def fail(self, what: str, error: Exception) -> NoReturn:
    """Comes to where the others are, or will be, with a failure.

    Raises:
      SharedError: in all.
      LostError: as `meet`.
    """

    def action():
      raise error

    self.meet(what, action)
    raise error  # Not reached.

  def forget(self) -> None:
    """Frees the store's memory, once all have begun another agreement."""
    if distributed.process_count() > 1 and distributed.is_main():
      distributed.client().key_value_delete(f'{self.name}/')

  def _exchange(
    self, what: str, failure: list[str], result: Any
  ) -> tuple[list[str], list[Any]]:
    if distributed.process_count() == 1:
      return failure, [result]
    store, key = distributed.client(), f'{self.name}/{next(self._points)}'
    own = f'{key}/{distributed.process_index()}'
    store.key_value_set(own, json.dumps([failure, result]))
    if distributed.is_main():
      failure, results = self._collect(key, what)
      verdict = json.dumps([failure, results[0]])
      store.key_value_set(f'{key}/verdict', verdict)
      return failure, results
    # Process 0 decides within the limit once it has come.
    patience, late = self._limit, ''
    if _get(f'{key}/0', self._limit) is None:
      late = f'process 0 was waited for {self._limit:g} s ({what})'
      told = json.dumps([[late, ''], None])
      store.key_value_set(own, told, allow_overwrite=True)
      # It may have read what was there before: only its verdict counts.
      patience = MARGIN
    if (verdict := _get(f'{key}/verdict', patience)) is None:
      raise LostError(late or f'process 0 does not answer ({what})')
    return verdict[0], [verdict[1]]

  def _collect(self, key: str, what: str) -> tuple[list[str], list[Any]]:
    """In process 0: the first failure, and the results."""
    seconds = self._limit - MARGIN
    end = time.monotonic() + seconds
    failures, results = [], []
    for number in range(distributed.process_count()):
      told = _get(f'{key}/{number}', max(end - time.monotonic(), 0.01))
      if told is None:
        late = f'process {number} was waited for {seconds:g} s ({what})'
        told = [[late, ''], None]
      failures.append(told[0])
      results.append(told[1])
    return next(filter(None, failures), []), results


def in_main(action: Callable[..., Any], *args: Any) -> Any:
  """What it returns in process 0; None elsewhere, where it is not done."""
  return action(*args) if distributed.is_main() else None


def my_part(items: Sequence[Any]) -> Sequence[Any]:
  """Those of them that are this process's to work on."""
  return items[distributed.process_index() :: distributed.process_count()]


def _get(key: str, seconds: float) -> Any:
  """What was told under a key; None where it does not come in time."""
  try:
    told = distributed.client().blocking_key_value_get(key, int(seconds * 1000))
  except jax.errors.JaxRuntimeError:
    _logger.debug('%s', key, exc_info=True)
    return None
  return json.loads(told)
