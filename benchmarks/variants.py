r"""What the options of a training step cost: a step without and with each.

    python -m benchmarks.variants
    python -m benchmarks.variants --preset llama_0.2b --batch 64 --length 1024 \
      --json FILE

The steps run in turn, every other round in the opposite order, on one state
that passes from each to the next. `deterministic` differs on a GPU alone: on a
CPU or TPU its ratio shows what the measurement is good for. `layer statistics`
is a step on which they are taken.
"""

import dataclasses
import statistics as stats
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import shapes, timing
from models import accounting
from models.config import DecoderConfig
from train import statistics, step
from train.config import Config, DataConfig, GuardConfig, OptimizerConfig
from train.feed import Feed
from train.mesh import make_mesh

BASE = 'step'


def variants(config: Config) -> dict[str, Config]:
  """The run's config by the name of what is different about it."""
  return {
    BASE: config,
    'deterministic': dataclasses.replace(config, deterministic=True),
    'guard.spike': dataclasses.replace(config, guard=GuardConfig(spike=6.0)),
  }


def measure(config: Config, rounds: int, directory: Path) -> dict[str, Any]:
  """Times a step of each variant.

  Args:
    config: The run without options.
    rounds: Samples of each.
    directory: Where deterministic programs keep their choice of kernels.

  Returns:
    Facts, settings and `variants`: of each `ms`, its median milliseconds a
    step, and `ratio` to the step without, with quartiles; medians over rounds.
  """
  mesh = make_mesh(config.mesh, jax.local_devices())
  made = {
    name: step.programs(variant, mesh, directory)
    for name, variant in variants(config).items()
  }
  feed = Feed(mesh, config.data.batch_size)
  shape = config.data.batch_size, config.data.sequence_length + 1
  tokens = np.random.default_rng(0).integers(
    config.model.vocab_size, size=shape
  )
  batch = feed({'tokens': tokens[feed.rows].astype(np.int32)})
  state = made[BASE].init()

  def stepping(train_step: Callable[..., Any]) -> Callable[[], Any]:
    def call():
      nonlocal state
      state, metrics = train_step(state, batch)
      return metrics

    return call

  calls = {name: stepping(each.train_step) for name, each in made.items()}
  look = statistics.program(config, mesh)
  calls['layer statistics'] = lambda: (look(state, batch), calls[BASE]())
  seconds = timing.time_rounds(calls, rounds)
  base = seconds[BASE]
  rows = {}
  for name, taken in seconds.items():
    ratios = [a / b for a, b in zip(taken, base, strict=True)]
    low, middle, high = timing.quartiles(ratios)
    rows[name] = {
      'ms': 1e3 * stats.median(taken),
      'ratio': middle,
      'ratio_quartiles': [low, high],
    }
  return {
    'benchmark': 'variants',
    'machine': timing.machine_facts(),
    'settings': {
      'model': {
        'type': type(config.model).__name__,
        **dataclasses.asdict(config.model),
      },
      'parameters': accounting.parameters(config.model).total,
      'batch': config.data.batch_size,
      'length': config.data.sequence_length,
      'rounds': rounds,
      'devices': mesh.size,
    },
    'variants': rows,
  }


def text(result: dict[str, Any]) -> str:
  """The result as a table."""
  rows = [
    [
      name,
      f'{row["ms"]:.1f}',
      f'{row["ratio"]:.4f}',
      '{:.4f} to {:.4f}'.format(*row['ratio_quartiles']),
    ]
    for name, row in result['variants'].items()
  ]
  header = ['', 'ms', f'of {BASE}', 'quartiles']
  return '\n'.join([
    timing.format_facts(result['machine']),
    timing.format_table(header, rows),
  ])  # fmt: skip


def _config(model: DecoderConfig, batch: int, length: int) -> Config:
  return Config(
    model=model,
    data=DataConfig(batch_size=batch, sequence_length=length),
    optimizer=OptimizerConfig(power=1.2, schedule='constant'),
  )


def main(argv: list[str] | None = None) -> None:
  """Measures, prints, and writes the result as JSON if asked to."""
  parser = timing.Parser(
    prog='python -m benchmarks.variants',
    description='Times what the options of a training step cost.',
    allow_abbrev=False,
  )
  shapes.add_options(parser)
  parser.add_argument('--batch', type=timing.positive, default=8)
  parser.add_argument('--length', type=timing.positive, default=256)
  parser.add_argument('--rounds', type=timing.positive, default=15)
  parser.add_argument('--json', metavar='FILE', help='write the result here')
  options = parser.parse_args(argv)
  model = shapes.from_options(parser, options)
  if options.batch % jax.local_device_count():
    parser.error(
      f'--batch ({options.batch}) must be a multiple of the '
      f'{jax.local_device_count()} devices'
    )
  if options.json:
    timing.check_writable(parser, options.json)
  config = _config(model, options.batch, options.length)
  try:
    with tempfile.TemporaryDirectory() as directory:
      result = measure(config, options.rounds, Path(directory))
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    parser.error('no memory for this model and batch')
  print(text(result))
  if options.json:
    timing.write_json(options.json, result)
    print(f'written to {options.json}', file=sys.stderr)


if __name__ == '__main__':
  main()
