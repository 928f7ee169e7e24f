"""The devices as one mesh with named axes.

Axes: data (batch split, parameters whole), fsdp, tensor, expert. Today every
device is on the data axis.
"""

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from train.errors import UserError

AXES = ('data', 'fsdp', 'tensor', 'expert')


def make_mesh(batch_size: int) -> Mesh:
  """Puts all devices on the data axis.

  Args:
    batch_size: Sequences in a global batch.

  Raises:
    UserError: the devices do not divide the batch.
  """
  devices = jax.device_count()
  if batch_size % devices:
    raise UserError(
      f'--data.batch_size ({batch_size}) must be a multiple of the number of '
      f'devices ({devices})'
    )
  return jax.make_mesh(
    (devices, 1, 1, 1), AXES, axis_types=(AxisType.Auto,) * len(AXES)
  )


def replicated(mesh: Mesh) -> NamedSharding:
  """A copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The leading axis split over the data axes."""
  return NamedSharding(mesh, PartitionSpec(('data', 'fsdp')))
