import errno
import gc
import shutil
import sys
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from train import checkpoint
from train.checkpoint import (
  Checkpoints,
  one_line_errors,
  restore_params,
)
from train.config import MeshConfig
from train.errors import UserError
from train.mesh import batch_sharding, make_mesh, replicated


def state(seed=0, width=64):
  rng = np.random.default_rng(seed)
  return jax.device_put(
    {
      'params': {'layers': {0: {'w': rng.normal(size=(8, width))},
                            1: {'w': rng.normal(size=(8, width))}}},
      'step': np.int32(seed),
    },
    replicated(make_mesh(MeshConfig())),
  )  # fmt: skip


def abstract(tree):
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree
  )


def assert_same(tree, other):
  jax.tree.map(np.testing.assert_array_equal, tree, other)
  assert jax.tree.structure(tree) == jax.tree.structure(other)


@pytest.fixture
def checkpoints(tmp_path):
  checkpoints = Checkpoints(tmp_path / 'checkpoints')
  yield checkpoints
  checkpoints.close()


def test_a_state_comes_back_to_the_bit(checkpoints):
  assert checkpoints.latest_step() is None
  checkpoints.save(3, state(3))
  checkpoints.wait()
  assert checkpoints.latest_step() == 3
  restored = checkpoints.restore(3, abstract(state(0)))
  assert_same(restored, state(3))
  leaf = restored['params']['layers'][0]['w']
  assert leaf.sharding == state()['params']['layers'][0]['w'].sharding


def test_it_comes_back_on_another_sharding(checkpoints):
  checkpoints.save(1, state(1))
  checkpoints.wait()
  wanted = abstract(state(0))
  rows = batch_sharding(make_mesh(MeshConfig()))
  wanted['params'] = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows),
    wanted['params'],
  )
  restored = checkpoints.restore(1, wanted)
  assert_same(restored, state(1))
  assert restored['params']['layers'][1]['w'].sharding == rows


def test_the_last_two_are_kept(checkpoints, tmp_path):
  for step in (5, 10, 15, 18):
    checkpoints.save(step, state(step))
  checkpoints.wait()
  checkpoints.close()
  names = {p.name for p in (tmp_path / 'checkpoints').iterdir()}
  assert names == {'15', '18'}


def test_the_arrays_may_be_donated_during_the_save(checkpoints):
  def scramble(tree):
    return jax.tree.map(lambda x: -x - 1, tree)

  scramble = jax.jit(scramble, donate_argnums=0)
  live = state(7, width=200_000)  # 12.8 MB: still writing when save returns.
  kept = jax.tree.map(lambda x: np.array(x, copy=True), live)
  checkpoints.save(7, live)
  for _ in range(5):
    live = scramble(live)
  jax.block_until_ready(live)
  checkpoints.wait()
  assert_same(checkpoints.restore(7, abstract(live)), kept)


def test_a_save_that_was_cut_off_is_not_there(tmp_path):
  directory = tmp_path / 'checkpoints'
  first = Checkpoints(directory)
  first.save(1, state(1))
  first.close()
  leftover = directory / '2.orbax-checkpoint-tmp'
  shutil.copytree(directory / '1', leftover)
  (leftover / '_CHECKPOINT_METADATA').unlink()  # Written last.
  second = Checkpoints(directory)
  assert second.latest_step() == 1
  second.save(2, state(2))
  second.wait()
  assert second.latest_step() == 2
  second.close()
  assert {p.name for p in directory.iterdir()} == {'1', '2'}


# Orbax drops coroutines that it did not get to.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.filterwarnings('ignore:coroutine:RuntimeWarning')
@pytest.mark.parametrize('change', ['shape', 'missing leaf', 'extra leaf'])
def test_another_state_is_refused_in_one_line(checkpoints, tmp_path, change):
  checkpoints.save(4, state(4))
  checkpoints.wait()
  wanted = state(0, width=32 if change == 'shape' else 64)
  if change == 'missing leaf':
    del wanted['params']['layers'][1]
  if change == 'extra leaf':
    wanted['more'] = jnp.zeros(3)
  with pytest.raises(UserError) as error:
    checkpoints.restore(4, abstract(wanted))
  message = str(error.value)
  assert message.startswith(f'cannot restore step 4 from {tmp_path}')
  assert '\n' not in message
  del error
  gc.collect()


def test_a_damaged_checkpoint_is_told_in_one_line(tmp_path):
  first = Checkpoints(tmp_path)
  first.save(2, state(2))
  first.close()
  for path in (tmp_path / '2').rglob('*'):
    if path.is_file() and path.stat().st_size and path.parent.name == 'd':
      path.write_bytes(b'')
  second = Checkpoints(tmp_path)
  with pytest.raises(UserError, match='remove its directory 2 to') as error:
    second.restore(2, abstract(state(0)))
  assert '\n' not in str(error.value)
  assert 'tensorstore_spec' not in str(error.value)
  second.close()


class Moments(NamedTuple):
  mu: dict
  nu: dict


def state_with_empty(width=0):
  """Parameters and moments, some of a width, sharded by rows."""
  params = jax.device_put(
    {
      'shared': {'gate': np.ones((8, width), np.float32),
                 'down': np.ones((8, width, 4), jnp.bfloat16)},
      'w': np.ones((8, 2), np.float32),
    },
    batch_sharding(make_mesh(MeshConfig())),
  )  # fmt: skip
  return {'params': params, 'moments': Moments(params, {'g': params['shared']})}


def test_arrays_without_elements_come_back(checkpoints, tmp_path):
  wanted = state_with_empty()
  checkpoints.save(2, wanted)
  checkpoints.wait()
  for like, restored in (
    (wanted, checkpoints.restore(2, abstract(wanted))),
    (
      wanted['params'],
      restore_params(tmp_path / 'checkpoints', abstract(wanted['params'])),
    ),
  ):
    assert_same(restored, like)
    assert abstract(restored) == abstract(like)  # With dtypes and shardings.


# As above.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.filterwarnings('ignore:coroutine:RuntimeWarning')
@pytest.mark.parametrize(('stored', 'wanted'), [(0, 3), (3, 0)])
def test_an_array_does_not_become_one_without_elements(
  checkpoints, tmp_path, stored, wanted
):
  checkpoints.save(2, state_with_empty(stored))
  checkpoints.wait()
  like = abstract(state_with_empty(wanted))
  with pytest.raises(UserError, match='cannot restore step 2') as error:
    checkpoints.restore(2, like)
  assert '\n' not in str(error.value)
  with pytest.raises(UserError, match='cannot read step 2') as error:
    restore_params(tmp_path / 'checkpoints', like['params'])
  assert '\n' not in str(error.value)
  del error
  gc.collect()


@pytest.fixture
def saved(tmp_path):
  """Two steps, and a third that a run is just saving."""
  checkpoints = Checkpoints(tmp_path / 'checkpoints')
  for step in (3, 6):
    checkpoints.save(step, state(step))
  checkpoints.close()
  (tmp_path / 'checkpoints' / '9.orbax-checkpoint-tmp').mkdir()
  return tmp_path / 'checkpoints'


def wanted(width=64):
  """Of the parameters, on the last of the devices."""
  last = jax.sharding.SingleDeviceSharding(jax.devices()[-1])
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=last),
    abstract(state(0, width))['params'],
  )


def test_parameters_alone(saved):
  before = sorted(saved.rglob('*'))
  for step, params in (
    (6, restore_params(saved, wanted())),
    (3, restore_params(saved, wanted(), 3)),
  ):
    assert_same(params, state(step)['params'])
    leaf = params['layers'][1]['w']
    assert leaf.devices() == {jax.devices()[-1]}
  assert sorted(saved.rglob('*')) == before


def test_only_parameters_are_read(saved, monkeypatch):
  read = []
  deserialize = ocp.type_handlers.ArrayHandler.deserialize

  async def noting(self, infos, args=None):
    read.extend(info.name for info in infos)
    return await deserialize(self, infos, args)

  monkeypatch.setattr(ocp.type_handlers.ArrayHandler, 'deserialize', noting)
  restore_params(saved, wanted())
  assert sorted(read) == ['params.layers.0.w', 'params.layers.1.w']


def test_a_step_that_is_not_there_is_said(saved, tmp_path):
  with pytest.raises(UserError, match=r'there is no step 4 in .*, only 3, 6$'):
    restore_params(saved, wanted(), 4)
  (tmp_path / 'empty').mkdir()
  for name in ('none', 'empty'):
    with pytest.raises(UserError, match='there is no checkpoint yet in'):
      restore_params(tmp_path / name, wanted())
  assert not (tmp_path / 'none').exists()


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.filterwarnings('ignore:coroutine:RuntimeWarning')
@pytest.mark.parametrize('change', ['shape', 'more'])
def test_other_parameters_are_refused_in_one_line(saved, change):
  params = wanted(width=32 if change == 'shape' else 64)
  if change == 'more':
    params['layers'][2] = params['layers'][1]
  with pytest.raises(UserError, match='cannot read step 6 from') as error:
    restore_params(saved, params)
  assert '\n' not in str(error.value)
  del error
  gc.collect()


@pytest.mark.parametrize(
  ('error', 'words'),
  [
    (OSError(errno.ENOSPC, 'x'), 'no space left'),
    (OSError(errno.EDQUOT, 'x'), 'no space left'),
    (ValueError('RESOURCE: [OS error 28: No space left on device]'),
     'no space left'),
    (OSError(errno.EROFS, 'x'), 'cannot write /there: Read-only'),
    (PermissionError(errno.EACCES, 'x'), 'cannot write /there: Permission'),
  ],
)  # fmt: skip
def test_errors_of_the_disk_become_one_line(error, words):
  with (
    pytest.raises(UserError, match=words) as raised,
    one_line_errors('/there'),
  ):
    raise error
  assert '\n' not in str(raised.value)


def test_late_failures_of_a_save_are_not_printed(monkeypatch):
  reported = []
  monkeypatch.setattr(sys, 'unraisablehook', reported.append)
  checkpoint._quiet.__wrapped__()
  failures = [
    types.SimpleNamespace(exc_value=RuntimeError(text))
    for text in ('Event loop is closed', 'other')
  ]
  for failure in failures:
    sys.unraisablehook(failure)
  assert reported == failures[1:]


def test_other_errors_pass():
  for error in (ValueError('shape'), UserError('x'), KeyboardInterrupt()):
    with pytest.raises(type(error)) as raised, one_line_errors('/there'):
      raise error
    assert raised.value is error
