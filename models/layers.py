"""Parts of a decoder: norm, rotary embedding, attention, SwiGLU.

Shape suffixes: B batch, T tokens, D model width, F hidden width, N query
heads, K key and value heads, H head width.
"""

import jax
import jax.numpy as jnp
from flax import nnx


def normal_param(rngs: nnx.Rngs, shape: tuple[int, ...], std: float):
  """A float32 parameter drawn from normal(0, std)."""
  return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32))


class RMSNorm(nnx.Module):
  """Divides by the root mean square, in float32, then scales."""

  def __init__(self, width: int, eps: float):
    self.scale = nnx.Param(jnp.ones((width,), jnp.float32))
    self.eps = eps

  def __call__(self, x_BTD):
    wide_BTD = x_BTD.astype(jnp.float32)
    mean_BT1 = jnp.mean(jnp.square(wide_BTD), axis=-1, keepdims=True)
    normed_BTD = wide_BTD * jax.lax.rsqrt(mean_BT1 + self.eps)
    return (normed_BTD * self.scale[...]).astype(x_BTD.dtype)


def rotary_angles(length: int, head_dim: int, theta: float):
  """Cosines and sines of the rotary embedding.

  Args:
    length: Tokens in the sequence.
    head_dim: Width of a head.
    theta: Base of the wavelengths, in tokens.

  Returns:
    Two float32 arrays (length, head_dim / 2).
  """
  exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
  position_T = jnp.arange(length, dtype=jnp.float32)
  angle = position_T[:, None] / theta**exponent
  return jnp.cos(angle), jnp.sin(angle)


def apply_rotary(x_BTNH, cos, sin):
  """Rotates pairs (i, i + H/2) of each head: the layout of Hugging Face."""
  first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  cos, sin = cos[:, None, :], sin[:, None, :]
  rotated = jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
  return rotated.astype(x_BTNH.dtype)


class Attention(nnx.Module):
  """Causal self-attention with rotary positions and grouped queries."""

  def __init__(self, config, *, rngs: nnx.Rngs):
    c = config
    self.query = normal_param(
      rngs, (c.d_model, c.n_heads, c.head_dim), c.init_std
    )
    self.key = normal_param(
      rngs, (c.d_model, c.kv_heads, c.head_dim), c.init_std
    )
    self.value = normal_param(
      rngs, (c.d_model, c.kv_heads, c.head_dim), c.init_std
    )
    self.out = normal_param(
      rngs, (c.n_heads, c.head_dim, c.d_model), c.init_std
    )

  def __call__(self, x_BTD, cos, sin):
    dtype = x_BTD.dtype
    query, key, value, out = (
      w[...].astype(dtype) for w in (self.query, self.key, self.value, self.out)
    )
    q_BTNH = apply_rotary(jnp.einsum('btd,dnh->btnh', x_BTD, query), cos, sin)
    k_BTKH = apply_rotary(jnp.einsum('btd,dkh->btkh', x_BTD, key), cos, sin)
    v_BTKH = jnp.einsum('btd,dkh->btkh', x_BTD, value)
    y_BTNH = jax.nn.dot_product_attention(
      q_BTNH, k_BTKH, v_BTKH, is_causal=True, implementation='xla'
    )
    return jnp.einsum('btnh,nhd->btd', y_BTNH, out)


class SwiGLU(nnx.Module):
  """down(silu(gate(x)) * up(x)), without biases."""

  def __init__(self, d_model: int, d_ff: int, std: float, *, rngs: nnx.Rngs):
    self.gate = normal_param(rngs, (d_model, d_ff), std)
    self.up = normal_param(rngs, (d_model, d_ff), std)
    self.down = normal_param(rngs, (d_ff, d_model), std)

  def __call__(self, x_BTD):
    gate, up, down = (
      w[...].astype(x_BTD.dtype) for w in (self.gate, self.up, self.down)
    )
    h_BTF = jax.nn.silu(x_BTD @ gate) * (x_BTD @ up)
    return h_BTF @ down
