"""Muon without param_shardings: what init has seen is where parameters lie."""

import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers

from gradpower_optax import muon

_spec = importlib.util.spec_from_file_location(
  'muon_case', pathlib.Path(__file__).with_name('muon_case.py')
)
case = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(case)

# Before jax 0.7.1 it is called use_mesh.
set_mesh = getattr(jax, 'set_mesh', None) or jax.sharding.use_mesh
NUMBERS = {'up': MuonDimensionNumbers(1, 2), 'norm': None}
SPECS = {'up': P(None, 'fsdp', 'tensor'), 'norm': P()}
TWO = {'all-to-all': 2}
UNKNOWN = 'muon: update is traced .* pass param_shardings '


def mesh_of(*kinds, sizes=(4, 2), devices=slice(8)):
  if len(jax.devices()) < 8:
    pytest.skip('needs 8 devices; tests/conftest.py asks for fake ones')
  types = tuple(getattr(AxisType, kind) for kind in kinds or ('Auto', 'Auto'))
  return jax.make_mesh(
    sizes, ('fsdp', 'tensor'), axis_types=types, devices=jax.devices()[devices]
  )


def on(mesh, specs=SPECS):
  up, norm = np.random.default_rng(0).standard_normal((2, 4, 8, 16), np.float32)
  places = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
  return jax.device_put({'up': up, 'norm': norm[0, 0]}, places)


def make(**more):
  return muon(
    0.1, ns_steps=1, muon_weight_dimension_numbers=NUMBERS, **more
  )  # One iteration is less to compile.


def check(tx, state, params):
  """That updates are optax's; returns the collectives."""
  lowered = jax.jit(tx.update).lower(params, state, params)
  program = lowered.compile(compiler_options=case.UNOPTIMIZED)
  updates, _ = program(params, state, params)
  theirs = optax.contrib.muon(
    0.1, ns_steps=1, muon_weight_dimension_numbers=NUMBERS
  )
  whole = jax.device_get(params)
  expected, _ = theirs.update(whole, theirs.init(whole), whole)
  assert max(case.errors(updates, expected).values()) < 2e-4
  for name, x in updates.items():
    assert x.sharding.device_set == params[name].sharding.device_set
  return case.counts(case.collectives(program.as_text()))


def test_init_sees_where_parameters_lie():
  params = on(mesh_of())
  tx = make()
  assert check(tx, tx.init(params), params) == TWO


def test_states_of_another_source():
  """As from a checkpoint, where init has seen the parameters or a like tree."""
  params, tx = on(mesh_of()), make()
  tx.init(jax.tree.map(jnp.zeros_like, params))
  assert check(tx, jax.jit(make().init)(params), params) == TWO


def test_two_models_and_two_meshes():
  """What is seen of one is not taken for another."""
  tx, first, other = make(), on(mesh_of()), on(mesh_of(sizes=(2, 4)))
  states = [tx.init(first), tx.init(other)]
  assert check(tx, states[0], first) == check(tx, states[1], other) == TWO
  longer = jax.tree.map(lambda x: jnp.concatenate([x] * 2), first)
  assert check(tx, tx.init(longer), longer) == TWO
  assert check(tx, states[0], first) == TWO


def test_other_devices_than_those_seen():
  """Of a mesh of the same shape: no device is remembered."""
  first, other = (
    on(mesh_of(sizes=(2, 2), devices=half)) for half in (slice(4), slice(4, 8))
  )
  tx = make()
  tx.init(first)
  assert check(tx, jax.jit(make().init)(other), other) == TWO


def test_parameters_that_were_moved_since():
  """They are moved back, which is slower; the updates are right."""
  tx = make()
  tx.init(on(mesh_of()))
  copies = on(mesh_of(), dict.fromkeys(SPECS, P()))
  assert check(tx, jax.jit(make().init)(copies), copies) != {}


def test_a_mesh_that_was_not_seen():
  tx, moved = make(), on(mesh_of(sizes=(8, 1)))
  tx.init(on(mesh_of()))
  with pytest.warns(UserWarning, match=UNKNOWN):
    assert check(tx, jax.jit(make().init)(moved), moved) != TWO


def test_within_other_transformations():
  params = on(mesh_of())
  labels = {'up': 'muon', 'norm': 'sgd'}
  tx = optax.partition({'muon': make(), 'sgd': optax.sgd(0.1)}, labels)
  tx = optax.MultiSteps(optax.chain(optax.clip(1.0), tx), 2)
  jax.eval_shape(tx.update, params, tx.init(params), params)  # No warning.


def test_warns_once_that_nothing_is_known():
  params, tx = on(mesh_of()), make()
  state = jax.jit(tx.init)(params)
  with pytest.warns(UserWarning, match=UNKNOWN) as found:
    assert check(tx, state, params) != TWO
    check(tx, state, params)
  assert len(found) == 1 and '\n' not in str(found[0].message)


def test_warns_of_injected_hyperparameters():
  params = {
    'w': jax.device_put(jnp.eye(8), NamedSharding(mesh_of(), P('fsdp')))
  }
  tx = optax.inject_hyperparams(muon)(0.1)
  with pytest.warns(UserWarning, match=UNKNOWN):
    jax.eval_shape(tx.update, params, tx.init(params), params)


@pytest.mark.parametrize('given', ['one device', 'copies', 'Explicit', 'eager'])
def test_no_false_alarm(given):
  mesh = mesh_of(*(['Explicit'] * 2 if given == 'Explicit' else []))
  params = on(mesh)
  if given == 'one device':
    params = on(mesh_of(sizes=(1, 1), devices=slice(1)))
  tx = make(
    param_shardings=NamedSharding(mesh, P()) if given == 'copies' else None
  )
  state = make().init(params)  # Not its own.
  (tx.update if given == 'eager' else jax.jit(tx.update))(params, state, params)


def test_where_every_axis_is_taken_nothing_is_split():
  params, tx = on(mesh_of(), dict.fromkeys(SPECS, P())), make()
  jax.eval_shape(
    jax.shard_map(
      lambda x: tx.update(x, tx.init(x), x)[0], mesh=mesh_of(), in_specs=P(),
      out_specs=P(), check_vma=False,
    ),
    params,
  )  # fmt: skip


def test_many_copies_of_a_model_at_once():
  """Each is of the shape that was seen."""
  params, tx = on(mesh_of()), make()
  state = tx.init(params)
  both = jax.tree.map(lambda x: jnp.stack([x, -x]), params)
  states = jax.vmap(tx.init)(both)
  updates, _ = jax.jit(jax.vmap(tx.update))(both, states, both)
  expected, _ = tx.update(params, state, params)
  for sign, i in ((1, 0), (-1, 1)):
    found = {name: sign * x[i] for name, x in updates.items()}
    assert max(case.errors(found, expected).values()) < 2e-4


def test_axes_of_both_kinds():
  """Seen, it is as fast; else JAX's error names what to pass."""
  mesh = mesh_of('Explicit', 'Auto')
  params, tx = on(mesh), make()
  with set_mesh(mesh):
    assert check(tx, tx.init(params), params) == TWO
    unseen = make()
    state = jax.jit(unseen.init)(params)
    with (
      pytest.warns(UserWarning, match=UNKNOWN),
      pytest.raises(Exception, match=None) as raised,
    ):
      jax.jit(unseen.update).lower(params, state, params)
  assert 'param_shardings' in ''.join(raised.value.__notes__)
