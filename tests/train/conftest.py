"""Small runs of the trainer, in this process and in one of their own."""

import json
import logging
import os
import pathlib
import random
import subprocess
import sys

import pytest

from train.__main__ import main as entry_point

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope='session')
def text_files(tmp_path_factory):
  """Writes deterministic pseudo-English; returns a glob for it."""
  directory = tmp_path_factory.mktemp('text')
  draw = random.Random(0)
  words = [
    ''.join(draw.choices('etaoinshrdlu', k=draw.randint(2, 7)))
    for _ in range(60)
  ]
  for i in range(40):
    text = ' '.join(draw.choice(words) for _ in range(100))
    (directory / f'{i:02}.txt').write_text(f'{text}.\n', 'utf-8')
  return str(directory / '*.txt')


@pytest.fixture(scope='session')
def tiny(text_files):
  """Options of a run of milliseconds a step; later ones override them."""
  options = {
    'data.files': text_files,
    'data.vocab_size': 300,
    'data.sequence_length': 16,
    'data.batch_size': 8,  # A sequence a fake device.
    'data.validation_fraction': 0.1,
    'data.validation_tokens': 500,
    'model.d_model': 16,
    'model.d_ff': 32,
    'model.n_layers': 1,
    'model.n_heads': 2,
    'optimizer.warmup_steps': 3,
    'optimizer.learning_rate': 0.02,
    'steps': 24,
    'eval_every': 8,
    'save_every': 5,
  }
  return [f'--{name}={value}' for name, value in options.items()]


@pytest.fixture(scope='session')
def data_cache(tmp_path_factory):
  """Tokens of all tests here."""
  return tmp_path_factory.mktemp('cache[1],@2*')


@pytest.fixture(autouse=True)
def own_logger():
  """What a program does to its logger ends with the test."""
  logger = logging.getLogger('train')
  before = logger.handlers, logger.propagate, logger.level
  yield
  logger.handlers, logger.propagate = before[:2]
  logger.setLevel(before[2])


@pytest.fixture
def main(data_cache, kept_programs, monkeypatch):
  """`python -m train` in this process, on its eight devices."""
  monkeypatch.setenv('GRADPOWER_CACHE', str(data_cache))
  return lambda *argv: entry_point([str(arg) for arg in argv])


@pytest.fixture(scope='session')
def start(data_cache, programs):
  """Starts `python -m train` as a user does, on one device unless told.

  `prelude` is code to run before, in the same process.
  """
  environment = {
    key: value
    for key, value in os.environ.items()
    if key not in ('XLA_FLAGS', 'PYTHONPATH')
  } | {'JAX_PLATFORMS': 'cpu', 'GRADPOWER_CACHE': str(data_cache),
     'JAX_COMPILATION_CACHE_DIR': programs,
     'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0'}  # fmt: skip

  def start(*argv, prelude='', devices=1, flags='', **variables):
    how = ['-m', 'train']
    if prelude:
      how = ['-c', f'{prelude}\nfrom train.__main__ import main\n'
             'import sys\nsys.exit(main(sys.argv[1:]))']  # fmt: skip
    count = f'--xla_force_host_platform_device_count={devices}'
    return subprocess.Popen(
      [sys.executable, *how, *map(str, argv)],
      cwd=ROOT, text=True, env=environment | {
        'XLA_FLAGS': f'{count} {flags}',
        **variables,
      },
      stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip

  return start


@pytest.fixture(scope='session')
def finish():
  """Waits for a started command; returns exit status, stdout and stderr."""

  def finish(process, timeout=120):
    try:
      out, err = process.communicate(timeout=timeout)
    finally:
      process.kill()
      process.wait()
    return process.returncode, out, err

  return finish


@pytest.fixture(scope='session')
def read_metrics():
  """The lines of a run's metrics.jsonl, each of which must be whole."""

  def read(run_dir):
    text = (run_dir / 'metrics.jsonl').read_text()
    assert text.endswith('\n')
    return [json.loads(line) for line in text.splitlines()]

  return read


@pytest.fixture(scope='session')
def numbers(read_metrics):
  """What must not depend on interruptions: all but events and speed."""
  of_this_time = 'time', 'tokens_per_second', 'data_seconds', 'memory', 'mfu'

  def numbers(run_dir):
    return [
      {k: v for k, v in line.items() if k not in of_this_time}
      for line in read_metrics(run_dir)
      if line.get('event') not in ('stopped', 'resumed')
    ]

  return numbers


@pytest.fixture
def small_disk(tmp_path):
  """Mounts a disk of so many KiB; call again to enlarge it."""
  disk = tmp_path / 'disk'
  disk.mkdir()

  def mount(kilobytes):
    remount = ',remount' if os.path.ismount(disk) else ''
    done = subprocess.run(
      ['mount', '-t', 'tmpfs', '-o', f'size={kilobytes}k{remount}', 'none',
       disk], check=False, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
      pytest.skip(f'cannot mount a small disk: {done.stderr.strip()}')
    return disk

  yield mount
  if os.path.ismount(disk):
    subprocess.run(['umount', '--lazy', disk], check=True)


@pytest.fixture(scope='session')
def one_error():
  """Asserts that all that stderr holds is one line, and returns its message."""

  def check(err):
    assert err.count('\n') == 1
    assert err.endswith('\n')
    assert err.startswith('python -m train: error: ')
    return err.removeprefix('python -m train: error: ').rstrip('\n')

  return check
