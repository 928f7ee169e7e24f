"""Weak scaling as the compiler sees it: one step for 8 to 6,144 chips.

Run with `python -m benchmarks.scaling`, where libtpu is installed; no TPU is
needed. For each topology it compiles the train step of a 1B-like LLaMA (the
shape that docs/aot.md compares with a peer) at the same batch on every device,
and prints bytes per device, collective bytes and the predicted step time. 64
chips share parameters (fsdp), cubes of 64 hold copies (data).

`--json FILE` is written after each point, so that it has those of a run that is
cut off, too; `--page FILE` draws them. All of it is prediction: nothing runs.
"""

import dataclasses
import pathlib
import sys
from typing import Any

from benchmarks.timing import Parser, check_writable, machine_facts, write_json
from models.config import LlamaConfig
from train.aot.compile import compile_step
from train.aot.report import WARNING, versions
from train.aot.topology import devices_of
from train.config import Config, DataConfig, MeshConfig
from train.errors import UserError

TOPOLOGIES = (
  'v5p:2x2x2', 'v5p:2x4x4', 'v5p:4x4x4', 'v5p:4x8x8', 'v5p:8x8x16',
  'v5p:16x16x16', 'v5p:16x16x24',
)  # fmt: skip
CUBE = 64
"""Chips that share the parameters (fsdp), at most."""
_KEPT = (
  'topology', 'devices', 'mesh', 'bytes_per_device', 'collectives',
  'estimated_cycles', 'seconds', 'bound', 'predicted_seconds', 'predicted_mfu',
  'compile_seconds',
)  # fmt: skip
"""Of a report's JSON."""
ROWS = 4
"""Sequences a device."""
MODEL = LlamaConfig(
  vocab_size=32128,
  d_model=2048,
  d_ff=5632,
  n_layers=16,
  n_heads=16,
  dtype='bfloat16',
  scan_layers=True,
  remat='full',
)


def config_for(devices: int) -> Config:
  """The step on so many devices, `ROWS` sequences on each."""
  return Config(
    model=MODEL,
    data=DataConfig(sequence_length=2048, batch_size=ROWS * devices),
    mesh=MeshConfig(data=0, fsdp=min(devices, CUBE)),
  )


def point(topology: str) -> dict[str, Any]:
  """Compiles for a topology.

  Raises:
    UserError: there is no libtpu, or no such topology.
  """
  config = config_for(len(devices_of(topology)))
  report = compile_step(config, topology)
  written = report.to_json()
  return {key: written[key] for key in _KEPT}


def line(one: dict[str, Any]) -> str:
  """A point as a row of the table."""
  size = one['bytes_per_device']
  moved = sum(c['bytes'] for c in one['collectives'])
  mesh = one['mesh']
  return (
    f'{one["devices"]:>6} {one["topology"]:<14} {mesh["data"]:>5} '
    f'{mesh["fsdp"]:>5} {size["arguments"] / 1e9:>10.3f} '
    f'{size["peak"] / 1e9:>8.3f} {moved / 1e9:>11.2f} '
    f'{1e3 * one["predicted_seconds"]:>9.1f} {one["predicted_mfu"]:>6.1%} '
    f'{one["compile_seconds"]:>8.0f}'
  )


HEADER = (
  f'{"chips":>6} {"topology":<14} {"data":>5} {"fsdp":>5} {"arguments":>10} '
  f'{"peak":>8} {"collectives":>11} {"step":>9} {"MFU":>6} {"compile":>8}\n'
  f'{"":>32} {"GB a chip":>11} {"GB":>8} {"GB a step":>11} {"ms":>9} '
  f'{"":>6} {"s":>8}'
)


def _write(path: pathlib.Path, points: list[dict[str, Any]]) -> None:
  write_json(
    path,
    {
      'warning': WARNING,
      'versions': versions(),
      'machine': machine_facts(),
      'shape': dataclasses.asdict(MODEL),
      'rows_per_device': ROWS,
      'points': points,
    },
  )


def main(argv: list[str] | None = None) -> int:
  """Compiles, prints, writes.

  Returns:
    The exit status: 0, or 2 for a mistake in the input.
  """
  parser = Parser(
    prog='python -m benchmarks.scaling',
    description=__doc__.splitlines()[0],
  )
  parser.add_argument(
    '--topologies',
    nargs='+',
    choices=TOPOLOGIES,
    default=list(TOPOLOGIES),
    metavar='NAME',
  )
  parser.add_argument('--json', type=pathlib.Path)
  parser.add_argument('--page', type=pathlib.Path, help='HTML with charts')
  options = parser.parse_args(argv)
  for path in (options.json, options.page):
    if path:
      check_writable(parser, path)
  try:
    print(HEADER)
    points: list[dict[str, Any]] = []
    for topology in sorted(set(options.topologies), key=TOPOLOGIES.index):
      points.append(point(topology))
      if options.json:
        _write(options.json, points)
      print(line(points[-1]), flush=True)
  except UserError as error:
    print(f'{parser.prog}: error: {error}', file=sys.stderr)
    return 2
  if options.page:
    from benchmarks import scaling_page

    options.page.write_text(scaling_page.page(points))
  print(WARNING)
  return 0


if __name__ == '__main__':
  sys.exit(main())
