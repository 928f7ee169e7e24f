"""Real processes on loopback, as users start them on several machines."""

import dataclasses
import itertools
import json
import re
import signal
import socket
import time

import jax
import pytest

from train import checkpoint, config, distributed, step
from train.digest import params_digest
from train.errors import UserError
from train.mesh import make_mesh

STEPS = 20
GENTLE = ['--optimizer.learning_rate=0.001', f'--steps={STEPS}',
          '--eval_every=8', '--save_every=50']  # fmt: skip
LONG = ['--steps=60', '--eval_every=40', '--save_every=15']
# Compiles in half of the time; what is compared is compiled alike.
FLAGS = '--xla_backend_optimization_level=0'
# Gloo says on stdout that it is connected, from several threads at once: one
# line may stand inside another, in these pieces.
GLOO = re.compile(
  r'(\[Gloo\] Rank |\d+| is connected to | peer ranks\. '
  r'|Expected number of connected peer ranks is : |\n)+'
)

# Notes which rows of which batch are read, and the hash of each.
NOTE_ROWS = """
import hashlib, json
from train.data import loader
read = loader.Batches.rows
def rows(self, index, rows):
  batch = read(self, index, rows)
  with open({path!r}, 'a') as file:
    for row, tokens in zip(rows, batch['tokens'], strict=True):
      digest = hashlib.sha256(tokens.tobytes()).hexdigest()
      file.write(json.dumps([index, int(row), digest]) + '\\n')
  return batch
loader.Batches.rows = rows
"""


def free_port():
  with socket.create_server(('127.0.0.1', 0)) as server:
    return server.getsockname()[1]


@pytest.fixture(scope='module')
def launch(start):
  """Starts all processes of a run; `prelude` of each, by its number."""

  def launch(count, *argv, devices=1, prelude=lambda process: ''):
    address = f'127.0.0.1:{free_port()}'
    return [
      start(*argv, '--coordinator', address, '--processes', count,
            '--process', process, devices=devices, flags=FLAGS,
            prelude=prelude(process))
      for process in range(count)
    ]  # fmt: skip

  return launch


@pytest.fixture(scope='module')
def finish_all(finish):
  """Waits for all; returns their exit statuses, stdouts and stderrs."""

  def finish_all(processes):
    try:
      ends = [finish(process) for process in processes]
    finally:
      for process in processes:
        process.kill()
    statuses, outs, errs = zip(*ends, strict=True)
    return list(statuses), [without_gloo(out) for out in outs], list(errs)

  return finish_all


def without_gloo(out):
  lines = out.splitlines(keepends=True)
  gloos = [line for line in lines if GLOO.fullmatch(line)]
  # Each message ends one line: an empty line more is not Gloo's.
  assert len(gloos) == out.count('[Gloo]'), out
  return ''.join(line for line in lines if line not in gloos)


def test_gloo_is_left_out_of_what_a_process_says():
  rank = '[Gloo] Rank 0 is connected to '
  ranks = '1 peer ranks. Expected number of connected peer ranks is : 1\n'
  for out in (
    rank + ranks,
    rank + ranks + rank + ranks,
    rank + rank + ranks + ranks,  # Seen: in CI.
    '[Gloo] Rank ' + rank + '0 is connected to ' + ranks[:-1] + ranks + '\n',
  ):
    assert without_gloo(out) == ''
    assert without_gloo(out + 'done: 1 peer\n') == 'done: 1 peer\n'
    with pytest.raises(AssertionError):
      without_gloo(out + '\n')


def command(tiny, run_dir, *extra):
  return ['run', 'demo', '--run-dir', run_dir, *tiny, *extra]


def rows_read(path):
  """Of the batches that are trained on: some more are read ahead."""
  read = [json.loads(line) for line in path.read_text().splitlines()]
  return sorted(row for row in read if row[0] < STEPS)


@pytest.fixture(scope='module')
def alone(tmp_path_factory, start, finish, tiny):
  """One process on one device."""
  directory = tmp_path_factory.mktemp('alone')
  prelude = NOTE_ROWS.format(path=str(directory / 'rows'))
  argv = command(tiny, directory / 'run', *GENTLE)
  status, _, err = finish(start(*argv, flags=FLAGS, prelude=prelude))
  assert status == 0, err
  return directory


@pytest.fixture(scope='module')
def whole(tmp_path_factory, launch, finish_all, tiny):
  """Two processes that nothing interrupts."""
  run_dir = tmp_path_factory.mktemp('whole') / 'run'
  statuses, _, errs = finish_all(launch(2, *command(tiny, run_dir, *LONG)))
  assert statuses == [0, 0], errs
  return run_dir


def digest_of(run_dir):
  """Of the last checkpoint, read by this process onto its own devices."""
  saved = config.from_dict(json.loads((run_dir / 'config.json').read_text()))
  saved = dataclasses.replace(saved, accumulate=1)  # Eight devices are here.
  programs = step.programs(saved, make_mesh(config.MeshConfig()))
  params = checkpoint.restore_params(
    run_dir / 'checkpoints', programs.state.params
  )
  return params_digest(params, saved.model)


@pytest.mark.parametrize(
  ('count', 'devices', 'mesh', 'shared'),
  [
    (2, 2, [], 1),
    pytest.param(4, 1, [], 1, marks=pytest.mark.slow),
    pytest.param(
      2, 2, ['--mesh.tensor=2', '--mesh.fsdp=2'], 1, marks=pytest.mark.slow
    ),
    pytest.param(
      2, 1, ['--mesh.tensor=2', '--accumulate=2'], 2, marks=pytest.mark.slow
    ),
  ],
  ids=['2x2', '4x1', '2x2 fsdp tensor', '2x1 tensor'],
)
def test_processes_train_as_one(
  alone, launch, finish_all, tiny, tmp_path, numbers, count, devices, mesh,
  shared,
):  # fmt: skip
  run_dir = tmp_path / 'run'
  statuses, outs, errs = finish_all(launch(
    count, *command(tiny, run_dir, *GENTLE, *mesh), devices=devices,
    prelude=lambda i: NOTE_ROWS.format(path=str(tmp_path / f'rows{i}')),
  ))  # fmt: skip
  assert statuses == [0] * count, errs
  # Process 0 alone says anything.
  assert outs[0].startswith(f'done: {STEPS} steps, held-out loss ')
  assert 'held-out' in errs[0]
  assert outs[1:] == errs[1:] == [''] * (count - 1)

  # The same batches to the bit; each process has read its own share only.
  each = [rows_read(tmp_path / f'rows{i}') for i in range(count)]
  whole = rows_read(alone / 'rows')
  assert len(whole) == 8 * STEPS
  assert sorted(itertools.chain(*each)) == sorted(whole * shared)
  assert {len(rows) for rows in each} == {8 * STEPS * shared // count}

  lines, wanted = numbers(run_dir), numbers(alone / 'run')
  assert len(lines) == len(wanted)
  for line, one in zip(lines, wanted, strict=True):
    assert line.keys() == one.keys()
    for key, value in one.items():
      if key.endswith('loss'):
        assert line[key] == pytest.approx(value, rel=1e-5), line
      elif key.endswith('_norm'):
        assert line[key] == pytest.approx(value, rel=1e-3), line
      elif key != 'params_digest':
        assert line[key] == value

  # The digest is that of the parameters, whoever holds them.
  assert lines[-1]['params_digest'] == digest_of(run_dir)
  names = {path.name for path in run_dir.iterdir()}
  assert names == {
    'config.json', 'run.json', 'tokenizer.json', 'lock', 'metrics.jsonl',
    'events.jsonl', 'checkpoints',
  }  # fmt: skip


def wait_for_lines(processes, run_dir, count):
  metrics = run_dir / 'metrics.jsonl'
  deadline = time.monotonic() + 90
  while time.monotonic() < deadline:
    assert all(process.poll() is None for process in processes)
    if metrics.exists() and metrics.read_bytes().count(b'\n') >= count:
      return
    time.sleep(0.002)
  raise AssertionError('it is too slow')


@pytest.mark.slow
def test_a_signal_to_any_process_stops_all_at_one_step(
  launch, finish_all, tiny, tmp_path, numbers, read_metrics, whole
):
  """And nothing shows of it in the end, to the bit."""
  run_dir = tmp_path / 'run'
  argv = command(tiny, run_dir, *LONG)
  slow = (
    'import time\n'
    'from train.feed import Feed\n'
    'put = Feed.__call__\n'
    'Feed.__call__ = lambda self, x: time.sleep(0.1) or put(self, x)\n'
  )
  reached = 0
  for process, number, wanted in (
    (1, signal.SIGTERM, 75),
    (1, signal.SIGINT, 130),
    (0, signal.SIGINT, 130),
  ):
    processes = launch(2, *argv, prelude=lambda i: slow)
    wait_for_lines(processes, run_dir, reached + 4)
    processes[process].send_signal(number)
    statuses, outs, errs = finish_all(processes)
    assert statuses == [wanted, wanted], errs
    assert outs == ['', '']
    last = read_metrics(run_dir)[-1]
    assert last['event'] == 'stopped'
    assert reached + 4 <= last['step'] < 60
    assert (run_dir / 'checkpoints' / str(last['step'])).is_dir()
    assert f'interrupted ({number.name}), saved in {run_dir};' in errs[0]
    assert 'interrupted' not in errs[1]
    assert not any('Traceback' in err for err in errs)
    reached = last['step']
  statuses, _, errs = finish_all(launch(2, *argv))
  assert statuses == [0, 0], errs
  assert f'continues from step {reached}' in errs[0]
  assert numbers(run_dir) == numbers(whole)


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_all_at_once(
  launch, finish_all, tiny, tmp_path, number
):
  endless = (
    'import time\n'
    'from train import distributed\n'
    'told = distributed.announced\n'
    'def announced(fact):\n'
    '  told(fact)\n'
    f'  open({str(tmp_path / "agreed")!r}, "w").close()\n'
    '  return True\n'
    'distributed.announced = announced\n'
    'from train import loop\n'
    'loop.gc.unfreeze = lambda: time.sleep(600)\n'  # Before it saves.
  )
  run_dir = tmp_path / 'run'
  processes = launch(
    2, *command(tiny, run_dir, '--steps=100000', '--eval_every=100000'),
    prelude=lambda i: endless,
  )  # fmt: skip
  wait_for_lines(processes, run_dir, 4)
  processes[1].send_signal(number)
  while not (tmp_path / 'agreed').exists():
    assert all(process.poll() is None for process in processes)
    time.sleep(0.01)
  time.sleep(1)
  sent = time.monotonic()
  processes[1].send_signal(number)
  statuses, _, errs = finish_all(processes)
  assert time.monotonic() - sent < 20
  assert statuses == [130, 130], errs
  assert errs[0].endswith('error: process 1: interrupted\n')
  assert errs[1].endswith('\npython -m train: interrupted\n')


def test_an_error_of_one_process_is_every_ones(
  launch, finish_all, tiny, tmp_path, one_error
):
  fail = (
    'from train import errors\n'
    'from train.data import dataset as data\n'
    'def load(*_):\n'
    '  raise errors.UserError("the disk of this host is full")\n'
    'data.load = load\n'
  )
  run_dir = tmp_path / 'run'
  processes = launch(
    2, *command(tiny, run_dir), prelude=lambda i: fail if i == 1 else ''
  )
  statuses, outs, errs = finish_all(processes)
  assert statuses == [2, 2], errs
  *progress, line = errs[0].splitlines()
  assert line == 'python -m train: error: the disk of this host is full'
  assert not any('error' in other for other in progress)
  assert errs[1] == ''
  assert outs == ['', '']
  assert not run_dir.exists()


@pytest.mark.slow
@pytest.mark.parametrize('failing', [0, 1])
def test_a_process_that_fails_later_ends_the_others(
  launch, finish_all, tiny, tmp_path, failing
):
  fail = (
    'from train import errors, loop\n'
    'def evaluate(self):\n'
    '  raise errors.UserError("no space left")\n'
    'loop._Run._evaluate = evaluate\n'
  )
  processes = launch(
    2, *command(tiny, tmp_path / 'run'),
    prelude=lambda i: fail if i == failing else '',
  )  # fmt: skip
  processes[failing].wait(100)
  ended = time.monotonic()
  statuses, _, errs = finish_all(processes)
  assert time.monotonic() - ended < 20
  assert statuses == [2, 2], errs
  mistake = 'python -m train: error: no space left\n'
  assert errs[failing].endswith(mistake)
  assert not any('Traceback' in err for err in errs)
  if failing == 1:  # What process 0 says is what is read.
    told = 'python -m train: error: process 1: no space left\n'
    assert errs[0].endswith(told)


@pytest.mark.slow
def test_a_run_whose_process_is_killed_goes_on(
  launch, finish_all, tiny, tmp_path, numbers, whole
):
  killed = 1
  run_dir = tmp_path / 'run'
  processes = launch(2, *command(tiny, run_dir, *LONG))
  wait_for_lines(processes, run_dir, 20)
  processes[killed].kill()
  since = time.monotonic()
  statuses, _, errs = finish_all(processes)
  assert time.monotonic() - since < 60
  assert statuses[killed] == -signal.SIGKILL
  assert statuses[1 - killed] == 1, errs
  last = errs[1 - killed].splitlines()[-1]
  assert f'error: process {killed} on {socket.gethostname()} is gone' in last
  assert 'Traceback' not in errs[1 - killed]
  statuses, _, errs = finish_all(launch(2, *command(tiny, run_dir, *LONG)))
  assert statuses == [0, 0], errs
  assert numbers(run_dir) == numbers(whole)


def test_a_directory_that_is_not_shared_is_refused(
  launch, finish_all, tiny, tmp_path
):
  elsewhere = (
    'import pathlib\n'
    'from train import run_dir\n'
    'opened = run_dir.RunDir.__init__\n'
    'def init(self, path, *args, **kwargs):\n'
    '  opened(self, path / "elsewhere", *args, **kwargs)\n'
    'run_dir.RunDir.__init__ = init\n'
  )
  processes = launch(
    2, *command(tiny, tmp_path / 'run'),
    prelude=lambda i: elsewhere if i else '',
  )  # fmt: skip
  statuses, _, errs = finish_all(processes)
  assert statuses == [2, 2], errs
  assert errs[0].endswith('must be on a disk that all processes share\n')
  assert 'process 1 does not see ' in errs[0]


def test_one_process_needs_nothing():
  with distributed.cluster(processes=1), distributed.together():
    assert distributed.share({'a': 1}) == {'a': 1}
    assert distributed.is_main() and not distributed.several()
  assert jax.process_count() == 1
  with (
    pytest.raises(UserError, match='mine') as error,
    distributed.cluster(),
    distributed.together(),
  ):
    raise UserError('mine')
  assert not error.value.shared
