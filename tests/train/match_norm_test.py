"""The control that scales powered gradients back to the clipped norm."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from train import guard
from train.config import Config, GuardConfig, OptimizerConfig
from train.optimizer import make_optimizer

OPTIMIZER = OptimizerConfig(
  power=1.2, warmup_steps=0, clip_norm=1.0, match_norm=True
)


def make(**changes):
  c = dataclasses.replace(OPTIMIZER, **changes)
  return make_optimizer(Config(optimizer=c, steps=10))


def draw(seed, scale=1.0):
  rng = np.random.default_rng(seed)
  shapes = {'w': (6, 5), 'b': (4,)}
  return {
    k: (scale * rng.normal(size=s)).astype('f') for k, s in shapes.items()
  }


POWERED = jax.jit(make().powered)


def flat(tree):
  return np.concatenate([np.float64(x).ravel() for x in jax.tree.leaves(tree)])


@pytest.mark.parametrize(
  ('power', 'clip_norm', 'scale'),
  [(1.2, 1, 1e-5), (1.2, 1, 30), (1.2, 0, 30), (0.8, 1, 30), (2.0, 1, 0.01)],
)
def test_the_base_takes_the_clipped_norm(power, clip_norm, scale):
  grads = draw(0, scale)
  optimizer = make(power=power, clip_norm=clip_norm)
  got = jax.jit(optimizer.powered)(grads)
  plain = make(power=power, clip_norm=clip_norm, match_norm=False)
  norm = np.linalg.norm(flat(grads))
  wanted = min(norm, clip_norm) if clip_norm else norm
  assert np.linalg.norm(flat(got)) == pytest.approx(wanted, rel=1e-5)
  # One factor for all: the direction, signs with it, is that of the power.
  powered = flat(jax.jit(plain.powered)(grads))
  np.testing.assert_allclose(
    flat(got) * np.linalg.norm(powered), powered * wanted, rtol=1e-4
  )


@given(
  hnp.arrays(np.float32, 7, elements=st.floats(-(2.0**10), 2.0**10, width=32))
)
def test_any_gradient(g):
  """Whatever float32 holds of its powers, all is finite and no larger."""
  got = flat(POWERED({'w': g}))
  assert np.isfinite(got).all()
  norm = min(np.linalg.norm(np.float64(g)), 1.0)
  assert np.linalg.norm(got) <= norm * (1 + 1e-4) + 1e-30
  if norm > 1e-10:
    assert np.linalg.norm(got) == pytest.approx(norm, rel=1e-4)


def test_of_power_1_it_changes_nothing_but_rounding():
  for scale in (0.01, 30.0):
    grads = draw(1, scale)
    ours, plain = (make(power=1.0, match_norm=on) for on in (True, False))
    np.testing.assert_allclose(
      flat(ours.powered(grads)), flat(plain.powered(grads)), rtol=1e-6
    )


def test_no_gradient_stays_none():
  got = make().powered(draw(0, 0.0))
  np.testing.assert_array_equal(flat(got), 0.0)


def test_norms_that_are_logged_are_those_without_it():
  """'powered_norm' is the power's, before it is scaled back."""
  grads = draw(2, 0.01)
  found = []
  for on in (True, False):
    optimizer = make(match_norm=on)
    *_, norms = jax.jit(optimizer.update)(grads, optimizer.init(grads), grads)
    found.append(norms)
  assert found[0].keys() == found[1].keys()
  for name, value in found[0].items():
    assert float(value) == pytest.approx(float(found[1][name]), rel=1e-6)


def test_the_update_takes_what_powered_gives():
  grads, params = draw(3), draw(4)
  optimizer = make(weight_decay=0.0, b1=0.0)
  _, state, _ = jax.jit(optimizer.update)(grads, optimizer.init(params), params)
  np.testing.assert_allclose(
    flat(optax.tree.get(state, 'mu')), flat(optimizer.powered(grads)), rtol=1e-6
  )


@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_the_guard_drops_what_is_not_finite(value):
  grads, params = draw(0), draw(1)
  grads['b'][1] = value
  optimizer = make()
  before = params, optimizer.init(params)

  @jax.jit
  def step(grads, params, state):
    updates, new, norms = optimizer.update(grads, state, params)
    take, watch = guard.judge(
      GuardConfig(), guard.init(), jnp.float32(3.0), norms
    )
    after = optax.apply_updates(params, updates), new
    return guard.keep(take, after, (params, state)), watch

  after, watch = step(grads, *before)
  assert (int(watch.skipped), int(watch.bad_in_row)) == (1, 1)
  jax.tree.map(np.testing.assert_array_equal, after, before)
  again, watch = step(draw(0), *after)
  assert int(watch.skipped) == 0
  assert np.isfinite(flat(again)).all()
