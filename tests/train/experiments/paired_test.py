"""Paired statistics against scipy's own tests."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from train.experiments import paired

losses = st.lists(
  st.tuples(st.floats(1, 10), st.floats(1, 10)), min_size=2, max_size=12
)


@given(losses)
@settings(max_examples=60, deadline=None)
def test_the_t_test_is_scipys(both):
  ours, theirs = np.asarray(both).T
  got = paired.difference(ours, theirs)
  assert got.n == len(both)
  assert got.mean == pytest.approx((ours - theirs).mean(), abs=1e-12)
  if got.sd < 1e-9:  # scipy warns of cancellation.
    return
  expected = stats.ttest_rel(ours, theirs)
  low, high = expected.confidence_interval(0.95)
  assert got.p_value == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-12)
  assert got.ci95 == pytest.approx((low, high), rel=1e-6, abs=1e-9)
  assert got.half_width == pytest.approx((high - low) / 2, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize('n', [7, 8, 9, 12])
def test_signs_are_flipped_from_eight_pairs_on(n):
  d = np.random.default_rng(n).normal(0.3, 1.0, n)
  got = paired.difference(d, np.zeros(n)).p_sign_flip
  if n < paired.LEAST_FOR_SIGNS:
    assert got is None
    return
  expected = stats.permutation_test(
    (d,), np.mean, permutation_type='samples', n_resamples=np.inf
  )
  assert got == pytest.approx(expected.pvalue, abs=1e-12)


def test_of_many_pairs_signs_are_drawn():
  d = np.random.default_rng(0).normal(0.4, 1.0, 25)
  got = paired.difference(d, np.zeros(25))
  # The normal approximation is good there.
  assert got.p_sign_flip == pytest.approx(got.p_value, rel=0.2)
  assert got == paired.difference(d, np.zeros(25))


def test_all_pairs_alike_in_sign_are_as_far_as_can_be():
  got = paired.difference(np.arange(1.0, 9.0), np.zeros(8))
  assert got.p_sign_flip == 2 / 2**8


def test_few_pairs():
  assert paired.difference([], []) is None
  one = paired.difference([3.0], [2.5])
  assert one == paired.Paired(1, 0.5)
  assert one.half_width is None
  same = paired.difference([3.0, 3.0], [2.0, 2.0])
  assert (same.mean, same.sd, same.ci95) == (1.0, 0.0, (1.0, 1.0))
  assert same.p_value is None


def test_holm():
  # Holm (1979): the smallest times 4, then 3, 2, 1, never falling.
  got = paired.holm([0.01, 0.04, None, 0.03, 0.005])
  assert got == pytest.approx([0.03, 0.06, None, 0.06, 0.02])
  assert paired.holm([0.9, 0.8]) == [1.0, 1.0]
  assert paired.holm([]) == []


def test_the_interval_of_a_mean_is_the_t_tests():
  values = np.random.default_rng(1).normal(size=(5, 3))
  mean, half = paired.interval(values)
  for k in range(3):
    low, high = stats.ttest_1samp(values[:, k], 0).confidence_interval(0.95)
    assert (mean[k] - half[k], mean[k] + half[k]) == pytest.approx((low, high))
  assert paired.interval(values[:1])[1].tolist() == [0, 0, 0]


def test_the_interval_covers_the_truth_as_often_as_it_says():
  draws = np.random.default_rng(2).normal(0.01, 0.005, (2000, 5))
  covered = 0
  for d in draws:
    low, high = paired.difference(d, np.zeros(5)).ci95
    covered += low <= 0.01 <= high
  # Three standard errors of a share of 0.95 among 2,000.
  assert abs(covered / 2000 - 0.95) < 0.015


def test_how_many_seeds_are_needed():
  n = paired.needed(0.006, 0.003)
  assert n == 18
  reach = [stats.t.ppf(0.975, k - 1) * 0.006 / math.sqrt(k) for k in (n - 1, n)]
  assert reach[0] > 0.003 >= reach[1]
  assert paired.needed(1.0, 1e-9) is None
