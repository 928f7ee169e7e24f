"""A train state as Orbax's files."""

import collections
import functools
import logging
import math
import sys
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from etils.epath import gpath

from train import distributed, step_dirs, storage
from train.agreement import Agreement, LostError, SharedError

MISFITS = (ValueError, KeyError, TypeError, OSError)
"""What `read` raises where the files are not those of such a state."""


class Writer:
  """Saves one state; all processes at once."""

  def __init__(self, talk: Agreement, limit: float):
    """With an Orbax of its own: nothing of a save that failed stays behind.

    Args:
      talk: Where the processes meet in the background.
      limit: Seconds that one of them may take to write its part, as `talk`'s.
    """
    quiet()
    self._talk = talk
    self._failure: Exception | None = None
    processes = distributed.process_count()
    # With processes named, Orbax waits in the coordination service, which has
    # time limits, and not in collectives.
    self._orbax = ocp.AsyncCheckpointer(
      _handler(),
      async_options=ocp.options.AsyncOptions(
        timeout_secs=int(limit),
        # In a thread it may come after the removal of a save that failed.
        create_directories_asynchronously=False,
        barrier_sync_fn=lambda key, timeout_ms: _meet(talk, key),
      ),
      multiprocessing_options=ocp.options.MultiprocessingOptions(
        active_processes=set(range(processes)) if processes > 1 else None,
        barrier_sync_key_prefix=talk.name.replace('/', '-'),
      ),
    )

  def start(self, directory: epath.Path, state: Any) -> None:
    """Returns when the arrays are copied and may be donated; never raises."""
    # Threads that a daemon begins, Orbax's here, are daemons: a program that
    # is to end at once does not wait for them.
    thread = threading.Thread(
      target=self._start, args=(_Literal(directory), state), daemon=True
    )
    thread.start()
    thread.join()

  def finish(self) -> None:
    """Waits until the directory is there.

    Raises:
      SharedError: it could not be written, in all processes.
      LostError: see `Agreement.meet`.
    """
    try:
      if self._failure is not None:
        raise self._failure
      self._orbax.wait_until_finished()
    except (SharedError, LostError):
      raise  # Told by another, where Orbax waited for it.
    except Exception as error:
      self._talk.fail('writing', error)
    finally:
      self._orbax.close()

  def _start(self, directory: epath.Path, state: Any) -> None:
    try:
      self._orbax.save(
        directory, args=ocp.args.PyTreeSave(_without_empty(state))
      )
    except Exception as error:
      self._failure = error


class _Literal(gpath.PosixGPath):
  """A path whose brackets are no pattern where Orbax globs below it."""

  def glob(self, pattern: str) -> Iterator[epath.Path]:
    return storage.matches(self, pattern)


def check(directory: epath.Path, state: Any, sizes: Mapping[str, int]) -> None:
  """Checks that `read` would find all of a state; reads none of its data.

  Args:
    directory: As Orbax has committed it.
    state: The saved arrays, or their shapes and dtypes.
    sizes: Bytes of each file below the directory.

  Raises:
    ValueError: an array is missing, incomplete, or of another shape or dtype;
      one line says which.
  """
  try:
    _check(directory, state, sizes)
  except Exception as error:
    raise ValueError(
      f'what was written could not be restored ({step_dirs.first(error)})'
    ) from error


def _check(directory: epath.Path, state: Any, sizes: Mapping[str, int]) -> None:
  # Opens each array.
  stored = ocp.tree.to_flat_dict(_handler().metadata(directory).tree)
  scheme, _, place = str(directory).rpartition('://')
  base = f'{scheme or "file"}://{urllib.parse.quote(place)}/'
  chunks: collections.Counter[str] = collections.Counter()
  for key, value in _entries(ts.KvStore.open(base).result()):
    chunks[key.rpartition('/')[0]] += 1
    if value:
      *_, folder, name, start, length = value.split(':')
      if sizes.get(folder + name, 0) < int(start) + int(length):
        raise ValueError(f'{folder + name} is missing or cut off')
  for path, x in ocp.tree.to_flat_dict(state).items():
    name = '.'.join(path)
    if (found := stored.get(path)) is None:
      raise ValueError(f'{name} is missing')
    if x.size and (found.shape, found.dtype) != (x.shape, x.dtype):
      raise ValueError(
        f'{name} is {found.dtype}{list(found.shape)}, not'
        f' {x.dtype}{list(x.shape)}'
      )
    # A number in the place of one without elements has a shape of ().
    chunk = found.storage.chunk_shape if x.size else ()
    parts = math.prod(map(lambda n, m: -(-n // m), found.shape, chunk))
    if chunks[name] != 1 + parts:  # With the array's own metadata.
      raise ValueError(f'{name} lacks data')


def _entries(
  base: ts.KvStore, node: str = '', prefix: bytes = b''
) -> Iterator[tuple[str, str]]:
  """Yields the keys of an OCDBT store, each with the place of its value.

  The place is empty where the value stands in the tree itself.
  """
  if not node:
    node = ts.ocdbt.dump(base).result()['versions'][-1]['root']['location']
  found = ts.ocdbt.dump(base, node).result()
  for entry in found['entries']:
    if found['height']:
      below = prefix + entry['subtree_common_prefix']
      yield from _entries(base, entry['location'], below)
    else:
      key = (prefix + entry['key']).decode()
      yield key, entry.get('indirect_value', '')


def read(directory: epath.Path, abstract_state: Any) -> Any:
  """A state, placed as abstract_state's shardings say.

  Raises:
    Exception: one of `MISFITS`.
  """
  quiet()
  wanted = _without_empty(abstract_state)
  return _with_empty(_restore(directory, wanted, partial=False), abstract_state)


def read_params(directory: epath.Path, abstract_params: Any) -> Any:
  """As `read`, of the parameters alone.

  Raises:
    Exception: one of `MISFITS`.
  """
  quiet()
  wanted = {'params': _without_empty(abstract_params)}
  stored = _restore(directory, wanted, partial=True)
  params = _with_empty(stored['params'], abstract_params)
  # What is not in the checkpoint comes back as it was asked for.
  if not all(isinstance(x, jax.Array) for x in jax.tree.leaves(params)):
    raise ValueError('it lacks parameters')
  return params


def _restore(directory: epath.Path, wanted: Any, *, partial: bool) -> Any:
  how = ocp.checkpoint_utils.construct_restore_args(wanted)
  return _handler().restore(
    directory,
    args=ocp.args.PyTreeRestore(
      item=wanted, restore_args=how, partial_restore=partial
    ),
  )


def _handler() -> ocp.PyTreeCheckpointHandler:
  """Without Orbax's metadata of arrays, of typed random keys for instance.

  Where process 0 fails, the others would wait for its folder for 10 minutes.
  """
  types = ocp.type_handlers
  registry = types.create_type_handler_registry(
    (int, types.ScalarHandler()), (jax.Array, types.ArrayHandler())
  )
  return ocp.PyTreeCheckpointHandler(
    use_ocdbt=True, use_zarr3=False, type_handler_registry=registry
  )  # The format that `check` reads.


def _meet(talk: Agreement, key: str) -> None:
  talk.meet(f'Orbax: {key}', lambda: None)


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


@functools.cache
def quiet() -> None:
  """Keeps tracebacks off the terminal of failures that are raised as well.

  `check` finds what Orbax only warns of.
  """
  logging.getLogger('asyncio').setLevel(logging.CRITICAL)
  logging.getLogger('absl').addFilter(
    lambda record: '/orbax/' not in record.pathname
  )
  report = sys.unraisablehook

  def report_others(failure):
    # A write fails and Orbax closes its event loop; those that TensorStore has
    # still under way then fail too and have nobody to tell.
    if str(failure.exc_value) != 'Event loop is closed':
      report(failure)

  sys.unraisablehook = report_others
