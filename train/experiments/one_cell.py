"""Trains one cell, and says what is kept of it."""

import contextlib
import functools
import math
import os
import pathlib
import platform
import statistics
import subprocess
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from train import allocator, distributed, kept_programs, loop, mesh
from train import config as config_lib
from train import step as step_lib
from train.config import Config
from train.errors import DivergedError
from train.experiments.cells import DIVERGED, DONE, Cell, Record
from train.lives import alive
from train.recipe_table import cost
from train.run_facts import versions
from train.run_log import RunLog, read_run
from train.watch_options import WatchOptions

_POINTS = 100  # Of the training loss.
_PROBE = 20.0  # Seconds that timing a step takes, at most.
_ROOT = pathlib.Path(__file__).resolve().parents[2]
_CODE = 'gradpower_optax', 'models', 'train', ':!train/experiments'


def train(
  cell: Cell, directory: pathlib.Path, watch: WatchOptions
) -> Record | str:
  """Trains a cell, or goes on training it.

  Args:
    cell: What to train.
    directory: Of its run; it stays, for who keeps the record to remove.
    watch: How it is shown.

  Returns:
    Its record, empty in all processes of a run but the first; or the name of
    the signal that has stopped it, saved.

  Raises:
    UserError: the input is at fault, or the end cannot be saved.
  """
  commit()  # As it is when the code is read, not hours later.
  try:
    result = loop.run(
      cell.config, epath.Path(directory), name=cell.label, watch=watch
    )
  except DivergedError:
    end: dict[str, Any] = {
      'status': DIVERGED, 'validation_loss': None, 'params_digest': '',
    }  # fmt: skip
  else:
    if result.status != 'done':
      return result.signal or 'SIGTERM'
    finite = math.isfinite(result.validation_loss)
    end = {
      'status': DONE if finite else DIVERGED,
      'validation_loss': result.validation_loss if finite else None,
      'params_digest': result.params_digest,
    }
  if not distributed.is_main():
    return {}
  return _record(cell, read_run(cell.label, epath.Path(directory)), end)


def seconds_a_step(config: Config) -> float:
  """Times a few steps of a run, compiled as they will be in earnest.

  Args:
    config: Resolved.
  """
  kept_programs.keep()
  allocator.keep_memory()
  programs = step_lib.programs(config, mesh.make_mesh(config.mesh))
  state = programs.init()
  ones = {
    name: jnp.ones(x.shape, x.dtype, device=x.sharding)
    for name, x in programs.batch.items()
  }
  times: list[float] = []
  while len(times) < 3 or (sum(times) < _PROBE and len(times) < 20):
    start = time.monotonic()
    state, metrics = programs.train_step(state, ones)
    jax.block_until_ready(metrics)
    times.append(time.monotonic() - start)
  return statistics.median(times[1:])  # The first one compiles.


def _record(cell: Cell, log: RunLog, end: Mapping[str, Any]) -> Record:
  of = cost(cell.config)
  tokens = cell.config.tokens_per_step
  rates = [
    line['tokens_per_second']
    for line in log.train.values()
    if 'tokens_per_second' in line
  ]
  return {
    'arm': cell.arm,
    'seed': cell.seed,
    **end,
    'tokens': int(log.tokens or 0),
    'parameters': of.parameters.total,
    'flops': of.flops,
    # Of the steps: without compilation, evaluation and saves.
    'seconds': round(sum(tokens / rate for rate in rates), 1),
    'wall': round(alive(log)[0], 1),  # All, of each time that it was begun.
    'validation': [
      [int(step), int(line.get('tokens', step * tokens)), _short(line['loss'])]
      for step, line in log.validation.items()
    ],
    'train': _means(log, tokens),
    'source_hash': cell.source_hash,
    'config': _portable(config_lib.to_dict(cell.config)),
    'device': machine(),
    'versions': versions(),
    'code': commit(),
    'time': time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime()),
  }


def _portable(config: dict[str, Any]) -> dict[str, Any]:
  """Without the folders of this machine."""
  places = ('files', 'tokenizer', 'prepared')
  names = {key: config['data'][key].rpartition('/')[2] for key in places}
  return config | {'data': config['data'] | names}


def _means(log: RunLog, tokens: int) -> list[list[float | None]]:
  """The training loss, as means over equal spans of steps."""
  steps = sorted(log.train)
  width = max(1, math.ceil(len(steps) / _POINTS))
  spans = [steps[i : i + width] for i in range(0, len(steps), width)]
  return [
    [
      span[-1],
      span[-1] * tokens,
      _short(math.fsum(log.train[s]['loss'] for s in span) / len(span)),
    ]
    for span in spans
  ]


def _short(loss: float) -> float | None:
  """JSON has no numbers that are none."""
  return round(loss, 6) if math.isfinite(loss) else None


def machine(given: int | None = None) -> str:
  """Names the devices that a run uses.

  Args:
    given: Cores of a CPU; None for those that this process has.
  """
  device = jax.devices()[0]
  if device.platform != 'cpu':
    return f'{jax.device_count()} x {device.device_kind}'
  name = platform.processor() or platform.machine()
  with contextlib.suppress(OSError, StopIteration):
    info = pathlib.Path('/proc/cpuinfo').read_text().splitlines()
    name = next(line for line in info if line.startswith('model name'))
    name = name.partition(':')[2].strip()
  count = given or min(cores(), _threads())
  return f'{name}, {count} {"core" if count == 1 else "cores"}'


def _threads() -> float:
  """How many XLA is told to take: fewer than the cores, on a shared node."""
  with contextlib.suppress(KeyError, ValueError):
    return max(1, int(os.environ['NPROC']))
  return math.inf


def cores() -> int:
  """How many of them this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


@functools.cache
def commit() -> str:
  """Names the code that trains: its last commit, '+' where it is another."""
  try:
    last = _git('log', '-1', '--format=%h')
    return last + '+' * bool(_git('status', '--porcelain'))
  except (OSError, subprocess.SubprocessError):
    return ''


def _git(*argv: str) -> str:
  """What git says of the code that the numbers follow from."""
  return subprocess.run(
    ['git', *argv, '--', *_CODE],
    cwd=_ROOT, capture_output=True, text=True, check=True, timeout=10,
  ).stdout.strip()  # fmt: skip
