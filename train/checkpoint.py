"""Saves and restores the whole train state with Orbax, asynchronously.

The state holds all that a step reads; batch i is a pure function of (seed, i),
so the step count is also the position in the data.
"""

import errno
import functools
import logging
import os
import pathlib
import sys
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from train.errors import UserError

_KEPT = 2
_MISFITS = (ValueError, KeyError, TypeError, FileNotFoundError)


class _Manager(ocp.CheckpointManager):
  """Orbax's, which leaves signals to the loop."""

  def reached_preemption(self, step: int) -> bool:
    """Asks nothing: JAX counts who has asked (`train/interrupt.py`)."""
    del step
    return False


class Checkpoints:
  """The checkpoints of one run directory, newest last.

  A save becomes visible under its step's name only once it is complete.
  """

  def __init__(self, directory: pathlib.Path):
    _quiet()
    self._directory = directory
    with self._one_line_errors():
      self._manager = _Manager(
        directory.absolute(),
        options=ocp.CheckpointManagerOptions(
          max_to_keep=_KEPT, cleanup_tmp_directories=True
        ),
      )

  def latest_step(self) -> int | None:
    """The newest complete checkpoint's step; None where there is none."""
    return self._manager.latest_step()

  def save(self, step: int, state: Any) -> None:
    """Starts saving; the arrays are copied first, so they may be donated.

    Raises:
      UserError: the disk is full; also where an earlier save found it full.
    """
    with self._one_line_errors():
      self._manager.save(
        step, args=ocp.args.StandardSave(_without_empty(state))
      )

  def restore(self, step: int, abstract_state: Any) -> Any:
    """Returns the state of a step, placed as abstract_state's shardings say.

    Raises:
      UserError: the checkpoint does not hold such a state.
    """
    try:
      stored = self._manager.restore(
        step, args=ocp.args.StandardRestore(_without_empty(abstract_state))
      )
      return _with_empty(stored, abstract_state)
    except _MISFITS as error:
      raise UserError(
        f'cannot restore step {step} from {self._directory}: remove its '
        f'directory {step} to go on from an earlier one ({_reason(error)})'
      ) from error

  def wait(self) -> None:
    """Waits for the save under way.

    Raises:
      UserError: the disk was full.
    """
    with self._one_line_errors():
      self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits, then lets go of the directory.

    Raises:
      UserError: the disk was full.
    """
    with self._one_line_errors():
      self._manager.close()

  def _one_line_errors(self):
    return one_line_errors(self._directory)


def restore_params(
  directory: pathlib.Path, abstract_params: Any, step: int | None = None
) -> Any:
  """Reads the parameters alone; changes nothing, a run may be under way.

  Args:
    directory: The checkpoints of a run.
    abstract_params: Shapes, dtypes and shardings.
    step: Which one; None for the latest.

  Returns:
    The arrays, in the tree of abstract_params.

  Raises:
    UserError: there is no such checkpoint, or it does not hold these.
  """
  _quiet()
  if not directory.is_dir():
    raise UserError(f'there is no checkpoint yet in {directory}')
  options = ocp.CheckpointManagerOptions(read_only=True)
  with ocp.CheckpointManager(directory.absolute(), options=options) as manager:
    steps = sorted(manager.all_steps())
    if not steps:
      raise UserError(f'there is no checkpoint yet in {directory}')
    if step is None:
      step = steps[-1]
    if step not in steps:
      raise UserError(
        f'there is no step {step} in {directory}, only '
        f'{", ".join(map(str, steps))}'
      )
    wanted = {'params': _without_empty(abstract_params)}
    how = ocp.args.PyTreeRestore(
      item=wanted,
      restore_args=ocp.checkpoint_utils.construct_restore_args(wanted),
      partial_restore=True,
    )
    try:
      stored = manager.restore(step, args=how)['params']
      params = _with_empty(stored, abstract_params)
      # What is not in the checkpoint comes back as it was asked for.
      if not all(isinstance(x, jax.Array) for x in jax.tree.leaves(params)):
        raise ValueError('it lacks parameters')
    except _MISFITS as error:
      raise UserError(
        f'cannot read step {step} from {directory} ({_reason(error)})'
      ) from error
  return params


class one_line_errors:  # noqa: N801 (a context manager reads as a verb)
  """Turns failures to write a run directory into a `UserError`.

  A full disk is told by its text too: TensorStore reports it as a ValueError.
  """

  def __init__(self, directory: pathlib.Path):
    self._directory = directory

  def __enter__(self):
    return self

  def __exit__(self, kind, error, traceback):
    if error is None or isinstance(error, UserError):
      return
    number = getattr(error, 'errno', None)
    text = str(error)
    if number in (errno.ENOSPC, errno.EDQUOT) or (
      os.strerror(errno.ENOSPC) in text
    ):
      raise UserError(
        f'no space left to write {self._directory}: free some and give the '
        'same command again; it continues from the last complete checkpoint'
      ) from error
    if isinstance(error, OSError) and number is not None:
      raise UserError(
        f'cannot write {self._directory}: {os.strerror(number)}'
      ) from error


def _without_empty(tree: Any) -> Any:
  """Puts a 0 in the place of each array without elements.

  Orbax refuses to write those, and a model may have them: a shared expert of
  width 0. A number in their place lets a model of another width be noticed.
  """
  return jax.tree.map(lambda x: x if x.size else 0, tree)


def _with_empty(stored: Any, abstract_tree: Any) -> Any:
  """Undoes `_without_empty`."""
  return jax.tree.map(
    lambda like, x: (
      x
      if like.size
      else jnp.zeros(like.shape, like.dtype, device=like.sharding)
    ),
    abstract_tree,
    stored,
  )


def _reason(error: Exception) -> str:
  """TensorStore appends its whole specification, in brackets."""
  return str(error).strip().split('\n')[0].split(' [')[0][:300]


@functools.cache
def _quiet() -> None:
  """Keeps tracebacks off the terminal of failures that are raised as well."""
  for name in ('absl', 'asyncio'):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  report = sys.unraisablehook

  def report_others(failure):
    # A write fails and Orbax closes its event loop; those that TensorStore has
    # still under way then fail too and have nobody to tell.
    if str(failure.exc_value) != 'Event loop is closed':
      report(failure)

  sys.unraisablehook = report_others
