"""A fingerprint of a model's parameters, whatever mesh or layout holds them."""

import hashlib
from typing import Any

import jax
import numpy as np

from models.config import DecoderConfig
from models.decoder import unstacked


def canonical_parameters(
  params: Any, config: DecoderConfig
) -> dict[str, np.ndarray]:
  """Parameters by dotted path, layers unstacked, in the order of the paths.

  Args:
    params: Nested dict of the model's arrays.
    config: The model's.

  Returns:
    'layers.0.mlp.up' and the like to arrays on the host.
  """
  layers = unstacked(params['layers'], config)
  leaves = jax.tree_util.tree_leaves_with_path({**params, 'layers': layers})
  named = {
    '.'.join(str(key.key) for key in path): np.asarray(leaf)
    for path, leaf in leaves
  }
  return dict(sorted(named.items()))


def params_digest(params: Any, config: DecoderConfig) -> str:
  """The sha256 of every parameter's path, dtype, shape and bytes.

  `docs/cli.md` has the exact definition.
  """
  digest = hashlib.sha256()
  for path, array in canonical_parameters(params, config).items():
    shape = ','.join(map(str, array.shape))
    digest.update(f'{path}\0{array.dtype.name}\0{shape}\0'.encode())
    little = array.astype(array.dtype.newbyteorder('<'), copy=False)
    digest.update(np.ascontiguousarray(little).tobytes())
  return digest.hexdigest()
