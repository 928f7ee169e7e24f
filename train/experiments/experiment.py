"""Experiments: cells that are to be run, what they cost, and their running."""

import argparse
import contextlib
import dataclasses
import functools
import logging
import pathlib
import shutil
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax

from train import cli, distributed, loop
from train.config import Config, DataConfig
from train.data import dataset as data
from train.errors import UserError
from train.experiments import one_cell, timing, workers
from train.experiments.arms import Arm
from train.experiments.cells import DIVERGED, Cell, Record, Store
from train.experiments.timing import duration
from train.recipe_table import cost
from train.watch_options import WatchOptions

_logger = logging.getLogger('train')

INTERRUPTED, PREEMPTED = 130, 75  # Exit statuses.
_FIRST_LINE, _BETWEEN_LINES = 20.0, 60.0  # Seconds, of cells side by side.


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
  wanted: Sequence[Cell], new: Sequence[Cell], store: Store, engine: Engine
) -> None:
  """Prints what is to be computed, and about how long that takes here.

  Raises:
    KeyboardInterrupt: a signal has come while a step was timed.
  """
  if not distributed.is_main():
    return
  total = len({cell.key for cell in wanted})
  cli.say(f'{total} cells, of which {total - len(new)} are done')
  if not new:
    return
  tokens = sum(cost(cell.config).tokens for cell in new)
  flops = sum(timing.flops(cell.config) for cell in new)
  cli.say(
    f'to run: {len(new)} cells, {tokens / 1e6:,.1f}M training tokens, '
    f'{flops:.2e} FLOPs with evaluations'
  )
  here = isinstance(engine, workers.Local)
  at_once = engine.workers if here else jobs(None)
  found = timing.seconds_each(
    new,
    store.records(),
    one_cell.machine(max(1, one_cell.cores() // at_once)),
    functools.partial(_time_a_step, at_once),
  )
  if found is None:
    return
  seconds, source = found
  place = 'on this machine' if here else 'on this machine, were it run here,'
  cli.say(
    f'{place} about {duration(timing.makespan(seconds, at_once))}: '
    f'{min(at_once, len(new))} at once, about '
    f'{duration(sum(seconds) / len(new))} a cell ({source})'
  )


def _time_a_step(at_once: int, config: Config) -> float | None:
  """Seconds of a step, on the cores that a cell is going to have."""
  if distributed.several():  # One process cannot take a step.
    return None
  engine = workers.Local(at_once)
  for _, seconds in engine.run(one_cell.seconds_a_step, [(config,)]):
    return seconds
  raise KeyboardInterrupt


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
  # It shows each run by itself then.
  alone = engine.workers == 1 and isinstance(engine, workers.Local)
  watch = WatchOptions(quiet=not alone)
  tasks = [(cell, runs / cell.key, watch) for cell in new]
  progress = timing.Progress(new, runs, engine.workers)
  done = 0
  if not alone:
    _logger.info('%d at once', min(engine.workers, len(new)))
  with contextlib.nullcontext() if alone else _told(progress):
    for i, record in engine.run(one_cell.train, tasks):
      done += 1
      if distributed.is_main():
        store.put(new[i].key, record)
        # Not before: a cell whose record is lost would be run again. A leftover
        # costs room alone.
        shutil.rmtree(runs / new[i].key, ignore_errors=True)
        progress.end(new[i].key)
        left = progress.left() if done < len(new) else None
        _print(
          f'[{done}/{len(new)}] {new[i].label}: {_end(record)}'
          + ('' if left is None else f'; about {duration(left)} left')
        )
  if not engine.signal:
    return 0
  if distributed.is_main():
    _print(
      f'interrupted ({engine.signal}): {done} of {len(new)} cells are done, '
      'those under way are saved; the same command goes on'
    )
  return INTERRUPTED if engine.signal == 'SIGINT' else PREEMPTED


@contextlib.contextmanager
def _told(progress: timing.Progress) -> Iterator[None]:
  """Prints now and then how far cells are that nothing else shows."""
  over = threading.Event()

  def tell() -> None:
    wait = _FIRST_LINE
    while not over.wait(wait):
      _print(progress.line())
      wait = _BETWEEN_LINES

  thread = threading.Thread(target=tell, daemon=True)
  thread.start()
  try:
    yield
  finally:
    over.set()
    thread.join()


def _print(line: str) -> None:
  print(line, file=sys.stderr, flush=True)


def _end(record: Record) -> str:
  if record['status'] == DIVERGED:
    return 'diverged'
  return f'{record["validation_loss"]:.4f}'
