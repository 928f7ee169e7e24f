"""Grouped matrix products: each group of rows times a matrix of its own.

Shape suffixes: M rows, sorted by group, E groups, D and F widths, C rows of a
block.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

_CPU_BLOCKS = 128, 32
"""Rows of a product: enough for its peak, then few for what is left over."""

_TPU_TILE = 512
"""Rows and columns of a tile; four of float32 fit the smallest vector memory
twice."""


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(
  x_MD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, platform: str
) -> jax.Array:
  """Multiplies each group of rows by its matrix.

  'tpu' and 'gpu': `jax.lax.ragged_dot`, whose gradient of the matrices a TPU
  computes for every group with every row; there that is the kernel `tgmm` of
  JAX's megablox instead. 'cpu': `ragged_dot` does all products that way, so it
  is a loop over blocks of rows, of as many turns as there are blocks.

  Args:
    x_MD: Rows.
    w_EDF: Matrices, in the rows' dtype.
    sizes_E: int32, rows of each group; rows beyond their sum are padding.
    platform: 'cpu', 'gpu' or 'tpu', whose kernels they are.

  Returns:
    (M, F): zeros for padding, which no gradient reaches.
  """
  return _product(x_MD, w_EDF, sizes_E, platform)


def _forward(x_MD, w_EDF, sizes_E, platform):
  return _product(x_MD, w_EDF, sizes_E, platform), (x_MD, w_EDF, sizes_E)


def _backward(platform, residuals, dy_MF):
  x_MD, w_EDF, sizes_E = residuals
  dx_MD = _product(dy_MF, w_EDF, sizes_E, platform, transposed=True)
  outer = {'cpu': _cpu_outer, 'gpu': _gpu_outer, 'tpu': _tpu_outer}[platform]
  return dx_MD, outer(x_MD, dy_MF, sizes_E).astype(w_EDF.dtype), None


grouped_matmul.defvjp(_forward, _backward)


def _product(x_MD, w_EDF, sizes_E, platform, transposed=False):
  """Rows times the matrix of their group, or times its transpose."""
  contract = 2 if transposed else 1
  if platform == 'cpu':
    return _cpu_product(x_MD, w_EDF, sizes_E, contract)
  y_MF = lax.ragged_dot_general(
    x_MD,
    w_EDF,
    sizes_E,
    lax.RaggedDotDimensionNumbers((([1], [contract]), ([], [])), [0], [0]),
  )
  # The kernels leave what they like in rows of no group.
  real_M1 = (jnp.arange(len(x_MD)) < jnp.sum(sizes_E))[:, None]
  return jnp.where(real_M1, y_MF, 0)


def _gpu_outer(x_MD, y_MF, sizes_E):
  """For each group the sum of its rows' outer products, (E, D, F)."""
  return lax.ragged_dot_general(
    x_MD,
    y_MF,
    sizes_E,
    lax.RaggedDotDimensionNumbers((([0], [0]), ([], [])), [0], []),
    preferred_element_type=jnp.float32,
  )


def _tpu_outer(x_MD, y_MF, sizes_E):
  """As `_gpu_outer`."""
  tile = min(_TPU_TILE, -(-len(x_MD) // 16) * 16)  # Sublanes come in 16s.
  padding = ((0, -len(x_MD) % tile), (0, 0))
  return tgmm(
    jnp.pad(x_MD, padding).T,  # The kernel reads it untransposed.
    jnp.pad(y_MF, padding),
    sizes_E,
    preferred_element_type=x_MD.dtype,
    tiling=(tile, *(min(_TPU_TILE, a.shape[1]) for a in (x_MD, y_MF))),
  )


def _fold_blocks(step, init, sizes_E, group, rows):
  """Folds `step(start, real_C1, carry)` over the blocks of a group.

  A block is C rows from `start`; the real ones are the group's that no earlier
  block had.
  """
  end = jnp.cumsum(sizes_E)[group]
  first = end - sizes_E[group]
  carry = init
  for block in _CPU_BLOCKS:
    length = min(block, rows)

    def turn(i, carry, first=first, length=length):
      wanted = first + i * length
      start = jnp.minimum(wanted, rows - length)
      row_C1 = start + jnp.arange(length)[:, None]
      return step(start, (row_C1 >= wanted) & (row_C1 < end), carry)

    # The last, shortest blocks reach the end.
    reach = length - 1 if block == _CPU_BLOCKS[-1] else 0
    turns = (end - first + reach) // length
    carry = lax.fori_loop(0, turns, turn, carry)
    first += turns * length
  return carry


def _cpu_product(x_MD, w_EDF, sizes_E, contract):
  rows = len(x_MD)

  def group(e, y_MF):
    w_DF = lax.dynamic_index_in_dim(w_EDF, e, keepdims=False)

    def block(start, real_C1, y_MF):
      x_CD = lax.dynamic_slice_in_dim(x_MD, start, len(real_C1))
      y_CF = lax.dot_general(x_CD, w_DF, (((1,), (contract - 1,)), ((), ())))
      old_CF = lax.dynamic_slice_in_dim(y_MF, start, len(real_C1))
      y_CF = jnp.where(real_C1, y_CF, old_CF)
      return lax.dynamic_update_slice_in_dim(y_MF, y_CF, start, 0)

    return _fold_blocks(block, y_MF, sizes_E, e, rows)

  y_MF = jnp.zeros((rows, w_EDF.shape[3 - contract]), x_MD.dtype)
  return lax.fori_loop(0, len(w_EDF), group, y_MF)


def _cpu_outer(x_MD, y_MF, sizes_E):
  """As `_gpu_outer`."""
  shape = x_MD.shape[1], y_MF.shape[1]

  def group(e, w_EDF):
    def block(start, real_C1, w_DF):
      x_CD, y_CF = (
        lax.dynamic_slice_in_dim(a, start, len(real_C1)) for a in (x_MD, y_MF)
      )
      return w_DF + lax.dot_general(
        x_CD,
        jnp.where(real_C1, y_CF, 0),
        (((0,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
      )

    w_DF = jnp.zeros(shape, jnp.float32)
    w_DF = _fold_blocks(block, w_DF, sizes_E, e, len(x_MD))
    return lax.dynamic_update_index_in_dim(w_EDF, w_DF, e, 0)

  w_EDF = jnp.zeros((len(sizes_E), *shape), jnp.float32)
  return lax.fori_loop(0, len(sizes_E), group, w_EDF)
