"""Dropless experts: tokens sorted by expert, then grouped matrix products.

Shape suffixes: B batch, T tokens, k experts of a token, D model width, F
hidden width, E experts, M rows: one for each expert of each token.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from models import exchange
from models.grouped import grouped_matmul
from models.sharding import RULES, divided, divides, island, platform, spec


# Outside of jit it is compiled once, not at every call; inside it is inlined.
@functools.partial(jax.jit, static_argnames='mesh', inline=True)
def experts(
  x_BTD: jax.Array,
  chosen_BTk: jax.Array,
  weights_BTk: jax.Array,
  gate_EDF: jax.Array,
  up_EDF: jax.Array,
  down_EFD: jax.Array,
  *,
  mesh: Mesh | None = None,
) -> jax.Array:
  """The weighted sum of what its experts make of each token.

  No token is dropped, however skewed the choice. With a mesh every rank has
  some of the tokens and some of the experts: tokens travel to the rank of
  their expert and back (`models.exchange`), for which each rank keeps room for
  the worst case: all tokens of all ranks.

  Args:
    x_BTD: Tokens.
    chosen_BTk: int32, the experts of each token, all different.
    weights_BTk: Of the chosen experts; float32.
    gate_EDF: Gates of the experts, in the tokens' dtype, like the other two.
    up_EDF: What the gates let through.
    down_EFD: Back to the model width.
    mesh: Over `models.sharding.AXES`; None on one unnamed device.

  Returns:
    (B, T, D) in the tokens' dtype.

  Raises:
    ValueError: the mesh does not divide the experts or their width;
      or a device has 2**31 tokens times chosen experts times experts.
  """
  operands = x_BTD, chosen_BTk, weights_BTk, gate_EDF, up_EDF, down_EFD
  if mesh is None:
    return _local(*operands, kernels='cpu', ranks=1)
  _check(operands, mesh)
  wide = spec('experts', None, 'expert_mlp')
  narrow = spec('experts', 'expert_mlp', None)
  # A batch that the mesh does not divide is everybody's.
  tokens = spec(divided(mesh, len(x_BTD), 'batch'), None, None)

  def body(*operands):
    ranks = mesh.shape['expert']
    return _local(*operands, kernels=platform(mesh), ranks=ranks)[None]

  # Each rank of 'tensor' has a part of the sum. Summed out here, its gradient
  # is a copy; a psum inside would be summed again on the way back.
  parts_PBTD = island(
    body,
    mesh,
    in_specs=(tokens, tokens, tokens, wide, wide, narrow),
    out_specs=PartitionSpec('tensor', *tokens),
    check_vma=False,  # A Pallas kernel does not say over what it varies.
  )(*operands)
  return jnp.sum(parts_PBTD, axis=0)


def dense_experts(
  x_BTD, chosen_BTk, weights_BTk, gate_EDF, up_EDF, down_EFD
) -> jax.Array:
  """The formula of `experts`: every expert for every token, most times 0."""
  h_BTEF = jax.nn.silu(jnp.einsum('btd,edf->btef', x_BTD, gate_EDF))
  h_BTEF *= jnp.einsum('btd,edf->btef', x_BTD, up_EDF)
  y_BTED = jnp.einsum('btef,efd->bted', h_BTEF, down_EFD)
  mask_BTkE = jax.nn.one_hot(chosen_BTk, len(gate_EDF), dtype=jnp.float32)
  weights_BTE = jnp.einsum('btk,btke->bte', weights_BTk, mask_BTkE)
  y_BTD = jnp.einsum('bte,bted->btd', weights_BTE, y_BTED.astype(jnp.float32))
  return y_BTD.astype(x_BTD.dtype)


def _check(operands, mesh):
  """Raises a ValueError if the mesh does not divide the operands."""
  experts, _, width = operands[3].shape
  for what, size, name in (
    ('experts', experts, 'experts'),
    ("experts' width", width, 'expert_mlp'),
  ):
    if not divides(mesh, size, name):
      (axis,) = RULES[name]
      raise ValueError(
        f'{what} of {size} cannot be split over the {mesh.shape[axis]} devices '
        f'of the mesh axis {axis}'
      )


def _local(
  x_BTD, chosen_BTk, weights_BTk, gate_EDF, up_EDF, down_EFD, *, kernels, ranks
):
  """The experts of the tokens of one device of `ranks` along 'expert'."""
  batch, length, width = x_BTD.shape
  chosen, local = chosen_BTk.shape[-1], len(gate_EDF)
  tokens = batch * length
  order_M, place_M, sizes_E = _sort(chosen_BTk.reshape(-1), local * ranks)
  x_MD = _copy(x_BTD.reshape(tokens, width), order_M, place_M, chosen)
  if ranks > 1:
    route = exchange.plan(sizes_E)
    sizes_E = route.received
    # Of a token's experts, one rank has no more than all of its own.
    bounds = {'most': tokens * min(chosen, local), 'platform': kernels}
    x_MD = exchange.dispatch(x_MD, route, **bounds)
    x_MD = checkpoint_name(x_MD, 'dispatch')
  gate_MF = grouped_matmul(x_MD, gate_EDF, sizes_E, kernels)
  up_MF = grouped_matmul(x_MD, up_EDF, sizes_E, kernels)
  gate_MF = checkpoint_name(gate_MF, 'gate')
  up_MF = checkpoint_name(up_MF, 'up')
  h_MF = jax.nn.silu(gate_MF) * up_MF
  y_MD = grouped_matmul(h_MF, down_EFD, sizes_E, kernels)
  if ranks > 1:
    y_MD = exchange.combine(y_MD, route, rows=len(order_M), **bounds)
  y_MD = checkpoint_name(y_MD, 'combine')
  y_BTkD = _permute(y_MD, place_M, order_M).reshape(*chosen_BTk.shape, width)
  y_BTD = jnp.sum(y_BTkD.astype(jnp.float32) * weights_BTk[..., None], axis=2)
  return y_BTD.astype(x_BTD.dtype)


def _sort(chosen_M, experts):
  """Sorts the rows by expert, stably.

  Returns:
    order_M: for each place the row that takes it; place_M: for each row its
    place; sizes_E: rows of each expert.
  """
  rows = len(chosen_M)
  if rows * experts >= 2**31:
    raise ValueError(f'{rows} rows for {experts} experts on one device')
  index_M = jnp.arange(rows)
  # One integer a row sorts several times faster than a pair.
  key_M = jnp.sort(chosen_M * rows + index_M)
  order_M = key_M % rows
  place_M = jnp.zeros_like(order_M).at[order_M].set(index_M)
  bounds_E = jnp.searchsorted(key_M, jnp.arange(experts + 1) * rows)
  return order_M, place_M, jnp.diff(bounds_E).astype(jnp.int32)


def _take(x_ND, index_M):
  return x_ND.at[index_M].get(mode='promise_in_bounds')


@jax.custom_vjp
def _permute(x_MD, index_M, inverse_M):
  """x[index]; its gradient is a look-up as well, where a scatter is slow."""
  del inverse_M
  return _take(x_MD, index_M)


_permute.defvjp(
  lambda x_MD, index_M, inverse_M: (_take(x_MD, index_M), inverse_M),
  lambda inverse_M, dy_MD: (_take(dy_MD, inverse_M), None, None),
)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _copy(x_ND, order_M, place_M, copies):
  """Copies each token to the places of its experts; the gradient adds up."""
  del place_M
  return _take(x_ND, order_M // copies)


def _copy_fwd(x_ND, order_M, place_M, copies):
  return _copy(x_ND, order_M, place_M, copies), place_M


def _copy_bwd(copies, place_M, dy_MD):
  dy_NkD = _take(dy_MD, place_M).reshape(-1, copies, dy_MD.shape[1])
  dx_ND = jnp.sum(dy_NkD, axis=1, dtype=jnp.float32)
  return dx_ND.astype(dy_MD.dtype), None, None


_copy.defvjp(_copy_fwd, _copy_bwd)
