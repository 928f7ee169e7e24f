"""Muon given what does not fit, one clear line each, and what just does."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers as D

from gradpower_optax import adamw_power, muon

KEYS = jax.random.split(jax.random.key(0), 2)
PARAMS, GRADS = (
  {
    'w': jax.random.normal(key, (4, 8, 16)),
    'b': jax.random.normal(key, (16,)),
  }
  for key in KEYS
)
NUMBERS = {'w': D(1, 2), 'b': None}
# Before jax 0.7.1 it is called use_mesh.
set_mesh = getattr(jax, 'set_mesh', None) or jax.sharding.use_mesh


def mesh_of(**kinds):
  """Four devices by two, each axis Auto or Explicit."""
  types = tuple(getattr(AxisType, kind) for kind in kinds.values())
  return jax.make_mesh((4, 2), tuple(kinds), axis_types=types)


AUTO = mesh_of(fsdp='Auto', tensor='Auto')


def update(tx, params=PARAMS, grads=GRADS):
  return tx.update(grads, tx.init(params), params)[0]


def close(actual, expected):
  for name, want in expected.items():
    got, scale = actual[name], np.abs(want).max(initial=0)
    np.testing.assert_allclose(got, want, atol=2e-4 * scale)


@pytest.mark.parametrize(
  ('numbers', 'message'),
  [
    ({'w': D(1, 3), 'b': None}, r"\['w'\] of shape \(4, 8, 16\) is no matrix"),
    ({'w': D(1, -2), 'b': None}, 'is no matrix'),
    ({'w': D((), 1), 'b': None}, 'is no matrix'),
    ({'w': D(1, 2), 'b': D(0, 1)}, r"\['b'\] of shape \(16,\) is no matrix"),
    ({'w': D(1, 2)}, 'must have the structure of the parameters'),
    ({'w': (1, 2), 'b': None}, 'must have the structure of the parameters'),
  ],
)
def test_dimension_numbers_that_do_not_fit(numbers, message):
  with pytest.raises(ValueError, match=message) as error:
    muon(0.1, muon_weight_dimension_numbers=numbers).init(PARAMS)
  assert '\n' not in str(error.value)


def test_dimension_numbers_of_another_type():
  with pytest.raises(TypeError, match='MuonDimensionNumbers or None, not 1'):
    muon(0.1, muon_weight_dimension_numbers={'w': 1, 'b': None}).init(PARAMS)


@pytest.mark.parametrize(
  ('shardings', 'error', 'message'),
  [
    (P('fsdp'), TypeError, 'must hold Sharding or None'),
    ({'w': P('fsdp'), 'b': None}, TypeError, 'must hold Sharding or None'),
    ({'w': NamedSharding(AUTO, P())}, ValueError, 'must have the structure'),
    ({'w': NamedSharding(AUTO, P(None, None, ('fsdp', 'tensor'), None)),
      'b': None}, ValueError, 'cannot lie as'),
    ({'w': NamedSharding(AUTO, P(('fsdp', 'tensor'))), 'b': None},
     ValueError, r'shape \(4, 8, 16\) cannot lie as'),
  ],
)  # fmt: skip
def test_shardings_that_do_not_fit(shardings, error, message):
  tx = muon(
    0.1, muon_weight_dimension_numbers=NUMBERS, param_shardings=shardings
  )
  with pytest.raises(error, match=message) as found:
    update(tx)
  assert '\n' not in str(found.value)


def test_a_single_device_is_no_mesh():
  shardings = jax.tree.map(lambda x: x.sharding, PARAMS)
  tx = muon(
    0.1, muon_weight_dimension_numbers=NUMBERS, param_shardings=shardings
  )
  expected = optax.contrib.muon(0.1, muon_weight_dimension_numbers=NUMBERS)
  close(update(tx), update(expected))


def test_a_matrix_split_by_an_axis_that_is_taken():
  place = NamedSharding(AUTO, P(None, 'fsdp'))
  tx = muon(
    0.1,
    muon_weight_dimension_numbers=D(1, 2),
    param_shardings=place,
  )
  inside = jax.shard_map(
    lambda g: tx.update(g, tx.init(g), g)[0],
    mesh=AUTO, in_specs=place.spec, out_specs=place.spec, check_vma=False,
  )  # fmt: skip
  with pytest.raises(ValueError, match=r"split over \['fsdp'\], which a"):
    jax.eval_shape(inside, GRADS['w'])


def test_injected_hyperparameters_on_a_mesh():
  """All of them: the number of steps too arrives as an array."""
  place = NamedSharding(AUTO, P(None, 'fsdp', 'tensor'))
  options = {'muon_weight_dimension_numbers': D(1, 2)}
  tx = optax.inject_hyperparams(muon)(0.1, **options, param_shardings=place)
  g = jax.device_put(GRADS['w'], place)
  got = jax.jit(tx.update)(g, tx.init(g), g)[0]
  expected = update(optax.contrib.muon(0.1, **options), g, GRADS['w'])
  close({'w': got}, {'w': expected})


def test_a_mesh_of_both_kinds_tells_half():
  """Nothing is then known of it, and nothing moved to where it was not."""
  mesh = mesh_of(fsdp='Explicit', tensor='Auto')
  place = NamedSharding(mesh, P(None, 'fsdp', 'tensor'))
  tx = muon(0.1, muon_weight_dimension_numbers=D(1, 2), param_shardings=place)
  g = jax.device_put(GRADS['w'], place)
  with set_mesh(mesh):
    got = jax.jit(tx.update)(g, tx.init(g), g)[0]
  expected = optax.contrib.muon(0.1, muon_weight_dimension_numbers=D(1, 2))
  close({'w': got}, {'w': update(expected, GRADS['w'], GRADS['w'])})
  assert got.sharding.is_equivalent_to(place, 3)


def test_a_matrix_without_elements():
  place = NamedSharding(AUTO, P('fsdp'))
  g = jax.device_put(jnp.zeros((8, 0)), place)
  assert update(muon(0.1), g, g).shape == (8, 0)


def test_numbers_of_one_matrix_are_not_looked_at():
  """As in optax; AOL would tell its rows from its columns."""
  options = {
    'muon_weight_dimension_numbers': D(1, 0), 'preconditioning': 'aol',
  }  # fmt: skip
  g = jax.random.normal(KEYS[0], (8, 8))
  there = jax.device_put(g, NamedSharding(AUTO, P('fsdp', 'tensor')))
  close(
    {'w': update(muon(0.1, **options), there, there)},
    {'w': update(optax.contrib.muon(0.1, **options), g, g)},
  )


@pytest.mark.parametrize(
  'clip_norm', [0, -1.0, np.nan, np.float32('nan'), jnp.zeros([])]
)
def test_a_norm_to_clip_at_is_positive(clip_norm):
  with pytest.raises(ValueError, match='clip_norm must be positive, or None'):
    adamw_power(1e-3, clip_norm=clip_norm)
