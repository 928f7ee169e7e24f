"""Parameters in the dtype of activations, cast once and read often.

The model casts what it multiplies with by itself; a train step that reads its
parameters several times, or gathers them from other devices, casts first.
"""

from typing import Any

import jax
from flax import nnx

from models.decoder import Decoder


def cast(model: Decoder, params: Any) -> Any:
  """Casts the parameters that the model would cast wherever it reads them.

  Norms, biases, routers and the embedding stay: their products or sums are in
  float32.

  Args:
    model: Real, or abstract from `nnx.eval_shape`.
    params: A nested dict like that of its parameters.

  Returns:
    The like; the model's results with it are the same, and the gradients have
    the dtypes of its arrays.
  """
  is_cast = nnx.to_pure_dict(
    jax.tree.map(
      lambda variable: variable.get_metadata('is_cast'),
      nnx.state(model, nnx.Param),
      is_leaf=lambda x: isinstance(x, nnx.Variable),
    )
  )
  dtype = model.config.dtype
  return jax.tree.map(
    lambda x, casts: x.astype(dtype) if casts else x, params, is_cast
  )
