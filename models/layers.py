"""Parts of a decoder: norm, rotary embedding, attention, SwiGLU.

Shape suffixes: B batch, T tokens, D model width, F hidden width, N query
heads, K key and value heads, H head width.
"""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from models.config import RopeScaling


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


def rotary_angles(
  length: int,
  head_dim: int,
  theta: float,
  scaling: RopeScaling | None = None,
):
  """Cosines and sines of the rotary embedding.

  Args:
    length: Tokens in the sequence.
    head_dim: Width of a head.
    theta: Base of the wavelengths.
    scaling: Llama 3's (arXiv 2407.21783; the rule is of its released code):
      slow frequencies divided, fast ones kept, in between interpolated.

  Returns:
    Two float32 arrays (length, head_dim / 2).
  """
  exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
  frequency = theta**-exponent  # Radians a token.
  if scaling is not None and scaling.factor != 1.0:
    turns = scaling.original_length * frequency / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = jnp.clip((turns - low) / (high - low), 0, 1)
    frequency = frequency * (kept + (1 - kept) / scaling.factor)
  angle = jnp.arange(length, dtype=jnp.float32)[:, None] * frequency
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
    c, std = config, config.init_std
    query, key = (c.n_heads, c.head_dim), (c.kv_heads, c.head_dim)
    self.query = normal_param(rngs, (c.d_model, *query), std)
    self.key = normal_param(rngs, (c.d_model, *key), std)
    self.value = normal_param(rngs, (c.d_model, *key), std)
    self.out = normal_param(rngs, (*query, c.d_model), std)
    self.has_bias = c.qkv_bias
    if c.qkv_bias:
      self.query_bias = nnx.Param(jnp.zeros(query, jnp.float32))
      self.key_bias = nnx.Param(jnp.zeros(key, jnp.float32))
      self.value_bias = nnx.Param(jnp.zeros(key, jnp.float32))

  def __call__(self, x_BTD, cos, sin):
    dtype = x_BTD.dtype
    query, key, value, out = (
      w[...].astype(dtype) for w in (self.query, self.key, self.value, self.out)
    )
    q_BTNH = jnp.einsum('btd,dnh->btnh', x_BTD, query)
    k_BTKH = jnp.einsum('btd,dkh->btkh', x_BTD, key)
    v_BTKH = jnp.einsum('btd,dkh->btkh', x_BTD, value)
    if self.has_bias:
      q_BTNH += self.query_bias[...].astype(dtype)
      k_BTKH += self.key_bias[...].astype(dtype)
      v_BTKH += self.value_bias[...].astype(dtype)
    y_BTNH = jax.nn.dot_product_attention(
      apply_rotary(q_BTNH, cos, sin),
      apply_rotary(k_BTKH, cos, sin),
      v_BTKH,
      is_causal=True,
      implementation='xla',
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
