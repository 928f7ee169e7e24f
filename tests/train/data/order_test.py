import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data import order

SEEDS = st.integers(0, 2**63)
# Of 3 sources in 3 stages; some weights are 0.
WEIGHTS = st.lists(
  st.lists(st.sampled_from([0, 0.001, 0.3, 1, 7]), min_size=3, max_size=3)
  .filter(any),
  min_size=1,
  max_size=3,
)  # fmt: skip


# On both sides of where the way of shuffling changes.
COUNTS = st.one_of(st.integers(1, 300), st.sampled_from([4095, 4096, 10_000]))


@given(COUNTS, st.integers(0, 10**6), SEEDS, st.integers(0, 3))
@settings(max_examples=30)
def test_shuffle_takes_each_window_once_an_epoch(count, epoch, seed, source):
  chosen = order.Shuffle(count, seed, source)
  n = epoch * count + np.arange(count)
  np.testing.assert_array_equal(np.sort(chosen(n)), np.arange(count))


def test_shuffle_is_the_order_that_runs_have_had():
  # Grain's of the seed's hash: found before any of this file was written.
  chosen = order.Shuffle(10_000, 17)
  assert chosen(np.asarray([0, 1, 2, 9999, 10_000, 10**9])).tolist() == [
    7692,
    6590,
    2576,
    2081,
    5111,
    5058,
  ]


def test_orders_stay_as_they_are():
  # A run that goes on under a later version must find its examples again.
  assert order.Shuffle(5, 17)(np.arange(3, 12)).tolist() == [
    *(3, 1),
    *(4, 3, 1, 2, 0),
    *(1, 3),
  ]
  offsets = order.RandomOffsets(1000, 17)(np.arange(4))
  assert offsets.tolist() == [12, 219, 78, 258]
  mixture = order.Mixture([(0, [3, 1]), (10, [1, 1])], 17)
  sources, _ = mixture(np.arange(4, 16))
  assert sources.tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 0, 1]


@pytest.mark.parametrize('count', [7, 500, 4095, 4096])
def test_examples_do_not_depend_on_company(count):
  chosen = order.Shuffle(count, 3)
  n = np.arange(10**6, 10**6 + 300)
  together = chosen(n)
  for i in range(0, 300, 37):
    assert chosen(n[i : i + 1]) == together[i]
  np.testing.assert_array_equal(chosen(n[::-1]), together[::-1])


@pytest.mark.parametrize('count', [500, 4096])
def test_orders_differ_by_seed_epoch_and_source(count):
  n = np.arange(count)
  orders = [
    order.Shuffle(count, seed, source)(epoch * count + n)
    for seed in range(2)
    for epoch in range(3)
    for source in range(3)
  ]
  # In particular epoch 1 of seed s is not epoch 0 of seed s + 1.
  assert len({tuple(o) for o in orders}) == len(orders)
  for o in orders:
    assert abs(np.corrcoef(o, n)[0, 1]) < 5 / np.sqrt(count)


@pytest.mark.parametrize('count', [1, 2, 100, 4095, 4096, 10_000])
def test_a_batch_of_any_split_is_found_at_once(count):
  chosen = order.Shuffle(count, 0)
  start = time.perf_counter()
  chosen(np.arange(10**12, 10**12 + 512))
  assert time.perf_counter() - start < 0.1


def test_splitmix64_is_that_of_its_authors():
  # The first numbers of the reference implementation, of state 1234567.
  found = order._hash(np.uint64(1234567), np.arange(3))
  assert found.tolist() == [
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
  ]


@given(st.integers(1, 2**45), SEEDS, st.lists(st.integers(0, 2**62)))
def test_offsets_fit_and_do_not_depend_on_company(count, seed, n):
  chosen = order.RandomOffsets(count, seed)
  starts = chosen(np.asarray(n, np.int64))
  assert starts.dtype == np.int64
  assert ((starts >= 0) & (starts < count)).all()
  alone = [int(chosen(np.asarray([i]))[0]) for i in n]
  assert starts.tolist() == alone


@pytest.mark.parametrize('seed', [0, 1])
@pytest.mark.parametrize('count', [1, 1000, 2**20 + 7])
def test_offsets_are_even(count, seed):
  draws = 400_000
  starts = order.RandomOffsets(count, seed)(np.arange(draws))
  bins = min(count, 200)
  seen = np.bincount(starts * bins // count, minlength=bins)
  expected = draws / bins
  # Chi-squared: mean bins - 1, standard deviation sqrt(2 (bins - 1)).
  chi = ((seen - expected) ** 2 / expected).sum()
  assert abs(chi - (bins - 1)) <= 5 * np.sqrt(2 * (bins - 1))


def test_offsets_are_uncorrelated():
  n = np.arange(100_000)
  series = [order.RandomOffsets(2**40, s, k)(n) for s in (0, 1) for k in (0, 1)]
  for i, one in enumerate(series):
    for other in [one[1:], *(o[:-1] for o in series[:i])]:
      assert abs(np.corrcoef(one[:-1], other)[0, 1]) < 0.02


@given(
  st.lists(st.floats(0, 1e300), min_size=1, max_size=9).filter(
    lambda w: max(w) > 0
  )
)
def test_shares_are_exact(weights):
  counts = order.shares(weights)
  assert counts.sum() == order.BLOCK
  # Each is a neighbour of what it should be.
  top = max(weights)
  scaled = np.asarray([w / top for w in weights])
  quotas = scaled / scaled.sum() * order.BLOCK
  assert (np.abs(counts - quotas) < 1 + 1e-6).all()


def test_shares_of_round_weights():
  assert order.shares([3, 1]).tolist() == [7500, 2500]
  assert order.shares([0.7, 0.29, 0.01]).tolist() == [7000, 2900, 100]
  assert order.shares([1, 1, 1]).tolist() == [3334, 3333, 3333]
  for bad in ([0, 0], [-1, 2], [float('nan')], [float('inf')]):
    with pytest.raises(ValueError, match='weights'):
      order.shares(bad)


@given(WEIGHTS, SEEDS, st.integers(1, 25_000), st.integers(1, 25_000))
@settings(max_examples=25)
def test_mixture_skips_and_repeats_nothing(weights, seed, first, second):
  starts = [0, first, first + second][: len(weights)]
  mixture = order.Mixture(list(zip(starts, weights, strict=True)), seed)
  n = np.arange(60_000)
  sources, numbers = mixture(n)
  for source in range(3):
    own = numbers[sources == source]
    # In order, from the first on, whatever stages there are.
    np.testing.assert_array_equal(own, np.arange(len(own)))
  for stage, start in enumerate(starts):
    stop = starts[stage + 1] if stage + 1 < len(starts) else len(n)
    for block in range(start, stop - order.BLOCK + 1, order.BLOCK):
      found = np.bincount(sources[block : block + order.BLOCK], minlength=3)
      np.testing.assert_array_equal(found, order.shares(weights[stage]))
  for examples in (0, 1, first, first + second, 59_999):
    np.testing.assert_array_equal(
      mixture.taken(examples), np.bincount(sources[:examples], minlength=3)
    )


@given(st.lists(st.integers(0, 10**15), min_size=1, max_size=20), SEEDS)
@settings(max_examples=25)
def test_mixture_does_not_depend_on_company(n, seed):
  stages = [(0, [3, 1]), (5000, [1, 1]), (10**9, [0, 1])]
  sources, numbers = order.Mixture(stages, seed)(np.asarray(n))
  for i, source, number in zip(n, sources, numbers, strict=True):
    alone = order.Mixture(stages, seed)(np.asarray([i]))
    assert (alone[0][0], alone[1][0]) == (source, number)


def test_every_run_of_a_mixture_has_about_its_shares():
  sources, _ = order.Mixture([(0, [3, 1])], 0)(np.arange(100_000))
  shares = (sources == 1).reshape(-1, 500).mean(axis=1)
  # Drawn without replacement: sd at most sqrt(.25 * .75 / 500) = 0.019.
  assert abs(shares - 0.25).max() < 0.1
  assert 0.012 < shares.std() < 0.022


def test_one_source_is_taken_as_it_is():
  n = np.asarray([5, 0, 10**15])
  sources, numbers = order.Mixture([(0, [2.0]), (9, [1.0])], 4)(n)
  assert sources.tolist() == [0, 0, 0]
  np.testing.assert_array_equal(numbers, n)


@pytest.mark.parametrize('starts', [[1], [0, 0], [0, 9, 5]])
def test_stages_ascend_from_0(starts):
  with pytest.raises(ValueError, match='ascend'):
    order.Mixture([(start, [1, 1]) for start in starts], 0)


def test_any_example_is_found_at_once():
  start = time.perf_counter()
  n = np.arange(10**15, 10**15 + 512)
  sources, numbers = order.Mixture([(0, [1, 2]), (10**14, [2, 1])], 0)(n)
  for source in range(2):
    own = numbers[sources == source]
    order.Shuffle(10**9, 0, source)(own)
    order.RandomOffsets(10**12, 0, source)(own)
  assert time.perf_counter() - start < 1
