"""The devices as one mesh; `models/sharding.py` has its axes and their use."""

import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models import sharding
from train.config import Config, MeshConfig
from train.errors import UserError


def make_mesh(config: MeshConfig, devices: Any = None) -> Mesh:
  """Lays the devices out.

  Args:
    config: Sizes of the axes.
    devices: A sequence; all of the default backend's, of all processes, if left
      out.

  Raises:
    UserError: the sizes do not fit the devices.
  """
  devices = jax.devices() if devices is None else devices
  inner = {axis: getattr(config, axis) for axis in sharding.AXES[1:]}
  ways = math.prod(inner.values())
  if len(devices) % ways:
    raise UserError(
      f'--mesh.{" x --mesh.".join(inner)} ({ways}) must divide the number of '
      f'devices ({len(devices)})'
    )
  data = config.data or len(devices) // ways
  if data * ways != len(devices):
    raise UserError(
      f'--mesh.data ({data}) times the other axes ({ways}) must be the number '
      f'of devices ({len(devices)})'
    )
  try:
    return sharding.make_mesh(devices, data=data, **inner)
  except ValueError as error:
    raise UserError(f'--{error}') from error


def check(config: Config, mesh: Mesh) -> None:
  """Checks that a mesh divides the model and each micro-batch.

  Raises:
    UserError: naming the option to change.
  """
  ways = sharding.ways(mesh, 'batch')
  if config.data.batch_size % (ways * config.accumulate):
    micro = f' x --accumulate ({config.accumulate})'
    raise UserError(
      f'--data.batch_size ({config.data.batch_size}) must be a multiple of the '
      f'{ways} devices that split it (mesh {" x ".join(sharding.BATCH)})'
      f'{micro if config.accumulate > 1 else ""}'
    )
  try:
    sharding.check(config.model, mesh)
  except ValueError as error:
    raise UserError(f'--{error}') from error


def replicated(mesh: Mesh) -> NamedSharding:
  """A copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The leading axis split over all axes that split a batch."""
  return NamedSharding(mesh, sharding.spec('batch'))
