"""Experiments: cells that are to be run, what they cost, and their running."""

import argparse
import dataclasses
import functools
import logging
import math
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax

from models import accounting
from train import cli, distributed, loop
from train.config import Config, DataConfig
from train.data import dataset as data
from train.errors import UserError
from train.experiments import one_cell
from train.experiments.arms import Arm
from train.experiments.cells import DIVERGED, Cell, Record, Store
from train.recipe_table import cost
from train.watch_options import WatchOptions

_logger = logging.getLogger('train')

INTERRUPTED, PREEMPTED = 130, 75  # Exit statuses.


class Engine(Protocol):
  """Does tasks; `train.experiments.workers.Local` says how."""

  workers: int
  """Tasks under way at once."""
  signal: str
  """The name of the one that has stopped it; empty where none has."""

  def run(
    self, function: Callable[..., Any], tasks: Sequence[tuple[Any, ...]]
  ) -> Iterator[tuple[int, Any]]:
    """Yields number of the task and its result, as they end."""


def jobs(wanted: int | None) -> int:
  """How many cells this machine trains at once: on a CPU one a core.

  Raises:
    UserError: more than one is asked for where they would share a device.
  """
  if distributed.several():
    if wanted not in (None, 1):
      raise UserError('--jobs goes with a single process')
    return 1
  if jax.default_backend() != 'cpu':
    if wanted not in (None, 1):
      raise UserError(
        '--jobs is for CPUs: on an accelerator cells are run one by one, each '
        'on all devices'
      )
    return 1
  return wanted or one_cell.cores()


def base_config(recipe: str, options: argparse.Namespace) -> Config:
  """A recipe's config as arms change it: without the power, unless asked for.

  Raises:
    UserError: there is no such recipe, or the options make no valid config.
  """
  config = cli.config(recipe, options)
  if hasattr(options, 'optimizer.power'):
    return config
  plain = dataclasses.replace(config.optimizer, power=1.0)
  return dataclasses.replace(config, optimizer=plain)


@functools.lru_cache(maxsize=64)
def _dataset(config: DataConfig) -> data.Dataset:
  with distributed.together(distributed.PREPARING):
    return data.load(config)


def cells(
  arms: Sequence[Arm], seeds: Sequence[int], config: Config
) -> list[Cell]:
  """The cells of arms and seeds, all arms of a seed before the next seed.

  Args:
    arms: What to change.
    seeds: Of parameters and data, the same for every arm.
    config: What arms change.

  Raises:
    UserError: an arm makes no valid config, or its text cannot be had.
  """
  configs = {arm.name: arm.config(config) for arm in arms}
  out = []
  for seed in seeds:
    for name, own in configs.items():
      out.append(cell(name, dataclasses.replace(own, seed=seed)))
  return out


def cell(name: str, config: Config) -> Cell:
  """A cell of any config; its text is prepared if it has not been.

  Raises:
    UserError: its text cannot be had.
  """
  dataset = _dataset(config.data)
  dataset.check_steps(config.steps)
  resolved = loop.resolve(config, dataset)
  return Cell(name, config.seed, resolved, dataset.source_hash)


def missing(wanted: Sequence[Cell], store: Store) -> list[Cell]:
  """Cells that no record is of, each once; the same in all processes."""
  new = {cell.key: cell for cell in wanted if store.get(cell.key) is None}
  keys = distributed.share(list(new))
  by_key = {cell.key: cell for cell in wanted}
  return [by_key[key] for key in keys]


def say_budget(
  wanted: Sequence[Cell], new: Sequence[Cell], store: Store, workers: int
) -> None:
  """Prints what is to be computed and how long that takes on this machine."""
  if not distributed.is_main():
    return
  total = len({cell.key for cell in wanted})
  cli.say(f'{total} cells, of which {total - len(new)} are done')
  if not new:
    return
  flops = sum(_flops(cell.config) for cell in new)
  tokens = sum(cost(cell.config).tokens for cell in new)
  rate, source = _rate(new, store)
  hours = flops / rate / min(workers, len(new)) / 3600
  cli.say(
    f'to run: {len(new)} cells, {tokens / 1e6:,.1f}M training tokens, '
    f'{flops:.2e} FLOPs with evaluations\n'
    f'on this machine about {duration(3600 * hours)}: {workers} at once, '
    f'{rate / 1e9:,.0f} GFLOP/s each ({source})'
  )


def _flops(config: Config) -> float:
  """Of training and of all evaluations."""
  d = config.data
  evaluations = math.ceil(config.steps / config.eval_every)
  scored = accounting.flops_per_token(
    config.model, d.sequence_length, backward=False
  )
  return cost(config).flops + evaluations * d.validation_tokens * scored


def _rate(new: Sequence[Cell], store: Store) -> tuple[float, str]:
  """Operations a second of one worker, and how that is known."""
  like = _shape(new[0].config)
  known = [
    record['flops'] / record['seconds']
    for record in store.records()
    if record['seconds']
    and record['device'].split(',')[0] == one_cell.machine().split(',')[0]
    and _shape_of(record) == like
  ]
  if known:
    known.sort()
    return known[len(known) // 2], f'as in {len(known)} cells before'
  config = new[0].config
  seconds = one_cell.seconds_a_step(config)
  flops = cost(config).flops / config.steps
  return flops / seconds, 'a few steps, timed alone on all cores'


def _shape(config: Config) -> tuple[Any, ...]:
  of = cost(config)
  return of.parameters.total, config.tokens_per_step


def _shape_of(record: Record) -> tuple[Any, ...]:
  d = record['config']['data']
  return record['parameters'], d['batch_size'] * d['sequence_length']


def run_missing(
  new: Sequence[Cell], store: Store, runs: pathlib.Path, engine: Engine
) -> int:
  """Runs cells, and keeps their records.

  Args:
    new: To run, in this order.
    store: Where records go.
    runs: Where run directories lie while cells are under way.
    engine: Where they are run.

  Returns:
    0, or the status to exit with where a signal has stopped it.

  Raises:
    UserError: of a cell.
  """
  alone = engine.workers == 1
  watch = WatchOptions(quiet=not alone)
  tasks = [(cell, runs / cell.key, watch) for cell in new]
  begun = time.monotonic()
  done = 0
  if not alone:
    _logger.info('%d at once', min(engine.workers, len(new)))
  for i, record in engine.run(one_cell.train, tasks):
    done += 1
    if distributed.is_main():
      store.put(new[i].key, record)
      # Not before: a cell whose record is lost would be run again. A leftover
      # costs room alone.
      shutil.rmtree(runs / new[i].key, ignore_errors=True)
      spent = time.monotonic() - begun
      # At first, others are about to end as well.
      ended = max(done, min(engine.workers, len(new)))
      left = spent / ended * (len(new) - done)
      print(
        f'[{done}/{len(new)}] {new[i].label}: {_end(record)}'
        + (f'; about {duration(left)} left' if done < len(new) else ''),
        file=sys.stderr,
        flush=True,
      )
  if not engine.signal:
    return 0
  if distributed.is_main():
    print(
      f'interrupted ({engine.signal}): {done} of {len(new)} cells are done, '
      'those under way are saved; the same command goes on',
      file=sys.stderr,
    )
  return INTERRUPTED if engine.signal == 'SIGINT' else PREEMPTED


def _end(record: Record) -> str:
  if record['status'] == DIVERGED:
    return 'diverged'
  return f'{record["validation_loss"]:.4f}'


def duration(seconds: float) -> str:
  """For people: '40 s', '12 min', '3.4 h'."""
  if seconds < 90:
    return f'{seconds:.0f} s'
  if seconds < 5400:
    return f'{seconds / 60:.0f} min'
  return f'{seconds / 3600:.1f} h'
