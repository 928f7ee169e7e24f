"""Cross-entropy fused with the head: logits exist a chunk at a time.

Shape suffixes: B batch, T tokens, D model width, V vocabulary, M tokens of all
sequences in a row, or those of one chunk.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from models import sharding

CHUNK_TOKENS = {'cpu': 512, 'gpu': 2048, 'tpu': 2048}
"""Tokens of a chunk, at most, on each device. A chunk reads and writes the
head's float32 gradient, 8 bytes for every 2 FLOPs a token: an accelerator needs
thousands to hide that, a CPU wants logits that stay near its caches."""


def plain_cross_entropy(
  x_BTD: jax.Array,
  head_DV: jax.Array,
  targets_BT: jax.Array,
  weights_BT: jax.Array,
  *,
  z_weight: float = 0.0,
  mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """What `cross_entropy` must equal, on whole logits.

  The compiler splits it over a mesh by itself.
  """
  _check(x_BTD, head_DV, targets_BT, weights_BT, mesh)
  vocab = head_DV.shape[1]
  targets_BT, weights_BT = _legal(targets_BT, weights_BT, vocab)
  logits_BTV = jnp.einsum(
    'btd,dv->btv', x_BTD, head_DV, preferred_element_type=jnp.float32
  )
  lse_BT = jax.nn.logsumexp(logits_BTV, axis=-1)
  target_BT1 = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)
  nll_BT = lse_BT - target_BT1[..., 0]
  nll, squares = (
    jnp.sum(weights_BT * a_BT) for a_BT in (nll_BT, jnp.square(lse_BT))
  )
  return nll + z_weight * squares, *lax.stop_gradient((nll, squares))


# Outside of jit it is compiled once, not at every call; inside it is inlined.
@functools.partial(jax.jit, static_argnames=('z_weight', 'mesh'), inline=True)
def cross_entropy(
  x_BTD: jax.Array,
  head_DV: jax.Array,
  targets_BT: jax.Array,
  weights_BT: jax.Array,
  *,
  z_weight: float = 0.0,
  mesh: Mesh | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Cross-entropy of the targets under the logits `x @ head`.

  With nll the negative log-likelihood of a target and lse the log-sum-exp of
  its token's logits, the results are

    loss    = sum(weights * (nll + z_weight * lse**2))
    nll     = sum(weights * nll)
    squares = sum(weights * lse**2)

  Only the first carries a gradient; the others are to report. Differentiated,
  the forward pass also finds the gradients of the loss, chunk by chunk while
  it has the logits, and the backward pass only scales them: three matrix
  products, where recomputed logits would cost a fourth. So do not put this
  under rematerialisation. Undifferentiated, it does one product.

  Args:
    x_BTD: float32 or bfloat16. Products take this dtype and add up in float32;
      all else is float32.
    head_DV: Of x's dtype. Its gradient is a float32 sum until it is complete.
    targets_BT: Integers. One out of range makes the results NaN, unless its
      weight is 0.
    weights_BT: Floats, 0 on padding.
    z_weight: Of the squared log-normaliser (arXiv 2204.02311).
    mesh: Over `models.sharding.AXES`. It splits x, targets and weights along
      the batch, and the head as a parameter. The head is gathered along its
      width once and its gradient reduced once, whatever the number of chunks;
      the vocabulary stays split.

  Returns:
    The three: float32 scalars, in nats, sums over the global batch.

  Raises:
    ValueError: shapes or dtypes do not fit together, or do not fit the mesh.
  """
  _check(x_BTD, head_DV, targets_BT, weights_BT, mesh)
  tokens_BT = _legal(targets_BT, weights_BT, head_DV.shape[1])
  chunk_tokens = CHUNK_TOKENS[sharding.platform(mesh)]
  return _sums(z_weight, mesh, chunk_tokens, x_BTD, head_DV, *tokens_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _sums(z_weight, mesh, chunk_tokens, *arrays):
  sums, _ = _run(z_weight, mesh, chunk_tokens, False, *arrays)
  return sums


def _sums_forward(z_weight, mesh, chunk_tokens, *arrays):
  return _run(z_weight, mesh, chunk_tokens, True, *arrays)


def _sums_backward(z_weight, mesh, chunk_tokens, grads, cotangents):
  del z_weight, mesh, chunk_tokens
  dx_BTD, dhead_DV, dweights_BT = grads
  scale, *_ = cotangents
  dtype = dx_BTD.dtype
  dx_BTD = (scale * dx_BTD.astype(jnp.float32)).astype(dtype)
  return dx_BTD, (scale * dhead_DV).astype(dtype), None, scale * dweights_BT


_sums.defvjp(_sums_forward, _sums_backward)


class _Axes(NamedTuple):
  """Mesh axes that split the arrays' axes."""

  batch: tuple[str, ...]
  embed: tuple[str, ...]
  vocab: tuple[str, ...]


def _run(z_weight, mesh, chunk_tokens, with_grads, *arrays):
  """The sums, and the loss's gradients of x, head and weights."""
  axes = _Axes((), (), ())
  if mesh is not None:
    axes = _Axes(
      *(sharding.axes_of(name, mesh) for name in ('batch', 'embed', 'vocab'))
    )
  local = functools.partial(
    _run_local, z_weight, axes, chunk_tokens, with_grads
  )
  if mesh is None:
    return local(*arrays)
  x_spec = sharding.spec('batch', 'length', 'width', mesh=mesh)
  head_spec = sharding.spec('embed', 'vocab', mesh=mesh)
  token_spec = sharding.spec('batch', 'length', mesh=mesh)
  return sharding.island(
    local,
    mesh,
    in_specs=(x_spec, head_spec, token_spec, token_spec),
    out_specs=(
      (PartitionSpec(),) * 3,
      (x_spec, head_spec, token_spec) if with_grads else None,
    ),
  )(*arrays)


def _run_local(
  z_weight, axes, chunk_tokens, with_grads, x_BTD, head_DV, *tokens_BT
):
  """`_run` on one device."""
  batch, embed, vocab = axes
  head_DV = _over(embed, lax.all_gather, head_DV, axis=0, tiled=True)
  part = lax.axis_index(vocab) if vocab else 0
  first_id = part * head_DV.shape[1]

  def chunk(dhead_DV, arrays):
    x_MD, targets_M, weights_M = arrays
    ids_M = targets_M - first_id
    nll_M, lse_M, logits_MV = _losses(x_MD, head_DV, ids_M, vocab)
    if not with_grads:
      return None, (nll_M, lse_M, None)
    softmax_MV = jnp.exp(logits_MV - lse_M[:, None])
    is_target_MV = jnp.arange(head_DV.shape[1]) == ids_M[:, None]
    dlse_M = weights_M * (1 + 2 * z_weight * lse_M)
    dlogits_MV = dlse_M[:, None] * softmax_MV
    dlogits_MV -= jnp.where(is_target_MV, weights_M[:, None], 0)
    dlogits_MV = dlogits_MV.astype(x_MD.dtype)
    dx_MD = _over(vocab, lax.psum, _product('mv,dv->md', dlogits_MV, head_DV))
    dhead_DV += _product('md,mv->dv', x_MD, dlogits_MV)
    return dhead_DV, (nll_M, lse_M, dx_MD.astype(x_MD.dtype))

  dhead_DV = None
  if with_grads:
    dhead_DV = jnp.zeros(head_DV.shape, jnp.float32)
    dhead_DV = _over((*batch, *vocab), lax.pcast, dhead_DV, to='varying')
  dhead_DV, (nll_BT, lse_BT, dx_BTD) = _scan_tokens(
    chunk, dhead_DV, (x_BTD, *tokens_BT), chunk_tokens
  )
  squares_BT = jnp.square(lse_BT)
  loss_BT = nll_BT + z_weight * squares_BT
  _, weights_BT = tokens_BT
  sums = tuple(
    _over(batch, lax.psum, jnp.sum(weights_BT * a_BT))
    for a_BT in (loss_BT, nll_BT, squares_BT)
  )
  if not with_grads:
    return sums, None
  dhead_DV = _over(
    embed, lax.psum_scatter, dhead_DV, scatter_dimension=0, tiled=True
  )
  copies = tuple(axis for axis in batch if axis not in embed)
  dhead_DV = _over(copies, lax.psum, dhead_DV)
  return sums, (dx_BTD, dhead_DV, loss_BT)


def _over(axes, collective, x, **options):
  """A collective over mesh axes, of which there may be none."""
  return collective(x, axes, **options) if axes else x


def _losses(x_MD, head_DV, ids_M, axes):
  """Negative log-likelihoods, log-normalisers, this part's logits."""
  vocab = head_DV.shape[1]
  logits_MV = _product('md,dv->mv', x_MD, head_DV)
  peak_M = _over(axes, lax.pmax, jnp.max(logits_MV, axis=-1))
  total_M = jnp.sum(jnp.exp(logits_MV - peak_M[:, None]), axis=-1)
  lse_M = peak_M + jnp.log(_over(axes, lax.psum, total_M))
  near_M1 = jnp.clip(ids_M, 0, vocab - 1)[:, None]
  target_M = jnp.take_along_axis(logits_MV, near_M1, axis=-1)[:, 0]
  is_here_M = (ids_M >= 0) & (ids_M < vocab)
  target_M = _over(axes, lax.psum, jnp.where(is_here_M, target_M, 0))
  return lse_M - target_M, lse_M, logits_MV


def _product(formula, a, b):
  return jnp.einsum(formula, a, b, preferred_element_type=jnp.float32)


def _scan_tokens(f, carry, arrays_BT, chunk_tokens):
  """Scans equal chunks of all tokens, the last padded with zeros."""
  batch, length = arrays_BT[0].shape[:2]
  tokens = batch * length
  count = math.ceil(tokens / chunk_tokens)
  size = math.ceil(tokens / count)

  def split(a_BT):
    a_M = a_BT.reshape(tokens, *a_BT.shape[2:])
    if count == 1:
      return a_M
    padding = [(0, count * size - tokens)] + [(0, 0)] * (a_M.ndim - 1)
    return jnp.pad(a_M, padding).reshape(count, size, *a_M.shape[1:])

  def join(a_M):
    if count > 1:
      a_M = a_M.reshape(count * size, *a_M.shape[2:])[:tokens]
    return a_M.reshape(batch, length, *a_M.shape[1:])

  arrays_M = jax.tree.map(split, arrays_BT)
  run = f if count == 1 else functools.partial(lax.scan, f)
  carry, results_M = run(carry, arrays_M)
  return carry, jax.tree.map(join, results_M)


def _legal(targets_BT, weights_BT, vocab):
  """Targets in range, and float32 weights: NaN where a target was not.

  A weight of 0 stays 0.
  """
  targets_BT = targets_BT.astype(jnp.int32)
  weights_BT = weights_BT.astype(jnp.float32)
  legal_BT = jnp.clip(targets_BT, 0, vocab - 1)
  is_wrong_BT = (legal_BT != targets_BT) & (weights_BT != 0)
  weights_BT = jnp.where(is_wrong_BT, jnp.nan, weights_BT)
  return legal_BT, weights_BT


def _check(x_BTD, head_DV, targets_BT, weights_BT, mesh):
  """Raises ValueError for arrays that do not fit together or the mesh."""
  if x_BTD.ndim != 3:
    raise ValueError(f'x must be (batch, length, width), not {x_BTD.shape}')
  batch, length, width = x_BTD.shape
  if head_DV.ndim != 2 or len(head_DV) != width:
    raise ValueError(
      f'head must be (width, vocabulary), with the width {width} of x, not '
      f'{head_DV.shape}'
    )
  for name, a in (('targets', targets_BT), ('weights', weights_BT)):
    if a.shape != (batch, length):
      raise ValueError(
        f'{name} must have the batch and length {(batch, length)} of x, not '
        f'{a.shape}'
      )
  if 0 in x_BTD.shape or 0 in head_DV.shape:
    raise ValueError(
      f'x {x_BTD.shape} and head {head_DV.shape} must not be empty'
    )
  if x_BTD.dtype not in (jnp.float32, jnp.bfloat16):
    raise ValueError(f'x must be float32 or bfloat16, not {x_BTD.dtype}')
  if head_DV.dtype != x_BTD.dtype:
    raise ValueError(
      f'head must have the dtype {x_BTD.dtype} of x, not {head_DV.dtype}'
    )
  if not jnp.issubdtype(targets_BT.dtype, jnp.integer):
    raise ValueError(f'targets must be integers, not {targets_BT.dtype}')
  if not jnp.issubdtype(weights_BT.dtype, jnp.floating):
    raise ValueError(f'weights must be floats, not {weights_BT.dtype}')
  if mesh is None:
    return
  for name, size, logical in (
    ('the batch of x', batch, 'batch'),
    ('the width of head', width, 'embed'),
    ('the vocabulary of head', head_DV.shape[1], 'vocab'),
  ):
    if not sharding.divides(mesh, size, logical):
      raise ValueError(
        f'{name} ({size}) must be a multiple of {sharding.ways(mesh, logical)},'
        f' the size of the mesh over {" x ".join(sharding.axes_of(logical))}'
      )
