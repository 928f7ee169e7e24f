"""One compiled recipe: what it takes on a device, and how it is told."""

import dataclasses
import importlib.metadata
import math
from typing import Any

from models import accounting
from train.aot import collectives as collectives_lib
from train.aot.chips import Chip
from train.aot.collectives import Collective
from train.aot.estimate import Estimate
from train.config import Config, to_dict

WARNING = (
  "A prediction, not a measurement: it adds up the compiler's estimates; "
  'nothing ran.'
)


@dataclasses.dataclass(frozen=True)
class Bytes:
  """Of one device's memory."""

  arguments: int
  """What the step is given: the state and a batch."""
  temporary: int
  """What the compiler reports that the step sets aside: activations kept for
  the backward pass, gradients, gathered parameters, buffers of collectives. It
  adds some that are not in use at one time."""
  peak: int
  """All that is in use at one time, arguments included."""
  parameters: int
  """Of the arguments, without padding."""
  moments: int
  """Of the arguments: the optimizer's state, without padding."""
  activations: int
  """Of the peak, what is neither an argument nor a gradient in float32:
  activations, the most of it, and gathered parameters."""


@dataclasses.dataclass(frozen=True)
class Report:
  """A recipe's train step, compiled for a topology."""

  config: Config
  topology: str
  slices: int
  chip: Chip
  mesh: dict[str, int]
  """Sizes of its axes."""
  bytes: Bytes
  fits: bool
  collectives: list[Collective]
  estimate: Estimate
  compile_seconds: float
  text: str
  """The compiled program."""

  @property
  def devices(self) -> int:
    """How many run the step."""
    return math.prod(self.mesh.values())

  @property
  def tokens_per_second(self) -> float:
    """Predicted, of one device."""
    tokens = self.config.tokens_per_step / self.devices
    return tokens / self.estimate.seconds

  @property
  def mfu(self) -> float:
    """Predicted: the model's FLOPs, without recomputation, over the peak."""
    flops = accounting.flops_per_token(
      self.config.model, self.config.data.sequence_length
    )
    return self.tokens_per_second * flops / self.chip.peak_flops

  def to_json(self) -> dict[str, Any]:
    """What `--json` writes."""
    e = self.estimate
    return {
      'topology': self.topology,
      'slices': self.slices,
      'devices': self.devices,
      'mesh': self.mesh,
      'bytes_per_device': dataclasses.asdict(self.bytes),
      'memory_per_device': self.chip.hbm_bytes,
      'fits': self.fits,
      'collectives': collectives_lib.totals(self.collectives),
      'kernels': [dataclasses.asdict(kernel) for kernel in e.kernels],
      'estimated_cycles': e.cycles,
      'operations_without_estimate': e.unknown,
      'seconds': {
        'compute': e.compute,
        'memory': e.memory,
        'network_blocking': e.blocking,
        'network_overlapping': e.overlapping,
      },
      'bound': e.bound,
      'predicted_seconds': e.seconds,
      'predicted_mfu': self.mfu,
      'predicted_tokens_per_second_per_device': self.tokens_per_second,
      'warning': WARNING,
      'compile_seconds': self.compile_seconds,
      'versions': versions(),
      'config': to_dict(self.config),
    }


def refusal(
  config: Config,
  topology: str,
  slices: int,
  *,
  devices: int,
  mesh: dict[str, int] | None,
  memory: int,
  peak: int | None,
) -> dict[str, Any]:
  """What `--json` writes where nothing fits: None is not known.

  Args:
    config: The recipe.
    topology: Name of a slice.
    slices: How many of them.
    devices: In all slices.
    mesh: Sizes of its axes; None after a search.
    memory: Bytes that a device has.
    peak: Bytes that it would need; None after a search.
  """
  sizes = [field.name for field in dataclasses.fields(Bytes)]
  return {
    'topology': topology,
    'slices': slices,
    'devices': devices,
    'mesh': mesh,
    'bytes_per_device': dict.fromkeys(sizes) | {'peak': peak},
    'memory_per_device': memory,
    'fits': False,
    'collectives': None,
    'kernels': None,
    'estimated_cycles': None,
    'operations_without_estimate': None,
    'seconds': dict.fromkeys(
      ('compute', 'memory', 'network_blocking', 'network_overlapping')
    ),
    'bound': None,
    'predicted_seconds': None,
    'predicted_mfu': None,
    'predicted_tokens_per_second_per_device': None,
    'warning': WARNING,
    'compile_seconds': None,
    'versions': versions(),
    'config': to_dict(config),
  }


def versions() -> dict[str, str]:
  """Those that a prediction depends on."""
  return {name: importlib.metadata.version(name) for name in ('jax', 'libtpu')}
