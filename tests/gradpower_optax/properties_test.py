"""Properties that every optimizer of this library has: one table."""

import functools

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import gradpower_optax
from gradpower_optax import sign_power


def before(base, **fixed):
  """The chain that the documentation tells to write out, as a factory."""

  def build(learning_rate, p=1.2, clip_norm=1.0):
    clip, power = optax.clip_by_global_norm(clip_norm), sign_power(p)
    return optax.chain(clip, power, base(learning_rate, **fixed))

  return build


def blockwise(learning_rate, p=1.2):
  """The chain of blockwise learning rates' documentation, as a factory."""
  multiples = gradpower_optax.scale_by_blockwise('vo', 10, 1500)
  base = gradpower_optax.adamw_power(learning_rate, weight_decay=0.0, p=p)
  return optax.chain(base, multiples)


RISING = optax.linear_schedule(1.0, 1.2, 1000)
# A factory, a learning rate that converges, and other arguments.
CASES = {
  'sgd': (before(optax.sgd, momentum=0.9), 0.002, {}),
  'adamw': (before(optax.adamw, weight_decay=0.0), 0.05, {}),
  'lion': (before(optax.lion, weight_decay=0.0), 0.02, {}),
  'rmsprop': (before(optax.rmsprop), 0.02, {'p': RISING}),
  'adamw_power': (
    gradpower_optax.adamw_power,
    0.05,
    {'clip_norm': 1.0, 'weight_decay': 0.0, 'nesterov': True},
  ),
  'adam_power': (gradpower_optax.adam_power, 0.05, {'p': RISING}),
  'adagrad_power': (gradpower_optax.adagrad_power, 2.0, {'p': 0.8}),
  'lion_power': (gradpower_optax.lion_power, 0.02, {'weight_decay': 0.0}),
  'blockwise': (blockwise, 0.02, {}),
  'muon': (gradpower_optax.muon, 0.05, {}),
  'muon_power': (gradpower_optax.muon_power, 0.05, {}),
  'muon_power_schedule': (
    gradpower_optax.muon_power,
    0.05,
    {'clip_norm': 1.0, 'p': RISING, 'consistent_rms': 0.2},
  ),
}
NAMES = pytest.mark.parametrize('name', CASES)
UNOPTIMIZED = {'xla_backend_optimization_level': 0}
STEPS = 3000


def build(name, learning_rate=None, **more):
  factory, rate, arguments = CASES[name]
  rate = rate if learning_rate is None else learning_rate
  return factory(learning_rate=rate, **{**arguments, **more})


def test_every_optimizer_is_tabled():
  tabled = {
    getattr(factory, '__name__', '') for factory, _, _ in CASES.values()
  }
  no_optimizers = {'sign_power', 'blockwise_schedule', 'scale_by_blockwise'}
  assert set(gradpower_optax.__all__) - tabled == no_optimizers


# Two bowls and a valley: a matrix and a vector to reach, and Rosenbrock's
# function of each column of a matrix.
TARGET = {
  'matrix': jnp.array([[3.0, -2.0], [1.0, 2.5]]),
  'vector': jnp.array([1.0, -1.0, 1.0]),
  'valley': jnp.ones((2, 2)),
}
START = {
  'matrix': jnp.zeros((2, 2)),
  'vector': jnp.array([-1.0, 2.0, 1.0]),
  'valley': jnp.array([[0.0, -0.5], [0.0, 0.5]]),
}


def objective(params):
  bowls = sum(
    jnp.sum((params[name] - TARGET[name]) ** 2) for name in ('matrix', 'vector')
  )
  x, y = params['valley']
  return bowls + jnp.sum((1 - x) ** 2 + 100 * (y - x**2) ** 2)


@NAMES
def test_converges(name):
  """With a schedule, arguments that it does not know, and a stable state.

  The scan refuses a state that changes its structure, a shape or a dtype.
  """
  rate = CASES[name][1]
  tx = build(name, optax.cosine_decay_schedule(rate, STEPS))

  def step(carry, _):
    params, state = carry
    value, grads = jax.value_and_grad(objective)(params)
    updates, state = tx.update(grads, state, params, value=value, unknown=1)
    return (optax.apply_updates(params, updates), state), None

  @functools.partial(jax.jit, compiler_options=UNOPTIMIZED)
  def run(params):
    return jax.lax.scan(step, (params, tx.init(params)), length=STEPS)[0]

  params, _ = run(START)
  chex.assert_trees_all_close(params, TARGET, rtol=3e-2, atol=3e-2)


def problem(dtype):
  keys = jax.random.split(jax.random.key(0), 4)
  params, grads = (
    {
      'w': jax.random.normal(a, (4, 6), dtype),
      'b': jax.random.normal(b, (6,), dtype),
    }
    for a, b in (keys[:2], keys[2:])
  )
  return params, grads


def first_updates(name, dtype='float32'):
  """A function of gradients and parameters: updates in several ways."""
  factory, rate, arguments = CASES[name]
  # A number of iterations is no array in optax's own either.
  static = ('ns_steps',) if 'muon' in name else ()
  inject = optax.inject_hyperparams(factory, static_args=static)
  scheduled = build(name, optax.constant_schedule(rate))
  multi_steps = optax.MultiSteps(build(name), 2)

  def first(tx, grads, params):
    return tx.update(grads, tx.init(params), params)

  def scaled(c, grads):
    return jax.tree.map(lambda g: c * g, grads)

  def updates(grads, params):
    state = multi_steps.init(params)
    # The mean of two is the gradient.
    none, state = multi_steps.update(scaled(1.5, grads), state, params)
    found = {
      'plain': first(build(name), grads, params)[0],
      'scheduled': first(scheduled, grads, params)[0],
      'none': none,
      'accumulated': multi_steps.update(scaled(0.5, grads), state, params)[0],
    }
    if dtype == 'float32':  # It gives p in the parameters' dtype.
      injected = inject(learning_rate=rate, **arguments)
      found['injected'], state = first(injected, grads, params)
      assert 'learning_rate' in state.hyperparams
    return found

  return updates


@functools.cache
def computed(name):
  """All of them, in one jit."""
  params, grads = problem('float32')
  updates = jax.jit(first_updates(name), compiler_options=UNOPTIMIZED)
  return updates(grads, params)


def assert_close(actual, expected, close=2e-5):
  chex.assert_trees_all_close(actual, expected, rtol=close, atol=close / 10)


@NAMES
def test_takes_a_schedule(name):
  assert_close(computed(name)['scheduled'], computed(name)['plain'])


@NAMES
def test_inside_inject_hyperparams(name):
  assert_close(computed(name)['injected'], computed(name)['plain'])


@NAMES
def test_inside_multi_steps(name):
  updates = computed(name)
  zeros = jax.tree.map(jnp.zeros_like, updates['plain'])
  chex.assert_trees_all_equal(updates['none'], zeros)
  assert_close(updates['accumulated'], updates['plain'])


@NAMES
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
def test_keeps_the_dtype(name, dtype):
  params, grads = problem(dtype)
  updates = jax.eval_shape(first_updates(name, dtype), grads, params)
  for found in updates.values():
    chex.assert_trees_all_equal_shapes_and_dtypes(found, params)


@NAMES
def test_types_are_stable_on_a_mesh(name):
  """Shape, dtype and sharding of state and updates, which types tell."""
  if len(jax.devices()) < 8:
    pytest.skip('needs 8 devices; tests/conftest.py asks for fake ones')
  mesh = jax.make_mesh(
    (4, 2), ('fsdp', 'tensor'), axis_types=(AxisType.Explicit,) * 2
  )
  specs = {
    'both': ((8, 16), ('fsdp', 'tensor')),
    'columns': ((8, 16), (None, ('fsdp', 'tensor'))),
    'bias': ((16,), ('tensor',)),
    'gain': ((16,), ()),
  }
  params = {
    leaf: jax.ShapeDtypeStruct(
      shape, 'float32', sharding=NamedSharding(mesh, PartitionSpec(*axes))
    )
    for leaf, (shape, axes) in specs.items()
  }
  tx = build(name)

  @jax.jit
  def types(params):
    # After a first update: optax's init alone forgets some.
    _, state = tx.update(params, tx.init(params), params)
    updates, new_state = tx.update(params, state, params)
    for old, new in [(state, new_state), (params, updates)]:
      assert jax.tree.map(jax.typeof, old) == jax.tree.map(jax.typeof, new)
    return updates

  jax.eval_shape(types, params)
