"""Processes that die, hang or fail, on loopback, and what the others say."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import hypothesis
import jax
import pytest
from hypothesis import strategies as st

from train import beats, heartbeat

ROOT = pathlib.Path(__file__).parents[2]
HOST = socket.gethostname()
# Steps with a collective in each; `ACT` is what one process does after 20.
PROGRAM = """
import os, signal, sys, time
import jax, numpy as np
from train import distributed, heartbeat
from train.errors import UserError

me, count, victim = (int(argument) for argument in sys.argv[2:5])
SETTINGS

def act():
  print('acts', flush=True)
  ACT

def others():
  OTHERS

def main():
  with distributed.cluster(sys.argv[1], count, me):
    mesh = jax.make_mesh((count,), ('x',))
    x = jax.make_array_from_callback(
      (count,), jax.NamedSharding(mesh, jax.P('x')), lambda i: np.ones(count)[i]
    )
    total = jax.jit(lambda x: x.sum())
    for step in range(1, 30):
      assert float(total(x)) == count
      distributed.progress(step)
      if step == 20:
        act() if me == victim else others()

try:
  main()
except UserError as error:
  print('python -m train: error:', error, file=sys.stderr)
  sys.exit(2)
"""


@pytest.fixture
def run():
  """Runs all processes to their end.

  Returns exit statuses, stderrs, and the seconds from the act to the last end
  of another process.
  """
  started = []

  def run(act, *, others='pass', count=2, victim=1, settings='', limit=60):
    with socket.create_server(('127.0.0.1', 0)) as server:
      address = f'127.0.0.1:{server.getsockname()[1]}'
    code = (
      PROGRAM.replace('ACT', act)
      .replace('OTHERS', others)
      .replace('SETTINGS', settings)
    )
    started[:] = [
      subprocess.Popen(
        [sys.executable, '-c', code, address, str(i), str(count), str(victim)],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {'XLA_FLAGS': '', 'JAX_PLATFORMS': 'cpu'},
      )
      for i in range(count)
    ]  # fmt: skip
    for line in started[victim].stdout:
      if line == 'acts\n':
        break
    acted = time.monotonic()
    errs = {}
    for i in sorted(range(count), key=lambda i: i == victim):
      if i == victim:
        seconds = time.monotonic() - acted
        if 'SIGSTOP' in act:
          started[i].kill()
      errs[i] = started[i].communicate(timeout=limit)[1]
    statuses = [process.returncode for process in started]
    return statuses, [errs[i] for i in range(count)], seconds

  yield run
  for process in started:
    process.kill()
    process.communicate()


slow = pytest.mark.slow
KILL = 'os.kill(os.getpid(), signal.SIGKILL)'


@pytest.mark.parametrize(
  ('act', 'count', 'victim'),
  [
    (KILL, 2, 1),
    pytest.param('os._exit(0)', 2, 1, marks=slow),
    pytest.param(KILL, 3, 1, marks=slow),
  ],
)
def test_a_process_that_dies_is_named(run, act, count, victim):
  """Though a collective of each of the others failed first."""
  statuses, errs, seconds = run(act, count=count, victim=victim)
  assert seconds < 20
  assert statuses.pop(victim) in (0, -signal.SIGKILL)
  assert statuses == [1] * (count - 1), errs
  line = f'python -m train: error: process {victim} on {HOST} is gone\n'
  assert errs == [line, *[''] * (count - 1)]


@pytest.mark.parametrize('count', [2, pytest.param(3, marks=slow)])
def test_process_0_that_dies_is_named(run, count):
  """JAX aborts the others, which say it all the same."""
  statuses, errs, seconds = run(KILL, count=count, victim=0)
  assert seconds < 20
  assert statuses == [-signal.SIGKILL, *[1] * (count - 1)], errs
  line = f'python -m train: error: process 0 on {HOST} is gone\n'
  for err in errs[1:]:
    assert err.count(line) == 1
    assert 'Traceback' not in err


@slow
def test_one_that_dies_while_the_others_wait_for_it(run):
  statuses, errs, _ = run(
    KILL, others='with distributed.together(): pass',
    settings='heartbeat._SILENT = 3.0',
  )  # fmt: skip
  assert statuses == [1, -signal.SIGKILL], errs
  line = f'process 1 on {HOST} is gone: not heard for 3 s\n'
  assert errs[0] == f'python -m train: error: {line}'


@slow
@pytest.mark.parametrize(
  ('victim', 'settings'),
  [(0, ''), (1, 'heartbeat._SILENT = 3.0')],
  ids=['0', '1'],
)
def test_one_that_stops_is_named_within_a_minute(run, victim, settings):
  """As one whose machine is gone: its sockets stay open."""
  statuses, errs, seconds = run(
    'os.kill(os.getpid(), signal.SIGSTOP)', victim=victim, settings=settings,
    limit=90,
  )  # fmt: skip
  assert seconds < 60
  assert statuses[1 - victim] == 1
  assert f'error: process {victim} on {HOST} is gone' in errs[1 - victim]


def test_an_error_of_its_own_keeps_its_traceback(run):
  statuses, errs, seconds = run('raise ValueError("a bug\\nof two lines")')
  assert seconds < 20
  assert statuses == [1, 1]
  assert errs[0] == 'python -m train: error: process 1: a bug\n'
  assert errs[1].startswith('Traceback')
  assert errs[1].endswith('ValueError: a bug\nof two lines\n')


@slow
def test_nobody_is_waited_for_without_end(run):
  statuses, errs, _ = run(
    'time.sleep(100)', others='with distributed.together(1.5): pass'
  )
  assert statuses == [2, 2]
  line = f'waited 0.025 min in vain for process 1 on {HOST}\n'
  assert errs == [f'python -m train: error: {line}', '']


@slow
def test_process_0_is_not_waited_for_without_end(run):
  statuses, errs, _ = run(
    'time.sleep(100)', others='distributed.share(None, 1.5)', victim=0
  )
  assert statuses == [2, 2]
  line = f'waited 0.025 min in vain for process 0 on {HOST}\n'
  assert errs[1] == f'python -m train: error: {line}'
  assert errs[0] == f'python -m train: error: process 1: {line}'


@slow
def test_a_run_that_hangs_ends(run):
  statuses, errs, seconds = run(
    'time.sleep(100)',
    settings='heartbeat._HUNG = 3.0',
  )
  assert seconds < 20
  assert statuses == [1, 1]
  assert errs[1] == ''
  assert errs[0].startswith(
    'python -m train: error: no progress in any process for 0.05 min; '
  )
  assert f'process 1 on {HOST}' in errs[0]


@hypothesis.given(
  st.lists(
    st.tuples(
      st.integers(1, 5),  # Seconds from the one before.
      st.lists(
        st.sampled_from(['silent', 'beats', 'moves']), min_size=3, max_size=3
      ),
    ),
    min_size=1,
    max_size=30,
  )
)
def test_who_is_silent_and_who_hangs(history):
  listener = beats.Listener(processes=3, now=0.0)
  now, heard, moved = 0.0, [0.0] * 3, 0.0
  states = [beats.Beat(0, 'a', 0, 0)] * 3
  for seconds, acts in history:
    now += seconds
    for i, act in enumerate(acts):
      if act != 'silent':
        states[i] = states[i]._replace(number=states[i].number + 1)
        heard[i] = now
      if act == 'moves':
        old = states[i]
        states[i] = old._replace(step=old.step + 1, reports=old.reports + 1)
        moved = now
    # One that has never said anything is not in the store.
    listener.hear({i: b for i, b in enumerate(states) if b.number}, now)
    assert listener.silent(4, now) == [
      i for i in range(3) if now - heard[i] >= 4
    ]
    hung = listener.hung(7, now)
    if moved and now - moved >= 7:
      steps = {i: b.step for i, b in enumerate(states) if b.number}
      assert hung == [i for i in steps if steps[i] == min(steps.values())]
    else:
      assert not hung


class Store:
  """JAX's coordination service, which fails `failures` times from now on."""

  def __init__(self):
    self.values = {}
    self.failures = 0

  def key_value_set(self, key, value, allow_overwrite=False):
    if self.failures:
      self.failures -= 1
      raise jax.errors.JaxRuntimeError('UNAVAILABLE: not now')
    assert allow_overwrite or key not in self.values
    self.values[key] = value

  def key_value_dir_get(self, prefix):
    return [(k, v) for k, v in self.values.items() if k.startswith(prefix)]

  def blocking_key_value_get(self, key, _):
    return self.values[key]

  def wait_for_beats(self, more):
    """Until all failures are over and so many beats have been taken."""
    deadline = time.monotonic() + 10
    number = None
    while number is None or self._beats() < number:
      if number is None and not self.failures:
        number = self._beats() + more
      assert time.monotonic() < deadline, 'it has ended'
      time.sleep(0.001)

  def _beats(self):
    return sum(beat.number for beat in beats.read(self).values())


@pytest.fixture
def beat(monkeypatch):
  """Starts a heartbeat of two; returns it and the statuses it ends with."""
  monkeypatch.setattr(heartbeat, 'PERIOD', 0.01)
  monkeypatch.setattr(heartbeat, '_SILENT', 0.3)
  monkeypatch.setattr(heartbeat, '_on_abort', lambda _: None)
  statuses, started = [], []

  def leave(status):
    statuses.append(status)
    started[0]._stopped.set()

  monkeypatch.setattr(heartbeat.os, '_exit', leave)

  def beat(store, process, port):
    if process:
      beats.post(store, 0, 1, beats.Progress())
    started.append(
      heartbeat.Heartbeat(
        store, process, 2, f'127.0.0.1:{port}', beats.Progress()
      )
    )
    return started[0], statuses

  yield beat
  started[0].stop()


@pytest.fixture
def listening():
  """A port at which somebody listens."""
  with socket.create_server(('127.0.0.1', 0)) as server:
    yield server.getsockname()[1]


def test_process_0_watches_on_after_a_failure(beat, listening, capsys):
  store = Store()
  _, statuses = beat(store, 0, listening)
  store.failures = heartbeat._UNANSWERED + 2
  store.wait_for_beats(2)
  assert not statuses
  deadline = time.monotonic() + 10
  while not statuses:  # Nothing is ever heard of process 1.
    assert time.monotonic() < deadline
    time.sleep(0.01)
  assert statuses == [heartbeat.GONE]
  assert 'error: process 1 is gone: not heard for' in capsys.readouterr().err


def test_a_moment_without_process_0_ends_nothing(beat, listening):
  store = Store()
  _, statuses = beat(store, 1, listening)
  for _ in range(3):
    store.failures = heartbeat._UNANSWERED - 1
    store.wait_for_beats(2)
  assert not statuses


@pytest.mark.parametrize('listens', [True, False])
def test_a_process_without_process_0_ends(beat, listening, capsys, listens):
  with socket.create_server(('127.0.0.1', 0)) as server:
    free = server.getsockname()[1]
  store = Store()
  running, statuses = beat(store, 1, listening if listens else free)
  failures = store.failures = 1000
  running._thread.join(10)
  assert statuses == [heartbeat.GONE]
  tried = failures - store.failures
  assert tried == (heartbeat._UNANSWERED if listens else 1)
  line = f'error: process 0 on {HOST} is gone\n'
  assert capsys.readouterr().err.endswith(line)


def test_a_run_of_many_names_a_few():
  class Client:
    def key_value_dir_get(self, _):
      return [('gradpower/beat/00000002', '[5, "two", 1, 1]')]

  assert beats.names(Client(), [2, 3]) == 'process 2 on two, process 3'
  assert beats.names(Client(), range(3, 9)) == (
    'process 3, process 4, process 5, process 6, 2 more'
  )
