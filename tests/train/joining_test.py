"""How processes find each other: options, launchers, and ports."""

import json
import socket

import pytest

from train import joining
from train.errors import UserError


def command(tiny, run_dir):
  return ['run', 'demo', '--run-dir', run_dir, *tiny]


@pytest.mark.parametrize('process', [0, 1])
def test_processes_that_do_not_meet(
  start, finish, tiny, tmp_path, one_error, process
):
  with socket.create_server(('127.0.0.1', 0)) as server:
    address = f'127.0.0.1:{server.getsockname()[1]}'
  process = start(
    *command(tiny, tmp_path / 'run'), '--coordinator', address,
    '--processes', 2, '--process', process,
    prelude='from train import joining\njoining._MEET = 1',
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
def test_a_launcher_is_found(start, finish, tiny, tmp_path, launcher):
  for port in range(61500, 65000):
    with socket.socket() as probe:
      if probe.connect_ex(('127.0.0.1', port)):
        break
  argv = [*command(tiny, tmp_path / 'run'), '--stop-at', 2]
  quick = '--xla_backend_optimization_level=0'  # Compiles in half of the time.
  processes = [
    start(*argv, flags=quick, **launcher(i, 2, port)) for i in range(2)
  ]
  ends = [finish(process) for process in processes]
  statuses, outs, errs = zip(*ends, strict=True)
  assert statuses == (0, 0), errs
  assert 'stopped: 2 of 24 steps' in outs[0]
  assert 'stopped' not in outs[1]
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
    for name in list(joining.os.environ):
      if name.startswith(KNOWN):
        patch.delenv(name)
    for name, value in variables.items():
      patch.setenv(name, value)
    assert joining._detect() == count


def test_an_open_mpi_that_says_too_little_is_refused(monkeypatch):
  for name, value in open_mpi(1, 4).items():
    if name != 'OMPI_MCA_orte_hnp_uri':  # As version 5.
      monkeypatch.setenv(name, value)
  with pytest.raises(UserError, match=r'give --coordinator.*docs/launch\.md'):
    joining._detect()


@pytest.mark.parametrize('size', ['x', '', '-1', '1.5'])
def test_an_open_mpi_size_that_is_no_number_is_refused(monkeypatch, size):
  monkeypatch.setenv('OMPI_COMM_WORLD_SIZE', size)
  with pytest.raises(UserError, match='OMPI_COMM_WORLD_SIZE must be a number'):
    joining._detect()
