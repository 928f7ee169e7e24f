"""What a training step on a CPU gains where freed memory is kept.

Two processes take the same steps on synthetic tokens, in turn, every other
round in the opposite order: one as `train.allocator.keep_memory` has it, one as
the C library comes.

    python -m benchmarks.allocator
    python -m benchmarks.allocator --shapes dense_0.25m,dense_1m --json FILE
"""

import argparse
import contextlib
import multiprocessing
import resource
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from benchmarks import timing
from models import sharding
from train import allocator, ladder, step
from train.config import Config

PLAIN, KEPT = 'as it comes', 'memory kept'
_SHAPES = 'dense_0.1m', 'dense_0.25m', 'dense_1m', 'moe_0.2m'


class _Process:
  """Takes steps of a run when it is told to."""

  def __init__(self, config: Config, keep: bool):
    context = multiprocessing.get_context('spawn')
    self.pipe, far = context.Pipe()
    self.process = context.Process(
      target=_serve, args=(far, config, keep), daemon=True
    )
    self.process.start()
    far.close()
    self.faults: list[int] = []
    """Pages that the system had to give, of each step."""

  def __call__(self) -> tuple[()]:
    try:
      self.pipe.send(True)
      self.faults.append(self.pipe.recv())
    except (EOFError, OSError):
      raise SystemExit('a process has died: see above') from None
    return ()

  def close(self) -> None:
    self.pipe.close()
    self.process.join()


def _serve(pipe, config: Config, keep: bool) -> None:
  if keep and not allocator.keep_memory():
    raise SystemExit('this C library cannot be told to keep memory')
  programs = step.programs(config, sharding.make_mesh(jax.devices()[:1]))
  state, data = programs.init(), config.data
  tokens_BU = jax.random.randint(
    jax.random.key(0),
    (data.batch_size, data.sequence_length + 1),
    0,
    config.model.vocab_size,
  )
  with contextlib.suppress(EOFError, OSError):
    while pipe.recv():
      before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
      state, metrics = programs.train_step(state, {'tokens': tokens_BU})
      jax.block_until_ready((state, metrics))
      after = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
      pipe.send(after - before)


@contextlib.contextmanager
def _processes(config: Config) -> Iterator[dict[str, _Process]]:
  ways = {PLAIN: _Process(config, False), KEPT: _Process(config, True)}
  try:
    yield ways
  finally:
    for way in ways.values():
      way.close()


def measure(shapes: Mapping[str, Config], rounds: int) -> dict[str, Any]:
  """Measures both ways for each shape; see the module's docstring.

  Args:
    shapes: By name.
    rounds: How many timings of each way.

  Returns:
    Facts of the machine and settings; and for each shape, of each way `ms`
    (median, of one step), `ms_quartiles` and `faults` (median, pages a step
    that the system had to give), and `ratio`: time with memory kept over time
    without, the median over rounds, with `ratio_quartiles`.
  """
  entries = []
  for name, config in shapes.items():
    with _processes(config) as ways:
      calls: dict[str, Callable[[], Any]] = {**ways}
      seconds = timing.time_rounds(calls, rounds)
      faults = {way: statistics.median(ways[way].faults) for way in ways}
    ratios = [
      kept / plain
      for kept, plain in zip(seconds[KEPT], seconds[PLAIN], strict=True)
    ]
    low, middle, high = timing.quartiles(ratios)
    entry: dict[str, Any] = {
      'shape': name,
      'ratio': middle,
      'ratio_quartiles': [low, high],
      'ways': {},
    }
    for way, taken in seconds.items():
      low, middle, high = timing.quartiles([1e3 * t for t in taken])
      entry['ways'][way] = {
        'ms': middle, 'ms_quartiles': [low, high], 'faults': faults[way],
      }  # fmt: skip
    entries.append(entry)
  return {
    'benchmark': 'allocator',
    'machine': timing.machine_facts(),
    'settings': {'rounds': rounds},
    'shapes': entries,
  }


def format_result(result: dict[str, Any]) -> str:
  """Returns a measurement as text: the machine, and a table."""
  rows = []
  for entry in result['shapes']:
    for way, numbers in entry['ways'].items():
      ratio = '{:.2f} ({:.2f}-{:.2f})'.format(
        entry['ratio'], *entry['ratio_quartiles']
      )
      rows.append((
        f'{entry["shape"]}, {way}',
        f'{numbers["ms"]:.2f}',
        '{:.2f}-{:.2f}'.format(*numbers['ms_quartiles']),
        f'{numbers["faults"]:,.0f}',
        ratio if way == KEPT else '',
      ))  # fmt: skip
  header = 'shape and way', 'ms a step', 'quartiles', 'page faults', 'ratio'
  return '\n'.join((
    timing.format_facts(result['machine']),
    f'medians of {result["settings"]["rounds"]} rounds',
    '',
    timing.format_table(header, rows),
    '',
    'page faults: of a step. ratio: of a step with memory kept to one without.',
  ))  # fmt: skip


def main(argv: list[str] | None = None) -> None:
  """Measures, prints, and writes the result as JSON if asked to."""
  parser = timing.Parser(
    prog='python -m benchmarks.allocator',
    description='Times training steps on a CPU with freed memory kept and not.',
    allow_abbrev=False,
  )
  parser.add_argument(
    '--shapes',
    type=_shapes,
    default=_SHAPES,
    metavar='NAME,NAME',
    help=f'of {", ".join(ladder.NAMES)}; default: {",".join(_SHAPES)}',
  )
  parser.add_argument('--rounds', type=timing.positive, default=30)
  parser.add_argument('--json', metavar='FILE', help='write the result here')
  options = parser.parse_args(argv)
  if jax.default_backend() != 'cpu':
    parser.error('it is about steps on a CPU: set JAX_PLATFORMS=cpu')
  if options.json:
    timing.check_writable(parser, options.json)
  shapes = {name: ladder.config(name) for name in options.shapes}
  result = measure(shapes, options.rounds)
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
