"""The devices as one mesh; `models/sharding.py` has its axes.

Today every device is on the data axis.
"""

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from models import sharding
from train.errors import UserError


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
  return sharding.make_mesh(data=devices)


def replicated(mesh: Mesh) -> NamedSharding:
  """A copy on every device."""
  return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The leading axis split over all axes that split a batch."""
  return NamedSharding(mesh, sharding.spec('batch'))
