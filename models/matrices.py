"""Which parameters are matrices, and along which axes, for Muon and its like.

A matrix takes activations to activations: of attention, of hidden layers, of
experts each its own, of routers. An embedding's rows and a head's columns are
of tokens, a norm's scales and a bias of features: those are none.
"""

from typing import Any, NamedTuple

import jax
from flax import nnx

_HEADS = ('heads', 'kv_heads')
# Of which logical axes activations are summed over, and which result.
_MATRICES: dict[tuple[str, ...], tuple[tuple[str, ...], tuple[str, ...]]] = {
  **{
    ('embed', heads, 'head_dim'): (('embed',), (heads, 'head_dim'))
    for heads in _HEADS
  },
  ('heads', 'head_dim', 'embed'): (('heads', 'head_dim'), ('embed',)),
  ('embed', 'mlp'): (('embed',), ('mlp',)),
  ('mlp', 'embed'): (('mlp',), ('embed',)),
  ('embed', 'router'): (('embed',), ('router',)),
  ('experts', 'expert_embed', 'expert_mlp'): (
    ('expert_embed',), ('expert_mlp',)),
  ('experts', 'expert_mlp', 'expert_embed'): (
    ('expert_mlp',), ('expert_embed',)),
}  # fmt: skip


class Matrix(NamedTuple):
  """The axes of a parameter that are a matrix's; the others are a stack's."""

  reduction: tuple[int, ...]
  """Summed over when it is applied; counted from the last axis, which is -1."""
  output: tuple[int, ...]
  """Those that result."""


def matrices(model: nnx.Module, *, per_head: bool = False) -> Any:
  """Which axes of each parameter are a matrix's.

  Args:
    model: Real, or abstract from `nnx.eval_shape`.
    per_head: Whether each head of an attention is a matrix by itself.

  Returns:
    A nested dict of `Matrix`, or None for what is no matrix, like
    `nnx.to_pure_dict` of the model's parameters.
  """

  def find(variable: nnx.Param) -> Matrix | None:
    names = variable.get_metadata('logical_axes')
    if names not in _MATRICES or variable.shape[-1] == 1:
      return None  # The gate of a shared expert is a vector.
    return Matrix(
      *(
        tuple(
          names.index(name) - len(names)
          for name in side
          if not (per_head and name in _HEADS)
        )
        for side in _MATRICES[names]
      )
    )

  found = jax.tree.map(
    find,
    nnx.state(model, nnx.Param),
    is_leaf=lambda x: isinstance(x, nnx.Variable),
  )
  return nnx.to_pure_dict(found)
