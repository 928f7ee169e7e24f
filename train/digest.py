"""A fingerprint of a model's parameters, whatever mesh or layout holds them."""

import dataclasses
import functools
import hashlib
import typing
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from models.config import DecoderConfig
from models.decoder import unstacked
from train import distributed
from train.mesh import replicated


@dataclasses.dataclass(frozen=True)
class Parameter:
  """An array of the model, of which nothing is copied to the host yet."""

  array: Any
  layer: int | None = None
  """Which of a stack of layers it is."""

  def __getitem__(self, layer: int) -> 'Parameter':
    return Parameter(self.array, layer)

  def read(self) -> np.ndarray:
    """Copies it to the host; called by all processes alike, in one order."""
    array = self.array
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
      # A layer at a time: no device or host need hold more of the model.
      mesh = typing.cast(NamedSharding, array.sharding).mesh
      whole = _gather(mesh, self.layer is not None)
      return np.asarray(whole(array, self.layer or 0))
    array = np.asarray(array)
    return array if self.layer is None else array[self.layer]


def canonical_parameters(
  params: Any, config: DecoderConfig
) -> dict[str, Parameter]:
  """Parameters by dotted path, layers unstacked, in the order of the paths.

  Args:
    params: Nested dict of the model's arrays.
    config: The model's.

  Returns:
    'layers.0.mlp.up' and the like.
  """
  wrapped = jax.tree.map(Parameter, params)
  layers = unstacked(wrapped['layers'], config)
  leaves = jax.tree_util.tree_leaves_with_path({**wrapped, 'layers': layers})
  named = {
    '.'.join(str(key.key) for key in path): leaf for path, leaf in leaves
  }
  return dict(sorted(named.items()))


def params_digest(params: Any, config: DecoderConfig) -> str:
  """The sha256 of every parameter's path, dtype, shape and bytes.

  `docs/cli.md` has the exact definition.
  """
  if all(
    x.is_fully_addressable
    for x in jax.tree.leaves(params)
    if isinstance(x, jax.Array)
  ):
    params = jax.device_get(params)
  digest = hashlib.sha256()
  for path, parameter in canonical_parameters(params, config).items():
    array = parameter.read()
    if not distributed.is_main():
      continue
    shape = ','.join(map(str, array.shape))
    digest.update(f'{path}\0{array.dtype.name}\0{shape}\0'.encode())
    little = array.astype(array.dtype.newbyteorder('<'), copy=False)
    digest.update(np.ascontiguousarray(little).tobytes())
  return distributed.share(digest.hexdigest())


@functools.cache
def _gather(mesh: Any, stacked: bool):
  def take(array, layer):
    return array[layer] if stacked else array

  return jax.jit(take, out_shardings=replicated(mesh))
