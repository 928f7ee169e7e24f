"""sign_power as an optax transformation: trees, p, wrappers, errors."""

import functools
import pathlib
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gradpower_optax import sign_power
from gradpower_optax.power import signed_power

SCHEDULE = optax.linear_schedule(1.0, 2.0, 10)


def apply(tx, grads):
  return tx.update(grads, tx.init(grads))[0]


def gradients(seed=0):
  keys = jax.random.split(jax.random.key(seed))
  return {
    'w': jax.random.normal(keys[0], (4, 3)),
    'b': jax.random.normal(keys[1], (3,)),
  }


def same_bits(a, b):
  chex.assert_trees_all_equal(a, b)
  chex.assert_trees_all_equal_shapes_and_dtypes(a, b)


# Trees and leaves.


@pytest.mark.parametrize(
  'tree',
  [
    {},
    (),
    [],
    None,
    {'a': None},
    [None, {'a': jnp.ones(2), 'b': (jnp.ones(()), None)}],
    {'a': optax.MaskedNode(), 'b': jnp.ones(2)},
    optax.EmptyState(),
    jnp.ones(3),
  ],
)
def test_any_pytree(tree):
  updates = apply(sign_power(1.2), tree)
  same_bits(updates, tree)  # Of ones.
  same_bits(jax.jit(functools.partial(apply, sign_power(1.2)))(tree), tree)


@pytest.mark.parametrize(
  'shape', [(), (1,), (0,), (3, 0), (5,), (2, 3, 4), (1, 1, 1, 1)]
)
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'float16'])
@pytest.mark.parametrize('p', [1.0, 1.2, SCHEDULE, np.float32(1.2)])
def test_shapes_and_dtypes_are_kept(shape, dtype, p):
  g = jnp.full(shape, -0.5, dtype)
  same = apply(sign_power(p), {'g': g})['g']
  assert isinstance(same, jax.Array)
  chex.assert_trees_all_equal_shapes_and_dtypes(same, g)


@pytest.mark.parametrize('p', [1.0, 1.5, jnp.float32(1.5), np.float64(1.5)])
def test_mixed_dtypes_do_not_promote_each_other(p):
  g = {
    name: jnp.asarray([0.25, -4.0], getattr(jnp, name))
    for name in ('float32', 'bfloat16', 'float16', 'float8_e5m2')
  }
  updates = apply(sign_power(p), g)
  for name, update in updates.items():
    assert update.dtype == getattr(jnp, name)
    np.testing.assert_array_equal(
      np.asarray(update, np.float32),
      [0.25, -4.0] if p == 1.0 else [0.125, -8.0],
    )


def test_numpy_and_python_leaves():
  updates = apply(sign_power(2.0), {'a': np.float32([0.5, -3.0]), 'b': -0.5})
  np.testing.assert_array_equal(updates['a'], [0.25, -9.0])
  assert updates['b'] == -0.25
  assert updates['a'].dtype == updates['b'].dtype == jnp.float32


def test_a_weak_type_does_not_widen_what_follows():
  g = jnp.asarray(0.5)  # Weakly typed.
  update = apply(sign_power(1.2), g)
  assert (update + jnp.ones((), jnp.float32)).dtype == jnp.float32
  carried, _ = jax.lax.scan(
    lambda g, _: (apply(sign_power(1.2), g), None), g, length=2
  )
  assert carried.dtype == jnp.float32


@settings(max_examples=30, deadline=None)
@given(
  values=st.lists(st.floats(width=32), min_size=8, max_size=8),
  p=st.floats(0.125, 8, width=32),
)
def test_equals_the_signed_power_and_is_odd(values, p):
  g = jnp.asarray(np.float32(values))
  tx = sign_power(jnp.float32(p))
  update, minus = apply(tx, g), apply(tx, -g)
  same_bits(update, signed_power(g, jnp.float32(p)))
  same_bits(minus, -update)


# The power: a number, an array, a schedule.


@pytest.mark.parametrize('p', [1.2, 2, np.float64(1.2), np.int32(2)])
def test_a_number_keeps_no_state(p):
  tx = sign_power(p)
  assert isinstance(tx, optax.GradientTransformation)
  grads = gradients()
  state = tx.init(grads)
  assert state == optax.EmptyState()
  updates, state = tx.update(grads, state)
  assert state == optax.EmptyState()
  expected = jax.tree_util.tree_map(lambda g: signed_power(g, float(p)), grads)
  same_bits(updates, expected)


@pytest.mark.parametrize(
  'p',
  [
    jnp.float32(1.2),
    np.array(1.2, np.float32),
    np.float32(1.2),
    jnp.int32(2),
    np.array(2),
  ],
)
def test_a_scalar_array(p):
  grads = gradients()
  expected = jax.tree_util.tree_map(
    lambda g: signed_power(g, jnp.float32(p)), grads
  )
  chex.assert_trees_all_close(apply(sign_power(p), grads), expected, rtol=3e-7)
  traced = jax.jit(lambda p, g: apply(sign_power(p), g))(p, grads)
  chex.assert_trees_all_close(traced, expected, rtol=3e-7)


def test_a_schedule_counts_steps():
  grads = gradients()
  tx = sign_power(SCHEDULE)
  state = tx.init(grads)
  assert state.count.dtype == jnp.int32
  assert state.count == 0
  update = jax.jit(tx.update)
  for step in range(4):
    updates, new_state = update(grads, state)
    expected = apply(sign_power(jnp.float32(1 + step / 10)), grads)
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, new_state)
    state = new_state
    assert state.count == step + 1
  updates, _ = tx.update(grads, tx.init(grads))
  same_bits(updates, grads)  # p = 1, by a schedule.


def test_a_schedule_of_python_numbers():
  tx = sign_power(lambda count: 2.0)
  same_bits(apply(tx, gradients()), apply(sign_power(2.0), gradients()))


def test_a_schedules_count_saturates():
  tx = sign_power(SCHEDULE)
  state = tx.init(None)
  last = jnp.iinfo(jnp.int32).max
  state = state._replace(count=jnp.asarray(last, jnp.int32))
  _, state = tx.update(gradients(), state)
  assert state.count == last


def test_eps():
  grads = gradients()
  updates = apply(sign_power(1.2, eps=1e-3), grads)
  expected = jax.tree_util.tree_map(
    lambda g: jnp.sign(g) * (jnp.abs(g) + 1e-3) ** 1.2, grads
  )
  chex.assert_trees_all_close(updates, expected, rtol=1e-6)
  traced = jax.jit(lambda eps: apply(sign_power(1.2, eps=eps), grads))(1e-3)
  chex.assert_trees_all_close(traced, expected, rtol=1e-6)
  assert apply(sign_power(1.2, eps=1e-3), jnp.zeros(())) == 0


# Under inject_hyperparams.


def test_inject_a_number():
  grads = gradients()
  tx = optax.inject_hyperparams(sign_power)(p=1.2)
  state = tx.init(grads)
  updates, state = jax.jit(tx.update)(grads, state, grads)
  same_bits(updates, apply(sign_power(jnp.float32(1.2)), grads))
  assert state.hyperparams['p'].dtype == jnp.float32
  state.hyperparams['p'] = jnp.float32(2.0)  # As a user changes it.
  updates, state = jax.jit(tx.update)(grads, state, grads)
  same_bits(updates, apply(sign_power(2.0), grads))
  state.hyperparams['p'] = jnp.float32(1.0)
  updates, state = jax.jit(tx.update)(grads, state, grads)
  same_bits(updates, grads)


def test_inject_a_schedule():
  grads = gradients()
  tx = optax.inject_hyperparams(sign_power)(p=SCHEDULE)
  state = tx.init(grads)
  for step in range(3):
    updates, new_state = jax.jit(tx.update)(grads, state, grads)
    expected = apply(sign_power(jnp.float32(1 + step / 10)), grads)
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, new_state)
    state = new_state


def test_inject_with_bfloat16_parameters_warns_that_p_is_rounded():
  grads = jax.tree_util.tree_map(lambda g: g.astype('bfloat16'), gradients())
  tx = optax.inject_hyperparams(sign_power)(p=1.2)
  with pytest.warns(UserWarning, match='hyperparam_dtype=jnp.float32'):
    state = tx.init(grads)
  assert state.hyperparams['p'] == jnp.bfloat16(1.203125)
  with pytest.warns(UserWarning, match='p arrives as bfloat16'):
    updates, _ = jax.jit(tx.update)(grads, state, grads)
  same_bits(updates, apply(sign_power(np.float32(1.203125)), grads))


def test_inject_with_bfloat16_parameters_and_a_float32_p_is_exact():
  grads = jax.tree_util.tree_map(lambda g: g.astype('bfloat16'), gradients())
  tx = optax.inject_hyperparams(sign_power, hyperparam_dtype=jnp.float32)(p=1.2)
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    state = tx.init(grads)
    updates, _ = jax.jit(tx.update)(grads, state, grads)
  same_bits(updates, apply(sign_power(np.float32(1.2)), grads))


def test_inject_in_a_chain():
  @optax.inject_hyperparams
  def optimizer(learning_rate, p):
    return optax.chain(
      optax.clip_by_global_norm(1.0), sign_power(p), optax.adamw(learning_rate)
    )

  params, grads = gradients(1), gradients()
  tx = optimizer(learning_rate=1e-3, p=SCHEDULE)
  update = jax.jit(tx.update)
  state = tx.init(params)
  for _ in range(2):
    updates, state = update(grads, state, params)
  np.testing.assert_allclose(state.hyperparams['p'], 1.1, rtol=1e-6)
  chex.assert_tree_all_finite(updates)


# Under optax's wrappers and jax's transformations.


def test_masked():
  grads = gradients()
  tx = optax.masked(sign_power(2.0), {'w': True, 'b': False})
  updates = jax.jit(functools.partial(apply, tx))(grads)
  same_bits(updates['w'], grads['w'] * jnp.abs(grads['w']))
  same_bits(updates['b'], grads['b'])


def test_partition():
  grads = gradients()
  tx = optax.partition(
    {'two': sign_power(2.0), 'one': sign_power(1.0)}, {'w': 'two', 'b': 'one'}
  )
  updates, _ = jax.jit(tx.update)(grads, tx.init(grads), grads)
  same_bits(updates['w'], grads['w'] * jnp.abs(grads['w']))
  same_bits(updates['b'], grads['b'])


def test_apply_if_finite():
  grads = gradients()
  tx = optax.apply_if_finite(
    optax.chain(sign_power(2.0), optax.sgd(1.0)), max_consecutive_errors=3
  )
  state = tx.init(grads)
  bad = {**grads, 'b': grads['b'].at[0].set(jnp.nan)}
  updates, state = jax.jit(tx.update)(bad, state, grads)
  same_bits(updates, jax.tree_util.tree_map(jnp.zeros_like, grads))
  assert state.notfinite_count == 1
  updates, state = jax.jit(tx.update)(grads, state, grads)
  expected = jax.tree_util.tree_map(lambda g: -g * jnp.abs(g), grads)
  same_bits(updates, expected)


def test_jit_changes_no_bit():
  grads = gradients()
  for p in (0.7, 1.2, 2.5):
    plain, jitted = sign_power(p), jax.jit(sign_power(p).update)
    same_bits(apply(plain, grads), jitted(grads, optax.EmptyState())[0])


def test_vmap_over_gradients():
  grads = jnp.stack([gradients(seed)['w'] for seed in range(3)])
  update = functools.partial(apply, sign_power(1.2))
  same_bits(jax.vmap(update)(grads), update(grads))


def test_vmap_over_powers():
  grads, powers = gradients()['w'], jnp.array([0.5, 1.0, 1.2, 3.0])
  updates = jax.vmap(lambda p: apply(sign_power(p), grads))(powers)
  same_bits(updates[1], grads)
  for p, update in zip(powers, updates, strict=True):
    chex.assert_trees_all_close(update, apply(sign_power(p), grads), rtol=3e-7)


def test_scan():
  tx = optax.chain(sign_power(SCHEDULE), optax.sgd(0.1))
  grads, params = gradients(), gradients(1)

  def step(carry, _):
    params, state = carry
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), None

  carry = (params, tx.init(params))
  (scanned, state), _ = jax.lax.scan(step, carry, length=3)
  for _ in range(3):
    carry, _ = step(carry, None)
  chex.assert_trees_all_close(scanned, carry[0], rtol=1e-5, atol=1e-6)
  assert state[0].count == 3


def test_donation():
  tx = optax.chain(sign_power(1.2), optax.adam(1e-3))
  grads, params = gradients(), gradients(1)
  state = tx.init(params)

  def step(grads, state, params):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  expected = jax.jit(step)(grads, state, params)
  donated = jax.jit(step, donate_argnums=(1, 2))(grads, state, params)
  same_bits(donated, expected)
  assert params['w'].is_deleted()
  same_bits(gradients(), grads)

  update = jax.jit(lambda g: apply(sign_power(1.2), g), donate_argnums=0)
  expected = apply(sign_power(1.2), grads)
  fresh = gradients()  # One that no NumPy view holds.
  same_bits(update(fresh), expected)
  assert fresh['w'].is_deleted()


def test_gradient_through_an_update():
  """A meta-gradient with respect to p, against a finite difference."""
  params, grads = jnp.array([1.0, -2.0]), jnp.array([0.5, 0.0])

  def loss_after(p):
    tx = optax.chain(sign_power(p), optax.sgd(0.1))
    updates, _ = tx.update(grads, tx.init(params), params)
    return jnp.sum(optax.apply_updates(params, updates) ** 2)

  for p in (0.7, 1.0, 1.2):
    slope = jax.grad(loss_after)(p)
    difference = (loss_after(p + 1e-2) - loss_after(p - 1e-2)) / 2e-2
    np.testing.assert_allclose(slope, difference, rtol=1e-2)
    assert slope != 0


# In chains.


@pytest.mark.parametrize('base', ['adamw', 'sgd'])
def test_accumulated_equals_one_large_batch(base):
  """MultiSteps around the chain: accumulate, mean, clip, power, optimizer."""
  optimizer = {'adamw': optax.adamw(1e-2), 'sgd': optax.sgd(1e-2)}[base]
  power = [optax.clip_by_global_norm(1.0), sign_power(1.2)]
  chain = optax.chain(*power, optimizer)
  params = gradients(99)
  micro = [gradients(seed) for seed in range(8)]
  stacked = jax.tree_util.tree_map(lambda *g: jnp.stack(g), *micro)

  def train(tx, batches):
    @jax.jit
    def step(params, state, grads):
      updates, state = tx.update(grads, state, params)
      return optax.apply_updates(params, updates), state

    current, state = params, tx.init(params)
    for grads in batches:
      current, state = step(current, state, grads)
    return current

  large = [
    jax.tree_util.tree_map(lambda g, i=i: jnp.mean(g[i : i + 4], 0), stacked)
    for i in (0, 4)
  ]
  expected = train(chain, large)
  accumulated = train(optax.MultiSteps(chain, 4), micro)
  chex.assert_trees_all_close(accumulated, expected, rtol=1e-5, atol=1e-6)

  wrong = optax.chain(
    *power, optax.MultiSteps(optimizer, 4).gradient_transformation()
  )
  other = train(wrong, micro)
  assert jnp.abs(other['w'] - expected['w']).max() > 1e-4


def test_the_power_of_a_mean_is_not_the_mean_of_powers():
  """Of 8 noisy micro-batches: another norm, and another direction."""
  signal, noise = jax.random.normal(jax.random.key(0), (2, 4096))
  signs = jax.random.normal(jax.random.key(1), (8, 4096))
  micro = signal + signs * jnp.abs(noise)
  phi = functools.partial(apply, sign_power(1.2))
  right, wrong = phi(jnp.mean(micro, 0)), jnp.mean(phi(micro), 0)
  assert jnp.linalg.norm(wrong) > 1.02 * jnp.linalg.norm(right)
  cosine = wrong @ right / jnp.linalg.norm(wrong) / jnp.linalg.norm(right)
  assert 0.97 < cosine < 0.9999


def test_the_authors_chain():
  params, grads = gradients(1), gradients()
  tx = optax.chain(
    optax.clip_by_global_norm(1.0),
    sign_power(1.2, eps=1e-8),
    optax.adamw(1e-3, b1=0.9, b2=0.95, weight_decay=0.1),
  )
  updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
  norm = np.sqrt(sum(np.sum(np.square(g)) for g in grads.values()))
  for name in grads:
    clipped = np.asarray(grads[name], np.float64) / max(norm, 1.0)
    g = np.sign(clipped) * (np.abs(clipped) + 1e-8) ** 1.2
    expected = -1e-3 * (g / (np.abs(g) + 1e-8) + 0.1 * params[name])
    np.testing.assert_allclose(updates[name], expected, rtol=1e-4, atol=1e-9)


def test_one_bound_is_stated_everywhere_of_the_error():
  said = (
    'In float32 and with eps = 0 the result is within 2 units in the last place'
    ' for p up to 3, and within p / 3 + 1 for greater p, wherever input and'
    ' result are normal numbers'
  )
  texts = [sign_power.__doc__, signed_power.__doc__]
  readme = pathlib.Path(__file__).parents[2] / 'README.md'
  if readme.exists():  # In a clone, not beside an installed wheel.
    texts.append(readme.read_text())
  assert all(said in ' '.join(text.split()) for text in texts)


# What is refused.


@pytest.mark.parametrize(
  ('p', 'error', 'words'),
  [
    (0, ValueError, r'positive and below 1e\+06, got 0\.0'),
    (0.0, ValueError, r'positive and below 1e\+06, got 0\.0'),
    (1e6, ValueError, r'positive and below 1e\+06, got 1000000\.0'),
    (
      -1.2,
      ValueError,
      r'positive and below 1e\+06, got -1\.2; the paper uses 1\.2',
    ),
    (float('nan'), ValueError, 'got nan'),
    (float('inf'), ValueError, 'got inf'),
    (np.float32(-1), ValueError, r'got -1\.0'),
    (jnp.float32(0), ValueError, r'got 0\.0'),
    (jnp.float32('nan'), ValueError, 'got nan'),
    (jnp.int32(-3), ValueError, r'got -3\.0'),
    (
      jnp.ones(3),
      ValueError,
      r'shape \(3,\); for a value per group.*partition',
    ),
    (np.ones((1, 1)), ValueError, r'shape \(1, 1\)'),
    (10**400, ValueError, 'got inf'),
    (True, TypeError, 'a positive number, a scalar array or a schedule, got'),
    (np.bool_(True), TypeError, 'got .*True'),
    (jnp.array(True), TypeError, 'got .*True'),
    ('1.2', TypeError, "got '1.2'"),
    (None, TypeError, 'got None'),
    (1.2 + 0j, TypeError, r'got \(1\.2\+0j\)'),
    (jnp.complex64(1), TypeError, 'got '),
    ([1.2], TypeError, r'got \[1\.2\]'),
  ],
)
def test_refuses_a_power(p, error, words):
  with pytest.raises(error, match=rf'sign_power: p must be .*{words}'):
    sign_power(p)


@pytest.mark.parametrize(
  ('returned', 'error', 'words'),
  [
    (-1.0, ValueError, r'got -1\.0'),
    (jnp.ones(2), ValueError, r'shape \(2,\)'),
    ('1.2', TypeError, "got '1.2'"),
  ],
)
def test_refuses_what_a_schedule_returns(returned, error, words):
  tx = sign_power(lambda count: returned)
  state = tx.init(None)
  with pytest.raises(error, match=words):
    tx.update(gradients(), state)


@pytest.mark.parametrize(
  ('eps', 'error', 'words'),
  [
    (-1e-8, ValueError, 'finite and not negative, got -1e-08'),
    (float('nan'), ValueError, 'got nan'),
    (float('inf'), ValueError, 'got inf'),
    (jnp.ones(2), ValueError, r'a scalar, got an array of shape \(2,\)'),
    (True, TypeError, 'a number or a scalar array, got True'),
    (SCHEDULE, TypeError, 'a number or a scalar array, got'),
  ],
)
def test_refuses_an_eps(eps, error, words):
  with pytest.raises(error, match=f'sign_power: eps must be .*{words}'):
    sign_power(1.2, eps=eps)


def test_eps_is_by_name_only():
  with pytest.raises(TypeError, match='positional'):
    sign_power(1.2, 1e-8)


FLOAT0 = np.zeros((2,), jax.dtypes.float0)


@pytest.mark.parametrize(
  ('leaf', 'dtype'),
  [
    (jnp.ones(2, jnp.int32), 'int32'),
    (np.ones(2, np.uint8), 'uint8'),
    (jnp.ones(2, jnp.complex64), 'complex64'),
    (jnp.ones(2, bool), 'bool'),
    (3, 'int32'),
    (FLOAT0, 'float0'),
  ],
)
@pytest.mark.parametrize('p', [1.0, 1.2, SCHEDULE])
def test_refuses_a_leaf_by_its_path(leaf, dtype, p):
  grads = {'layers': [jnp.ones(2), {'table': leaf}]}
  tx = sign_power(p)
  state = tx.init(grads)
  with pytest.raises(TypeError) as refused:
    tx.update(grads, state)
  message = str(refused.value)
  assert "['layers'][1]['table'] is " in message
  assert dtype in message
  assert 'optax.masked' in message
  with pytest.raises(TypeError, match='the gradient is'):
    tx.update(leaf, state)


def test_integer_parameters_are_refused_and_the_remedy_works():
  params = {'w': jnp.array([1.0, 2.0]), 'table': jnp.arange(2)}
  loss = lambda params: jnp.sum(params['w'] ** 2)
  grads = jax.grad(loss, allow_int=True)(params)
  with pytest.raises(TypeError, match=r"\['table'\] is .*float0"):
    apply(sign_power(1.2), grads)
  tx = optax.masked(sign_power(2.0), {'w': True, 'table': False})
  updates = apply(tx, grads)
  np.testing.assert_array_equal(updates['w'], [4.0, 16.0])


def test_numpy_numbers_of_low_precision_warn():
  for number in (np.float16(1.2), jnp.bfloat16(1.2)):
    with pytest.warns(UserWarning, match='p arrives as b?float16'):
      sign_power(number)


def test_a_leaf_that_is_no_number_is_named():
  for leaf in ('text', object()):
    with pytest.raises(TypeError, match=r"floating dtype, but \['a'\] is"):
      sign_power(1.2).update({'a': leaf}, optax.EmptyState())
