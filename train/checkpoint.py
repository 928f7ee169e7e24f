"""Saves and restores the whole train state with Orbax, asynchronously.

The state holds all that a step reads; batch i is a pure function of (seed, i),
so the step count is also the position in the data.

A checkpoint is complete once its manifest (`train/manifest.py`) is there, after
Orbax has committed all else; what has none, or is not what it says, is never
restored.
"""

import contextlib
import dataclasses
import logging
import queue
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from etils import epath

from train import manifest, retention, state_files, step_dirs
from train.agreement import LIMIT, Agreement, SharedError, in_main, my_part
from train.config import KeepConfig
from train.errors import UserError
from train.save_job import Outcome, SaveJob
from train.storage import one_line_errors

_logger = logging.getLogger('train')


@dataclasses.dataclass(frozen=True)
class Restored:
  """A state that was saved."""

  step: int
  """How many were taken."""
  state: Any
  """As asked for."""
  refused: list[tuple[int, str]]
  """Newer steps that were passed over, each with the reason in a few words."""


class Checkpoints:
  """The checkpoints of one run directory, used by all processes alike."""

  def __init__(
    self,
    directory: epath.PathLike,
    keep: KeepConfig,
    facts: Mapping[str, Any],
    confirm: Callable[[], None] = lambda: None,
  ):
    """Takes away what saves that were cut off have left.

    Args:
      directory: Made where it is missing.
      keep: Which to keep.
      facts: Told in each manifest; JSON.
      confirm: Called in process 0, by any thread, before a manifest is written
        and before anything is removed; raises a UserError where another run
        has taken the directory.

    Raises:
      UserError: the directory cannot be written.
    """
    self._directory = step_dirs.absolute(directory)
    self._facts = facts
    self._confirm = confirm
    self._keeper = retention.Keeper(self._directory, keep, confirm)
    self._outcomes: queue.SimpleQueue[Outcome] = queue.SimpleQueue()
    self._save: SaveJob | None = None  # The last.

    def clear():
      confirm()
      step_dirs.clear(self._directory)

    with _shared_errors():
      self._agreement('write').meet('opening', lambda: in_main(clear))

  def restore(self, abstract_state: Any) -> Restored | None:
    """The newest state whose files are what was saved; changes nothing.

    Args:
      abstract_state: Shapes, dtypes and shardings.

    Returns:
      The same step in all processes; None where none was ever complete.

    Raises:
      UserError: there are complete ones and all are damaged, whether one is
        cannot be told, or the one to restore holds another state.
    """
    talk = self._agreement('read')
    with _shared_errors():
      found = talk.meet(
        'listing', lambda: in_main(step_dirs.present, self._directory)
      )[0]
    refused = []
    for step, _ in reversed(found):
      try:
        self._verify(talk, step)
      except SharedError as error:
        if error.kind != manifest.DamagedError.__name__:
          raise _unknown(step, error, shared=True) from error
        refused.append((step, str(error)))
        continue
      self._keeper.refuse(step for step, _ in refused)
      return Restored(step, self._read(step, abstract_state), refused)
    if any(complete for _, complete in found):
      none = _none_left(self._directory, refused)
      none.shared = True
      raise none
    for step, reason in refused:
      _logger.warning('warning: step %d is passed over: %s', step, reason)
    return None

  def save(
    self, step: int, state: Any, validation_loss: float | None = None
  ) -> None:
    """Starts saving, once the save before has ended.

    What goes wrong, a full disk say, is told by its `Outcome`.

    Args:
      step: How many were taken; a checkpoint of so many is replaced.
      state: Copied first: its arrays may be donated.
      validation_loss: Nats a token, where this step was evaluated.

    Raises:
      UserError: the processes have lost one another; so the next three.
    """

    def ended(outcome):
      if not outcome.error:
        in_main(self._keeper.saved, step, validation_loss)
      self._outcomes.put(outcome)

    self.close()
    before = self._save
    self._save = SaveJob(
      self._directory,
      step,
      validation_loss,
      self._facts,
      self._confirm,
      sum(x.nbytes for x in jax.tree.leaves(state)),
    )
    self._save.start(state, ended)
    if before is not None:
      before.forget()

  def finished(self) -> list[Outcome]:
    """Of the saves that have ended since last asked; waits for none."""
    if self._save is not None:
      self._save.check()
    outcomes = []
    while not self._outcomes.empty():
      outcomes.append(self._outcomes.get())
    return outcomes

  def wait(self) -> list[Outcome]:
    """As `finished`, after the save under way."""
    self.close()
    return self.finished()

  def close(self) -> None:
    """Waits for the save under way."""
    if self._save is not None:
      self._save.wait()

  def _agreement(self, verb: str, limit: float = LIMIT) -> Agreement:
    return Agreement(
      lambda error: step_dirs.explain(error, self._directory, verb), limit
    )

  def _verify(self, talk: Agreement, step: int) -> None:
    """Each process reads its share of the files."""
    directory = self._directory / str(step)
    files = talk.meet(
      'reading a manifest',
      lambda: in_main(lambda: manifest.read(directory, step)['files']),
    )[0]
    mine = {name: files[name] for name in my_part(sorted(files))}
    size = sum(entry['bytes'] for entry in files.values())
    slow = self._agreement('read', manifest.seconds(size))
    slow.meet('verifying', lambda: manifest.check(directory, mine))

  def _read(self, step: int, abstract_state: Any) -> Any:
    try:
      return state_files.read(self._directory / str(step), abstract_state)
    except state_files.MISFITS as error:
      raise UserError(
        f'cannot restore step {step} from {self._directory} '
        f'({step_dirs.first(error)})'
      ) from error


def restore_params(
  directory: epath.PathLike, abstract_params: Any, step: int | None = None
) -> Any:
  """Reads the parameters alone; changes nothing, a run may be under way.

  Args:
    directory: The checkpoints of a run.
    abstract_params: Shapes, dtypes and shardings.
    step: Which one; None for the newest that is what was saved. Of those that
      are passed over it warns.

  Returns:
    The arrays, in the tree of abstract_params.

  Raises:
    UserError: there is no such checkpoint, it is damaged, or it does not hold
      these.
  """
  directory = step_dirs.absolute(directory)
  while True:
    with one_line_errors(directory):
      found = step_dirs.present(directory)
    try:
      return _read_params(directory, abstract_params, dict(found), step)
    except UserError:
      # Where a run has removed it meanwhile, there is a newer one.
      if step is not None or step_dirs.present(directory) == found:
        raise


def _read_params(
  directory: epath.Path,
  abstract_params: Any,
  found: dict[int, bool],
  wanted: int | None,
) -> Any:
  steps = [step for step, complete in found.items() if complete]
  if wanted is None and not steps:
    raise UserError(f'there is no checkpoint yet in {directory}')
  if wanted is not None and wanted not in found:
    raise UserError(
      f'there is no step {wanted} in {directory}, only '
      f'{", ".join(map(str, steps)) or "none"}'
    )
  refused: list[tuple[int, str]] = []
  for step in [step for step in reversed(found) if wanted in (None, step)]:
    path = directory / str(step)
    try:
      manifest.check(path, manifest.read(path, step)['files'])
    except manifest.DamagedError as error:
      refused.append((step, str(error)))
      continue
    except Exception as error:  # Each store's client has its own.
      why = step_dirs.explain(error, path, 'read')
      raise _unknown(step, why) from error
    for other, reason in refused:
      _logger.warning(
        'warning: step %d is passed over for step %d: %s', other, step, reason
      )
    try:
      return state_files.read_params(path, abstract_params)
    except state_files.MISFITS as error:
      raise UserError(
        f'cannot read step {step} from {directory} ({step_dirs.first(error)})'
      ) from error
  raise _none_left(directory, refused)


def _none_left(
  directory: epath.Path, refused: list[tuple[int, str]]
) -> UserError:
  reasons = '; '.join(f'step {step}: {reason}' for step, reason in refused)
  return UserError(f'no checkpoint in {directory} can be used ({reasons})')


def _unknown(step: int, why: object, *, shared: bool = False) -> UserError:
  """Of a step that may well be what was saved: none before it is taken."""
  error = UserError(
    f'step {step} cannot be checked ({why}): nothing is removed; mend that and '
    'give the same command again'
  )
  error.shared = shared
  return error


@contextlib.contextmanager
def _shared_errors() -> Iterator[None]:
  try:
    yield
  except SharedError as error:
    shared = UserError(str(error))
    shared.shared = True
    raise shared from error
