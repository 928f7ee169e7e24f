r"""What Muon adds to a training step over AdamW: on one device, and on many.

    python -m benchmarks.optimizer
    python -m benchmarks.optimizer --preset llama_1b --rounds 2 --json FILE
    python -m benchmarks.optimizer --preset llama_1b --topology v5e:4x4

On one device, in turn and every other round in the opposite order: the updates
of AdamW, of our Muon and of optax's, parameters and state donated, of some
layers at the preset's width; forward and backward of those layers, and of
embedding, head and loss, on the tokens of a step; and a square float32 product
of as many operations as the largest of Muon's, the limit. On a CPU the model
computes in float32, elsewhere as the preset says; Muon in float32, at the
platform's default precision of products.

Layers are alike, so of all of them the times are those of the timed ones,
scaled. Embedding, last norm and head are AdamW's under both optimizers and do
not grow with the layers: they are timed by themselves, and stand in the step's
time alone. Then, with a AdamW's update of all parameters and d their forward
and backward,

    share = (Muon's update - AdamW's, of the layers) / (a + d)

On N devices that split the parameters, each with the same tokens, an update of
AdamW takes a / N, and Muon's its time on one device x the operations of its
program for one of N (`benchmarks.optimizer_work`) over those of the program for
one alone: computed, not measured, and without the network's time.

A second process times both updates of a small model, split over eight fake CPU
devices, and reads their collectives. With --topology nothing is timed: it
compiles the whole step with either optimizer ahead of time.
"""

import argparse
import dataclasses
import pathlib
import statistics
import sys
from typing import Any

import jax

from benchmarks import optimizer_programs as programs
from benchmarks import optimizer_sharded, optimizer_tpu, shapes, timing
from benchmarks import optimizer_work as work
from benchmarks.optimizer_result import text, tpu_text
from models import presets
from models.config import DecoderConfig, Qwen2MoeConfig
from train import hardware
from train.aot.report import WARNING, versions
from train.errors import UserError

DEVICES = (1, 8, 16, 64, 256)
MOST_DEVICES = 1024
TARGET = 0.1


def measure(
  config: DecoderConfig, layers: int, tokens: int, length: int, rounds: int
) -> dict[str, Any]:
  """Times one device's programs, and computes the shares of many devices.

  Args:
    config: The whole model.
    layers: How many of them to time.
    tokens: Of a step, on a device.
    length: Of a sequence.
    rounds: Samples of each program, after a warm-up.

  Returns:
    Facts and settings; `programs`, of each `ms` with quartiles, `flops` of its
    products where they are counted and `of_limit`; `ratio`, of our Muon's
    update to optax's, with quartiles; `shares`, of each number of devices, see
    `shares`; `target`, the share to stay below, and `fewest`, the fewest
    devices, a power of two, that do, None if none; and `mfu`, of Muon's update,
    None where `mfu_missing` says why.
  """
  timed = dataclasses.replace(config, n_layers=layers)
  flops = work.on_devices(timed, 1).flops
  m, n = work.largest(timed)
  side = round((m * m * n) ** (1 / 3))
  facts = timing.machine_facts()
  made = programs.Programs(timed, tokens // length, length, side)
  seconds = programs.time_rounds(made.runs, rounds)
  counted = work.forward_and_backward_flops(timed, tokens, length) | {
    programs.MUON: flops,
    programs.OPTAX: flops,
    programs.LIMIT: 2 * side**3,
  }
  limits = [2 * side**3 / taken for taken in seconds[programs.LIMIT]]
  entries = []
  for name, taken in seconds.items():
    low, middle, high = timing.quartiles(taken)
    of_limit = statistics.median(
      counted.get(name, 0) / s / limit
      for s, limit in zip(taken, limits, strict=True)
    )
    entries.append({
      'program': name,
      'ms': 1e3 * middle,
      'ms_quartiles': [1e3 * low, 1e3 * high],
      'flops': counted.get(name),
      'of_limit': of_limit if name in counted else None,
    })  # fmt: skip
  peak, missing = hardware.peak(
    facts['platform'], facts['device'], config.dtype
  )
  muon = statistics.median(seconds[programs.MUON])
  low, middle, high = timing.quartiles(
    [
      ours / theirs
      for ours, theirs in zip(
        seconds[programs.MUON], seconds[programs.OPTAX], strict=True
      )
    ]
  )
  return {
    'benchmark': 'optimizer',
    'machine': facts,
    'settings': {
      'model': {'type': type(config).__name__, **dataclasses.asdict(config)},
      'layers': layers,
      'tokens': tokens,
      'length': length,
      'rounds': rounds,
      'side': side,
    },
    'programs': entries,
    'ratio': middle,
    'ratio_quartiles': [low, high],
    'shares': [shares(config, layers, seconds, n) for n in DEVICES],
    'target': TARGET,
    'fewest': next(
      (
        n
        for n in (2**i for i in range(MOST_DEVICES.bit_length()))
        if shares(config, layers, seconds, n)['share'] <= TARGET
      ),
      None,
    ),
    'mfu': peak and flops / muon / peak,
    'mfu_missing': missing,
  }


def shares(
  config: DecoderConfig,
  layers: int,
  seconds: dict[str, tuple[float, ...]],
  devices: int,
) -> dict[str, Any]:
  """What Muon adds to a step, by the formula of the module's docstring.

  Args:
    config: The whole model.
    layers: How many were timed.
    seconds: Of a call of each program, by round.
    devices: That share the parameters, each with as many tokens as timed.

  Returns:
    `devices`, `mesh`, `flops` of the products of Muon's update on a device,
    `sent`, bytes that a device sends for them; `added_ms` over AdamW's update,
    and `share` of AdamW's step, with `share_quartiles`; medians over rounds.
  """
  here = work.on_devices(config, devices)
  part = here.flops / work.on_devices(config, 1).flops
  times = config.n_layers / layers
  added, ratios = [], []
  for taken in zip(*seconds.values(), strict=True):
    s = dict(zip(seconds, taken, strict=True))
    adamw = times * s[programs.ADAMW] / devices
    added.append(times * s[programs.MUON] * part - adamw)
    step = adamw + s[programs.REST_ADAMW] / devices
    step += times * s[programs.LAYERS] + s[programs.REST]
    ratios.append(added[-1] / step)
  low, middle, high = timing.quartiles(ratios)
  mesh = work.abstract_mesh(config, devices)
  return {
    'devices': devices,
    'mesh': {axis: n for axis, n in mesh.shape.items() if n > 1},
    'flops': here.flops,
    'sent': here.sent,
    'added_ms': 1e3 * statistics.median(added),
    'share': middle,
    'share_quartiles': [low, high],
  }


def _ahead_of_time(parser, options, config, batch) -> dict[str, Any]:
  """Compiles for each topology."""
  points = []
  for topology in options.topology:
    try:
      points.append(
        optimizer_tpu.point(config, topology, batch, options.length)
      )
    except UserError as error:
      parser.error(str(error))
  return {
    'benchmark': 'optimizer',
    'settings': {
      'model': {'type': type(config).__name__, **dataclasses.asdict(config)},
      'tokens': options.tokens,
      'length': options.length,
    },
    'points': points,
    'warning': WARNING,
    'versions': versions(),
  }


def _options(
  parser: timing.Parser, argv: list[str] | None
) -> argparse.Namespace:
  shapes.add_options(parser)
  parser.set_defaults(preset='llama_0.2b')
  parser.add_argument(
    '--layers', type=timing.positive,
    help='to time; 2 on a CPU, else all of them',
  )  # fmt: skip
  parser.add_argument(
    '--tokens', type=timing.positive, default=4096, help='of a device'
  )
  parser.add_argument(
    '--length', type=timing.positive,
    default=presets.VOCABULARIES['t5'].length, help='of a sequence',
  )  # fmt: skip
  parser.add_argument(
    '--rounds', type=timing.positive, default=3, help='samples of each program'
  )
  parser.add_argument(
    '--no-sharded', action='store_true', help='leaves the second process out'
  )
  parser.add_argument(
    '--topology', nargs='+', metavar='NAME',
    help='compile for these TPUs instead: v5e:4x4',
  )  # fmt: skip
  parser.add_argument('--json', metavar='FILE', help='write the result here')
  return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
  """Measures, prints, and writes the result as JSON if asked to."""
  parser = timing.Parser(
    prog='python -m benchmarks.optimizer',
    description='Times Muon against AdamW and a training step.',
    allow_abbrev=False,
  )
  options = _options(parser, argv)
  config = shapes.from_options(parser, options)
  batch, rest = divmod(options.tokens, options.length)
  if rest or not batch:
    parser.error(
      f'--tokens ({options.tokens}) must be a multiple of --length '
      f'({options.length})'
    )
  if options.json:
    timing.check_writable(parser, options.json)
  if options.topology:
    result = _ahead_of_time(parser, options, config, batch)
    print(tpu_text(result))
  else:
    result = _measured(parser, options, config)
    print(text(result))
  if options.json:
    timing.write_json(pathlib.Path(options.json), result)
    print(f'written to {options.json}', file=sys.stderr)


def _measured(parser, options, config) -> dict[str, Any]:
  on_cpu = jax.default_backend() == 'cpu'
  if on_cpu and vars(options)['model.dtype'] is None:
    config = dataclasses.replace(config, dtype='float32')
  layers = options.layers or (2 if on_cpu else config.n_layers)
  if layers > config.n_layers:
    parser.error(f'--layers ({layers}): the model has {config.n_layers}')
  if len({config.is_sparse(layer) for layer in range(config.n_layers)}) > 1:
    parser.error('layers with and without experts do not scale')
  try:
    result = measure(
      config, layers, options.tokens, options.length, options.rounds
    )
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    parser.error('no memory for these layers and tokens')
  if options.no_sharded:
    return result | {'sharded': None}
  sparse = isinstance(config, Qwen2MoeConfig)
  try:
    sharded = optimizer_sharded.measure_apart(
      'qwen2_moe' if sparse else 'llama'
    )
  except optimizer_sharded.SubprocessError as error:
    parser.error(f'on eight fake devices: {error}')
  return result | {'sharded': sharded}


if __name__ == '__main__':
  main()
