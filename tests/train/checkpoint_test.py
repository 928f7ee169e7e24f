"""Checkpoints of one process; those of several: agreement_test.py."""

import errno
import gc
import json
import logging
import os
import pathlib
import shutil
import subprocess
import sys
import threading
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tensorstore as ts
from etils import epath
from hypothesis import example, given, settings
from hypothesis import strategies as st

from train import manifest, retention, state_files, step_dirs
from train.checkpoint import Checkpoints, restore_params
from train.config import KeepConfig, MeshConfig
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


def opened(directory, **keep):
  return Checkpoints(directory, KeepConfig(**keep), {'data': {'seed': 5}})


def save(checkpoints, *steps):
  """Saves and waits; each must succeed."""
  for step in steps:
    checkpoints.save(step, state(step))
    [outcome] = checkpoints.wait()
    assert (outcome.step, outcome.error) == (step, '')


def steps(checkpoints):
  """Those that are complete."""
  found = step_dirs.present(checkpoints._directory)
  return [step for step, complete in found if complete]


def largest_file(directory):
  """Where most of the arrays is."""
  files = [path for path in directory.rglob('*') if path.is_file()]
  return max(files, key=lambda path: path.stat().st_size)


def flip_a_bit(directory):
  path = largest_file(directory)
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


@pytest.fixture
def directory(tmp_path):
  return tmp_path / 'checkpoints'


@pytest.fixture
def checkpoints(directory):
  checkpoints = opened(directory)
  yield checkpoints
  checkpoints.close()


def test_a_state_comes_back_to_the_bit(checkpoints):
  assert steps(checkpoints) == []
  assert checkpoints.restore(abstract(state(0))) is None
  checkpoints.save(3, state(3))
  [outcome] = checkpoints.wait()
  assert (outcome.step, outcome.error) == (3, '')
  assert 0 < outcome.seconds < 60
  assert outcome.bytes > 4 * 8 * 64 * 2
  assert checkpoints.wait() == checkpoints.finished() == []
  assert steps(checkpoints) == [3]
  restored = checkpoints.restore(abstract(state(0)))
  assert (restored.step, restored.refused) == (3, [])
  assert_same(restored.state, state(3))
  leaf = restored.state['params']['layers'][0]['w']
  assert leaf.sharding == state()['params']['layers'][0]['w'].sharding


def test_it_comes_back_on_another_sharding(checkpoints):
  save(checkpoints, 1)
  wanted = abstract(state(0))
  rows = batch_sharding(make_mesh(MeshConfig()))
  wanted['params'] = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows),
    wanted['params'],
  )
  restored = checkpoints.restore(wanted).state
  assert_same(restored, state(1))
  assert restored['params']['layers'][1]['w'].sharding == rows


def test_the_manifest_tells_of_the_run(checkpoints, directory):
  checkpoints.save(4, state(4), 2.5)
  checkpoints.close()
  content = json.loads((directory / '4' / 'manifest.json').read_text())
  assert content['data'] == {'seed': 5, 'next_batch': 4}
  assert content['validation_loss'] == 2.5
  on_disk = {
    str(path.relative_to(directory / '4'))
    for path in (directory / '4').rglob('*')
    if path.is_file()
  }
  assert content['files'].keys() == on_disk - {'manifest.json'}


# What a shell, a pattern, an address, a format or TensorStore reads.
CHARACTERS = r"""[]*?!{}~%#&@=+,;:|<>"'`$()^- ._\\aZ0""" + '\t\n\x7fé\u2028😀'
NAME = st.text(st.sampled_from(CHARACTERS), min_size=1, max_size=12)
EVERY = ''.join(chr(i) for i in range(1, 128) if chr(i) not in '/\\')


@settings(max_examples=5)
@given(st.lists(NAME, min_size=1, max_size=3))
@example([EVERY])
@example(['[!a]', '[b-c]', '**'])
@example(['a[', ']', '%2F', '~', '*'])
@example(['é' * 127, 'x' * 255])
def test_a_path_can_be_restored_or_is_refused(tmp_path_factory, names):
  directory = tmp_path_factory.mktemp('run') / 'a/b/c'  # '..' stays below.
  directory = directory.joinpath(*names)
  try:
    checkpoints = opened(directory)
  except UserError as error:
    assert 'cannot hold checkpoints' in str(error)
    assert '\\' in str(directory) or '..' in names
    return
  save(checkpoints, 1)
  assert (directory / '1' / 'manifest.ocdbt').exists()
  assert_same(opened(directory).restore(abstract(state(0))).state, state(1))
  assert_same(restore_params(directory, wanted()), state(1)['params'])


@pytest.mark.parametrize(
  ('path', 'found'),
  [
    (r'/runs/a\b', r'\\'),
    ('/a\\/run', r'\\'),
    ('/runs/a.__lock', '.__lock'),
    ('/a.__lock/run', '.__lock'),
    ('/runs/logs:', 'gs:'),
    ('/gs/bucket/run', '/gs'),
    ('/hf/../s3/run', '/s3'),
    ('/runs/\udcff', r'\udcff'),
    ('gs://bucket/lr[1]', '['),
    ('gs://bucket/runs*/run', '*'),
    ('gs://bucket/run?', '?'),
    ('gs://bucket/run#1', '#'),
    ('gs://bucket/a\nb', r'\n'),
  ],
)
def test_a_path_that_others_misread_is_refused(path, found):
  with pytest.raises(UserError) as error:
    step_dirs.absolute(pathlib.PurePosixPath(path) if path[0] == '/' else path)
  assert str(error.value).endswith(f"what is above it, without '{found}'")
  assert '\n' not in str(error.value)


@pytest.mark.parametrize(
  'path', ['/runs/gs', '/gsx/run', '/a__lock/b.__locks', '/a:b', 'gs://b/a;b=%']
)
def test_a_path_that_reads_alike_is_not_refused(path):
  assert str(step_dirs.absolute(path)) == path


def test_a_link_is_followed_before_the_parent_is_taken(tmp_path):
  (tmp_path / 'far' / 'off').mkdir(parents=True)
  (tmp_path / 'link').symlink_to(tmp_path / 'far' / 'off')
  save(opened(tmp_path / 'link' / '..' / 'run'), 1)
  assert (tmp_path / 'far' / 'run' / '1' / 'manifest.ocdbt').exists()
  assert not (tmp_path / 'run').exists()


def writes_nothing(patch):
  async def serialize(*_, **__):
    return []

  patch.setattr(ocp.type_handlers.ArrayHandler, 'serialize', serialize)


def skips_the_merge(patch):
  patch.setattr(ocp.PyTreeCheckpointHandler, 'finalize', lambda *_, **__: None)


def loses(pattern):
  """What Orbax has committed, before anything looks at it."""

  def prepare(patch):
    def list_files(directory):
      for path in pathlib.Path(directory).glob(pattern):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
      return listed(directory)

    listed = manifest.list_files
    patch.setattr(manifest, 'list_files', list_files)

  return prepare


@pytest.mark.parametrize(
  'fault',
  [
    writes_nothing,
    skips_the_merge,
    loses('manifest.ocdbt'),
    loses('_METADATA'),
    loses('d'),
    loses('ocdbt.process_0/d'),
    loses('*'),
  ],
)
def test_a_save_that_cannot_be_restored_is_none(
  checkpoints, directory, monkeypatch, fault
):
  save(checkpoints, 1)
  with monkeypatch.context() as patch:
    fault(patch)
    checkpoints.save(2, state(2, width=4000))  # Not all beside its keys.
    [outcome] = checkpoints.wait()
  assert (outcome.step, outcome.bytes) == (2, 0)
  assert outcome.error.startswith(
    f'cannot write {directory}: what was written could not be restored ('
  )
  assert '\n' not in outcome.error
  assert {path.name for path in directory.iterdir()} == {'1'}
  save(checkpoints, 2)
  assert checkpoints.restore(abstract(state(0))).step == 2


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (lambda tree: {**tree, 'loss': tree['step']}, 'loss is missing'),
    (
      lambda tree: {**tree, 'step': jnp.zeros(2, jnp.int32)},
      r'step is int32\[',
    ),
    (lambda tree: {**tree, 'step': jnp.float32(2)}, r'step is int32\['),
  ],
)
def test_each_array_is_looked_for(checkpoints, directory, change, message):
  save(checkpoints, 1)
  path = epath.Path(directory / '1')
  sizes = {
    name: (path / name).stat().length for name in manifest.list_files(path)
  }
  state_files.check(path, state(1), sizes)
  with pytest.raises(ValueError, match=message):
    state_files.check(path, change(state(1)), sizes)


def test_a_tree_of_several_nodes_is_walked():
  small = {'max_decoded_node_bytes': 500, 'max_inline_value_bytes': 10}
  store = ts.KvStore.open(
    {'driver': 'ocdbt', 'base': 'memory://', 'config': small}
  ).result()
  with ts.Transaction() as together:
    for i in range(200):
      store.with_transaction(together)[f'layer.{i:03}/0'] = bytes(i % 20)
  found = dict(state_files._entries(store.base))
  assert [*found] == [f'layer.{i:03}/0' for i in range(200)]
  kinds = {key: bool(value) for key, value in found.items()}
  assert kinds == {key: len(store[key]) > 10 for key in found}


def test_a_part_that_is_not_merged_is_missed(
  checkpoints, directory, monkeypatch
):
  """As of a process whose directory is not listed yet."""
  entries = state_files._entries
  monkeypatch.setattr(
    state_files, '_entries', lambda store: list(entries(store))[:-1]
  )
  checkpoints.save(1, state(1))
  [outcome] = checkpoints.wait()
  assert 'could not be restored (step lacks data)' in outcome.error


def test_a_save_does_not_wait_for_its_end(checkpoints, monkeypatch):
  go_on = threading.Event()
  digests = manifest.digests

  def slowly(*args, **kwargs):
    assert go_on.wait(60)
    return digests(*args, **kwargs)

  monkeypatch.setattr(manifest, 'digests', slowly)
  checkpoints.save(1, state(1))
  assert checkpoints.finished() == []
  assert steps(checkpoints) == []  # Orbax may well have committed it.
  go_on.set()
  assert [outcome.step for outcome in checkpoints.wait()] == [1]


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
  assert_same(checkpoints.restore(abstract(live)).state, kept)


def test_the_last_and_the_best_are_kept(checkpoints, directory):
  losses = {5: 3.0, 10: 1.0, 15: None, 20: 2.0, 25: 4.0}
  for step, loss in losses.items():
    checkpoints.save(step, state(step), loss)
  checkpoints.wait()
  assert steps(checkpoints) == [10, 20, 25]
  # Another start of the run finds the losses in the manifests.
  other = opened(directory)
  save(other, 30, 35)
  assert steps(other) == [10, 30, 35]
  other.save(40, state(40), 0.5)
  other.close()
  assert {path.name for path in directory.iterdir()} == {'35', '40'}


@settings(max_examples=5)
@given(
  saves=st.dictionaries(
    st.integers(1, 30), st.none() | st.sampled_from([1.0, 2.0]), min_size=1,
    max_size=6,
  ),
  keep=st.builds(
    KeepConfig, last=st.integers(1, 3), best=st.booleans(),
    every=st.sampled_from([0, 5]),
  ),
)  # fmt: skip
def test_what_is_kept_is_what_the_rules_say(tmp_path_factory, saves, keep):
  checkpoints = Checkpoints(tmp_path_factory.mktemp('run'), keep, {})
  expected = {}
  tree = state(1)
  for step, loss in sorted(saves.items()):
    checkpoints.save(step, tree, loss)
    checkpoints.wait()
    expected[step] = loss
    kept = retention.kept(expected, keep, step)
    expected = {step: expected[step] for step in kept}
    assert steps(checkpoints) == sorted(kept)


@pytest.mark.parametrize(
  ('damage', 'reason'),
  [
    (flip_a_bit, 'is not what was written'),
    (lambda path: os.truncate(largest_file(path), 100), 'has 100 bytes, not'),
    (lambda path: largest_file(path).unlink(), 'is missing'),
    (lambda path: shutil.rmtree(path / 'd'), 'is missing'),
    (lambda path: (path / 'manifest.json').unlink(), 'its save was cut off'),
    (lambda path: os.truncate(path / 'manifest.json', 100),
     'manifest.json is damaged'),
    (lambda path: shutil.copy(path.parent / '3' / 'manifest.json', path),
     'manifest.json is of step 3'),
  ],
)  # fmt: skip
def test_a_damaged_step_is_passed_over(
  checkpoints, directory, damage, reason, caplog
):
  save(checkpoints, 3, 6)
  damage(directory / '6')
  before = sorted(directory.rglob('*'))
  restored = checkpoints.restore(abstract(state(0)))
  assert restored.step == 3
  assert_same(restored.state, state(3))
  [(step, said)] = restored.refused
  assert step == 6
  assert reason in said
  assert '\n' not in said
  assert_same(restore_params(directory, wanted()), state(3)['params'])
  assert 'step 6 is passed over for step 3: ' in caplog.text
  assert reason in caplog.text
  with pytest.raises(
    UserError, match=r'no checkpoint in .* can be used'
  ) as one:
    restore_params(directory, wanted(), 6)
  assert reason in str(one.value)
  assert sorted(directory.rglob('*')) == before
  # The run comes by again, if it is at another step.
  save(checkpoints, 5)
  assert steps(checkpoints) == [3, 5]
  assert {path.name for path in directory.iterdir()} == {'3', '5'}
  save(checkpoints, 6)
  assert_same(checkpoints.restore(abstract(state(0))).state, state(6))


def test_a_damaged_step_is_saved_again(checkpoints, directory):
  save(checkpoints, 3, 6)
  flip_a_bit(directory / '6')
  save(checkpoints, 6)
  restored = checkpoints.restore(abstract(state(0)))
  assert (restored.step, restored.refused) == (6, [])
  assert steps(checkpoints) == [3, 6]


def test_a_damaged_step_does_not_count_as_kept(checkpoints, directory):
  save(checkpoints, 3, 6)
  flip_a_bit(directory / '6')
  other = opened(directory)
  assert other.restore(abstract(state(0))).step == 3
  save(other, 9)
  assert steps(other) == [3, 9]


def test_where_all_are_damaged_nothing_is_removed(checkpoints, directory):
  save(checkpoints, 3, 6)
  flip_a_bit(directory / '6')
  largest_file(directory / '3').unlink()
  before = sorted(directory.rglob('*'))
  for restore in (
    lambda: opened(directory).restore(abstract(state(0))),
    lambda: restore_params(directory, wanted()),
  ):
    with pytest.raises(UserError, match=r'no checkpoint in .* can be') as error:
      restore()
    message = str(error.value)
    assert 'step 6: ' in message
    assert 'step 3: ' in message
    assert '\n' not in message
  assert sorted(directory.rglob('*')) == before


@pytest.mark.parametrize('name', ['read', 'check'])
def test_what_cannot_be_checked_is_not_damaged(
  checkpoints, directory, monkeypatch, name
):
  def fail(*_):
    raise PermissionError(errno.EACCES, 'x')

  save(checkpoints, 3, 6)
  before = sorted(directory.rglob('*'))
  other = opened(directory)
  with monkeypatch.context() as patch:
    patch.setattr(manifest, name, fail)
    for restore in (
      lambda: other.restore(abstract(state(0))),
      lambda: restore_params(directory, wanted()),
    ):
      with pytest.raises(UserError, match=r'^step 6 cannot be checked') as one:
        restore()
      assert 'Permission denied' in str(one.value)
      assert '\n' not in str(one.value)
  assert sorted(directory.rglob('*')) == before
  assert other.restore(abstract(state(0))).step == 6


@pytest.mark.parametrize('calls', range(3))
def test_a_run_that_has_lost_its_directory_changes_nothing(
  directory, calls, caplog
):
  def confirm():
    if not left:
      raise UserError('taken by another run')
    left.pop()

  left = [None]
  checkpoints = Checkpoints(directory, KeepConfig(last=1), {}, confirm)
  assert not left
  left += [None] * 2
  save(checkpoints, 1)
  before = sorted(directory.rglob('*'))
  left += [None] * calls
  checkpoints.save(2, state(2))
  [outcome] = checkpoints.wait()
  if calls == 2:  # It was taken after the manifest.
    assert outcome.error == ''
    assert steps(checkpoints) == [1, 2]
    assert 'warning: taken by another run' in caplog.text
    return
  assert outcome.error == 'taken by another run'
  assert not (directory / '2' / 'manifest.json').exists()
  assert {*before} <= {*directory.rglob('*')}
  with pytest.raises(UserError, match='taken by'):
    Checkpoints(directory, KeepConfig(), {}, confirm)


EXIT = """
import pathlib, sys, time
import numpy as np
import jax.numpy as jnp
import orbax.checkpoint as ocp
from train import manifest
from train.checkpoint import Checkpoints
from train.config import KeepConfig

def slowly(*_, **__):
  print('slow', flush=True)
  time.sleep(60)

if sys.argv[2] == 'digest':
  manifest._digest = slowly
else:
  ocp.PyTreeCheckpointHandler.finalize = slowly
checkpoints = Checkpoints(pathlib.Path(sys.argv[1]), KeepConfig(), {})
checkpoints.save(1, {'w': jnp.zeros((50, 1000))})
time.sleep(3)
raise KeyboardInterrupt
"""


@pytest.mark.parametrize('where', ['digest', 'commit'])
def test_a_program_that_ends_does_not_wait_for_a_save(directory, where):
  done = subprocess.run(
    [sys.executable, '-c', EXIT, directory, where],
    check=False, capture_output=True, text=True, timeout=40,
    env={**os.environ, 'PYTHONPATH': os.getcwd(), 'XLA_FLAGS': ''},
  )  # fmt: skip
  assert 'slow' in done.stdout
  assert done.stderr.rstrip().endswith('KeyboardInterrupt')


def test_where_none_was_complete_the_run_begins(directory, caplog):
  save(opened(directory), 3)
  (directory / '3' / 'manifest.json').unlink()
  checkpoints = opened(directory)
  assert checkpoints.restore(abstract(state(0))) is None
  assert 'step 3 is passed over: no manifest.json' in caplog.text
  with pytest.raises(UserError, match='there is no checkpoint yet in'):
    restore_params(directory, wanted())
  save(checkpoints, 2)
  assert {path.name for path in directory.iterdir()} == {'2'}


def test_what_a_save_left_is_removed(directory):
  save(opened(directory), 1)
  leftover = directory / '2.orbax-checkpoint-tmp'
  shutil.copytree(directory / '1', leftover)
  second = opened(directory)
  assert {path.name for path in directory.iterdir()} == {'1'}
  assert steps(second) == [1]
  leftover.mkdir()
  save(second, 2)
  assert {path.name for path in directory.iterdir()} == {'1', '2'}


def test_a_directory_that_cannot_be_made_is_told(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match=r'cannot write .*: Not a dir') as error:
    opened(tmp_path / 'file' / 'checkpoints')
  assert '\n' not in str(error.value)


class Stop(BaseException):
  """As if the process ended there."""


@pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnhandledThreadExceptionWarning'
)
@pytest.mark.parametrize(
  ('module', 'name', 'lasts'),
  [
    (manifest, 'list_files', False),  # Orbax has committed it.
    (manifest, 'digests', False),
    (manifest.storage, 'write_atomically', False),
    (retention, 'kept', True),
    (step_dirs, '_remove', True),  # A surplus step has lost its manifest.
  ],
)
def test_an_end_at_any_point_leaves_a_complete_one(
  directory, monkeypatch, module, name, lasts
):
  save(opened(directory, last=1), 1)
  checkpoints = opened(directory, last=1)
  begun = step_dirs.prepare

  def stop(*args, **kwargs):
    raise Stop

  def prepare(*args):  # What is called before the save is not meant.
    begun(*args)
    monkeypatch.setattr(module, name, stop)

  monkeypatch.setattr(step_dirs, 'prepare', prepare)
  checkpoints.save(2, state(2))
  assert checkpoints.wait() == []
  monkeypatch.undo()

  other = opened(directory, last=1)
  restored = other.restore(abstract(state(0)))
  assert restored.step == (2 if lasts else 1)
  assert_same(restored.state, state(restored.step))
  assert [step for step, _ in restored.refused] == ([] if lasts else [2])
  save(other, 3)
  assert {path.name for path in directory.iterdir()} == {'3'}


LOOP = """
import os, pathlib, random, sys, threading, time
import jax, numpy as np
from train.checkpoint import Checkpoints
from train.config import KeepConfig
directory, seed = pathlib.Path(sys.argv[1]), int(sys.argv[2])
checkpoints = Checkpoints(directory, KeepConfig(last=1), {})
like = {'w': jax.numpy.zeros((50, 1000), 'int32')}
restored = checkpoints.restore(jax.tree.map(lambda x: jax.ShapeDtypeStruct(
  x.shape, x.dtype, sharding=x.sharding), like))
step = restored.step if restored else 0
if restored:
  np.testing.assert_array_equal(restored.state['w'], step)
print('restored', step, flush=True)
def end():
  time.sleep(random.Random(seed).uniform(0, 0.15))
  os._exit(9)
for step in range(step + 1, step + (10**6 if seed else 4)):
  checkpoints.save(step, {'w': like['w'] + step})
  [outcome] = checkpoints.wait()
  assert not outcome.error, outcome
  print('saved', outcome.step, flush=True)
  if seed and threading.active_count() == 1:
    threading.Thread(target=end, daemon=True).start()
"""


def interrupted(directory, seeds):
  last = 0
  for seed in seeds:
    done = subprocess.run(
      [sys.executable, '-c', LOOP, directory, str(seed)],
      check=False, capture_output=True, text=True, timeout=120,
      env={**os.environ, 'PYTHONPATH': os.getcwd(), 'XLA_FLAGS': ''},
    )  # fmt: skip
    assert done.returncode == (9 if seed else 0), done.stderr
    assert 'Traceback' not in done.stderr
    steps = [int(line.split()[1]) for line in done.stdout.splitlines()]
    assert steps[0] >= last
    assert steps == sorted(steps)
    last = steps[-1]
  return last


def test_a_process_that_ends_at_any_moment_loses_nothing(directory):
  assert interrupted(directory, [1, 2, 3, 0]) > 3


@pytest.mark.slow
def test_a_process_that_ends_at_many_moments_loses_nothing(directory):
  # How far it gets is a matter of the machine; that it goes on is not.
  assert interrupted(directory, [*range(1, 21, 3), 0]) > 8


@pytest.mark.parametrize(
  'where', ['writing', 'committing', 'digesting', 'manifest', 'beginning']
)
# Orbax drops coroutines that it did not get to.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.filterwarnings('ignore:coroutine:RuntimeWarning')
def test_a_full_disk_is_an_outcome(checkpoints, directory, monkeypatch, where):
  save(checkpoints, 3)

  def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, 'x')

  async def full_async(*args, **kwargs):
    raise ValueError('RESOURCE: [OS error 28: No space left on device] [x=1]')

  with monkeypatch.context() as patch:
    patch.setattr(
      *{
        'beginning': (step_dirs, 'clear', full),
        'writing': (ocp.type_handlers.ArrayHandler, 'serialize', full_async),
        'committing': (ocp.PyTreeCheckpointHandler, 'finalize', full),
        'digesting': (manifest, '_digest', full),
        'manifest': (manifest.storage, 'write_atomically', full),
      }[where]
    )
    checkpoints.save(6, state(6))
    [outcome] = checkpoints.wait()
    assert outcome.error == f'no space left to write {directory}'
    assert (outcome.step, outcome.bytes) == (6, 0)
  assert steps(checkpoints) == [3]
  assert {path.name for path in directory.iterdir()} == {'3'}
  save(checkpoints, 6, 9)
  assert steps(checkpoints) == [6, 9]
  gc.collect()


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.filterwarnings('ignore:coroutine:RuntimeWarning')
def test_a_disk_that_is_really_full(small_disk):
  directory = small_disk(300) / 'checkpoints'
  checkpoints = opened(directory)
  save(checkpoints, 1)
  large = state(2, width=20_000)
  checkpoints.save(2, large)
  [outcome] = checkpoints.wait()
  assert outcome.error == f'no space left to write {directory}'
  assert {path.name for path in directory.iterdir()} == {'1'}
  save(checkpoints, 3)  # There is room for this one.
  small_disk(20_000)
  checkpoints.save(4, large)
  assert checkpoints.wait()[0].error == ''
  assert steps(checkpoints) == [3, 4]
  gc.collect()


def test_older_ones_that_cannot_be_removed_go_later(
  directory, monkeypatch, caplog
):
  def fail(*_):
    raise PermissionError(errno.EACCES, 'x')

  checkpoints = opened(directory, last=1)
  save(checkpoints, 1)
  with monkeypatch.context() as patch:
    patch.setattr(retention, 'kept', fail)
    save(checkpoints, 2)
  assert f'warning: cannot write {directory}: Permission denied' in caplog.text
  assert steps(checkpoints) == [1, 2]
  save(checkpoints, 3)
  assert steps(checkpoints) == [3]


def test_what_is_still_being_written_is_removed_in_the_end(
  tmp_path, monkeypatch
):
  path = epath.Path(tmp_path / '4')
  path.mkdir()
  rmtree, errors = type(path).rmtree, [OSError(errno.ENOTEMPTY, 'x')] * 2

  def unruly(self, missing_ok=False):
    if errors:
      raise errors.pop()
    rmtree(self, missing_ok)

  monkeypatch.setattr(type(path), 'rmtree', unruly)
  monkeypatch.setattr(step_dirs.time, 'sleep', lambda _: None)
  step_dirs.remove(epath.Path(tmp_path), 4)
  assert not path.exists()
  errors += [OSError(errno.ENOTEMPTY, 'x')] * 5
  path.mkdir()
  with pytest.raises(OSError, match='x'):
    step_dirs.remove(epath.Path(tmp_path), 4)


# Orbax drops coroutines that it did not get to.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.filterwarnings('ignore:coroutine:RuntimeWarning')
@pytest.mark.parametrize('change', ['shape', 'missing leaf', 'extra leaf'])
def test_another_state_is_refused_in_one_line(checkpoints, tmp_path, change):
  save(checkpoints, 4)
  wanted = state(0, width=32 if change == 'shape' else 64)
  if change == 'missing leaf':
    del wanted['params']['layers'][1]
  if change == 'extra leaf':
    wanted['more'] = jnp.zeros(3)
  with pytest.raises(UserError) as error:
    checkpoints.restore(abstract(wanted))
  message = str(error.value)
  assert message.startswith(f'cannot restore step 4 from {tmp_path}')
  assert '\n' not in message
  del error
  gc.collect()


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
    (wanted, checkpoints.restore(abstract(wanted)).state),
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
    checkpoints.restore(like)
  assert '\n' not in str(error.value)
  with pytest.raises(UserError, match='cannot read step 2') as error:
    restore_params(tmp_path / 'checkpoints', like['params'])
  assert '\n' not in str(error.value)
  del error
  gc.collect()


@pytest.fixture
def saved(directory):
  """Two steps, and a third that a run is just saving."""
  save(opened(directory), 3, 6)
  (directory / '9.orbax-checkpoint-tmp').mkdir()
  return directory


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


def test_a_run_may_go_on_meanwhile(saved, monkeypatch):
  run = opened(saved)
  check = manifest.check

  def slowly(*args):
    if not steps(run)[-1] > 6:
      save(run, 9, 12)  # What is being read is removed.
    check(*args)

  monkeypatch.setattr(manifest, 'check', slowly)
  assert_same(restore_params(saved, wanted()), state(12)['params'])


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
    (OSError(errno.ENOSPC, 'x'), 'no space left to write /there'),
    (OSError(errno.EDQUOT, 'x'), 'no space left to write /there'),
    (ValueError('RESOURCE: [OS error 28: No space left on device]'),
     'no space left to write /there'),
    (OSError(errno.EROFS, 'x'), 'cannot write /there: Read-only file system'),
    (ValueError('DATA_LOSS: bad [tensorstore_spec={}]\nmore'),
     'cannot write /there: DATA_LOSS: bad'),
    (KeyError(), 'cannot write /there: KeyError'),
    (manifest.DamagedError('x is missing'), 'x is missing'),
  ],
)  # fmt: skip
def test_failures_become_one_line(error, words):
  assert step_dirs.explain(error, epath.Path('/there'), 'write') == words


def test_only_what_orbax_logs_is_hidden(caplog):
  state_files.quiet()
  for place in ('/orbax/checkpoint/x.py', '/tensorflow_datasets/x.py'):
    record = logging.LogRecord(
      'absl', logging.WARNING, f'/lib{place}', 1, place, None, None
    )
    logging.getLogger('absl').handle(record)
  assert 'tensorflow_datasets' in caplog.text
  assert 'orbax' not in caplog.text


def test_late_failures_of_a_save_are_not_printed(monkeypatch):
  reported = []
  monkeypatch.setattr(sys, 'unraisablehook', reported.append)
  state_files.quiet.__wrapped__()
  failures = [
    types.SimpleNamespace(exc_value=RuntimeError(text))
    for text in ('Event loop is closed', 'other')
  ]
  for failure in failures:
    sys.unraisablehook(failure)
  assert reported == failures[1:]
