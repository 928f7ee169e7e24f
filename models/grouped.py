"""Grouped matrix products: each group of rows times a matrix of its own.

Shape suffixes: M rows, sorted by group, E groups, D and F widths, N tiles, T
rows of a tile, C rows of a block.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax

_CPU_TILE = 128
"""Rows of a tile on a CPU, at least: enough for a product's peak."""

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
  is one batched product, which all cores share: each tile of rows by a copy of
  the matrix of its first row. A loop goes over the few rows of other groups.

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
  # Imported late: other platforms need no Pallas.
  from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

  tile = min(_TPU_TILE, -(-len(x_MD) // 16) * 16)  # Sublanes come in 16s.
  padding = ((0, -len(x_MD) % tile), (0, 0))
  return tgmm(
    jnp.pad(x_MD, padding).T,  # The kernel reads it untransposed.
    jnp.pad(y_MF, padding),
    sizes_E,
    preferred_element_type=x_MD.dtype,
    tiling=(tile, *(min(_TPU_TILE, a.shape[1]) for a in (x_MD, y_MF))),
  )


def _tiles(x_MD, tile):
  """Rows in tiles, (N, T, D); zeros fill the last."""
  padding = ((0, -len(x_MD) % tile), (0, 0))
  return jnp.pad(x_MD, padding).reshape(-1, tile, x_MD.shape[1])


def _cpu_tile(rows, w_shape):
  """Rows of a tile: copies of the matrices take no more room than rows do."""
  return min(rows, max(_CPU_TILE, min(w_shape[-2:])))


def _owners(tiles, sizes_E):
  """The group of each tile's first row, (N,); whose rows are which, (N, T, 1).

  Tiles of padding have a group, too, but no row is its own.
  """
  count, tile = tiles.shape[:2]
  row_NT = jnp.arange(count * tile).reshape(count, tile)
  end_E = jnp.cumsum(sizes_E)
  past_NE = row_NT[:, :1] >= end_E
  group_N = jnp.minimum(jnp.sum(past_NE, axis=1), len(sizes_E) - 1)
  return group_N, (row_NT < end_E[group_N][:, None])[..., None]


def _fold_rest(step, init, sizes_E, group, tiles):
  """Folds `step(start, real_C1, carry)` over a group's rows of others' tiles.

  Those are its first ones, up to the next tile. A block is C rows from
  `start`; the real ones are the group's that no earlier block had.
  """
  count, tile = tiles.shape[:2]
  length = -(-tile // 4)
  end = jnp.cumsum(sizes_E)[group]
  first = end - sizes_E[group]
  end = jnp.minimum(end, -(-first // tile) * tile)

  def turn(i, carry):
    wanted = first + i * length
    start = jnp.minimum(wanted, count * tile - length)
    row_C1 = start + jnp.arange(length)[:, None]
    return step(start, (row_C1 >= wanted) & (row_C1 < end), carry)

  return lax.fori_loop(0, -(-(end - first) // length), turn, init)


def _cpu_product(x_MD, w_EDF, sizes_E, contract):
  x_NTD = _tiles(x_MD, _cpu_tile(len(x_MD), w_EDF.shape))
  group_N, own_NT1 = _owners(x_NTD, sizes_E)
  y_NTF = lax.dot_general(
    x_NTD,
    w_EDF.at[group_N].get(mode='promise_in_bounds'),
    (((2,), (contract,)), ((0,), (0,))),
  )
  y_NTF = jnp.where(own_NT1, y_NTF, 0)
  flat_MD = x_NTD.reshape(-1, x_MD.shape[1])

  def group(e, y_MF):
    w_DF = lax.dynamic_index_in_dim(w_EDF, e, keepdims=False)

    def block(start, real_C1, y_MF):
      x_CD = lax.dynamic_slice_in_dim(flat_MD, start, len(real_C1))
      y_CF = lax.dot_general(x_CD, w_DF, (((1,), (contract - 1,)), ((), ())))
      old_CF = lax.dynamic_slice_in_dim(y_MF, start, len(real_C1))
      y_CF = jnp.where(real_C1, y_CF, old_CF)
      return lax.dynamic_update_slice_in_dim(y_MF, y_CF, start, 0)

    return _fold_rest(block, y_MF, sizes_E, e, x_NTD)

  y_MF = y_NTF.reshape(-1, y_NTF.shape[-1])
  return lax.fori_loop(0, len(w_EDF), group, y_MF)[: len(x_MD)]


def _cpu_outer(x_MD, y_MF, sizes_E):
  """As `_gpu_outer`."""
  widths = x_MD.shape[1], y_MF.shape[1]
  tile = _cpu_tile(len(x_MD), widths)
  x_NTD, y_NTF = (_tiles(a, tile) for a in (x_MD, y_MF))
  group_N, own_NT1 = _owners(x_NTD, sizes_E)
  w_NDF = lax.dot_general(
    x_NTD,
    jnp.where(own_NT1, y_NTF, 0),
    (((1,), (1,)), ((0,), (0,))),
    preferred_element_type=jnp.float32,
  )
  w_EDF = jax.ops.segment_sum(
    w_NDF, group_N, len(sizes_E), indices_are_sorted=True
  )
  flat = [a.reshape(-1, a.shape[-1]) for a in (x_NTD, y_NTF)]

  def group(e, w_EDF):
    def block(start, real_C1, w_DF):
      x_CD, y_CF = (
        lax.dynamic_slice_in_dim(a, start, len(real_C1)) for a in flat
      )
      return w_DF + lax.dot_general(
        x_CD,
        jnp.where(real_C1, y_CF, 0),
        (((0,), (0,)), ((), ())),
        preferred_element_type=jnp.float32,
      )

    w_DF = lax.dynamic_index_in_dim(w_EDF, e, keepdims=False)
    w_DF = _fold_rest(block, w_DF, sizes_E, e, x_NTD)
    return lax.dynamic_update_index_in_dim(w_EDF, w_DF, e, 0)

  return lax.fori_loop(0, len(sizes_E), group, w_EDF)
