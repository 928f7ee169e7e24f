"""What several small runs gain from being trained at once.

As many runs of one shape take a step each: one after another, each on the
whole device (on a CPU, on all cores); in one program, by `jax.vmap` over their
stacked states; and, on a CPU, in as many processes as there are cores, each
pinned to one. All in turn, on synthetic tokens, every other round in the
opposite order.

    python -m benchmarks.together
    python -m benchmarks.together --shapes dense_0.1m,dense_1m --runs 8
"""

import argparse
import contextlib
import functools
import multiprocessing
import os
import statistics
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import timing
from models import accounting, sharding
from train import allocator, ladder, step
from train.config import Config
from train.optimizer import make_optimizer

ALONE, VMAP, PROCESSES = 'one by one', 'vmap', 'processes'
_SHAPES = 'dense_0.1m', 'dense_0.25m', 'dense_1m'


class _Runs:
  """Runs of one shape, and a step of each of them."""

  def __init__(self, config: Config, count: int):
    mesh = sharding.make_mesh(jax.devices()[:1])
    self.programs = step.programs(config, mesh)
    first = self.programs.init()
    self.states = [jax.tree.map(jnp.copy, first) for _ in range(count)]
    # The same for all: what is computed does not follow from its values.
    data = config.data
    self.tokens_BU = jax.random.randint(
      jax.random.key(0),
      (data.batch_size, data.sequence_length + 1),
      0,
      config.model.vocab_size,
    )

  def one_by_one(self) -> list[Any]:
    """A step of each; returns what is measured of them."""
    out = []
    for i, state in enumerate(self.states):
      self.states[i], metrics = self.programs.train_step(
        state, {'tokens': self.tokens_BU}
      )
      out.append(metrics)
    return out


class _Vmapped:
  """The same runs as one program."""

  def __init__(self, config: Config, runs: _Runs):
    mesh = sharding.make_mesh(jax.devices()[:1])
    optimizer = make_optimizer(config, step.abstract_model(config, mesh), mesh)
    _, graph = step.init(config, optimizer, mesh)
    one = functools.partial(
      step.train_step, graph, optimizer, config.guard, mesh, config.accumulate
    )
    self.step = jax.jit(jax.vmap(one), donate_argnums=0)
    self.state = jax.tree.map(lambda *x: jnp.stack(x), *runs.states)
    copies = [runs.tokens_BU] * len(runs.states)
    self.batch = {'tokens': jnp.stack(copies)}

  def __call__(self) -> Any:
    self.state, metrics = self.step(self.state, self.batch)
    return metrics


@contextlib.contextmanager
def _processes(config: Config, runs: int) -> Iterator[Callable[[], Any]]:
  """Processes pinned to a core each; yields what has all runs take a step."""
  context = multiprocessing.get_context('spawn')
  cores = sorted(os.sched_getaffinity(0))[:runs]
  pipes, started = [], []
  try:
    for i, core in enumerate(cores):
      near, far = context.Pipe()
      own = len(range(i, runs, len(cores)))
      process = context.Process(target=_serve, args=(far, core, config, own))
      process.start()
      far.close()
      pipes.append(near)
      started.append(process)

    def call() -> tuple[()]:
      for pipe in pipes:
        pipe.send(True)
      for pipe in pipes:
        pipe.recv()
      return ()

    yield call
  finally:
    for pipe in pipes:
      pipe.close()
    for process in started:
      process.join()


def _serve(pipe, core: int, config: Config, count: int) -> None:
  """A process: takes a step of its runs, each time that it is told to."""
  os.sched_setaffinity(0, {core})
  threading.Thread(target=_end_with_parent, daemon=True).start()
  allocator.keep_memory()
  runs = _Runs(config, count)
  with contextlib.suppress(EOFError, OSError):
    while pipe.recv():
      jax.block_until_ready(runs.one_by_one())
      pipe.send(True)


def _end_with_parent() -> None:
  parent = multiprocessing.parent_process()
  assert parent is not None
  parent.join()
  os._exit(1)


def measure(
  shapes: Mapping[str, Config], runs: int, rounds: int
) -> dict[str, Any]:
  """Measures each way for each shape; see the module's docstring.

  Args:
    shapes: By name.
    runs: How many are trained at once.
    rounds: How many timings of each way.

  Returns:
    Facts of the machine and settings; and for each shape `parameters`, its
    `batch` and `length`, and of each way `ms` (median, of one step of one run)
    with `ms_quartiles`, `gflops_per_second`, and `gain` (median over rounds of
    how many times the steps a second of one by one) with `gain_quartiles`.
  """
  facts = timing.machine_facts()
  allocator.keep_memory()  # As the trainer does.
  entries = [_entry(name, shapes[name], runs, rounds) for name in shapes]
  return {
    'benchmark': 'together',
    'machine': facts,
    'settings': {
      'runs': runs,
      'rounds': rounds,
      'processes': min(timing.cores(), runs) if _on_cpu() else None,
    },
    'shapes': entries,
  }


def _on_cpu() -> bool:
  return jax.default_backend() == 'cpu' and hasattr(os, 'sched_setaffinity')


def _entry(
  name: str, config: Config, count: int, rounds: int
) -> dict[str, Any]:
  with contextlib.ExitStack() as stack:
    runs = _Runs(config, count)
    ways: dict[str, Callable[[], Any]] = {
      ALONE: runs.one_by_one,
      VMAP: _Vmapped(config, runs),
    }
    if _on_cpu():
      ways[PROCESSES] = stack.enter_context(_processes(config, count))
    seconds = timing.time_rounds(ways, rounds)
  data = config.data
  flops = config.tokens_per_step * accounting.flops_per_token(
    config.model, data.sequence_length
  )
  return {
    'shape': name,
    'parameters': accounting.parameters(config.model).total,
    'batch': data.batch_size,
    'length': data.sequence_length,
    'ways': {
      way: _way(taken, seconds[ALONE], count, flops)
      for way, taken in seconds.items()
    },
  }


def _way(
  taken: Sequence[float], alone: Sequence[float], count: int, flops: float
) -> dict[str, Any]:
  low, middle, high = timing.quartiles([1e3 * t / count for t in taken])
  gains = [a / t for a, t in zip(alone, taken, strict=True)]
  least, _, most = timing.quartiles(gains)
  return {
    'ms': middle,
    'ms_quartiles': [low, high],
    'gflops_per_second': flops / middle / 1e6,
    'gain': statistics.median(gains),
    'gain_quartiles': [least, most],
  }


def format_result(result: dict[str, Any]) -> str:
  """Returns a measurement as text: the machine, and a table."""
  settings = result['settings']
  rows = []
  for entry in result['shapes']:
    for way, numbers in entry['ways'].items():
      least, most = numbers['gain_quartiles']
      rows.append((
        f'{entry["shape"]}, {way}',
        f'{numbers["ms"]:.2f}',
        '{:.2f}-{:.2f}'.format(*numbers['ms_quartiles']),
        f'{numbers["gflops_per_second"]:.1f}',
        f'{numbers["gain"]:.2f}',
        f'{least:.2f}-{most:.2f}',
      ))  # fmt: skip
  header = ('shape and way', 'ms a step', 'quartiles', 'GFLOP/s', 'gain',
            'quartiles')  # fmt: skip
  shapes = ', '.join(
    f'{entry["shape"]}: {entry["parameters"]:,} parameters, {entry["batch"]} x '
    f'{entry["length"]} tokens'
    for entry in result['shapes']
  )
  processes = settings['processes']
  return '\n'.join((
    timing.format_facts(result['machine']),
    f'{settings["runs"]} runs at once'
    + (f', {processes} processes, a core each' if processes else '')
    + f'; medians of {settings["rounds"]} rounds',
    shapes,
    '',
    timing.format_table(header, rows),
    '',
    'ms a step: of one run. gain: times the steps a second of one by one.',
  ))  # fmt: skip


def main(argv: list[str] | None = None) -> None:
  """Measures, prints, and writes the result as JSON if asked to."""
  parser = timing.Parser(
    prog='python -m benchmarks.together',
    description='Times several small runs one by one, vmapped, and in pinned '
    'processes.',
    allow_abbrev=False,
  )
  parser.add_argument(
    '--shapes',
    type=_shapes,
    default=_SHAPES,
    metavar='NAME,NAME',
    help=f'of {", ".join(ladder.NAMES)}; default: {",".join(_SHAPES)}',
  )
  parser.add_argument(
    '--runs',
    type=timing.positive,
    default=max(4, timing.cores()),
    help='default: as many as cores, at least 4',
  )
  parser.add_argument('--rounds', type=timing.positive, default=20)
  parser.add_argument('--json', metavar='FILE', help='write the result here')
  options = parser.parse_args(argv)
  if options.json:
    timing.check_writable(parser, options.json)
  shapes = {name: ladder.config(name) for name in options.shapes}
  result = measure(shapes, options.runs, options.rounds)
  print(format_result(result))
  if options.json:
    timing.write_json(options.json, result)
    print(f'written to {options.json}', file=sys.stderr)


def _shapes(text: str) -> tuple[str, ...]:
  names = tuple(dict.fromkeys(text.split(',')))
  for name in names:
    if name not in ladder.NAMES:
      raise argparse.ArgumentTypeError(f'there is no shape {name!r}')
  return names


if __name__ == '__main__':
  main()
