"""A process's share of each batch, and the global array that it is part of."""

from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from train.mesh import batch_sharding


class Feed:
  """Knows which rows of a batch the devices of this process hold.

  Devices along 'tensor' hold the same rows; those are read once.
  """

  def __init__(self, mesh: Mesh, batch_size: int):
    """Splits `batch_size` rows as the mesh does."""
    self._sharding = batch_sharding(mesh)
    self._batch_size = batch_size
    held = self._sharding.addressable_devices_indices_map((batch_size,))
    spans = {
      device: index[0].indices(batch_size)[:2]
      for device, index in held.items()
      if index is not None
    }
    parts = sorted(set(spans.values()))
    starts = np.cumsum([0] + [stop - start for start, stop in parts]).tolist()
    at = {part: slice(*starts[i : i + 2]) for i, part in enumerate(parts)}
    self._devices = list(spans)
    self._places = [at[span] for span in spans.values()]
    self.rows = np.concatenate([np.arange(*part) for part in parts])
    """Numbers of the rows that this process reads, ascending."""

  def __call__(self, local: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Makes the global batch of which this process has `rows`.

    Args:
      local: arrays whose leading axis is that of `rows`.

    Returns:
      The same, each (batch_size, ...), split over the mesh.
    """
    return {name: self._put(array) for name, array in local.items()}

  def _put(self, local: np.ndarray) -> jax.Array:
    if self._sharding.is_fully_addressable:
      return jax.device_put(local, self._sharding)
    parts = [local[place] for place in self._places]
    return jax.make_array_from_single_device_arrays(
      (self._batch_size, *local.shape[1:]),
      self._sharding,
      jax.device_put(parts, self._devices),
    )
