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

HAS_EXPLICIT = hasattr(jax.sharding, 'AxisType') and hasattr(jax, 'typeof')
KINDS = [
  'Auto',
  pytest.param(
    'Explicit',
    marks=pytest.mark.skipif(
      not HAS_EXPLICIT, reason=f'jax {jax.__version__} has no Explicit meshes'
    ),
  ),
]
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
  devices = jax.devices()
  if len(devices) < 8:
    pytest.skip('needs 8 devices; tests/conftest.py asks for fake ones')
  devices = np.array(devices[:8]).reshape(4, 2)
  names = ('fsdp', 'tensor')
  if not HAS_EXPLICIT:
    return jax.sharding.Mesh(devices, names)
  axis_type = getattr(jax.sharding.AxisType, kind)
  return jax.sharding.Mesh(devices, names, axis_types=(axis_type,) * 2)


def shard(x, kind, spec):
  return jax.device_put(x, NamedSharding(mesh(kind), spec))


def gradient(seed=0, rows=16):
  return jax.random.normal(jax.random.key(seed), (rows, 8))


def tree(kind, seed=0):
  """A leaf of every sharding, as parameters or gradients.

  Each is of another shape: XLA's partitioner before Shardy (jax < 0.7) spreads
  one leaf's sharding to another over constants that both use.
  """
  return {
    name: shard(gradient(seed + i, 16 + 8 * i), kind, spec)
    for i, (name, spec) in enumerate(SPECS.items())
  }


def assert_same_types(a, b):
  """Equal structure, and each leaf's shape, dtype and sharding."""

  def check(x, y):
    assert (x.shape, x.dtype) == (y.shape, y.dtype)
    assert x.sharding.is_equivalent_to(y.sharding, x.ndim), (
      f'{x.sharding} and {y.sharding}'
    )
    if HAS_EXPLICIT:
      assert jax.typeof(x) == jax.typeof(y)

  jax.tree_util.tree_map(check, a, b)


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


@pytest.mark.parametrize('chain', CHAINS)
@pytest.mark.parametrize('kind', KINDS[1:])
def test_types_of_the_state_are_stable(kind, chain):
  tx = CHAINS[chain]()
  params, grads = tree(kind), tree(kind, seed=10)

  @jax.jit
  def step(grads, params):
    # After a first update: on some versions optax's init alone forgets them.
    _, state = tx.update(grads, tx.init(params), params)
    updates, new_state = tx.update(grads, state, params)
    for before, after in [(state, new_state), (params, updates)]:
      types = [jax.tree_util.tree_map(jax.typeof, x) for x in (before, after)]
      assert types[0] == types[1]
    return updates

  assert_same_types(step(grads, params), params)


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


def test_muon_takes_the_power_on_an_auto_mesh():
  params, grads = tree('Auto'), tree('Auto', seed=10)
  tx = muon_power(1e-2, clip_norm=1.0)
  updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
  whole, _ = jax.jit(tx.update)(
    *jax.device_get((grads, tx.init(params), params))
  )
  chex.assert_trees_all_close(
    jax.device_get(updates), jax.device_get(whole), rtol=1e-3, atol=1e-6
  )
