"""Real processes on loopback, as users start them on several machines."""

import dataclasses
import itertools
import json
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
GLOO = '[Gloo] '  # Says that it is connected, on stdout.

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
    plain = [
      ''.join(
        line for line in out.splitlines(True) if not line.startswith(GLOO)
      )
      for out in outs
    ]
    return list(statuses), plain, list(errs)

  return finish_all


def command(tiny, run_dir, *extra):
  return ['run', 'demo', '--run-dir', run_dir, *tiny, *extra]


def rows_read(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope='module')
def alone(tmp_path_factory, start, finish, tiny):
  """One process on one device."""
  directory = tmp_path_factory.mktemp('alone')
  prelude = NOTE_ROWS.format(path=str(directory / 'rows'))
  argv = command(tiny, directory / 'run', *GENTLE)
  status, _, err = finish(start(*argv, flags=FLAGS, prelude=prelude))
  assert status == 0, err
  return directory


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
    'config.json', 'run.json', 'tokenizer.json', 'metrics.jsonl', 'checkpoints',
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
  launch, finish_all, tiny, tmp_path, numbers, read_metrics
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
  for process, number in ((1, signal.SIGTERM), (0, signal.SIGINT)):
    processes = launch(2, *argv, prelude=lambda i: slow)
    wait_for_lines(processes, run_dir, reached + 4)
    processes[process].send_signal(number)
    statuses, outs, errs = finish_all(processes)
    assert statuses == [130, 130], errs
    assert outs == ['', '']
    last = read_metrics(run_dir)[-1]
    assert last['event'] == 'stopped'
    assert reached + 4 <= last['step'] < 60
    assert (run_dir / 'checkpoints' / str(last['step'])).is_dir()
    assert f'interrupted, saved in {run_dir};' in errs[0]
    assert 'interrupted' not in errs[1]
    assert not any('Traceback' in err for err in errs)
    reached = last['step']
  statuses, _, errs = finish_all(launch(2, *argv))
  assert statuses == [0, 0], errs
  assert f'continues from step {reached}' in errs[0]

  whole = tmp_path / 'whole'
  statuses, _, errs = finish_all(launch(2, *command(tiny, whole, *LONG)))
  assert statuses == [0, 0], errs
  assert numbers(run_dir) == numbers(whole)


def test_an_error_of_one_process_is_every_ones(
  launch, finish_all, tiny, tmp_path, one_error
):
  fail = (
    'from train import data, errors\n'
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


@pytest.mark.parametrize(
  'failing', [pytest.param(0, marks=pytest.mark.slow), 1]
)
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


@pytest.mark.parametrize('process', [0, 1])
def test_processes_that_do_not_meet(
  start, finish, tiny, tmp_path, one_error, process
):
  address = f'127.0.0.1:{free_port()}'
  process = start(
    *command(tiny, tmp_path / 'run'), '--coordinator', address,
    '--processes', 2, '--process', process,
    prelude='from train import distributed\ndistributed._MEET = 1',
  )  # fmt: skip
  status, out, err = finish(process)
  assert (status, out) == (2, '')
  message = one_error(err)
  assert f'the 2 processes did not all meet at {address} within 1 s' in message
  assert not (tmp_path / 'run').exists()


def test_a_port_that_is_taken(start, finish, tiny, tmp_path, one_error):
  with socket.create_server(('', 0)) as server:
    port = server.getsockname()[1]
    status, _, err = finish(start(
      *command(tiny, tmp_path / 'run'), '--coordinator', f'127.0.0.1:{port}',
      '--processes', 2, '--process', 0,
    ))  # fmt: skip
  assert status == 2
  message = one_error(err)
  assert message.startswith(f'--coordinator: cannot listen on port {port} (')


def slurm(process, count, port=61440):
  """What srun sets; the job's number decides the port, in JAX's way."""
  return {
    'SLURM_JOB_ID': str(port - 61440),
    'SLURM_STEP_NODELIST': 'localhost',
    'SLURM_STEP_NUM_NODES': '1',
    'SLURM_NTASKS': str(count),
    'SLURM_PROCID': str(process),
    'SLURM_LOCALID': str(process),
  }


def open_mpi(process, count, port=61440):
  """What mpirun of version 4 sets, likewise."""
  return {
    'OMPI_MCA_orte_hnp_uri': f'{(port - 61440) * 4096}.0;tcp://127.0.0.1:9',
    'OMPI_COMM_WORLD_SIZE': str(count),
    'OMPI_COMM_WORLD_RANK': str(process),
    'OMPI_COMM_WORLD_LOCAL_RANK': str(process),
  }


@pytest.mark.slow
@pytest.mark.parametrize('launcher', [slurm, open_mpi])
def test_a_launcher_is_found(start, finish_all, tiny, tmp_path, launcher):
  for port in range(61500, 65000):
    with socket.socket() as probe:
      if probe.connect_ex(('127.0.0.1', port)):
        break
  argv = command(tiny, tmp_path / 'run', *GENTLE, '--stop-at', 2)
  statuses, outs, errs = finish_all(
    [start(*argv, flags=FLAGS, **launcher(i, 2, port)) for i in range(2)]
  )
  assert statuses == [0, 0], errs
  assert outs[0].startswith('stopped: 2 of 20 steps')
  assert outs[1] == ''
  facts = json.loads((tmp_path / 'run' / 'run.json').read_text())
  assert facts['devices'] == '2 cpu'


KNOWN = ('SLURM_', 'OMPI_', 'KUBERNETES_', 'JOB_COMPLETION_INDEX', 'TPU_')


@pytest.mark.parametrize(
  ('variables', 'count'),
  [
    ({}, 1),
    (slurm(0, 1), 1),
    (slurm(1, 16), 16),
    ({'SLURM_JOB_ID': '7', 'SLURM_NTASKS': '8'}, 1),  # A shell of salloc.
    (open_mpi(1, 4), 4),
    ({'OMPI_COMM_WORLD_SIZE': '1'}, 1),
    ({'KUBERNETES_SERVICE_HOST': '10.0.0.1'}, 1),  # A notebook in a pod.
    ({'TPU_WORKER_HOSTNAMES': 'a,b'}, 1),  # No TPU here.
  ],
)
def test_a_launcher_is_recognised(monkeypatch, variables, count):
  with monkeypatch.context() as patch:
    for name in list(distributed.os.environ):
      if name.startswith(KNOWN):
        patch.delenv(name)
    for name, value in variables.items():
      patch.setenv(name, value)
    assert distributed._detect() == count


def test_an_open_mpi_that_says_too_little_is_refused(monkeypatch):
  for name, value in open_mpi(1, 4).items():
    if name != 'OMPI_MCA_orte_hnp_uri':  # As version 5.
      monkeypatch.setenv(name, value)
  with pytest.raises(UserError, match=r'give --coordinator.*docs/launch\.md'):
    distributed._detect()


@pytest.mark.parametrize('size', ['x', '', '-1', '1.5'])
def test_an_open_mpi_size_that_is_no_number_is_refused(monkeypatch, size):
  monkeypatch.setenv('OMPI_COMM_WORLD_SIZE', size)
  with pytest.raises(UserError, match='OMPI_COMM_WORLD_SIZE must be a number'):
    distributed._detect()


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
