"""Learning rates by block: the ratios, their warm-up and their return."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gradpower_optax import blockwise_schedule, scale_by_blockwise
from gradpower_optax.blockwise import RATIOS

PARAMS = {'norm': jnp.ones(3), 'attention': {'q': jnp.ones((2, 3))}}
LABELS = {'norm': 'norm', 'attention': {'q': 'qk'}}


def authors(step, peak, least, warmup, steps, ratio):
  """A group's learning rate, by the words of the authors' wsd schedule."""
  climb, third, two_thirds = warmup * ratio, steps / 3, 2 * steps / 3
  if step <= climb:
    return ratio * peak * step / climb
  if step <= third:
    return ratio * peak
  if step <= two_thirds:
    return np.interp(step, [third, two_thirds], [ratio * peak, peak])
  return np.interp(step, [two_thirds, steps], [peak, least])


def test_ratios_are_the_published_ones():
  assert dict(RATIOS) == {
    'norm': 1, 'vo': 4, 'ffn': 6, 'qk': 8, 'embedding': 10, 'lm_head': 1,
  }  # fmt: skip


@pytest.mark.parametrize('name', RATIOS)
def test_times_wsd_it_is_the_groups_own_schedule(name):
  peak, warmup, steps = 1e-3, 20, 900
  base = lambda t: authors(t, peak, peak / 10, warmup, steps, 1)
  multiple = blockwise_schedule(RATIOS[name], warmup, steps)
  counts = np.arange(steps + 1)
  found = multiple(counts) * np.array([base(t) for t in counts])
  expected = [
    authors(t, peak, peak / 10, warmup, steps, RATIOS[name]) for t in counts
  ]
  np.testing.assert_allclose(found, expected, rtol=2e-6, atol=1e-12)


@given(
  ratio=st.floats(1, 100),
  warmup=st.integers(0, 1000),
  steps=st.none() | st.integers(1, 10_000),
)
def test_stays_between_1_and_the_ratio(ratio, warmup, steps):
  counts = np.array([0, 1, warmup, 3 * warmup, 1000, 10_000, 2**31 - 1])
  found = np.asarray(blockwise_schedule(ratio, warmup, steps)(counts))
  assert found.dtype == np.float32
  assert ((found >= 1) & (found <= np.float32(ratio))).all()
  if steps is not None:  # Nothing is left where the base decays.
    assert (found[counts >= 2 * steps / 3] == 1).all()
  elif warmup == 0:
    assert (found == np.float32(ratio)).all()


def test_a_climb_that_is_too_long_ends_at_the_fall():
  found = blockwise_schedule(10.0, 100, 600)(np.arange(601))
  assert found.max() < 10
  assert np.abs(np.diff(found)).max() < 0.05  # No jump.


def test_each_block_is_scaled_by_its_own():
  tx = scale_by_blockwise(LABELS, warmup_steps=2)
  state = tx.init(PARAMS)
  for expected in (1, 1, 1, 1.5, 2):
    updates, state = jax.jit(tx.update)(PARAMS, state)
    assert (updates['norm'] == 1).all()
    assert (updates['attention']['q'] == expected).all()
  assert state.count == 5
  assert state.count.dtype == jnp.int32


def test_decoupled_weight_decay_is_scaled_as_well():
  base = optax.adamw(optax.linear_schedule(0.0, 1e-2, 2), weight_decay=0.1)
  tx = optax.chain(base, scale_by_blockwise(LABELS, 0))
  state, alone = tx.init(PARAMS), base.init(PARAMS)
  for _ in range(3):
    updates, state = tx.update(PARAMS, state, PARAMS)
    unscaled, alone = base.update(PARAMS, alone, PARAMS)
    np.testing.assert_allclose(
      updates['attention']['q'], 8 * unscaled['attention']['q'], rtol=1e-6
    )


@pytest.mark.parametrize('labels', [
  LABELS,
  {'norm': 'norm', 'attention': 'qk'},
  lambda params: jax.tree.map(lambda x: 'qk' if x.ndim > 1 else 'norm', params),
])  # fmt: skip
def test_labels_are_a_tree_a_prefix_or_a_function(labels):
  tx = scale_by_blockwise(labels, 0)
  updates, _ = tx.update(PARAMS, tx.init(PARAMS))
  assert [float(x.max()) for x in jax.tree.leaves(updates)] == [8, 1]


def test_narrow_updates_are_rounded_once():
  g = jnp.linspace(-3, 3, 97, dtype=jnp.bfloat16)
  tx = scale_by_blockwise('odd', 0, ratios={'odd': 1.7})
  found, _ = tx.update(g, tx.init(g))
  expected = (g.astype(jnp.float32) * np.float32(1.7)).astype(jnp.bfloat16)
  assert found.dtype == jnp.bfloat16
  assert (found == expected).all()


def test_counts_updates_not_micro_batches():
  tx = optax.MultiSteps(
    optax.chain(optax.sgd(1.0), scale_by_blockwise('qk', 1)), 2
  )
  state = tx.init(PARAMS)
  sizes = []
  for _ in range(6):
    updates, state = tx.update(PARAMS, state, PARAMS)
    sizes.append(float(-updates['norm'][0]))
  assert sizes == [0, 1, 0, 1, 0, 2]


def test_state_is_found_by_optax():
  tx = optax.chain(optax.adamw(1e-3), scale_by_blockwise(LABELS, 10))
  state = optax.tree.map_params(tx, jnp.zeros_like, tx.init(PARAMS))
  assert state[1].count == 0


@pytest.mark.parametrize('kind', ['Auto', 'Explicit'])
def test_sharding_is_kept(kind):
  if len(jax.devices()) < 8:
    pytest.skip('needs 8 devices; tests/conftest.py asks for fake ones')
  mesh = jax.make_mesh((8,), ('fsdp',), axis_types=(getattr(AxisType, kind),))
  x = jax.device_put(jnp.ones((16, 2)), NamedSharding(mesh, P('fsdp', None)))
  tx = scale_by_blockwise('vo', 0)
  found, _ = jax.jit(tx.update)(x, tx.init(x))
  assert found.sharding.is_equivalent_to(x.sharding, 2)
  assert (found == 4).all()


@pytest.mark.parametrize('arguments, words', [
  ({'ratio': 0.5, 'warmup_steps': 1}, 'ratio must be at least 1, not 0.5'),
  ({'ratio': np.inf, 'warmup_steps': 1}, 'ratio must be at least 1, not inf'),
  ({'ratio': np.nan, 'warmup_steps': 1}, 'ratio must be at least 1, not nan'),
  ({'ratio': 2, 'warmup_steps': -1}, 'steps must be at least 0, not -1'),
  ({'ratio': 2, 'warmup_steps': np.nan}, 'steps must be at least 0, not nan'),
  ({'ratio': 2, 'warmup_steps': np.inf}, 'steps must be at least 0, not inf'),
  ({'ratio': 2, 'warmup_steps': 1, 'steps': 0}, 'at least 1, not 0'),
  ({'ratio': 2, 'warmup_steps': 1, 'steps': np.nan}, 'at least 1, not nan'),
  ({'ratio': 2, 'warmup_steps': 1, 'steps': np.inf}, 'at least 1, not inf'),
])  # fmt: skip
def test_says_what_is_out_of_range(arguments, words):
  with pytest.raises(ValueError, match=words):
    blockwise_schedule(**arguments)


@pytest.mark.parametrize('labels, words', [
  ('head', "'head' is no block, which are norm, vo, ffn, qk, embedding, lm_he"),
  ({'norm': 'norm', 'attention': {'q': 3}}, '3 is no block'),
  ({'norm': 'norm'}, 'must have the structure of the parameters'),
])  # fmt: skip
def test_says_what_is_wrong_with_labels(labels, words):
  tx = scale_by_blockwise(labels, 0)
  for use in (tx.init, lambda x: tx.update(x, optax.ScaleByScheduleState(0))):
    with pytest.raises(ValueError, match=words) as raised:
      use(PARAMS)
    assert '\n' not in str(raised.value)
