"""muon on meshes of eight devices against optax's on one."""

import functools
import importlib.util
import math
import pathlib

import chex
import jax
import numpy as np
import optax
import optax.contrib
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers

from gradpower_optax import muon

_spec = importlib.util.spec_from_file_location(
  'muon_case', pathlib.Path(__file__).with_name('muon_case.py')
)
case = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(case)

# Before jax 0.7.1 it is called use_mesh.
set_mesh = getattr(jax, 'set_mesh', None) or jax.sharding.use_mesh

KINDS = ('Auto', 'Explicit')
SLOW = pytest.mark.slow
ONE_SLOW = (pytest.param('Auto', marks=SLOW), 'Explicit')
# Relative to an array's largest entry.
BOUND = 2e-4
ARGUMENTS = {
  'learning_rate': 0.1, 'weight_decay': 0.1, 'ns_coeffs': case.LOOPED,
}  # fmt: skip
FEW = {
  name: case.PARAMS[name]
  for name in ('query', 'out', 'alone', 'expert_down', 'norm')
}


def compiled(tx, *arguments):
  lowered = jax.jit(tx.update).lower(*arguments)
  return lowered.compile(compiler_options=case.UNOPTIMIZED)


def arguments_of(params, **more):
  numbers = {name: param.numbers for name, param in params.items()}
  return {**ARGUMENTS, 'muon_weight_dimension_numbers': numbers, **more}


@functools.cache
def expected(names, more=()):
  """Updates and state of optax's on one device."""
  params = {name: case.PARAMS[name] for name in names}
  tx = optax.contrib.muon(**arguments_of(params, **dict(more)))
  weights, grads = case.arrays(0, params), case.arrays(1, params)
  inputs = grads, tx.init(weights), weights
  return jax.device_get(compiled(tx, *inputs)(*inputs))


def on_mesh(sizes, kind, params=FEW, **more):
  """The transformation, its sharded arguments, and where parameters lie."""
  where = case.shardings(case.mesh_of(sizes, kind), params)
  known = where if kind == 'Auto' else None
  tx = muon(**{**arguments_of(params), 'param_shardings': known, **more})
  weights, grads = jax.device_put(
    (case.arrays(0, params), case.arrays(1, params)), (where, where)
  )
  return tx, (grads, tx.init(weights), weights), where


def moments(state):
  """First moments of matrices, by name."""
  found = state.inner_states['muon'].inner_state[0].mu
  return {
    name: x for name, x in found.items() if not isinstance(x, optax.MaskedNode)
  }


def check(actual, where, params=FEW, more=()):
  """Values and places of updates and moments."""
  updates, state = expected(tuple(params), more)
  pairs = [(actual[0], updates), (moments(actual[1]), moments(state))]
  for ours, theirs in pairs:
    assert max(case.errors(ours, theirs).values()) < BOUND
    for name, x in ours.items():
      assert x.sharding.is_equivalent_to(where[name], x.ndim), name
  chex.assert_trees_all_equal_shapes_and_dtypes(actual[0], updates)


@pytest.mark.parametrize(
  ('sizes', 'kind'), [((1, 4, 2, 1), 'Auto'), ((2, 2, 1, 2), 'Explicit')]
)
def test_equals_optax_on_one_device(sizes, kind):
  tx, inputs, where = on_mesh(sizes, kind)
  program = compiled(tx, *inputs)
  check(program(*inputs), where)
  case.check_traffic(case.collectives(program.as_text()), FEW, sizes)


@SLOW
@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('sizes', case.MESHES)
def test_equals_optax_on_every_mesh(sizes, kind):
  tx, inputs, where = on_mesh(sizes, kind, case.PARAMS)
  program = compiled(tx, *inputs)
  check(program(*inputs), where, case.PARAMS)
  case.check_traffic(case.collectives(program.as_text()), case.PARAMS, sizes)


@SLOW
@pytest.mark.parametrize('kind', KINDS)
def test_equals_optax_with_its_options(kind):
  more = {
    'consistent_rms': 0.2, 'adaptive': True, 'nesterov': False,
    'mu_dtype': 'bfloat16',
  }  # fmt: skip
  names = ('alone', 'norm')
  params = {name: case.PARAMS[name] for name in names}
  tx, inputs, where = on_mesh((1, 2, 4, 1), kind, params, **more)
  actual = compiled(tx, *inputs)(*inputs)
  check(actual, where, params, tuple(more.items()))


@pytest.mark.parametrize('preconditioning', [
  'aol', pytest.param('spectral', marks=SLOW),
  pytest.param('schatten', marks=SLOW),
])  # fmt: skip
def test_preconditioning(preconditioning):
  """Of square matrices: not all of these commute with a transpose."""
  shape = 3, 8, 8
  numbers = MuonDimensionNumbers(1, 2)
  where = NamedSharding(
    case.mesh_of((1, 2, 4, 1)), PartitionSpec(None, 'tensor', 'fsdp')
  )
  arguments = {
    'ns_steps': 2, 'preconditioning': preconditioning,
    'muon_weight_dimension_numbers': numbers,
  }  # fmt: skip
  g = jax.random.normal(jax.random.key(0), shape)
  updates = []
  for tx, x in [
    (optax.contrib.muon(0.1, **arguments), g),
    (muon(0.1, **arguments, param_shardings=where), jax.device_put(g, where)),
  ]:
    inputs = x, tx.init(x), x
    updates.append(compiled(tx, *inputs)(*inputs)[0])
  assert case.errors({'x': updates[1]}, {'x': updates[0]})['x'] < BOUND


@pytest.mark.parametrize(
  'given', ['function', pytest.param('prefix', marks=SLOW), 'nothing']
)
def test_where_parameters_lie(given):
  names = ('query', 'query_by_head')
  params = {name: case.PARAMS[name] for name in names}
  sizes = 1, 4, 2, 1
  same = NamedSharding(
    case.mesh_of(sizes), PartitionSpec(None, 'fsdp', 'tensor')
  )
  known = {
    'function': lambda params: dict.fromkeys(names, same),
    'prefix': same,
    'nothing': None,  # It is where init has seen them.
  }[given]
  tx, inputs, where = on_mesh(sizes, 'Auto', params, param_shardings=known)
  program = compiled(tx, *inputs)
  updates, _ = program(*inputs)
  assert max(case.errors(updates, expected(names)[0]).values()) < BOUND
  check(program(*inputs), where, params)
  case.check_traffic(case.collectives(program.as_text()), params, sizes)


@pytest.mark.parametrize('kind', ONE_SLOW)
def test_outside_of_jit(kind):
  """Arrays themselves say where they are."""
  params = {name: case.PARAMS[name] for name in ('alone', 'norm')}
  sizes = 1, 4, 2, 1
  tx, inputs, where = on_mesh(sizes, kind, params, param_shardings=None)
  check(tx.update(*inputs), where, params)


@pytest.mark.parametrize('kind', ONE_SLOW)
def test_in_the_context_of_a_mesh(kind):
  params = {name: case.PARAMS[name] for name in ('alone', 'norm')}
  tx, inputs, where = on_mesh((2, 2, 2, 1), kind, params)
  with set_mesh(where['alone'].mesh):
    check(compiled(tx, *inputs)(*inputs), where, params)


@pytest.mark.parametrize('kind', ONE_SLOW)
def test_inside_a_shard_map_over_one_axis(kind):
  """As where each data-parallel device updates its own copy."""
  params = {name: case.PARAMS[name] for name in ('alone', 'query', 'norm')}
  tx, inputs, where = on_mesh((2, 2, 2, 1), kind, params)
  replicated = jax.shard_map(
    tx.update,
    mesh=where['alone'].mesh,
    in_specs=PartitionSpec(),
    out_specs=PartitionSpec(),
    axis_names={'data'},
    check_vma=False,
  )
  update = jax.jit(replicated, compiler_options=case.UNOPTIMIZED)
  check(update(*inputs), where, params)


@SLOW
def test_hyperparameters_in_the_state_and_steps_accumulated():
  params = {name: case.PARAMS[name] for name in ('alone', 'norm')}
  _, (grads, _, weights), where = on_mesh((1, 4, 2, 1), 'Auto', params)
  inject = optax.inject_hyperparams(muon, static_args='ns_steps')
  tx = optax.MultiSteps(
    inject(**arguments_of(params, param_shardings=where)), 2
  )
  update = jax.jit(tx.update, compiler_options=case.UNOPTIMIZED)
  _, state = update(grads, tx.init(weights), weights)
  updates, state = update(grads, state, weights)
  want, _ = expected(tuple(params))
  assert max(case.errors(updates, want).values()) < BOUND


def test_singular_values_of_a_first_update():
  """Of matrices twice as wide as high, which are well-conditioned."""
  numbers = {
    'query': MuonDimensionNumbers(1, (2, 3)),
    'query_by_head': MuonDimensionNumbers(1, 3),
    'expert_up': MuonDimensionNumbers(2, 3),
  }
  params = {
    'query': case.Param(
      (3, 32, 8, 8), numbers['query'], (None, 'fsdp', 'tensor', None)
    ),
    'query_by_head': case.Param(
      (3, 32, 8, 16), numbers['query_by_head'], (None, 'fsdp', 'tensor', None)
    ),
    'expert_up': case.Param(
      (3, 4, 16, 32), numbers['expert_up'], (None, 'expert', 'fsdp', 'tensor')
    ),
  }
  tx, inputs, _ = on_mesh(
    (1, 2, 2, 2), 'Auto', params, learning_rate=1.0, weight_decay=0.0,
    consistent_rms=0.2,
  )  # fmt: skip
  updates, _ = jax.device_get(compiled(tx, *inputs)(*inputs))
  matrices = {
    'query': updates['query'].reshape(3, 32, 64),
    'query_by_head': updates['query_by_head'].swapaxes(1, 2),
    'expert_up': updates['expert_up'],
  }
  for name, x in matrices.items():
    scale = 0.2 * np.sqrt(max(x.shape[-2:]))
    values = np.linalg.svd(x / scale, compute_uv=False)
    assert values.min() > 0.6, name
    assert values.max() < 1.25, name


@st.composite
def sharded_stacks(draw):
  """Arrays of any rank, their matrices' dimensions anywhere, split anyhow."""
  sizes = draw(st.sampled_from(case.MESHES))
  by_name = dict(zip(case.AXES, sizes, strict=True))
  params = {}
  for name in 'ab':
    rank = draw(st.integers(2, 5))
    order = draw(st.permutations(range(rank)))
    first = draw(st.integers(1, rank - 1))
    second = draw(st.integers(first + 1, rank))
    rows, columns = order[:first], order[first:second]
    axes = [()] * rank
    for axis in draw(st.permutations(case.AXES)):
      dim = draw(st.none() | st.integers(0, rank - 1))
      if dim is not None:
        axes[dim] += (axis,)
    ways = [math.prod(by_name[axis] for axis in names) for names in axes]
    shape = [n * draw(st.integers(1, 3)) for n in ways]
    # Far from square, so that a random matrix is of full rank by far.
    n_rows = math.prod(shape[dim] for dim in rows)
    n_columns = math.prod(shape[dim] for dim in columns)
    if n_columns < 2 * n_rows:
      shape[columns[0]] *= -(-2 * n_rows // n_columns)
    numbers = MuonDimensionNumbers(tuple(rows), tuple(columns))
    if draw(st.booleans()):
      numbers = MuonDimensionNumbers(*reversed(numbers))
    params[name] = case.Param(tuple(shape), numbers, tuple(axes))
  return sizes, draw(st.sampled_from(KINDS)), params


@SLOW
@settings(max_examples=30)
@given(sharded_stacks())
def test_equals_optax_however_split(drawn):
  sizes, kind, params = drawn
  tx, inputs, where = on_mesh(sizes, kind, params)
  program = compiled(tx, *inputs)
  updates, _ = program(*inputs)
  one = optax.contrib.muon(**arguments_of(params))
  whole = jax.device_get((inputs[0], one.init(inputs[2]), inputs[2]))
  want, _ = compiled(one, *whole)(*whole)
  assert max(case.errors(updates, want).values()) < BOUND
  for name, x in updates.items():
    assert x.sharding.is_equivalent_to(where[name], x.ndim), name
  case.check_traffic(case.collectives(program.as_text()), params, sizes)
