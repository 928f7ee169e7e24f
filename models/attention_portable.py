"""Causal attention from plain matrix products, without work for the masked.

Queries come in a few blocks, each with only the keys up to its end: with four,
five eighths of the plain formula's products. The gradient is written out, and
needs no scores of the forward.

Shape suffixes: B batch, T query tokens, S keys, N query heads, K key and value
heads, G query heads of a key head, H head width, R the G T rows of a block.
Scores lie keys first (S, R): every product of the gradient then contracts
contiguous axes, which XLA's CPU backend needs to be fast.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

UNSEEN = -0.7 * float(jnp.finfo(jnp.float32).max)
"""Score of a key that must not count: finite, so that nothing turns to nan."""
BLOCK = 128
MOST_BLOCKS = 4  # Unrolled: more would save less than they cost to compile.


@jax.custom_vjp
def attend(q_BTNH, k_BTKH, v_BTKH, segments_BT=None):
  """Causal self-attention; arguments and result as of `attention.attend`."""
  return _forward(q_BTNH, k_BTKH, v_BTKH, segments_BT)[0]


def _forward(q_BTNH, k_BTKH, v_BTKH, segments_BT):
  q_BKGTH, k_BKSH = _queries(q_BTNH, k_BTKH.shape[2]), _keys(k_BTKH)
  v_BKHS = _turned(v_BTKH)
  ys, maxima, sums = [], [], []
  for rows in _blocks(q_BTNH.shape[1]):
    s_BKSR = _scores(q_BKGTH, k_BKSH, segments_BT, rows)
    max_BKR = jnp.max(s_BKSR, axis=2)
    p_BKSR = jnp.exp(s_BKSR - max_BKR[:, :, None])
    sum_BKR = jnp.sum(p_BKSR, axis=2)
    y_BKHR = v_BKHS[..., : rows.stop] @ p_BKSR / sum_BKR[:, :, None]
    split = functools.partial(_split, groups=q_BKGTH.shape[2])
    ys.append(split(y_BKHR))
    maxima.append(split(max_BKR))
    sums.append(split(sum_BKR))
  y_BKHGT, max_BKGT, sum_BKGT = (
    jnp.concatenate(parts, axis=-1) for parts in (ys, maxima, sums)
  )
  y_BTNH = _merge_heads(y_BKHGT).astype(q_BTNH.dtype)
  y_BTNH, max_BKGT, sum_BKGT = (
    checkpoint_name(x, 'attention') for x in (y_BTNH, max_BKGT, sum_BKGT)
  )
  saved = q_BTNH, k_BTKH, v_BTKH, segments_BT, y_BTNH, max_BKGT, sum_BKGT
  return y_BTNH, saved


def _backward(saved, dy_BTNH):
  q_BTNH, k_BTKH, v_BTKH, segments_BT, y_BTNH, max_BKGT, sum_BKGT = saved
  kv_heads = k_BTKH.shape[2]
  q_BKGTH, k_BKSH, v_BKSH = (
    _queries(q_BTNH, kv_heads),
    _keys(k_BTKH),
    _keys(v_BTKH),
  )
  k_BKHS = _turned(k_BTKH)
  # The softmax's divisor goes to this small side: probabilities stay as the
  # forward made them, so the compiler may keep those instead.
  dy_BKGTH = _group(dy_BTNH, kv_heads) / sum_BKGT[..., None]
  delta_BKGT = jnp.sum(dy_BKGTH * _group(y_BTNH, kv_heads), axis=-1)
  dk_BKSH, dv_BKSH = jnp.zeros_like(k_BKSH), jnp.zeros_like(v_BKSH)
  dqs = []
  for rows in _blocks(q_BTNH.shape[1]):
    keys = slice(rows.stop)
    s_BKSR = _scores(q_BKGTH, k_BKSH, segments_BT, rows)
    p_BKSR = jnp.exp(s_BKSR - _rows(max_BKGT, rows)[:, :, None])
    dy_BKRH = _rows(dy_BKGTH, rows)
    dp_BKSR = jnp.einsum('bksh,bkrh->bksr', v_BKSH[:, :, keys], dy_BKRH)
    ds_BKSR = p_BKSR * (dp_BKSR - _rows(delta_BKGT, rows)[:, :, None])
    dv_BKSH = dv_BKSH.at[:, :, keys].add(p_BKSR @ dy_BKRH)
    dk_BKSH = dk_BKSH.at[:, :, keys].add(ds_BKSR @ _rows(q_BKGTH, rows))
    dqs.append(_split(k_BKHS[..., keys] @ ds_BKSR, q_BKGTH.shape[2]))
  dq_BTNH = _merge_heads(jnp.concatenate(dqs, axis=-1))
  return (
    (dq_BTNH / math.sqrt(q_BTNH.shape[-1])).astype(q_BTNH.dtype),
    dk_BKSH.transpose(0, 2, 1, 3).astype(k_BTKH.dtype),
    dv_BKSH.transpose(0, 2, 1, 3).astype(v_BTKH.dtype),
    None,
  )


attend.defvjp(_forward, _backward)


def _blocks(length: int) -> list[slice]:
  """Equal runs of queries."""
  count = min(MOST_BLOCKS, -(-length // BLOCK))
  size = -(-length // count)
  return [slice(i, min(i + size, length)) for i in range(0, length, size)]


def _scores(q_BKGTH, k_BKSH, segments_BT, rows: slice):
  """Of a block's queries to all keys up to its end, keys first."""
  s_BKSR = jnp.einsum(
    'bksh,bkrh->bksr', k_BKSH[:, :, : rows.stop], _rows(q_BKGTH, rows)
  )
  position = jnp.arange(rows.stop)
  sees_BST = (position[:, None] <= position[None, rows])[None]
  if segments_BT is not None:
    ids_BS = segments_BT[:, : rows.stop]
    sees_BST &= ids_BS[:, :, None] == ids_BS[:, None, rows]
  sees_BSR = jnp.tile(sees_BST, q_BKGTH.shape[2])
  return jnp.where(sees_BSR[:, None], s_BKSR, UNSEEN)


def _group(x_BTNH, kv_heads: int):
  batch, length, heads, width = x_BTNH.shape
  x_BTKGH = x_BTNH.reshape(batch, length, kv_heads, heads // kv_heads, width)
  return x_BTKGH.transpose(0, 2, 3, 1, 4).astype(jnp.float32)


def _queries(q_BTNH, kv_heads: int):
  return _group(q_BTNH, kv_heads) / math.sqrt(q_BTNH.shape[-1])


def _keys(x_BTKH):
  return x_BTKH.transpose(0, 2, 1, 3).astype(jnp.float32)


def _turned(x_BTKH):
  return x_BTKH.transpose(0, 2, 3, 1).astype(jnp.float32)


def _rows(x_BKGT, rows: slice):
  """A block of queries, of all groups of a key head: (B, K, G T, ...)."""
  block = x_BKGT[:, :, :, rows]
  return block.reshape(*block.shape[:2], -1, *block.shape[4:])


def _split(x_BKR, groups: int):
  """(..., G T) to (..., G, T)."""
  return x_BKR.reshape(*x_BKR.shape[:-1], groups, -1)


def _merge_heads(x_BKHGT):
  batch, kv_heads, width, groups, length = x_BKHGT.shape
  x_BTKGH = x_BKHGT.transpose(0, 4, 1, 3, 2)
  return x_BTKGH.reshape(batch, length, kv_heads * groups, width)
