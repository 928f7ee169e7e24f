"""The router against numpy, and the losses against their definitions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import moe
from models.config import Qwen2MoeConfig

CONFIG = Qwen2MoeConfig(
  vocab_size=8, d_model=8, n_heads=2, n_experts=6, experts_per_token=2,
  d_expert=4, d_shared=6, init_std=0.5,
)  # fmt: skip
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(3, 5, 6)).astype(np.float32)
MASK = RNG.integers(0, 2, (3, 5)).astype(np.float32)


def softmax(x):
  e = np.exp(np.float64(x) - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize('renormalize', [False, True])
def test_routing_is_softmax_then_the_largest(renormalize):
  config = dataclasses.replace(CONFIG, renormalize=renormalize)
  weights, chosen, sums = moe.route(LOGITS, MASK, config)
  p = softmax(LOGITS)
  order = np.argsort(-p, axis=-1)[..., :2]
  np.testing.assert_array_equal(chosen, order)
  wanted = np.take_along_axis(p, order, -1)
  if renormalize:
    wanted /= wanted.sum(-1, keepdims=True)
  np.testing.assert_allclose(weights, wanted, rtol=1e-5)
  counts = np.zeros((3, 6))
  for b, t, k in np.ndindex(3, 5, 2):
    counts[b, order[b, t, k]] += MASK[b, t]
  np.testing.assert_array_equal(sums.chosen_BE, counts)
  np.testing.assert_allclose(
    sums.probability_BE, (p * MASK[..., None]).sum(1), rtol=1e-5
  )
  entropy = -(p * np.log(p)).sum(-1)
  np.testing.assert_allclose(sums.entropy_B, (entropy * MASK).sum(1), rtol=1e-5)
  squares = np.log(np.exp(np.float64(LOGITS)).sum(-1)) ** 2
  np.testing.assert_allclose(
    sums.squared_log_z_B, (squares * MASK).sum(1), rtol=1e-5
  )


def stacked(n_layers):
  logits = RNG.normal(size=(n_layers, 3, 5, 6)).astype(np.float32)
  sums = [moe.route(x, MASK, CONFIG)[2] for x in logits]
  return logits, jax.tree.map(lambda *x: jnp.stack(x), *sums)


def test_the_balance_loss_is_the_formula():
  logits, sums = stacked(2)
  wanted = 0.0
  for row in range(3):
    keep = MASK[row] > 0
    p = softmax(logits[:, row, keep].reshape(-1, 6))  # Layers as more tokens.
    chosen = np.argsort(-p, axis=-1)[:, :2]
    if not len(p):
      continue
    fraction = np.stack(
      [[np.mean(chosen[:, k] == e) for e in range(6)] for k in range(2)]
    )
    wanted += 6 * np.sum(fraction * p.mean(0))
  found = moe.balance_loss(sums, jnp.asarray(MASK.sum(1)))
  assert float(found) == pytest.approx(wanted, rel=1e-5)
  # The trap of softmax taken twice would show.
  twice = moe.route(softmax(logits[0]), MASK, CONFIG)[2]
  once = moe.route(logits[0], MASK, CONFIG)[2]
  a, b = (
    moe.balance_loss(jax.tree.map(lambda x: x[None], s), MASK.sum(1))
    for s in (twice, once)
  )
  assert abs(float(a) - float(b)) > 0.01


def test_a_balanced_router_has_the_least_balance_loss():
  even = np.tile(np.eye(6, dtype=np.float32) * 30, (1, 4, 1))
  mask = np.ones((1, 24), np.float32)
  config = dataclasses.replace(CONFIG, experts_per_token=1)

  def loss(logits):
    sums = moe.route(logits, mask, config)[2]
    sums = jax.tree.map(lambda x: x[None], sums)
    return float(moe.balance_loss(sums, mask.sum(1)))

  assert loss(even) == pytest.approx(1.0, rel=1e-5)
  assert loss(even[:, :1].repeat(24, axis=1)) == pytest.approx(6.0, rel=1e-4)


def test_the_z_loss_is_the_mean_of_layers():
  logits, sums = stacked(3)
  z = np.log(np.exp(np.float64(logits)).sum(-1))
  wanted = ((z**2).mean(0) * MASK).sum()
  assert float(moe.z_loss(sums)) == pytest.approx(wanted, rel=1e-5)


def test_the_layer_matches_numpy():
  layer = moe.Moe(CONFIG, rngs=nnx.Rngs(params=0), mesh=None)
  x = RNG.normal(size=(2, 4, 8))
  p = {
    name: np.float64(getattr(layer, name)[...])
    for name in ('router', 'gate', 'up', 'down', 'shared_gate')
  }
  shared = {
    name: np.float64(getattr(layer.shared, name)[...])
    for name in ('gate', 'up', 'down')
  }

  def swiglu(x, gate, up, down):
    g = x @ gate
    return (g / (1 + np.exp(-g)) * (x @ up)) @ down

  wanted = np.zeros_like(x)
  for place in np.ndindex(2, 4):
    token = x[place]
    probability = softmax(token @ p['router'])
    for e in np.argsort(-probability)[:2]:
      y = swiglu(token, p['gate'][e], p['up'][e], p['down'][e])
      wanted[place] += probability[e] * y
    opened = 1 / (1 + np.exp(-(token @ p['shared_gate'])))
    wanted[place] += opened * swiglu(token, **shared)
  found, sums = jax.jit(lambda x: layer(x, jnp.ones((2, 4))))(jnp.float32(x))
  np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
  assert float(sums.chosen_BE.sum()) == 2 * 4 * 2


def test_the_router_is_float32_in_bfloat16_too():
  layer = moe.Moe(CONFIG, rngs=nnx.Rngs(params=0), mesh=None)
  x = jnp.asarray(RNG.normal(size=(2, 4, 8)), jnp.bfloat16)
  logits = layer._logits(x)
  assert logits.dtype == jnp.float32
  wanted = np.float64(x) @ np.float64(layer.router[...])
  np.testing.assert_allclose(logits, wanted, rtol=1e-5, atol=1e-5)


def test_no_shared_expert():
  config = dataclasses.replace(CONFIG, d_shared=0)
  layer = moe.Moe(config, rngs=nnx.Rngs(params=0), mesh=None)
  assert layer.shared.gate[...].shape == (8, 0)
  x = jnp.asarray(RNG.normal(size=(2, 4, 8)), jnp.float32)
  gradient = jax.grad(
    lambda gate: jnp.sum(_with_gate(layer, gate)(x, jnp.ones((2, 4)))[0])
  )(layer.shared_gate[...])
  assert not gradient.any()


def _with_gate(layer, gate):
  graph, state = nnx.split(layer)
  params = nnx.to_pure_dict(state)
  return nnx.merge(graph, {**params, 'shared_gate': gate})
