"""Parts of a decoder: norm, rotary embedding, attention, SwiGLU.

Shape suffixes: B batch, T tokens, S cached tokens, D model width, F hidden
width, N query heads, K key and value heads, H head width, R half of H, L
layers.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from models.attention import attend, attend_cached
from models.config import DecoderConfig, RopeScaling
from models.sharding import axes_of, constrain, param


def normal_param(
  rngs: nnx.Rngs,
  shape: tuple[int, ...],
  std: float,
  *names: str,
  is_cast: bool = True,
) -> nnx.Param:
  """A float32 parameter drawn from normal(0, std); see `sharding.param`."""
  value = std * jax.random.normal(rngs.params(), shape, jnp.float32)
  return param(value, *names, is_cast=is_cast)


def product(
  x: jax.Array, weight: jax.Array, mesh: Mesh | None, *names: str
) -> jax.Array:
  """Contracts the last axis of `x` with the first of `weight`, in x's dtype.

  A weight that is split along the model width is gathered first, forwards and
  backwards, and its gradient reduced to the part of each device. Left to
  itself the compiler for TPUs sends the parts around in the product's loop:
  with many devices they are thin, and the sum is rounded after each.

  Args:
    x: Activations.
    weight: A parameter, cast here unless it was.
    mesh: Where.
    *names: The weight's logical axes.
  """
  weight = weight.astype(x.dtype)
  if mesh is None or not axes_of('embed', mesh) or 'embed' not in names:
    return _plain_product(x, weight)
  return _gathered_product(x, weight, mesh, names)


def _plain_product(x, weight):
  # As one product of two matrices: on a CPU the gradient of a batched one is
  # slower, up to twice.
  x_MD = x.reshape(-1, x.shape[-1])
  weight_DF = weight.reshape(weight.shape[0], -1)
  return (x_MD @ weight_DF).reshape(*x.shape[:-1], *weight.shape[1:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _gathered_product(x, weight, mesh, names):
  return _plain_product(x, _whole(weight, mesh, names))


def _gathered_product_forward(x, weight, mesh, names):
  return _gathered_product(x, weight, mesh, names), (x, weight)


def _gathered_product_backward(mesh, names, saved, dy):
  x, weight = saved
  _, pull = jax.vjp(_plain_product, x, _whole(weight, mesh, names))
  dx, dweight = pull(dy)
  return dx, _whole(dweight, mesh, names, back=True)


_gathered_product.defvjp(_gathered_product_forward, _gathered_product_backward)


def _whole(weight, mesh, names, back=False):
  """A weight, gathered from the devices that split the model width.

  With `back` its gradient: computed whole, then reduced to each device's part.
  """
  whole = ['width' if name == 'embed' else name for name in names]
  for axes in (whole, names) if back else (names, whole):
    weight = constrain(weight, mesh, *axes)
  return weight


class RMSNorm(nnx.Module):
  """Divides by the root mean square, in float32, then scales."""

  def __init__(self, width: int, eps: float):
    self.scale = param(jnp.ones((width,), jnp.float32), 'norm')
    self.eps = eps

  def __call__(self, x_BTD):
    wide_BTD = x_BTD.astype(jnp.float32)
    mean_BT1 = jnp.mean(jnp.square(wide_BTD), axis=-1, keepdims=True)
    normed_BTD = wide_BTD * jax.lax.rsqrt(mean_BT1 + self.eps)
    return (normed_BTD * self.scale[...]).astype(x_BTD.dtype)


def rotary_angles(
  positions_BT: jax.Array,
  head_dim: int,
  theta: float,
  scaling: RopeScaling | None = None,
):
  """Cosines and sines of the rotary embedding.

  Args:
    positions_BT: Of the tokens, integers.
    head_dim: Width of a head.
    theta: Base of the wavelengths.
    scaling: Llama 3's (arXiv 2407.21783; the rule is of its released code):
      slow frequencies divided, fast ones kept, in between interpolated.

  Returns:
    Two float32 arrays (batch, length, head_dim / 2).
  """
  frequency_R = rotary_frequencies(head_dim, theta, scaling)
  angle_BTR = positions_BT[..., None].astype(jnp.float32) * frequency_R
  return jnp.cos(angle_BTR), jnp.sin(angle_BTR)


def rotary_frequencies(
  head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> jax.Array:
  """Returns the float32 (head_dim / 2,) radians a token of `rotary_angles`."""
  exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
  frequency_R = theta**-exponent
  if scaling is not None and scaling.factor != 1.0:
    turns = scaling.original_length * frequency_R / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = jnp.clip((turns - low) / (high - low), 0, 1)
    frequency_R = frequency_R * (kept + (1 - kept) / scaling.factor)
  return frequency_R


def apply_rotary(x_BTNH, cos_BTR, sin_BTR):
  """Rotates pairs (i, i + H/2) of each head: the layout of Hugging Face."""
  first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
  cos, sin = cos_BTR[:, :, None, :], sin_BTR[:, :, None, :]
  rotated = jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )
  return rotated.astype(x_BTNH.dtype)


class Cache(NamedTuple):
  """Keys and values of the tokens so far."""

  keys_LBSKH: jax.Array
  values_LBSKH: jax.Array
  length: jax.Array
  """int32 scalar: tokens so far, at most S."""


class Attention(nnx.Module):
  """Causal self-attention with rotary positions and grouped queries."""

  def __init__(
    self, config: DecoderConfig, *, rngs: nnx.Rngs, mesh: Mesh | None
  ):
    c, std = config, config.init_std
    query, key = (c.n_heads, c.head_dim), (c.kv_heads, c.head_dim)
    of_query, of_key = ('heads', 'head_dim'), ('kv_heads', 'head_dim')
    self.query = normal_param(
      rngs, (c.d_model, *query), std, 'embed', *of_query
    )
    self.key = normal_param(rngs, (c.d_model, *key), std, 'embed', *of_key)
    self.value = normal_param(rngs, (c.d_model, *key), std, 'embed', *of_key)
    self.out = normal_param(rngs, (*query, c.d_model), std, *of_query, 'embed')
    self.has_bias = c.qkv_bias
    if c.qkv_bias:
      self.query_bias = param(jnp.zeros(query, jnp.float32), *of_query)
      self.key_bias = param(jnp.zeros(key, jnp.float32), *of_key)
      self.value_bias = param(jnp.zeros(key, jnp.float32), *of_key)
    self.mesh = mesh

  def __call__(self, x_BTD, angles, segments_BT=None):
    q_BTNH, k_BTKH, v_BTKH = self._project(x_BTD, angles)
    y_BTNH = attend(
      q_BTNH, k_BTKH, v_BTKH, segments_BT=segments_BT, mesh=self.mesh
    )
    return self._merge(y_BTNH)

  def decode(self, x_BTD, angles, cache: Cache, layer: int):
    """Attends from new tokens to those of the cache and to each other.

    Args:
      x_BTD: The new tokens.
      angles: Of their positions, which follow those cached.
      cache: With room for them.
      layer: Which of the cache's layers this is.

    Returns:
      As `__call__`; and the cache with their keys and values, its length as it
      was: other layers are still to come.
    """
    q_BTNH, k_BTKH, v_BTKH = self._project(x_BTD, angles)
    start = cache.length
    at = (layer, 0, start, 0, 0)
    keys_LBSKH, values_LBSKH = (
      jax.lax.dynamic_update_slice(stack, new[None], at)
      for stack, new in (
        (cache.keys_LBSKH, k_BTKH),
        (cache.values_LBSKH, v_BTKH),
      )
    )
    y_BTNH = attend_cached(
      q_BTNH, keys_LBSKH[layer], values_LBSKH[layer], start, mesh=self.mesh
    )
    return self._merge(y_BTNH), Cache(keys_LBSKH, values_LBSKH, start)

  def _project(self, x_BTD, angles):
    def project(weight, bias, heads, name):
      of_weight = 'embed', heads, 'head_dim'
      y = product(x_BTD, weight[...], self.mesh, *of_weight)
      if bias is not None:  # In float32, as the sum that is its gradient.
        y = (y.astype(jnp.float32) + bias[...]).astype(y.dtype)
      y = constrain(y, self.mesh, 'batch', 'length', heads, 'head_dim')
      # After the rotation, so that a saved one is not rotated again.
      y = y if name == 'value' else apply_rotary(y, *angles)
      return checkpoint_name(y, name)

    biases = (
      (self.query_bias, self.key_bias, self.value_bias)
      if self.has_bias
      else (None, None, None)
    )
    return (
      project(self.query, biases[0], 'heads', 'query'),
      project(self.key, biases[1], 'kv_heads', 'key'),
      project(self.value, biases[2], 'kv_heads', 'value'),
    )

  def _merge(self, y_BTNH):
    batch, length, heads, width = y_BTNH.shape
    out = self.out[...].reshape(heads * width, -1)
    y_BTM = y_BTNH.reshape(batch, length, heads * width)
    y_BTD = product(y_BTM, out, self.mesh, 'heads', 'embed')
    return checkpoint_name(y_BTD, 'out')


class SwiGLU(nnx.Module):
  """down(silu(gate(x)) * up(x)), without biases."""

  def __init__(
    self,
    d_model: int,
    d_ff: int,
    std: float,
    *,
    rngs: nnx.Rngs,
    mesh: Mesh | None,
  ):
    self.gate = normal_param(rngs, (d_model, d_ff), std, 'embed', 'mlp')
    self.up = normal_param(rngs, (d_model, d_ff), std, 'embed', 'mlp')
    self.down = normal_param(rngs, (d_ff, d_model), std, 'mlp', 'embed')
    self.mesh = mesh

  def __call__(self, x_BTD):
    def project(weight, name):
      y_BTF = product(x_BTD, weight[...], self.mesh, 'embed', 'mlp')
      y_BTF = constrain(y_BTF, self.mesh, 'batch', 'length', 'mlp')
      return checkpoint_name(y_BTF, name)

    h_BTF = jax.nn.silu(project(self.gate, 'gate')) * project(self.up, 'up')
    return product(h_BTF, self.down[...], self.mesh, 'mlp', 'embed')
