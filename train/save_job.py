"""One save, from the copy of the arrays to the manifest."""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath

from train import manifest, state_files, step_dirs
from train.agreement import (
  Agreement,
  LostError,
  SharedError,
  in_main,
  my_part,
)
from train.errors import UserError


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How a save ended, the same in all processes."""

  step: int
  """How many were taken."""
  seconds: float
  """From its beginning; where it failed, each process has measured its own."""
  bytes: int
  """Of all its files; 0 where it failed."""
  error: str = ''
  """One line; empty where it is saved."""


class SaveJob:
  """A save that is under way."""

  def __init__(
    self,
    directory: epath.Path,
    step: int,
    validation_loss: float | None,
    facts: Mapping[str, Any],
    confirm: Callable[[], None],
    size: int,
  ):
    """Prepares it; `start` follows.

    Args:
      directory: Of all checkpoints.
      step: How many were taken.
      validation_loss: See `manifest.write`; so the next.
      facts: Of the run.
      confirm: Called in process 0 before the manifest is written and before
        anything is removed; raises where that is not ours to do.
      size: Bytes of the arrays, the more the longer the processes wait for one
        another.
    """
    self._directory = directory
    self._step = step
    self._loss = validation_loss
    self._facts = facts
    self._confirm = confirm
    self._begun = time.monotonic()
    self._thread: threading.Thread | None = None
    self._lost: LostError | None = None
    self._shapes: Any = None  # Shapes and dtypes of the arrays.
    self._limit = manifest.seconds(size)
    self._talk = Agreement(
      lambda error: step_dirs.explain(error, directory, 'write'), self._limit
    )

  def start(self, state: Any, ended: Callable[[Outcome], None]) -> None:
    """Returns when the arrays are copied and may be donated.

    Args:
      state: The arrays.
      ended: Called once, by a thread of the save's.

    Raises:
      LostError: see `Agreement.meet`; what else fails is told by the outcome.
    """

    def prepare():
      self._confirm()
      step_dirs.prepare(self._directory, self._step)

    try:
      self._talk.meet('beginning', lambda: in_main(prepare))
    except SharedError as error:
      ended(self._failed(error))
      return
    self._shapes = jax.tree.map(jax.typeof, state)
    writer = state_files.Writer(self._talk, self._limit)
    writer.start(self._directory / str(self._step), state)
    # A program that is to end at once does not wait for it.
    self._thread = threading.Thread(
      target=self._work,
      args=(writer, ended),
      name=f'save {self._step}',
      daemon=True,
    )
    self._thread.start()

  def wait(self) -> None:
    """Waits for its end.

    Raises:
      LostError: as `check`.
    """
    if self._thread is not None:
      self._thread.join()
    self.check()

  def check(self) -> None:
    """Looks whether it has ended without an outcome.

    Raises:
      LostError: see `Agreement.meet`.
    """
    if self._lost is not None:
      raise self._lost

  def forget(self) -> None:
    """Frees what is kept of it, once the next one has been started."""
    self._talk.forget()

  def _work(
    self, writer: state_files.Writer, ended: Callable[[Outcome], None]
  ) -> None:
    try:
      ended(self._finish(writer))
    except LostError as error:
      self._lost = error

  def _finish(self, writer: state_files.Writer) -> Outcome:
    try:
      return Outcome(self._step, *self._seal(writer))
    except LostError:
      raise
    except Exception as error:
      in_main(self._discard)
      return self._failed(error)

  def _discard(self) -> None:
    with contextlib.suppress(UserError):
      self._confirm()
      step_dirs.discard(self._directory, self._step)

  def _seal(self, writer: state_files.Writer) -> tuple[float, int]:
    """Waits for Orbax, writes the manifest; returns the seconds and bytes."""
    directory, meet = self._directory / str(self._step), self._talk.meet
    writer.finish()
    names = meet('listing', lambda: in_main(manifest.list_files, directory))[0]
    parts = meet(
      'computing digests',
      lambda: manifest.digests(directory, my_part(names), flush=True),
    )

    def write():
      files = {name: entry for part in parts for name, entry in part.items()}
      sizes = {name: entry['bytes'] for name, entry in files.items()}
      state_files.check(directory, self._shapes, sizes)
      self._confirm()
      manifest.write(directory, self._step, files, self._loss, self._facts)
      return self._seconds(), sum(sizes.values())

    seconds, size = meet('writing the manifest', lambda: in_main(write))[0]
    return seconds, size

  def _failed(self, error: Exception) -> Outcome:
    line = step_dirs.explain(error, self._directory, 'write')
    return Outcome(self._step, self._seconds(), 0, line)

  def _seconds(self) -> float:
    return round(time.monotonic() - self._begun, 3)
