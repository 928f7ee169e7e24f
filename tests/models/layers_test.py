import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import layers


def normal(seed, *shape):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_rms_norm_matches_numpy():
  x_BTD = normal(0, 2, 3, 8)
  norm = layers.RMSNorm(8, eps=0.1)
  norm.scale[...] = jnp.asarray(normal(1, 8))
  wide = x_BTD.astype(np.float64)
  root = np.sqrt((wide**2).mean(-1, keepdims=True) + 0.1)
  np.testing.assert_allclose(norm(x_BTD), wide / root * normal(1, 8), rtol=1e-5)


def test_rms_norm_works_in_float32_and_keeps_the_dtype():
  x = jnp.full((1, 1, 4), 300.0, jnp.float16)  # Its square overflows float16.
  y = layers.RMSNorm(4, eps=1e-6)(x)
  assert y.dtype == jnp.float16
  np.testing.assert_allclose(y, 1.0, rtol=1e-3)


def test_swiglu_matches_numpy():
  mlp = layers.SwiGLU(6, 10, std=1.0, rngs=nnx.Rngs(params=0), mesh=None)
  x = normal(2, 1, 3, 6).astype(np.float64)
  gate, up, down = (np.float64(w[...]) for w in (mlp.gate, mlp.up, mlp.down))
  gated = x @ gate
  wanted = (gated / (1 + np.exp(-gated)) * (x @ up)) @ down
  np.testing.assert_allclose(mlp(jnp.float32(x)), wanted, rtol=2e-4, atol=1e-4)


def test_rotary_first_position_stays_and_norms_are_kept():
  x_BTNH = normal(3, 1, 7, 2, 8)
  y_BTNH = layers.apply_rotary(
    x_BTNH, *layers.rotary_angles(jnp.arange(7)[None], 8, 100.0)
  )
  np.testing.assert_array_equal(y_BTNH[:, 0], x_BTNH[:, 0])
  np.testing.assert_allclose(
    np.linalg.norm(y_BTNH, axis=-1),
    np.linalg.norm(x_BTNH, axis=-1),
    rtol=1e-6,
  )


def test_rotary_rotates_pairs_by_position_over_wavelength():
  angles = layers.rotary_angles(jnp.arange(5)[None], 6, theta=10.0)
  cos, sin = (x[0] for x in angles)
  for position in range(5):
    for i in range(3):
      angle = position / 10.0 ** (2 * i / 6)
      assert cos[position, i] == pytest.approx(np.cos(angle), abs=1e-6)
      assert sin[position, i] == pytest.approx(np.sin(angle), abs=1e-6)
  unit = np.zeros((1, 5, 1, 6), np.float32)
  unit[..., 1] = 1.0  # Its partner is 1 + 3.
  turned = np.asarray(layers.apply_rotary(unit, *angles))[0, :, 0]
  np.testing.assert_allclose(turned[:, 1], cos[:, 1], rtol=1e-6)
  np.testing.assert_allclose(turned[:, 4], sin[:, 1], rtol=1e-6)
  assert not turned[:, [0, 2, 3, 5]].any()


def test_scores_depend_on_the_distance_alone():
  query, key = normal(4, 8), normal(5, 8)
  length = 12

  def turn(x_H):
    x_BTNH = np.broadcast_to(x_H, (1, length, 1, 8))
    angles = layers.rotary_angles(jnp.arange(length)[None], 8, 10000.0)
    return np.asarray(layers.apply_rotary(x_BTNH, *angles))[0, :, 0]

  scores = turn(query) @ turn(key).T
  for distance in range(-length + 1, length):
    diagonal = np.diagonal(scores, distance)
    np.testing.assert_allclose(diagonal, diagonal[0], atol=2e-5)
  assert np.ptp(scores) > 1  # And it does depend on that.


def test_parameters_are_float32_and_differ():
  a, b = (
    layers.normal_param(rngs, (64, 64), 0.5, 'embed', 'mlp')[...]
    for rngs in [nnx.Rngs(params=0)] * 2
  )
  assert a.dtype == jnp.float32
  assert not jnp.array_equal(a, b)
  assert float(jnp.std(a)) == pytest.approx(0.5, rel=0.05)


def test_attention_is_the_same_for_repeated_key_heads():
  # Grouped queries equal full heads whose keys and values are copies.
  class Shape:
    d_model, n_heads, head_dim, kv_heads, init_std = 8, 4, 2, 2, 1.0
    qkv_bias = False

  class Full(Shape):
    kv_heads = 4

  grouped = layers.Attention(Shape, rngs=nnx.Rngs(params=0), mesh=None)
  full = layers.Attention(Full, rngs=nnx.Rngs(params=1), mesh=None)
  full.query[...], full.out[...] = grouped.query[...], grouped.out[...]
  full.key[...] = jnp.repeat(grouped.key[...], 2, axis=1)
  full.value[...] = jnp.repeat(grouped.value[...], 2, axis=1)
  x_BTD = jnp.asarray(normal(6, 2, 5, 8))
  angles = layers.rotary_angles(jnp.arange(5)[None], 2, 10.0)
  np.testing.assert_allclose(
    jax.jit(grouped)(x_BTD, angles), full(x_BTD, angles), atol=1e-4
  )


def test_a_bias_is_the_weight_of_a_constant_feature():
  class Biased:
    d_model, n_heads, head_dim, kv_heads, init_std = 8, 4, 2, 2, 1.0
    qkv_bias = True

  class Wider(Biased):
    d_model, qkv_bias = 9, False

  biased = layers.Attention(Biased, rngs=nnx.Rngs(params=0), mesh=None)
  wider = layers.Attention(Wider, rngs=nnx.Rngs(params=1), mesh=None)
  for i, name in enumerate(('query', 'key', 'value')):
    bias = getattr(biased, f'{name}_bias')
    assert not bias[...].any()
    bias[...] = jnp.asarray(normal(i, *bias[...].shape))
    weight = getattr(biased, name)[...]
    getattr(wider, name)[...] = jnp.concatenate([weight, bias[...][None]])
  wider.out[...] = jnp.concatenate(
    [biased.out[...], jnp.zeros((4, 2, 1))], axis=2
  )
  x_BTD = jnp.asarray(normal(6, 2, 5, 8))
  one_BT1 = jnp.ones((2, 5, 1))
  angles = layers.rotary_angles(jnp.arange(5)[None], 2, 10.0)
  np.testing.assert_allclose(
    wider(jnp.concatenate([x_BTD, one_BT1], axis=2), angles)[..., :8],
    biased(x_BTD, angles),
    rtol=1e-5,
    atol=1e-5,
  )
