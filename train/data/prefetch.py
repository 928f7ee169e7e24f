"""Batches read ahead of the loop, so that no step waits for the disk."""

from collections.abc import Callable
from concurrent import futures
from typing import Generic, TypeVar

T = TypeVar('T')


class Prefetch(Generic[T]):
  """Reads batches before they are asked for, in threads.

  Which batch is which does not depend on threads or depth: `read` is a pure
  function of the number. At most `depth` batches are held or being read.
  """

  def __init__(
    self,
    read: Callable[[int], T],
    first: int,
    *,
    depth: int = 4,
    threads: int = 2,
  ):
    """Begins to read.

    Args:
      read: Gives batch i; called from several threads at a time.
      first: Number of the batch that is asked for first.
      depth: Batches to be ahead, at least 1.
      threads: How many are read at a time, at least 1.
    """
    self._read = read
    self._depth = depth
    self._pool = futures.ThreadPoolExecutor(threads, 'prefetch')
    self._ahead: dict[int, futures.Future[T]] = {}
    self._fill(first)

  def next(self, index: int) -> T:
    """Returns batch `index`, and goes on to read those after it.

    In turn or not: after a jump, what was read in vain is let go.

    Raises:
      Exception: what `read` raised for this batch.
    """
    self._fill(index)
    batch = self._ahead.pop(index).result()
    self._fill(index + 1)
    return batch

  def _fill(self, first: int) -> None:
    """Has those read that come next, and no others."""
    wanted = range(first, first + self._depth)
    for index in [i for i in self._ahead if i not in wanted]:
      self._ahead.pop(index).cancel()
    for index in wanted:
      if index not in self._ahead:
        self._ahead[index] = self._pool.submit(self._read, index)

  def close(self) -> None:
    """Ends the threads, after the batches that they are reading."""
    self._pool.shutdown(cancel_futures=True)
    self._ahead.clear()

  def __enter__(self) -> 'Prefetch[T]':
    """Returns itself, to be closed at the end."""
    return self

  def __exit__(self, *_) -> None:
    """Closes."""
    self.close()
