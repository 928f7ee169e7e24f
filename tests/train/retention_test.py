import math

from hypothesis import given
from hypothesis import strategies as st

from train.config import KeepConfig
from train.retention import kept

LOSSES = {10: 3.0, 20: 1.0, 30: None, 40: 2.0, 50: math.nan, 60: 1.5}

steps = st.integers(0, 40)
losses = st.dictionaries(
  steps,
  st.none() | st.sampled_from([1.0, 2.0, math.nan, math.inf]) | st.floats(),
)
rules = st.builds(
  KeepConfig,
  last=st.integers(1, 5),
  best=st.booleans(),
  every=st.integers(0, 12),
)


def test_each_rule():
  assert kept(LOSSES, KeepConfig(last=2, best=False), 60) == {50, 60}
  assert kept(LOSSES, KeepConfig(last=2, best=True), 60) == {20, 50, 60}
  assert kept(LOSSES, KeepConfig(1, False, every=20), 60) == {20, 40, 60}
  assert kept(LOSSES, KeepConfig(1, False, every=7), 60) == {60}


def test_of_equal_losses_the_latest_is_the_best():
  assert kept({1: 2.0, 2: 2.0, 3: 3.0}, KeepConfig(last=1), 3) == {2, 3}


def test_what_comes_after_the_newest_is_of_another_past():
  assert kept(LOSSES | {80: 0.1}, KeepConfig(last=2), 40) == {20, 30, 40}


@given(losses, rules, steps)
def test_the_rules_hold(losses, keep, newest):
  losses |= {newest: None}
  found = kept(losses, keep, newest)
  past = sorted(step for step in losses if step <= newest)
  assert newest in found
  assert found <= set(past)
  assert found >= set(past[-keep.last :])
  scored = [losses[s] for s in past if losses[s] is not None]
  scored = [loss for loss in scored if math.isfinite(loss)]
  if keep.best and scored:
    assert min(scored) in [losses[step] for step in found]
  if keep.every:
    assert all(step in found for step in past if step % keep.every == 0)
  # Nothing but what a rule names.
  rest = found - set(past[-keep.last :])
  if keep.every:
    rest -= {step for step in rest if step % keep.every == 0}
  assert len(rest) <= keep.best
