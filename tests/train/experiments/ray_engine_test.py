"""Ray: an engine like the local one, on a cluster of two nodes here."""

import contextlib
import importlib.util
import json
import os
import pathlib
import signal
import sys
import threading
import time

import pytest

from tests.train.experiments import worker_tasks as tasks
from train import config
from train.errors import UserError
from train.experiments import experiment
from train.experiments.cells import Cell

ROOT = pathlib.Path(__file__).parents[3]

needs_ray = pytest.mark.skipif(
  importlib.util.find_spec('ray') is None, reason='Ray is not installed'
)
pytestmark = pytest.mark.filterwarnings('ignore')  # Ray's own.
TOLD = str(int(signal.SIGTERM))  # By the engine, whatever it has heard.
ARGUMENTS = ('sweep', 'demo', '--point', 'p=1.2', '--engine', 'ray')


def test_says_which_extra_it_needs(main, tiny, tmp_path, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, 'ray', None)
  monkeypatch.delitem(
    sys.modules, 'train.experiments.ray_engine', raising=False
  )
  assert main(*ARGUMENTS, '--out', tmp_path / 'x', *tiny) == 2
  assert '.[train,ray]' in capsys.readouterr().err
  assert not (tmp_path / 'x').exists()


def test_jobs_are_of_the_local_engine(main, tiny, tmp_path, capsys):
  assert main(*ARGUMENTS, '--jobs', 2, '--out', tmp_path / 'x', *tiny) == 2
  assert '--jobs is of --engine local' in capsys.readouterr().err


@pytest.fixture(scope='module')
def cluster(data_cache, programs):
  """Two nodes of a CPU each, and this process on them."""
  pytest.importorskip('ray', reason='Ray is not installed')
  import ray
  from ray import cluster_utils

  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(ROOT)
    patch.setenv('GRADPOWER_CACHE', str(data_cache))
    patch.setenv('JAX_COMPILATION_CACHE_DIR', programs)
    cluster = cluster_utils.Cluster(
      initialize_head=True, head_node_args={'num_cpus': 1}
    )
    cluster.add_node(num_cpus=1)
    ray.init(cluster.address, log_to_driver=False, logging_level='error')
    yield cluster
    ray.shutdown()
    cluster.shutdown()


@pytest.fixture
def engine(cluster):
  from train.experiments import ray_engine

  return ray_engine.Ray()


@contextlib.contextmanager
def once(condition, act, seconds=60.0):
  """Acts in another thread once a condition holds."""

  def watch():
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
      time.sleep(0.05)
    act()

  thread = threading.Thread(target=watch)
  thread.start()
  yield
  thread.join()


def begun(directory):
  return list(directory.glob('*.begun'))


def wait_for(condition, seconds=30.0):
  end = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < end, 'waited in vain'
    time.sleep(0.05)


@needs_ray
@pytest.mark.slow
def test_every_task_is_done_once(engine):
  assert engine.workers == 2
  found = sorted(engine.run(tasks.square, [(x,) for x in range(5)]))
  assert found == [(x, x * x) for x in range(5)]
  assert engine.signal == ''
  assert list(engine.run(tasks.square, [])) == []


@needs_ray
@pytest.mark.slow
def test_a_mistake_ends_all(engine):
  with pytest.raises(UserError, match=r'^1 will not do$') as caught:
    list(engine.run(tasks.fail_at, [(x, 1) for x in range(3)]))
  assert caught.value.status == 2


@needs_ray
@pytest.mark.slow
def test_a_bug_keeps_its_traceback(engine):
  with pytest.raises(RuntimeError, match=r'(?s)return 1 / x.*ZeroDivision'):
    list(engine.run(tasks.divide, [(0,)]))


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_signal_has_all_save_and_end(engine, tmp_path, number):
  def stop():
    os.kill(os.getpid(), number)

  with once(lambda: len(begun(tmp_path)) == 2, stop):
    found = list(
      engine.run(tasks.until_stopped, [(i, tmp_path) for i in range(4)])
    )
  assert found == []
  assert engine.signal == number.name
  saved = {path.stem: path.read_text() for path in tmp_path.glob('*.saved')}
  assert saved == {'0': TOLD, '1': TOLD}


@needs_ray
@pytest.mark.slow
def test_no_task_misses_that_it_is_to_end(engine, tmp_path, monkeypatch):
  # As Ray does by chance, for one that is about to begin.
  monkeypatch.setattr('ray.cancel', lambda *_, **__: None)

  def stop():
    os.kill(os.getpid(), signal.SIGINT)

  with once(lambda: len(begun(tmp_path)) == 2, stop):
    assert not list(
      engine.run(tasks.until_stopped, [(i, tmp_path) for i in range(4)])
    )
  saved = {path.stem: path.read_text() for path in tmp_path.glob('*.saved')}
  assert saved == {'0': TOLD, '1': TOLD}
  assert len(begun(tmp_path)) == 2


@needs_ray
@pytest.mark.slow
def test_a_second_signal_ends_at_once(engine, tmp_path):
  def stop():
    for _ in range(2):
      os.kill(os.getpid(), signal.SIGINT)
      time.sleep(1.5)

  start = time.monotonic()
  with once(lambda: len(begun(tmp_path)) == 2, stop):
    assert not list(
      engine.run(tasks.stubborn, [(i, tmp_path) for i in range(2)])
    )
  assert engine.signal == 'SIGINT'
  assert time.monotonic() - start < 40  # A task takes 60 s.


@needs_ray
@pytest.mark.slow
def test_a_lost_nodes_cell_is_run_again(cluster, engine, tmp_path):
  node = cluster.add_node(num_cpus=1, resources={'lost': 1})
  wait_for(lambda: type(engine)().workers == 3)
  with once(
    lambda: len(begun(tmp_path)) == 3,
    lambda: cluster.remove_node(node, allow_graceful=False),
  ):
    found = sorted(
      engine.run(tasks.slow, [(i, tmp_path, 12.0) for i in range(3)])
    )
  assert found == [(0, 0), (1, 1), (2, 2)]
  lines = [path.read_text().split() for path in begun(tmp_path)]
  assert sorted(map(len, lines)) == [1, 1, 2]  # One of them was begun twice.


@needs_ray
@pytest.mark.slow
def test_a_sweep_on_the_cluster(cluster, main, tiny, tmp_path, capsys):
  options = '--over', 'lr=0.01,0.02', '--seeds', '4,', *tiny
  results = []
  for name, engine in (('far', ['--engine', 'ray']), ('near', ['--jobs', 1])):
    out = tmp_path / name
    assert main('sweep', 'demo', '--out', out, *options, *engine) == 0
    found = json.loads((out / 'results.json').read_text())
    found.pop('command')
    results.append(found)
    assert not list((out / 'runs').glob('*'))
  far, near = results
  assert far['best'] == near['best']
  for a, b in zip(far['points'], near['points'], strict=True):
    assert a['mean'] == pytest.approx(b['mean'], abs=1e-4)
    assert a['name'] == b['name']
  assert '[2/2]' in capsys.readouterr().err


@needs_ray
@pytest.mark.slow
def test_a_node_with_other_text_is_one_line(engine, text_files):
  data = config.DataConfig(
    files=text_files, vocab_size=300, sequence_length=16, batch_size=8,
    validation_fraction=0.1, validation_tokens=500,
  )  # fmt: skip
  cell = experiment.cell('p12', config.Config(data=data))
  assert list(engine.run(tasks.arm, [(cell,)])) == [(0, b'p12')]
  other = Cell(cell.arm, cell.seed, cell.config, 'f' * 64)
  with pytest.raises(UserError) as caught:
    list(engine.run(tasks.arm, [(other,)]))
  message = str(caught.value)
  assert 'text, vocabulary or split is another' in message
  assert 'than here (ffffffffff)' in message
  assert '\n' not in message


@needs_ray
@pytest.mark.slow
def test_no_cluster_is_one_line(monkeypatch):
  import ray

  from train.experiments import ray_engine

  monkeypatch.setattr(ray, 'is_initialized', lambda: False)
  monkeypatch.setenv('RAY_ADDRESS', '127.0.0.1:1')
  with pytest.raises(UserError, match=r'no cluster at RAY_ADDRESS=127\.0'):
    ray_engine.Ray()
