"""Causal attention by the splash kernel of jax, for a TPU.

The kernel wants lengths of whole blocks of 128, so shorter ones are padded at
their end: causal queries never look there, and what padding computes is
dropped. Head widths are taken as they are (64 fills half of a TPU's lanes).

Shape suffixes: B batch, T tokens, N query heads, K key and value heads, H head
width.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention as splash

LANES = 128
BLOCKS = (512, 384, 256, 128)


def attend(q_BTNH, k_BTKH, v_BTKH, segments_BT=None, *, interpret=False):
  """Causal self-attention; arguments and result as of `attention.attend`.

  With `interpret` the kernel is emulated, on any platform and slowly.
  """
  length, heads, width = q_BTNH.shape[1:]
  kernel = _kernel(length + -length % LANES, heads, interpret)
  q_BTNH = (q_BTNH / math.sqrt(width)).astype(q_BTNH.dtype)
  q_BNTH, k_BKTH, v_BKTH = (
    _padded(x, axis=1).transpose(0, 2, 1, 3) for x in (q_BTNH, k_BTKH, v_BTKH)
  )
  ids = None
  if segments_BT is not None:
    ids_BT = _padded(segments_BT, axis=1)
    ids = splash.SegmentIds(ids_BT, ids_BT)
  y_BNTH = jax.vmap(kernel)(q_BNTH, k_BKTH, v_BKTH, ids)
  return y_BNTH.transpose(0, 2, 1, 3)[:, :length]


def _padded(x, axis: int):
  widths = [(0, 0)] * x.ndim
  widths[axis] = (0, -x.shape[axis] % LANES)
  return jnp.pad(x, widths)


def _kernel(length: int, heads: int, interpret: bool):
  """The kernel for whole blocks of tokens; its masks are constants."""
  size = next(block for block in BLOCKS if length % block == 0)
  mask = splash.MultiHeadMask([splash.CausalMask((length, length))] * heads)
  return splash.make_splash_mha(
    mask,
    block_sizes=splash.BlockSizes(
      block_q=size,
      block_kv=size,
      block_q_dkv=size,
      block_kv_dkv=size,
      block_q_dq=size,
      block_kv_dq=size,
    ),
    head_shards=1,
    q_seq_shards=1,
    residual_checkpoint_name='attention',
    interpret=interpret,
  )
