"""A TPU's training step with Muon and with AdamW, as the compiler sees them.

Both are `python -m train aot` of one recipe with another `optimizer.name`: what
Muon adds is the difference of the two predictions. Nothing runs.
"""

import math
from typing import Any

from models.config import DecoderConfig
from train.aot import compile as compile_lib
from train.aot.topology import devices_of
from train.config import Config, DataConfig, MeshConfig, OptimizerConfig
from train.errors import UserError

OPTIMIZERS = ('adamw', 'muon')
_KEPT = (
  'devices', 'mesh', 'bytes_per_device', 'collectives', 'estimated_cycles',
  'seconds', 'predicted_seconds', 'compile_seconds',
)  # fmt: skip


def config_for(
  model: DecoderConfig, devices: int, batch: int, length: int, name: str
) -> Config:
  """The step on so many devices, `batch` sequences on each.

  Parameters are split over as many devices as divide their width; the others
  hold copies.
  """
  return Config(
    model=model,
    data=DataConfig(sequence_length=length, batch_size=batch * devices),
    optimizer=OptimizerConfig(name=name),
    mesh=MeshConfig(data=0, fsdp=math.gcd(model.d_model, devices)),
  )


def point(
  model: DecoderConfig, topology: str, batch: int, length: int
) -> dict[str, Any]:
  """Compiles both steps.

  Args:
    model: The whole model, in the preset's dtype.
    topology: As 'v5e:4x4'.
    batch: Sequences a device.
    length: Tokens of each.

  Returns:
    By the optimizer's name, of the report of `python -m train aot`, the mesh,
    bytes, collectives, and seconds; `added`, what Muon adds, of predicted
    seconds, and of bytes of collectives; and `share`, of AdamW's step.

  Raises:
    UserError: there is no libtpu, no such topology, or the step does not fit.
  """
  devices = len(devices_of(topology))
  result: dict[str, Any] = {'topology': topology}
  for name in OPTIMIZERS:
    config = config_for(model, devices, batch, length, name)
    try:
      report = compile_lib.compile_step(config, topology)
    except compile_lib.DoesNotFitError as error:
      raise UserError(
        f'the step does not fit on {topology}: {error}'
      ) from error
    written = report.to_json()
    result[name] = {key: written[key] for key in _KEPT}
  added = _seconds(result['muon']) - _seconds(result['adamw'])
  return result | {
    'added_seconds': added,
    'added_bytes': _moved(result['muon']) - _moved(result['adamw']),
    'share': added / _seconds(result['adamw']),
  }


def _seconds(entry: dict[str, Any]) -> float:
  return entry['predicted_seconds']


def _moved(entry: dict[str, Any]) -> int:
  return sum(one['bytes'] for one in entry['collectives'])


def rows(points: list[dict[str, Any]]) -> list[tuple[str, ...]]:
  """A table of points, two lines each; its header first."""
  lines: list[tuple[str, ...]] = [(
    'predicted', 'compute', 'memory', 'network', 'beside', 'step, ms',
    'moved, MB', 'adds',
  )]  # fmt: skip
  for one in points:
    for name in OPTIMIZERS:
      entry = one[name]
      taken = entry['seconds']
      lines.append((
        f'{one["topology"]} {name}',
        *(
          f'{1e3 * taken[key]:.2f}'
          for key in (
            'compute', 'memory', 'network_blocking', 'network_overlapping'
          )
        ),
        f'{1e3 * _seconds(entry):.2f}',
        f'{_moved(entry) / 1e6:.0f}',
        f'{one["share"]:.1%}' if name == 'muon' else '',
      ))  # fmt: skip
  return lines
