import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.config import Config, OptimizerConfig
from train.optimizer import make_optimizer, schedule

STEPS = 12
OPTIMIZER = OptimizerConfig(
  power=1.3, power_eps=1e-3, learning_rate=0.02, warmup_steps=2, eps=1e-4,
  clip_norm=1.0,
)  # fmt: skip
SHAPES = {'w': (3, 5), 'b': (4,), 'deep': {'u': (2, 2, 2)}}


def draw(seed, scale=1.0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda shape: (scale * rng.normal(size=shape)).astype(np.float32),
    SHAPES,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def gradients():
  """Some above the norm to clip at, some below."""
  return [draw(100 + i, scale=[3.0, 0.05][i % 2]) for i in range(STEPS)]


def train(optimizer, params, grads):
  @jax.jit
  def step(params, state, grads):
    updates, state = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  state = optimizer.init(params)
  for g in grads:
    params, state = step(params, state, g)
  return params


def adam_power(c, rates, params, grads, order=('clip', 'power')):
  """AdamPower as the paper prints it, in float64."""
  theta = [np.float64(x) for x in jax.tree.leaves(params)]
  m = [np.zeros_like(x) for x in theta]
  v = [np.zeros_like(x) for x in theta]
  for t, (tree, rate) in enumerate(zip(grads, rates, strict=True), start=1):
    g = [np.float64(x) for x in jax.tree.leaves(tree)]
    for stage in order:
      if stage == 'power':
        g = [np.sign(x) * (np.abs(x) + c.power_eps) ** c.power for x in g]
      else:
        norm = math.sqrt(sum((x**2).sum() for x in g))
        g = [x * min(1.0, c.clip_norm / norm) for x in g]
    for i, x in enumerate(g):
      m[i] = c.b1 * m[i] + (1 - c.b1) * x
      v[i] = c.b2 * v[i] + (1 - c.b2) * x**2
      step = m[i] / (1 - c.b1**t)
      step /= np.sqrt(v[i] / (1 - c.b2**t)) + c.eps
      theta[i] = theta[i] - rate * (step + c.weight_decay * theta[i])
  return theta


def furthest(params, theta):
  return max(
    np.abs(np.float64(x) - y).max()
    for x, y in zip(jax.tree.leaves(params), theta, strict=True)
  )


@pytest.mark.parametrize('power', [1.3, 1.0, 0.8])
def test_the_chain_is_clip_power_adamw(power):
  c = dataclasses.replace(OPTIMIZER, power=power)
  params = train(
    make_optimizer(Config(optimizer=c, steps=STEPS)), draw(0), gradients()
  )
  rates = [0.0, 0.01, *[0.02] * 6, *[0.02 - 0.018 * i / 4 for i in range(4)]]
  wanted = adam_power(c, rates, draw(0), gradients())
  assert furthest(params, wanted) < 2e-6
  if power != 1:
    other = adam_power(c, rates, draw(0), gradients(), ('power', 'clip'))
    assert furthest(params, other) > 1e-4


@pytest.mark.parametrize('clip_norm', [1.0, 0.0])
def test_power_1_is_optax_to_the_bit(clip_norm):
  c = dataclasses.replace(
    OPTIMIZER, power=1.0, power_eps=0.0, clip_norm=clip_norm
  )
  clip = [optax.clip_by_global_norm(1.0)] if clip_norm else []
  plain = optax.chain(
    *clip,
    optax.adamw(
      schedule(c, STEPS), b1=0.9, b2=0.95, eps=1e-4, weight_decay=0.1
    ),
  )
  ours = make_optimizer(Config(optimizer=c, steps=STEPS))
  jax.tree.map(
    np.testing.assert_array_equal,
    train(ours, draw(0), gradients()),
    train(plain, draw(0), gradients()),
  )


def test_clip_norm_0_does_not_clip():
  c = dataclasses.replace(OPTIMIZER, clip_norm=0.0)
  params = train(make_optimizer(Config(optimizer=c, steps=STEPS)), draw(0),
                 gradients())  # fmt: skip
  rates = [float(schedule(c, STEPS)(i)) for i in range(STEPS)]
  wanted = adam_power(c, rates, draw(0), gradients(), ('power',))
  assert furthest(params, wanted) < 2e-6


def rate(name, count, *, steps=300, warmup=10, ratio=0.1):
  config = OptimizerConfig(
    learning_rate=2.0, schedule=name, warmup_steps=warmup, final_lr_ratio=ratio
  )
  return float(schedule(config, steps)(jnp.int32(count)))


@pytest.mark.parametrize('name', ['wsd', 'cos', 'constant'])
def test_warm_up_is_linear_from_zero(name):
  assert [rate(name, i) for i in (0, 5, 10)] == pytest.approx([0.0, 1.0, 2.0])


@pytest.mark.parametrize('name', ['wsd', 'cos', 'constant'])
def test_without_warm_up_the_first_step_has_the_peak(name):
  assert rate(name, 0, warmup=0) == 2.0
  assert rate(name, 0, warmup=0, steps=1) == 2.0


def test_wsd_is_constant_until_two_thirds_then_linear():
  assert [rate('wsd', i) for i in (10, 100, 200)] == [2.0] * 3
  assert rate('wsd', 250) == pytest.approx((2.0 + 0.2) / 2)
  # It would be 0.2 one step after the last.
  assert rate('wsd', 299) == pytest.approx(0.2 + 1.8 / 100)
  assert rate('wsd', 300) == pytest.approx(0.2)


def test_wsd_decays_from_the_end_of_a_long_warm_up():
  assert rate('wsd', 280, warmup=280) == 2.0
  assert rate('wsd', 290, warmup=280) == pytest.approx(1.1)


def test_cos_falls_along_half_a_wave():
  for count in (10, 60, 155, 299):
    done = (count - 10) / 290
    wanted = 0.2 + 1.8 * (1 + math.cos(math.pi * done)) / 2
    assert rate('cos', count) == pytest.approx(wanted, rel=1e-4)


def test_constant_stays():
  assert [rate('constant', i) for i in (10, 200, 299)] == [2.0] * 3


@given(
  st.sampled_from(['wsd', 'cos', 'constant']),
  st.integers(1, 10**6),
  st.data(),
)
def test_every_rate_is_finite_and_within_the_peak(name, steps, data):
  config = OptimizerConfig(
    learning_rate=data.draw(st.floats(1e-6, 10.0), 'peak'),
    schedule=name,
    warmup_steps=data.draw(st.integers(0, steps - 1), 'warmup'),
    final_lr_ratio=data.draw(st.floats(0.0, 1.0), 'ratio'),
  )
  Config(optimizer=config, steps=steps)  # It is legal.
  count = data.draw(
    st.integers(0, steps - 1)
    | st.sampled_from([0, config.warmup_steps, 2 * steps // 3, steps - 1]),
    'count',
  )
  value = float(schedule(config, steps)(count))
  assert math.isfinite(value)
  assert 0 <= value <= config.learning_rate * (1 + 1e-6)
  if count > config.warmup_steps:
    lowest = config.learning_rate * config.final_lr_ratio
    assert value >= lowest * (1 - 1e-3) - 1e-9
