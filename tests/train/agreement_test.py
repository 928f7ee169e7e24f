"""What several processes do together: as threads, then as processes."""

import os
import re
import socket
import subprocess
import sys
import threading

import jax
import pytest

from train import agreement, distributed
from train.agreement import Agreement, LostError, SharedError, in_main, my_part


class Store:
  """JAX's coordination store; a number names each thread that uses it."""

  def __init__(self):
    self.values = {}
    self.changed = threading.Condition()

  def key_value_set(self, key, value, allow_overwrite=False):
    with self.changed:
      assert allow_overwrite or key not in self.values
      self.values[key] = value
      self.changed.notify_all()

  def blocking_key_value_get(self, key, timeout_ms):
    with self.changed:
      if not self.changed.wait_for(
        lambda: key in self.values, timeout_ms / 1e3
      ):
        raise jax.errors.JaxRuntimeError('DEADLINE_EXCEEDED')
      return self.values[key]

  def key_value_delete(self, key):
    with self.changed:
      for name in [name for name in self.values if name.startswith(key)]:
        del self.values[name]


@pytest.fixture
def together(monkeypatch):
  """Runs a function in each of so many processes, given one `Agreement`."""
  store, local = Store(), threading.local()
  monkeypatch.setattr(distributed, 'client', lambda: store)
  monkeypatch.setattr(distributed, 'process_index', lambda: local.number)

  def together(count, function, limit=agreement.LIMIT):
    monkeypatch.setattr(distributed, 'process_count', lambda: count)
    results, names = {}, next(agreement._names)

    def work(number):
      local.number = number
      talk = Agreement(lambda error: f'bad: {error}', limit)
      talk.name = f'gradpower/agreement/{names}'
      try:
        results[number] = function(talk)
      except SharedError as error:
        results[number] = f'shared {error}'
      except LostError as error:
        results[number] = f'lost {error}'

    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    return [results[number] for number in range(count)]

  together.store = store
  return together


def test_process_0_hears_all_and_the_others_hear_it(together):
  def work(talk):
    first = talk.meet('one', lambda: distributed.process_index() * 10)
    second = talk.meet('two', lambda: in_main(str, 'x'))
    return first, second[0], my_part('abcde')

  assert together(3, work) == [
    ([0, 10, 20], 'x', 'ad'),
    ([0], 'x', 'be'),
    ([0], 'x', 'c'),
  ]
  assert together(1, work) == [([0], 'x', 'abcde')]


@pytest.mark.parametrize('count', [1, 2, 4])
def test_a_failure_of_one_is_that_of_all(together, count):
  def work(talk):
    talk.meet('one', lambda: None)

    def act():
      if distributed.process_index() >= count - 2:
        raise ValueError(distributed.process_index())

    talk.meet('two', act)

  first = max(count - 2, 0)
  assert together(count, work) == [f'shared bad: {first}'] * count


def test_who_fails_elsewhere_meets_the_others(together):
  def work(talk):
    if distributed.process_index() == 1:
      talk.fail('writing', ValueError('x'))
    talk.meet('committing', lambda: None)

  assert together(3, work) == ['shared bad: x'] * 3


@pytest.mark.parametrize('late', [0, 1])
def test_who_does_not_come_is_named(together, monkeypatch, late):
  monkeypatch.setattr(agreement, 'MARGIN', 1)
  come = threading.Event()

  def work(talk):
    if distributed.process_index() == late:
      come.wait(60)
    try:
      talk.meet('writing', lambda: None)
    finally:
      come.set()

  # All fail, also the one that comes at last.
  words = f'process {late} was waited for {1 + (late == 0)} s (writing)'
  first = 'shared' if late else 'lost'  # Process 0 decides, once it is there.
  results = together(2, work, limit=2)
  assert results[late] == f'shared {words}'
  assert results[1 - late] == f'{first} {words}'


@pytest.mark.parametrize('older', [True, False])
def test_who_gives_up_as_process_0_comes_decides_as_it_does(
  together, monkeypatch, older
):
  """Process 0 reads what process 1 said before it gave up, or after."""
  given_up, get = threading.Event(), together.store.blocking_key_value_get
  key_value_set = together.store.key_value_set

  def late(key, timeout_ms):
    if distributed.process_index() == 1 and key.endswith('/0'):
      raise jax.errors.JaxRuntimeError('DEADLINE_EXCEEDED')
    return get(key, timeout_ms)

  def setting(key, value, allow_overwrite=False):
    if not (older and allow_overwrite):  # Too late to be seen.
      key_value_set(key, value, allow_overwrite)
    if allow_overwrite:
      given_up.set()

  monkeypatch.setattr(together.store, 'blocking_key_value_get', late)
  monkeypatch.setattr(together.store, 'key_value_set', setting)

  def work(talk):
    if distributed.process_index() == 0:
      given_up.wait(60)
    return talk.meet('writing', lambda: None)[:1]

  first, second = together(2, work, limit=60)
  assert first == second
  assert (first == [None]) == older


def test_the_kind_of_a_failure_is_told(together):
  def work(talk):
    def act():
      if distributed.process_index() == 1:
        raise PermissionError('x')

    try:
      talk.meet('one', act)
    except SharedError as error:
      return error.kind

  assert together(3, work) == ['PermissionError'] * 3


@pytest.mark.parametrize('who', [0, 1])
def test_process_0_frees_the_store(together, who):
  done = threading.Barrier(2)

  def work(talk):
    talk.meet('one', lambda: 'x' * 100)
    done.wait(60)
    if distributed.process_index() == who:
      talk.forget()

  together(2, work)
  assert bool(together.store.values) == (who != 0)


PROGRAM = """
import os, pathlib, sys
import jax, numpy as np
import orbax.checkpoint as ocp
number, directory = int(sys.argv[2]), pathlib.Path(sys.argv[3])
jax.distributed.initialize(f'localhost:{sys.argv[1]}', 2, number)
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from etils import epath
from train import agreement, manifest, step_dirs
from train.checkpoint import Checkpoints
from train.config import KeepConfig

mesh = Mesh(np.array(jax.devices()), ('x',))

def state(step):
  rows = np.random.default_rng(step).normal(size=(8, 1000)).astype('float32')
  return {
    'params': jax.make_array_from_callback(
      rows.shape, NamedSharding(mesh, P('x')), rows.__getitem__),
    'step': jax.make_array_from_callback(
      (), NamedSharding(mesh, P()), lambda _: np.int32(step)),
  }

wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(
  x.shape, x.dtype, sharding=x.sharding), state(0))
checkpoints = Checkpoints(directory, KeepConfig(), {})
assert checkpoints.restore(wanted) is None

def meet():
  agreement.Agreement(str).meet('test', lambda: None)

def save(step):
  checkpoints.save(step, state(step))
  [outcome] = checkpoints.wait()
  meet()  # Older ones are removed by process 0.
  found = step_dirs.present(epath.Path(directory))
  steps = [step for step, complete in found if complete]
  print(step, outcome, steps, flush=True)

def full(*_, **__):
  raise OSError(28, 'x')

async def full_async(*_, **__):
  full()

class broken:
  def __init__(self, who, owner, name, value):
    self.parts, self.who = (owner, name), who
    self.values = getattr(owner, name), value
  def __enter__(self):
    if number == self.who:
      setattr(*self.parts, self.values[1])
  def __exit__(self, *_):
    if number == self.who:
      setattr(*self.parts, self.values[0])

save(1), save(2), save(3)
arrays = ocp.type_handlers.ArrayHandler
for who in (0, 1):
  with broken(who, manifest, 'digests', full):
    save(4)
  with broken(who, arrays, 'serialize', full_async):
    save(4)
with broken(0, ocp.PyTreeCheckpointHandler, 'finalize', full):
  save(4)
with broken(0, manifest, 'write', full):
  save(4)
save(4)
meet()
if number == 0:
  files = [path for path in (directory / '4').rglob('*') if path.is_file()]
  for path in sorted(files, key=lambda path: path.stat().st_size)[-2:]:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
meet()
restored = checkpoints.restore(wanted)
print('restored', restored.step, restored.refused, flush=True)
for ours, theirs in zip(jax.tree.leaves(restored.state),
                        jax.tree.leaves(state(3))):
  for a, b in zip(ours.addressable_shards, theirs.addressable_shards):
    np.testing.assert_array_equal(a.data, b.data)
meet()
jax.distributed.shutdown()
"""


def test_two_processes_save_alike(tmp_path):
  with socket.create_server(('localhost', 0)) as server:
    port = server.getsockname()[1]
  environment = {
    **os.environ,
    'PYTHONPATH': os.getcwd(),
    'XLA_FLAGS': '--xla_force_host_platform_device_count=2',
    'JAX_PLATFORMS': 'cpu',
  }
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', PROGRAM, str(port), str(i), tmp_path / 'c'],
      env=environment, text=True, stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
    )
    for i in range(2)
  ]  # fmt: skip
  try:
    results = [process.communicate(timeout=120) for process in processes]
  finally:
    for process in processes:
      process.kill()
      process.wait()
  assert [process.returncode for process in processes] == [0, 0], results
  first, second = (
    re.sub(r'seconds=[\d.]+', '', out).replace(str(tmp_path), '')
    for out, _ in results
  )
  assert first == second
  *outcomes, restored = first.splitlines()
  full = (
    "4 Outcome(step=4, , bytes=0, error='no space left to write /c') [2, 3]"
  )
  assert [line == full for line in outcomes] == [False] * 3 + [True] * 6 + [
    False
  ]
  assert [
    line.rpartition('[')[2] for line in outcomes if "error=''" in line
  ] == [
    '1]',
    '1, 2]',
    '2, 3]',
    '3, 4]',
  ]
  assert restored.startswith('restored 3 [(4, ')
  assert restored.endswith("is not what was written')]")
