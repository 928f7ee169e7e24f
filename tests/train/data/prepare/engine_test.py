import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

from tests.train.data.prepare import fakes
from train import errors
from train.data.prepare import engine, progress

ROOT = pathlib.Path(__file__).parents[4]
TASKS = [fakes.Task(i) for i in range(6)]

RUN = (
  'import pathlib, sys\n'
  'from tests.train.data.prepare import fakes\n'
  'from train.data.prepare import engine, progress\n'
  'if __name__ == "__main__":\n'
  '  tasks = [fakes.Task(i) for i in range(6)]\n'
  '  job = fakes.Job(pathlib.Path(sys.argv[1]), "sleep", 1)\n'
  '  engine.Local(2).run(job, tasks, progress.Progress())\n'
)


@pytest.mark.parametrize('workers', [1, 2])
def test_does_every_task_and_counts(tmp_path, workers):
  shown = progress.Progress()
  engine.Local(workers).run(fakes.Job(tmp_path), TASKS, shown)
  assert sorted(path.name for path in tmp_path.iterdir()) == list('012345')
  assert shown.tokens == 15
  workers_seen = {path.read_text() for path in tmp_path.iterdir()}
  assert (workers_seen == {str(os.getpid())}) == (workers == 1)


def test_a_mistake_is_told_as_it_is(tmp_path):
  with pytest.raises(errors.UserError, match=r'^a mistake in the input$'):
    engine.Local(2).run(
      fakes.Job(tmp_path, 'mistake'), TASKS, progress.Progress()
    )


def test_a_bug_keeps_its_traceback(tmp_path):
  with pytest.raises(ZeroDivisionError) as found:
    engine.Local(2).run(fakes.Job(tmp_path, 'bug'), TASKS, progress.Progress())
  assert "raise ZeroDivisionError('a bug')" in str(found.value.__cause__)


def test_a_process_that_dies_is_one_line(tmp_path):
  with pytest.raises(errors.UserError, match='a worker process has died'):
    engine.Local(2).run(
      fakes.Job(tmp_path, 'death'), TASKS, progress.Progress()
    )


@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_parent(tmp_path, number):
  parent = subprocess.Popen(
    [sys.executable, '-c', RUN, str(tmp_path)],
    cwd=ROOT,
    stderr=subprocess.PIPE,
    # Of its own group: a terminal's Ctrl-C goes to all of it.
    start_new_session=True,
  )
  try:
    asleep = tmp_path / 'asleep'
    wait_until(lambda: asleep.exists() and asleep.read_text())
    worker = int(asleep.read_text())
    if number == signal.SIGINT:
      os.killpg(parent.pid, number)
    else:
      parent.send_signal(number)
    _, said = parent.communicate(timeout=30)
    wait_until(lambda: not alive(worker))
  finally:
    parent.kill()
    parent.wait()
  if number == signal.SIGINT:
    # The parent's own; the workers say nothing.
    assert said.count(b'Traceback') == 1
    assert said.strip().endswith(b'KeyboardInterrupt')


def test_workers_start_without_jax():
  line = (
    'import sys, train.data.prepare, train.data.tokenizer\n'
    'print({"jax", "flax", "models", "tensorflow_datasets"} & {*sys.modules})'
  )
  found = subprocess.run(
    [sys.executable, '-c', line],
    cwd=ROOT,
    capture_output=True,
    text=True,
    check=True,
  )
  assert found.stdout == 'set()\n'


def alive(pid):
  try:
    state = pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2]
  except OSError:
    return False
  return state.split()[0] != 'Z'


def wait_until(condition):
  end = time.monotonic() + 30
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.02)
