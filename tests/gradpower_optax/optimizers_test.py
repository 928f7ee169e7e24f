"""The ready-made chains against optax's own functions."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import gradpower_optax
from gradpower_optax import sign_power

# Chain, the optax function it ends in, and arguments unlike the defaults.
CASES = {
  'adamw_power': (
    optax.adamw,
    {'b1': 0.8, 'b2': 0.95, 'eps': 1e-6, 'eps_root': 1e-9,
     'mu_dtype': jnp.bfloat16, 'weight_decay': 0.1,
     'mask': {'w': True, 'b': False}, 'nesterov': True},
  ),
  'adam_power': (
    optax.adam,
    {'b1': 0.8, 'b2': 0.95, 'eps': 1e-6, 'eps_root': 1e-9,
     'mu_dtype': jnp.bfloat16, 'nesterov': True},
  ),
  'adagrad_power': (
    optax.adagrad, {'initial_accumulator_value': 0.5, 'eps': 1e-3},
  ),
  'lion_power': (
    optax.lion,
    {'b1': 0.8, 'b2': 0.95, 'mu_dtype': jnp.bfloat16, 'weight_decay': 0.1,
     'mask': {'w': True, 'b': False}},
  ),
  'muon_power': (
    gradpower_optax.muon,
    {'ns_steps': 3, 'beta': 0.9, 'weight_decay': 0.1, 'nesterov': False},
  ),
}  # fmt: skip
OWN = ('p', 'power_eps', 'clip_norm')


def chain_of(name):
  return getattr(gradpower_optax, name)


def problem():
  """Parameters, and gradients of three steps along a leading axis."""
  keys = jax.random.split(jax.random.key(0), 3)
  params = {'w': jax.random.normal(keys[0], (4, 6)), 'b': jnp.ones(6)}
  grads = {
    'w': jax.random.normal(keys[1], (3, 4, 6)),
    'b': jax.random.normal(keys[2], (3, 6)),
  }
  return params, grads


def trajectory(tx):
  """Parameters and state after three steps, all in one jit."""

  def step(carry, grads):
    params, state = carry
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), None

  # Compiling is what takes the time here.
  @functools.partial(
    jax.jit, compiler_options={'xla_backend_optimization_level': 0}
  )
  def steps(params, grads):
    return jax.lax.scan(step, (params, tx.init(params)), grads)[0]

  return steps(*problem())


def test_every_ready_made_chain_is_tested():
  chains = {name for name in gradpower_optax.__all__ if '_power' in name}
  assert chains - {'sign_power'} == set(CASES)


@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize('own', [
  {},
  {'p': 0.9, 'power_eps': 1e-8, 'clip_norm': 0.5},
])  # fmt: skip
def test_equals_the_chain_written_out(name, own):
  base, arguments = CASES[name]
  clip = [optax.clip_by_global_norm(0.5)] if own else []
  power = sign_power(own.get('p', 1.2), eps=own.get('power_eps', 0.0))
  written_out = optax.chain(*clip, power, base(1e-2, **arguments))
  ready_made = chain_of(name)(1e-2, **arguments, **own)
  chex.assert_trees_all_equal(trajectory(ready_made), trajectory(written_out))


@pytest.mark.parametrize('name', CASES)
def test_one_equals_the_base(name):
  base, arguments = CASES[name]
  params, state = trajectory(chain_of(name)(1e-2, **arguments, p=1.0))
  base_params, base_state = trajectory(base(1e-2, **arguments))
  chex.assert_trees_all_equal(params, base_params)
  chex.assert_trees_all_equal(
    jax.tree.leaves(state), jax.tree.leaves(base_state)
  )


@pytest.mark.parametrize('name', CASES)
def test_signature_is_that_of_optax(name):
  own = inspect.signature(chain_of(name)).parameters
  base = inspect.signature(CASES[name][0]).parameters
  assert list(own) == [*base, *OWN]
  for argument, parameter in base.items():
    assert own[argument].default == parameter.default, argument
    assert own[argument].kind == parameter.kind, argument
  for argument, default in zip(OWN, (1.2, 0.0, None), strict=True):
    assert own[argument].default == default
    assert own[argument].kind == inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize('name', CASES)
def test_positional_arguments_are_those_of_optax(name):
  base, _ = CASES[name]
  values = [
    parameter.default
    for parameter in list(inspect.signature(base).parameters.values())[1:]
    if parameter.kind == inspect.Parameter.POSITIONAL_OR_KEYWORD
  ]
  with_positions = chain_of(name)(1e-2, *values, p=1.0)
  chex.assert_trees_all_equal(
    trajectory(with_positions)[0], trajectory(base(1e-2))[0]
  )


@pytest.mark.parametrize('name', CASES)
def test_clip_comes_before_the_power(name):
  # 64 elements of equal size: clip gives each 1/8, then the power. In the
  # other order each would be 1/8.
  base, _ = CASES[name]
  params = jnp.zeros((8, 8))
  grads = jnp.full((8, 8), 5.0)
  tx = chain_of(name)(1.0, p=2.0, clip_norm=1.0)
  actual, state = tx.update(grads, tx.init(params), params)
  wanted = base(1.0)
  expected, wanted_state = wanted.update(
    jnp.full((8, 8), 1 / 64), wanted.init(params), params
  )
  chex.assert_trees_all_close(actual, expected, rtol=1e-5)
  chex.assert_trees_all_close(
    jax.tree.leaves(state),
    jax.tree.leaves(wanted_state),
    rtol=1e-5,
  )


def test_order_of_clip_and_power_matters():
  g = jax.random.normal(jax.random.key(0), (1000,)) * 10
  clip, power = optax.clip_by_global_norm(1.0), sign_power(1.2)
  norms = []
  for tx in (optax.chain(clip, power), optax.chain(power, clip)):
    updates, _ = tx.update(g, tx.init(g))
    norms.append(float(jnp.linalg.norm(updates)))
  assert norms[0] == pytest.approx(0.55, abs=0.02)
  assert norms[1] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize('p', [0, -1.2, float('nan'), float('inf')])
def test_refuses_a_power_that_is_none(name, p):
  with pytest.raises(ValueError, match='p must be positive and below'):
    chain_of(name)(1e-3, p=p)


@pytest.mark.parametrize(
  ('p', 'row'),
  [
    (1.0, (1.000, 0.999, 0.990, 0.909)),
    (1.2, (0.999, 0.990, 0.863, 0.285)),
    (1.5, (0.990, 0.760, 0.091, 0.003)),
    (2.0, (0.500, 0.010, 0.000, 0.000)),
  ],
)
def test_adams_eps_acts_on_larger_gradients(p, row):
  """The first update over the rate, for gradients 1e-4 to 1e-7."""
  g = jnp.array([1e-4, 1e-5, 1e-6, 1e-7])
  tx = gradpower_optax.adam_power(1.0, p=p)
  updates, _ = tx.update(g, tx.init(g), g)
  np.testing.assert_allclose(-updates, row, atol=6e-4)
  tx = gradpower_optax.adam_power(1.0, eps=1e-8**p, p=p)
  updates, _ = tx.update(g, tx.init(g), g)
  np.testing.assert_allclose(-updates[:2], 1.0, atol=2e-3)


@pytest.mark.parametrize('name', ['adam_power', 'muon_power'])
def test_loss_scale_changes_nothing(name):
  """(c g)^p = c^p g^p, and Adam and Muon discard such a factor."""
  params, grads = problem()
  tx = chain_of(name)(1.0, eps=1e-30)

  def update(scale):
    g = jax.tree.map(lambda g: scale * g[0], grads)
    return jax.jit(tx.update)(g, tx.init(params), params)[0]

  chex.assert_trees_all_close(update(1024.0), update(1.0), rtol=1e-4)


def test_loss_scale_changes_what_a_clip_does():
  _, grads = problem()
  tx = optax.chain(optax.clip_by_global_norm(1.0), sign_power(1.2))

  def update(scale):
    g = jax.tree.map(lambda g: scale * g[0], grads)
    return tx.update(g, tx.init(g))[0]['w']

  np.testing.assert_allclose(update(0.01) / update(0.001), 10**1.2, rtol=1e-5)
  np.testing.assert_allclose(update(100.0) / update(10.0), 1.0, rtol=1e-5)
