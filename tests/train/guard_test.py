import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train import guard
from train.config import GuardConfig
from train.errors import UserError

OFF, ON = GuardConfig(), GuardConfig(spike=6.0)
BAD = [math.nan, math.inf, -math.inf]


@functools.partial(jax.jit, static_argnums=0)
def judge(config, state, loss, norm, powered=1.0):
  norms = {'grad_norm': norm, 'clipped_norm': 1.0, 'powered_norm': powered}
  norms = jax.tree.map(jnp.float32, norms)
  return guard.judge(config, state, jnp.float32(loss), norms)


def after(config, losses, norm=1.0):
  """The guard after such steps, and which of them counted."""
  state, taken = guard.init(), []
  for loss in losses:
    take, state = judge(config, state, loss, norm)
    taken.append(bool(take))
  return state, taken


def calm(count, seed=0):
  return list(np.random.default_rng(seed).normal(3, 0.1, count))


@pytest.mark.parametrize('bad', BAD)
@pytest.mark.parametrize('config', [OFF, ON])
@pytest.mark.parametrize('place', ['loss', 'norm', 'powered'])
def test_what_is_not_finite_does_not_count(config, bad, place):
  before, _ = after(config, calm(60))
  values = {'loss': 3.0, 'norm': 1.0} | {place: bad}
  take, state = judge(config, before, **values)
  assert not take
  assert state.skipped == before.skipped + 1
  assert state.bad_in_row == 1
  for name in ('seen', 'mean_2', 'variance_2'):
    np.testing.assert_array_equal(getattr(state, name), getattr(before, name))


@given(st.lists(st.sampled_from([3.0, *BAD]), max_size=30))
def test_counts(losses):
  state, taken = after(OFF, losses)
  assert taken == [math.isfinite(loss) for loss in losses]
  assert state.skipped == taken.count(False)
  in_row = 0
  for good in taken:
    in_row = 0 if good else in_row + 1
  assert state.bad_in_row == in_row


def test_the_estimates_are_the_mean_and_variance_at_first():
  losses = calm(50)
  state, _ = after(ON, losses, norm=2.0)
  assert state.seen == 50
  np.testing.assert_allclose(state.mean_2, [np.mean(losses), 2.0], rtol=1e-5)
  np.testing.assert_allclose(
    state.variance_2, [np.var(losses), 0], rtol=1e-4, atol=1e-9
  )


def test_a_spike_is_skipped_and_only_where_asked_for():
  losses = [*calm(80), 9.0, 3.0]
  state, taken = after(ON, losses)
  assert taken == [True] * 80 + [False, True]
  assert state.skipped == 1
  assert state.bad_in_row == 0  # It was finite.
  assert all(after(OFF, losses)[1])


def test_a_spike_of_the_gradient_alone_is_skipped():
  state = guard.init()
  for loss, norm in zip(calm(60), calm(60, seed=1), strict=True):
    _, state = judge(ON, state, loss, norm)
  assert judge(ON, state, 3.0, 3.0)[0]
  assert not judge(ON, state, 3.0, 30.0)[0]
  assert judge(ON, state, 0.1, 0.1)[0]  # A fall is none.


def test_nothing_is_a_spike_before_there_are_estimates():
  assert after(ON, [*calm(49), 90.0])[1][-1]
  assert not after(ON, [*calm(50), 90.0])[1][-1]


def test_a_lasting_change_of_level_is_accepted():
  _, taken = after(ON, [*calm(100), *(x + 2 for x in calm(200, seed=1))])
  assert not taken[100]
  assert all(taken[-100:])


def test_keep_takes_one_tree_whole():
  new = {'a': jnp.ones(3), 'b': jnp.int32(2)}
  old = {'a': jnp.zeros(3), 'b': jnp.int32(1)}
  for take, wanted in ((True, new), (False, old)):
    kept = guard.keep(jnp.bool(take), new, old)
    jax.tree.map(np.testing.assert_array_equal, kept, wanted)
  poisoned = {'a': jnp.full(3, jnp.nan), 'b': jnp.int32(2)}
  kept = guard.keep(jnp.bool(False), poisoned, old)
  jax.tree.map(np.testing.assert_array_equal, kept, old)


@pytest.mark.parametrize(
  'values', [{'bad_steps': 0}, {'spike': -1.0}, {'spike': math.nan}]
)
def test_settings_out_of_range_are_refused(values):
  with pytest.raises(UserError, match=f'--guard.{next(iter(values))} must'):
    GuardConfig(**values)
