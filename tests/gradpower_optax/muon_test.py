"""muon against optax's on one device: signature, state, updates, errors."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers

from gradpower_optax import muon

STANDARD = (3.4445, -4.7750, 2.0315)
# Compiling is what takes the time here.
UNOPTIMIZED = {'xla_backend_optimization_level': 0}


def gaussians(seed, dtype='float32'):
  """Parameters, of which two are stacks of matrices."""
  keys = jax.random.split(jax.random.key(seed), 3)
  leaves = [
    jax.random.normal(key, shape, dtype)
    for key, shape in zip(keys, [(2, 6, 4), (2, 4, 4), (4,)], strict=True)
  ]
  layers = dict(zip(('wide', 'square', 'bias'), leaves, strict=True))
  return {'layers': layers, 'gain': jnp.full(3, 0.5, dtype)}


STACK = MuonDimensionNumbers(1, 2)
WHOLE = {'layers': {'wide': STACK, 'square': None, 'bias': None}, 'gain': None}
SQUARE = {'layers': {'wide': None, 'square': STACK, 'bias': None}, 'gain': None}


def by_rank(params):
  """As a user's function: it sees what optax masks, too."""
  return jax.tree.map(
    lambda x: MuonDimensionNumbers(-1, (-2,)) if x.ndim == 3 else None, params
  )


# One iteration, which compiles in a fifth of the time of five.
QUICK = {'ns_steps': 1, 'muon_weight_dimension_numbers': WHOLE}
CASES = {
  'consistent_rms': {'consistent_rms': 0.2, 'adaptive': True, 'ns_steps': 5},
  'function': {'muon_weight_dimension_numbers': by_rank, 'nesterov': False},
  'stack_as_rows': {
    'muon_weight_dimension_numbers': {
      **WHOLE, 'layers': {**WHOLE['layers'],
                          'wide': MuonDimensionNumbers((1, 0), 2)},
    },
  },
  'spectral': {'preconditioning': 'spectral'},
  'aol': {
    'preconditioning': 'aol', 'ns_steps': 2,
    'muon_weight_dimension_numbers': SQUARE,
  },
  'schatten': {'preconditioning': 'schatten', 'ns_steps': 2},
  'dion': {'ns_coeffs': 'dion', 'ns_steps': 5},
  'standard': {
    'ns_coeffs': 'standard', 'mu_dtype': 'bfloat16', 'adam_b1': 0.8,
    'adam_b2': 0.9, 'adam_eps_root': 1e-6, 'adam_weight_decay': 0.1,
    'adam_learning_rate': 0.3,
  },
  'coefficients': {
    'ns_coeffs': (STANDARD,) * 3, 'ns_steps': 3, 'eps': 1e-3, 'beta': 0.8,
    'weight_decay': 0.1,
    'weight_decay_mask': lambda params: jax.tree.map(
      lambda x: x.ndim == 3, params
    ),
  },
  'schedules': {
    'learning_rate': optax.linear_schedule(0.1, 0.01, 3),
    'adam_learning_rate': optax.linear_schedule(0.2, 0.01, 3),
    'weight_decay': 0.1,
  },
}  # fmt: skip
LATER = ('spectral', 'schatten', 'dion', 'coefficients', 'stack_as_rows')


def assert_equal_optax(arguments, params, grads, close=2e-5):
  """State and two updates of each, the second from the other's state."""
  pair = [
    build(**{'learning_rate': 0.1, **arguments})
    for build in (muon, optax.contrib.muon)
  ]

  @functools.partial(jax.jit, compiler_options=UNOPTIMIZED)
  def run(params, grads):
    states = [tx.init(params) for tx in pair]
    updates = []
    for _ in range(2):
      steps = [
        tx.update(grads, state, params)
        for tx, state in zip(pair, states, strict=True)
      ]
      updates.append([update for update, _ in steps])
      states = [state for _, state in reversed(steps)]
      grads = jax.tree.map(jnp.flip, grads)
    return [(states[i], [both[i] for both in updates]) for i in range(2)]

  first, second = run(params, grads)
  chex.assert_trees_all_equal_shapes_and_dtypes(first, second)
  chex.assert_trees_all_close(first, second, rtol=close, atol=close / 10)


@pytest.mark.parametrize(
  'case',
  [
    pytest.param(case, marks=pytest.mark.slow) if case in LATER else case
    for case in CASES
  ],
)
def test_equals_optax(case):
  assert_equal_optax(QUICK | CASES[case], gaussians(0), gaussians(1))


def test_equals_optax_in_bfloat16():
  params, grads = (gaussians(seed, 'bfloat16') for seed in range(2))
  assert_equal_optax({**QUICK, 'consistent_rms': 0.2}, params, grads, 2e-2)


@pytest.mark.parametrize('numbers', ['none', 'prefix'])
def test_equals_optax_where_numbers_are(numbers):
  w = jax.random.normal(jax.random.key(0), (4, 6))
  params = {'layers': [w, w[:, ::-1]], 'others': (w[0], jnp.stack([w, w]))}
  grads = jax.tree.map(jnp.cos, params)
  by_name = {'layers': MuonDimensionNumbers(1, 0), 'others': None}
  arguments = {
    'none': {'ns_steps': 1},
    'prefix': {'ns_steps': 1, 'muon_weight_dimension_numbers': by_name},
  }
  assert_equal_optax(arguments[numbers], params, grads)


def test_signature_is_that_of_optax():
  own = inspect.signature(muon).parameters
  theirs = inspect.signature(optax.contrib.muon).parameters
  assert list(own) == [*theirs, 'param_shardings']
  for name, parameter in theirs.items():
    assert own[name].default == parameter.default, name
    assert own[name].kind == parameter.kind, name
  assert own['param_shardings'].default is None
  assert own['param_shardings'].kind == inspect.Parameter.KEYWORD_ONLY


@pytest.mark.parametrize('arguments', [
  {'ns_coeffs': 'dion'},
  {'mu_dtype': jnp.bfloat16, 'learning_rate': optax.constant_schedule(0.1)},
])  # fmt: skip
def test_state_is_that_of_optax(arguments):
  params = gaussians(0)
  arguments = {'learning_rate': 0.1, **QUICK, 'ns_steps': 5, **arguments}
  ours, theirs = (
    build(**arguments).init(params) for build in (muon, optax.contrib.muon)
  )
  assert jax.tree.structure(ours) == jax.tree.structure(theirs)
  chex.assert_trees_all_equal(ours, theirs)
  chex.assert_trees_all_equal_shapes_and_dtypes(ours, theirs)


def test_inject_hyperparams():
  """Optax's own cannot take its number of iterations that way either."""
  params, grads = gaussians(0), gaussians(1)
  arguments = {
    **QUICK, 'learning_rate': optax.linear_schedule(0.1, 0.01, 3),
    'beta': 0.9, 'consistent_rms': 0.2, 'weight_decay': 0.1,
  }  # fmt: skip

  def updates(build):
    inject = optax.inject_hyperparams(build, static_args='ns_steps')
    tx = inject(**arguments)
    state = tx.init(params)
    assert {'learning_rate', 'beta', 'eps'} <= set(state.hyperparams)
    update = jax.jit(tx.update, compiler_options=UNOPTIMIZED)
    return update(grads, state, params)

  ours, theirs = updates(muon), updates(optax.contrib.muon)
  chex.assert_trees_all_close(ours, theirs, rtol=2e-5, atol=2e-6)


def test_multi_steps():
  params, grads = gaussians(0), gaussians(1)

  def updates(build):
    tx = optax.MultiSteps(build(0.1, **QUICK), 2)
    update = jax.jit(tx.update, compiler_options=UNOPTIMIZED)
    none, state = update(grads, tx.init(params), params)
    chex.assert_trees_all_equal(none, jax.tree.map(jnp.zeros_like, params))
    return update(grads, state, params)

  ours, theirs = updates(muon), updates(optax.contrib.muon)
  chex.assert_trees_all_close(ours, theirs, rtol=2e-5, atol=2e-6)


# The momentum of a first step is the gradient's multiple. Of well-conditioned
# gradients: Gaussian ones with twice as many columns as rows, and square ones
# with singular values in [0.1, 1]. A square Gaussian matrix may have a singular
# value of nearly zero, which no five iterations lift.


def with_singular_values(seed, values):
  rng = np.random.default_rng(seed)
  u, v = (
    np.linalg.qr(rng.standard_normal((len(values), len(values))))[0]
    for _ in range(2)
  )
  return np.float32(u * values @ v)


def test_singular_values_of_a_first_update():
  rng = np.random.default_rng(0)
  gaussian = lambda *shape: rng.standard_normal(shape, np.float32)
  square = [
    with_singular_values(seed, np.linspace(0.1, 1, 32)) for seed in range(3)
  ]
  grads = {
    'tall': gaussian(64, 32),
    'experts': gaussian(3, 4, 16, 32),
    'heads': gaussian(32, 4, 8),
    'square': np.stack(square),
  }
  numbers = {
    'tall': MuonDimensionNumbers(0, 1),
    'experts': MuonDimensionNumbers(2, 3),
    'heads': MuonDimensionNumbers(0, 2),
    'square': STACK,
  }
  tx = muon(1.0, consistent_rms=0.2, muon_weight_dimension_numbers=numbers)
  update = jax.jit(tx.update, compiler_options=UNOPTIMIZED)
  updates, _ = update(grads, tx.init(grads), grads)
  updates['heads'] = updates['heads'].swapaxes(0, 1)
  for name, update in updates.items():
    scale = 0.2 * np.sqrt(max(update.shape[-2:]))
    values = np.linalg.svd(np.asarray(update) / scale, compute_uv=False)
    assert values.min() > 0.6, name
    assert values.max() < 1.25, name


# Errors.


def test_refuses_an_unknown_preset():
  with pytest.raises(ValueError, match="'fast', not one of"):
    muon(0.1, ns_coeffs='fast')


@pytest.mark.parametrize('coefficients', [(1.0, 2.0), ((1.0, 2.0),) * 5])
def test_refuses_coefficients_of_another_shape(coefficients):
  with pytest.raises(ValueError, match=r'must have shape \(3,\) or \(n, 3\)'):
    muon(0.1, ns_coeffs=coefficients).init(jnp.ones((2, 3)))


@pytest.mark.parametrize(
  ('rows', 'columns'),
  [(0, 0), (0, -3), ((0, 1), 1), ((0, 0), 1), (0, 3), (-4, 1), (0, ())],
)
def test_refuses_dimensions_that_make_no_matrix(rows, columns):
  params = jnp.ones((2, 3, 4))
  numbers = MuonDimensionNumbers(rows, columns)
  tx = muon(0.1, muon_weight_dimension_numbers=numbers)
  with pytest.raises(ValueError, match=r'shape \(2, 3, 4\) is no matrix'):
    tx.update(params, tx.init(params), params)


def test_refuses_two_meshes():
  devices = np.array(jax.devices())
  if len(devices) < 4:
    pytest.skip('needs 4 devices; tests/conftest.py asks for fake ones')
  params = {'a': jnp.ones((2, 4)), 'b': jnp.ones((2, 4))}
  where = {
    name: NamedSharding(Mesh(part, 'x'), PartitionSpec(None, 'x'))
    for name, part in [('a', devices[:2]), ('b', devices[2:4])]
  }
  tx = muon(0.1, param_shardings=where)
  with pytest.raises(ValueError, match='lie on 2 meshes, not one'):
    tx.update(params, tx.init(params), params)
