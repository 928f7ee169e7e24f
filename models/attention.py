"""Causal attention: one formula, and the kernel of each platform.

A TPU has jax's splash kernel, an NVIDIA GPU has cuDNN's in float16 and
bfloat16, and all else is plain matrix products. The platform is that of the
mesh's devices: a CPU that compiles for a TPU compiles the TPU's kernel.

Shape suffixes: B batch, T query tokens, S keys, N query heads, K key and value
heads, G query heads of a key head, H head width. Query head n uses key head
n // G.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, PartitionSpec

from models import attention_portable, sharding


# Outside of jit it is compiled once, not at every call; inside it is inlined.
@functools.partial(jax.jit, static_argnames='mesh', inline=True)
def attend(
  q_BTNH, k_BTKH, v_BTKH, *, segments_BT=None, mesh: Mesh | None = None
):
  """Causal self-attention.

  Args:
    q_BTNH: Queries, rotated; scaled here by H**-0.5. N must be a multiple of K.
    k_BTKH: Keys, rotated.
    v_BTKH: Values.
    segments_BT: int32 ids of packed documents; a token sees its own only.
    mesh: Its devices choose the kernel; its axes split batch and heads.

  Returns:
    The weighted values (B, T, N, H) in the dtype of the queries. They bear the
    checkpoint name 'attention', and so does what else a gradient needs of the
    forward: if a policy saves it, that runs once (cuDNN's runs again, its row
    sums have no name).
  """
  return _on_shards(
    mesh, kernel(mesh, q_BTNH), q_BTNH, k_BTKH, v_BTKH, segments_BT
  )


def kernel(mesh: Mesh | None, q_BTNH):
  """The function that computes attention for these queries on this mesh."""
  match sharding.platform(mesh):
    case 'tpu':
      # Imported late: other platforms need no Pallas.
      from models import attention_tpu

      return attention_tpu.attend
    case 'gpu' if q_BTNH.dtype in (jnp.float16, jnp.bfloat16):
      # Up to 256 from Hopper on; 128 holds everywhere.
      if q_BTNH.shape[-1] % 8 == 0 and q_BTNH.shape[-1] <= 128:
        return cudnn
  return attention_portable.attend


def cudnn(q_BTNH, k_BTKH, v_BTKH, segments_BT=None):
  """The kernel of cuDNN, to which segments are a mask.

  Raises:
    RuntimeError: jax has no CUDA plugin, even if only to compile.
  """
  # Its gradient takes even lengths only; no query looks at a token after it.
  length = q_BTNH.shape[1]
  q_BTNH, k_BTKH, v_BTKH, segments_BT = jax.tree.map(
    lambda x: jnp.pad(x, [(0, 0), (0, length % 2)] + [(0, 0)] * (x.ndim - 2)),
    (q_BTNH, k_BTKH, v_BTKH, segments_BT),
  )
  sees_B1TT = None
  if segments_BT is not None:
    sees_B1TT = (segments_BT[:, :, None] == segments_BT[:, None, :])[:, None]
  y_BTNH = jax.nn.dot_product_attention(
    q_BTNH,
    k_BTKH,
    v_BTKH,
    mask=sees_B1TT,
    is_causal=True,
    implementation='cudnn',
  )
  return checkpoint_name(y_BTNH[:, :length], 'attention')


@functools.partial(jax.jit, static_argnames='mesh', inline=True)
def attend_cached(q_BTNH, k_BSKH, v_BSKH, start, mesh: Mesh | None = None):
  """Attention of the newest tokens to a cache of keys and values.

  Args:
    q_BTNH: Queries, rotated; the one at t has position start + t.
    k_BSKH: Keys by position; those after start + t do not count.
    v_BSKH: Values by position; finite even where they do not count.
    start: int32, may be traced.
    mesh: Its axes split batch and heads.

  Returns:
    The weighted values (B, T, N, H) in the dtype of the queries.
  """

  def local(q_BTNH, k_BSKH, v_BSKH, start):
    position = start + jnp.arange(q_BTNH.shape[1])
    sees_TS = position[:, None] >= jnp.arange(k_BSKH.shape[1])
    return _formula(q_BTNH, k_BSKH, v_BSKH, sees_TS[None])

  return _on_shards(mesh, local, q_BTNH, k_BSKH, v_BSKH, jnp.asarray(start))


def reference(q_BTNH, k_BTKH, v_BTKH, segments_BT=None):
  """The plain formula, which every kernel must equal."""
  position = jnp.arange(q_BTNH.shape[1])
  sees_BTS = (position[:, None] >= position)[None]
  if segments_BT is not None:
    sees_BTS &= segments_BT[:, :, None] == segments_BT[:, None, :]
  return _formula(q_BTNH, k_BTKH, v_BTKH, sees_BTS)


def _formula(q_BTNH, k_BSKH, v_BSKH, sees_BTS):
  """Attention to the keys that each query sees, scores in float32."""
  batch, length, heads, width = q_BTNH.shape
  kv_heads = k_BSKH.shape[2]
  q_BTKGH = q_BTNH.reshape(batch, length, kv_heads, heads // kv_heads, width)
  s_BKGTS = jnp.einsum(
    'btkgh,bskh->bkgts', q_BTKGH, k_BSKH, preferred_element_type=jnp.float32
  )
  s_BKGTS = jnp.where(
    sees_BTS[:, None, None],
    s_BKGTS / math.sqrt(width),
    attention_portable.UNSEEN,
  )
  p_BKGTS = jax.nn.softmax(s_BKGTS, axis=-1).astype(v_BSKH.dtype)
  y_BTKGH = jnp.einsum('bkgts,bskh->btkgh', p_BKGTS, v_BSKH)
  return y_BTKGH.reshape(q_BTNH.shape).astype(q_BTNH.dtype)


def _on_shards(mesh: Mesh | None, local, q_BTNH, *rest):
  """Runs `local` on each device's sequences and heads: all are independent.

  Kernels cannot be partitioned by the compiler. A batch that the mesh does not
  divide is computed in full on every device.
  """
  if mesh is None:
    return local(q_BTNH, *rest)
  batch = sharding.divided(mesh, q_BTNH.shape[0], 'batch')
  heads = sharding.spec(batch, 'length', 'heads', 'head_dim')
  tokens = sharding.spec(batch, 'length')
  by_rank = {4: heads, 2: tokens, 0: PartitionSpec()}
  arrays = q_BTNH, *rest
  return sharding.island(
    local,
    mesh,
    in_specs=jax.tree.map(lambda x: by_rank[x.ndim], arrays),
    out_specs=heads,
    check_vma=False,  # Pallas kernels do not say over which axes they vary.
  )(*arrays)
