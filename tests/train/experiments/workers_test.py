"""Processes that train cells: results, errors, and every way of ending them."""

import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests.train.experiments import worker_tasks as tasks
from train.errors import UserError
from train.experiments import workers

ROOT = pathlib.Path(__file__).parents[3]


def wait_for(condition):
  end = time.monotonic() + tasks.LONGEST / 2
  while not condition():
    assert time.monotonic() < end, 'waited in vain'
    time.sleep(0.02)


def gone(pid):
  try:
    state = pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2]
  except OSError:
    return True
  return state.split()[0] == 'Z'


@pytest.fixture
def parent(tmp_path):
  """Starts a process with two workers; returns it and their ids."""
  started = []

  def parent(function, many=2):
    process = subprocess.Popen(
      [sys.executable, '-m', tasks.__name__, function, tmp_path, '2',
       str(many)],
      cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
      start_new_session=True,
    )  # fmt: skip
    started.append(process)
    wait_for(lambda: len(begun(tmp_path)) == 2)
    return process, begun(tmp_path)

  yield parent
  for process in started:
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def begun(directory):
  """The processes whose tasks are under way and have said so in full."""
  said = [path.read_text() for path in directory.glob('*.begun')]
  return [int(pid) for pid in said if pid]


def end(process):
  out, err = process.communicate(timeout=tasks.LONGEST / 2)
  return process.returncode, out.strip(), err


def saved(directory):
  return {path.stem: path.read_text() for path in directory.glob('*.saved')}


@pytest.mark.parametrize('count', [1, 2, 4])
def test_every_task_is_done_once(count):
  engine = workers.Local(count)
  found = list(engine.run(tasks.square, [(x,) for x in range(3)]))
  assert sorted(found) == [(0, 0), (1, 1), (2, 4)]
  assert count > 1 or found == sorted(found)
  assert engine.signal == ''
  assert list(engine.run(tasks.square, [])) == []


def test_cores_are_shared_out_alike_however_many_tasks_are_left(monkeypatch):
  monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: set(range(8)))
  assert workers._shares(2) == [{0, 1, 2, 3}, {4, 5, 6, 7}]
  assert workers._shares(3) == [{0, 1}, {2, 3}, {4, 5}]
  assert workers._shares(16) == [{i % 8} for i in range(16)]


@pytest.mark.skipif(
  len(os.sched_getaffinity(0)) < 2, reason='there is a single core'
)
def test_a_last_task_has_no_more_cores_than_others():
  engine = workers.Local(2)
  (two, _), (one,) = (
    [found for _, found in engine.run(tasks.cores, [(0,)] * many)]
    for many in (2, 1)
  )
  assert len(one) == len(two) == len(os.sched_getaffinity(0)) // 2


def test_a_mistake_ends_all():
  engine = workers.Local(2)
  start = time.monotonic()
  with pytest.raises(UserError, match=r'^1 will not do$') as caught:
    list(engine.run(tasks.fail_at, [(x, 1) for x in range(4)]))
  assert caught.value.status == 2
  assert time.monotonic() - start < tasks.LONGEST / 2  # Nobody waited for one.
  assert engine.signal == ''


def test_a_bug_keeps_its_traceback():
  with pytest.raises(RuntimeError, match=r'(?s)return 1 / x.*ZeroDivision'):
    list(workers.Local(2).run(tasks.divide, [(1,), (0,)]))


def test_a_process_that_dies_is_one_line():
  number = signal.SIGKILL
  with pytest.raises(UserError) as caught:
    list(workers.Local(2).run(tasks.die, [(0, number), (1, number)]))
  message = str(caught.value)
  assert 'died (SIGKILL): give the same command again' in message
  assert '\n' not in message


def test_a_process_that_dies_before_it_is_given_a_task(monkeypatch):
  before = workers._Worker.give

  def give(worker, task):
    worker.process.kill()
    worker.process.join()
    before(worker, task)

  monkeypatch.setattr(workers._Worker, 'give', give)
  with pytest.raises(UserError, match='SIGKILL'):
    list(workers.Local(2).run(tasks.square, [(0,), (1,)]))


@pytest.mark.parametrize('count', [1, 2])
def test_a_task_that_names_a_signal_is_the_last_to_begin(tmp_path, count):
  engine = workers.Local(count)
  found = dict(engine.run(tasks.named, [(x, tmp_path) for x in range(40)]))
  assert engine.signal == 'SIGHUP'
  assert 1 not in found
  assert len(found) < 20


@pytest.mark.parametrize(
  'number, group',
  [(signal.SIGINT, False), (signal.SIGINT, True), (signal.SIGTERM, True),
   (signal.SIGHUP, True)],
)  # fmt: skip
def test_a_signal_has_all_save_and_end(parent, tmp_path, number, group):
  process, pids = parent('until_stopped', many=4)
  (os.killpg if group else os.kill)(process.pid, number)
  # Also where a terminal or a scheduler signals all: one SIGTERM for each.
  heard = str(int(signal.SIGTERM))
  assert end(process) == (0, f'[] {number.name}', '')
  assert saved(tmp_path) == {'0': heard, '1': heard}
  assert all(map(gone, pids))


def test_a_second_signal_ends_at_once(parent, tmp_path):
  process, pids = parent('stubborn', many=3)
  process.send_signal(signal.SIGINT)
  wait_for(lambda: len(list(tmp_path.glob('*.told'))) == 2)
  assert process.poll() is None
  process.send_signal(signal.SIGINT)
  assert end(process) == (0, '[] SIGINT', '')
  assert all(map(gone, pids))


def test_a_signal_while_processes_start(tmp_path):
  process = subprocess.Popen(
    [sys.executable, '-c', f'''
import threading, os, signal
from tests.train.experiments import worker_tasks as tasks
from train.experiments import workers
before = workers._Worker.give
def give(worker, task):
  before(worker, task)
  os.kill(os.getpid(), signal.SIGTERM) if worker.process.name[-1] == '2' else 0
workers._Worker.give = give
tasks.main('until_stopped', {str(tmp_path)!r}, 2, 3)
'''], cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
  )  # fmt: skip
  assert end(process) == (0, '[] SIGTERM', '')


def test_nobody_outlives_the_parent(parent, tmp_path):
  process, pids = parent('until_stopped')
  process.kill()
  wait_for(lambda: all(map(gone, pids)))
  assert set(saved(tmp_path)) == {'0', '1'}
