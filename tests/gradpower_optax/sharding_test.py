"""sign_power on sharded arrays: eight fake devices, two-dimensional leaves."""

import collections
import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from gradpower_optax import adamw_power, muon_power, sign_power

KINDS = ('Auto', 'Explicit')
SPECS = {
  'rows': P('fsdp', None),
  'columns': P(None, 'fsdp'),
  'both': P('fsdp', 'tensor'),
  'rows_by_both': P(('fsdp', 'tensor'), None),
  'replicated': P(None, None),
}
POWERS = {'static': 1.2, 'traced': np.float32(1.2), 'far': 4.7}
COLLECTIVE = re.compile(
  r'\b(all-reduce|all-gather|all-to-all|collective-permute|'
  r'collective-broadcast|reduce-scatter)(?:-start)?\('
)


@functools.cache
def mesh(kind):
  if len(jax.devices()) < 8:
    pytest.skip('needs 8 devices; tests/conftest.py asks for fake ones')
  axis_type = getattr(jax.sharding.AxisType, kind)
  return jax.make_mesh((4, 2), ('fsdp', 'tensor'), axis_types=(axis_type,) * 2)


def shard(x, kind, spec):
  return jax.device_put(x, NamedSharding(mesh(kind), spec))


def gradient(seed=0, rows=16):
  return jax.random.normal(jax.random.key(seed), (rows, 8))


def tree(kind, seed=0):
  """A leaf of every sharding, as parameters or gradients."""
  return {
    name: shard(gradient(seed + i), kind, spec)
    for i, (name, spec) in enumerate(SPECS.items())
  }


def assert_same_types(a, b):
  """Equal structure, and each leaf's shape, dtype and sharding."""

  def check(x, y):
    assert (x.shape, x.dtype) == (y.shape, y.dtype)
    assert x.sharding.is_equivalent_to(y.sharding, x.ndim), (
      f'{x.sharding} and {y.sharding}'
    )
    assert jax.typeof(x) == jax.typeof(y)

  jax.tree.map(check, a, b)


def power_update(p):
  tx = sign_power(p)
  return lambda g: tx.update(g, tx.init(g))[0]


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('spec', SPECS)
@pytest.mark.parametrize('power', POWERS)
def test_sharding_is_kept_and_changes_no_bit(kind, spec, power):
  g = gradient()
  expected = jax.jit(power_update(POWERS[power]))(g)
  sharded = shard(g, kind, SPECS[spec])
  actual = jax.jit(power_update(POWERS[power]))(sharded)
  assert_same_types(actual, sharded)
  np.testing.assert_array_equal(actual, expected)
  if spec == 'both':
    assert_same_types(power_update(POWERS[power])(sharded), sharded)


@pytest.mark.parametrize('kind', KINDS)
def test_schedule_on_sharded_gradients(kind):
  tx = sign_power(optax.linear_schedule(1.0, 1.5, 10))
  grads = tree(kind)
  state = jax.jit(tx.init)(grads)
  for _ in range(2):
    updates, state = jax.jit(tx.update)(grads, state)
  assert_same_types(updates, grads)
  whole = sign_power(np.float32(1.05)).update(jax.device_get(grads), ())[0]
  chex.assert_trees_all_close(
    jax.device_get(updates), jax.device_get(whole), rtol=1e-6
  )


@pytest.mark.parametrize('axis', [0, 1])
@pytest.mark.parametrize('power', POWERS)
def test_permutation_equivariance(axis, power):
  g = gradient()
  order = np.random.default_rng(0).permutation(g.shape[axis])
  phi = jax.jit(power_update(POWERS[power]))
  np.testing.assert_array_equal(
    phi(jnp.take(g, order, axis)), jnp.take(phi(g), order, axis)
  )
  np.testing.assert_array_equal(phi(g.T), phi(g).T)
  np.testing.assert_array_equal(phi(g.ravel()), phi(g).ravel())


def collectives(tx, kind):
  """How many of each collective the compiled update holds."""
  params, grads = tree(kind), tree(kind, seed=10)
  state = tx.init(params)
  compiled = jax.jit(tx.update).lower(grads, state, params).compile()
  return collections.Counter(COLLECTIVE.findall(compiled.as_text()))


@pytest.mark.parametrize('kind', KINDS)
def test_power_adds_no_collective(kind):
  clip, adamw = optax.clip_by_global_norm(1.0), optax.adamw(1e-3)
  without = collectives(optax.chain(clip, adamw), kind)
  assert without  # The norm is a sum over devices: the pattern finds it.
  schedule = optax.linear_schedule(1.0, 1.5, 10)
  for p in (1.2, schedule):
    with_power = collectives(optax.chain(clip, sign_power(p), adamw), kind)
    assert with_power == without
    assert not collectives(sign_power(p), kind)


CHAINS = {
  'sign_power': lambda: sign_power(1.2),
  'schedule': lambda: sign_power(optax.linear_schedule(1.0, 1.5, 10)),
  'adamw_power': lambda: adamw_power(1e-3, clip_norm=1.0),
  'inject': lambda: optax.inject_hyperparams(adamw_power)(
    learning_rate=1e-3, p=1.2
  ),
}


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('chain', CHAINS)
def test_state_is_stable(kind, chain):
  tx = CHAINS[chain]()
  params, grads = tree(kind), tree(kind, seed=10)

  @jax.jit
  def step(grads, state, params):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  _, first = step(grads, tx.init(params), params)
  new_params, second = step(grads, first, params)
  assert_same_types(new_params, params)
  assert_same_types(second, first)


@pytest.mark.parametrize('kind', KINDS)
def test_a_sharded_step_equals_a_whole_one(kind):
  tx = adamw_power(1e-2, p=1.2, clip_norm=1.0, weight_decay=0.1)
  sharded = tree(kind), tree(kind, seed=10)
  results = []
  for params, grads in (sharded, jax.device_get(sharded)):
    update = jax.jit(tx.update)
    updates, _ = update(grads, tx.init(params), params)
    results.append(jax.device_get(updates))
  chex.assert_trees_all_close(*results, rtol=1e-5)


@pytest.mark.parametrize('kind', KINDS)
def test_muon_takes_the_power_on_a_mesh(kind):
  params, grads = tree(kind), tree(kind, seed=10)
  where = jax.tree.map(lambda x: x.sharding, params)
  known = {'param_shardings': where} if kind == 'Auto' else {}
  tx = muon_power(1e-2, ns_steps=2, clip_norm=1.0, **known)
  updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
  assert_same_types(updates, params)
  whole = jax.device_get((grads, params))
  alone = muon_power(1e-2, ns_steps=2, clip_norm=1.0)
  expected, _ = jax.jit(alone.update)(whole[0], alone.init(whole[1]), whole[1])
  chex.assert_trees_all_close(
    jax.device_get(updates), jax.device_get(expected), rtol=1e-3, atol=1e-6
  )
