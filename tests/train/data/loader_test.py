import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train.data import loader

# Token i of a stream is i, so a token tells where it came from.
LENGTHS = st.integers(1, 9)
SIZES = st.integers(0, 200)


@given(SIZES, LENGTHS)
def test_windows_lose_and_repeat_no_target(size, length):
  windows = loader.Windows(np.arange(size), length)
  rows = windows.__getitems__(range(len(windows)))['tokens']
  assert rows.shape == (len(windows), length + 1)
  targets = rows[:, 1:].reshape(-1)
  np.testing.assert_array_equal(targets, np.arange(1, len(targets) + 1))
  assert 0 <= max(0, size - 1) - len(targets) < length
  np.testing.assert_array_equal(rows[:, 1:], rows[:, :-1] + 1)


@given(st.integers(10, 200), LENGTHS)
def test_batched_read_equals_single_reads(size, length):
  windows = loader.Windows(np.arange(size, dtype=np.uint16), length)
  indices = list(range(len(windows)))[::-1]
  rows = windows.__getitems__(indices)['tokens']
  assert rows.dtype == np.int32
  for row, index in zip(rows, indices, strict=True):
    np.testing.assert_array_equal(row, windows[index]['tokens'])


@given(
  size=st.integers(10, 200),
  length=LENGTHS,
  batch_size=st.integers(1, 7),
  seed=st.integers(0, 2**63),
)
@settings(max_examples=40, deadline=None)
def test_each_epoch_takes_each_window_once(size, length, batch_size, seed):
  windows = loader.Windows(np.arange(size), length)
  batches = loader.Batches(windows, batch_size, seed)
  count = len(windows)
  # As many batches as take every window `batch_size` times.
  rows = np.concatenate([batches[i]['tokens'] for i in range(count)])
  assert rows.shape == (count * batch_size, length + 1)
  first = rows[:, 0].reshape(batch_size, count) // length
  for epoch in first:
    np.testing.assert_array_equal(np.sort(epoch), np.arange(count))


@given(
  index=st.integers(0, 10**9),
  seed=st.integers(0, 2**32),
  other=st.integers(0, 10**6),
)
@settings(max_examples=50, deadline=None)
def test_batch_depends_on_seed_and_index_alone(index, seed, other):
  windows = loader.Windows(np.arange(2000), 8)
  batches = loader.Batches(windows, 4, seed)
  expected = batches[index]['tokens']
  _ = batches[other]
  np.testing.assert_array_equal(batches[index]['tokens'], expected)
  fresh = loader.Batches(windows, 4, seed)
  np.testing.assert_array_equal(fresh[index]['tokens'], expected)


@given(
  batch_size=st.integers(1, 12),
  ways=st.integers(1, 12),
  index=st.integers(0, 10**6),
)
@settings(max_examples=50)
def test_processes_read_parts_that_make_the_batch(batch_size, ways, index):
  windows = loader.Windows(np.arange(2000), 8)
  whole = loader.Batches(windows, batch_size, 3)[index]['tokens']
  parts = np.array_split(np.arange(batch_size), ways)
  reads = []

  class Noting(loader.Windows):
    def __getitems__(self, indices):
      reads.append(len(indices))
      return super().__getitems__(indices)

  each = [
    loader.Batches(Noting(np.arange(2000), 8), batch_size, 3) for _ in parts
  ]
  rows = [
    batches.rows(index, part)['tokens']
    for batches, part in zip(each, parts, strict=True)
    if len(part)
  ]
  np.testing.assert_array_equal(np.concatenate(rows), whole)
  assert reads == [len(part) for part in parts if len(part)]


def order(seed, epoch, count=500):
  windows = loader.Windows(np.arange(count + 1), 1)
  batches = loader.Batches(windows, count, seed)
  return batches[epoch]['tokens'][:, 0].tolist()


def test_orders_differ_by_seed_and_epoch():
  orders = [order(s, e) for s in range(6) for e in range(6)]
  # In particular epoch 1 of seed s is not epoch 0 of seed s + 1.
  assert len({tuple(o) for o in orders}) == len(orders)
  for o in orders:
    assert abs(np.corrcoef(o, np.arange(len(o)))[0, 1]) < 0.25


def test_any_batch_is_found_at_once():
  windows = loader.Windows(np.arange(10_001), 10)
  batches = loader.Batches(windows, 16, 0)
  batches[0]
  start = time.perf_counter()
  batches[10**12]
  assert time.perf_counter() - start < 0.1


def test_single_window():
  batches = loader.Batches(loader.Windows(np.arange(5), 4), 3, 0)
  np.testing.assert_array_equal(batches[7]['tokens'], [[0, 1, 2, 3, 4]] * 3)


@given(
  size=st.integers(0, 300),
  length=LENGTHS,
  batch_size=st.integers(1, 7),
  limit=st.integers(1, 400),
)
def test_validation_counts_each_target_once(size, length, batch_size, limit):
  stream = np.arange(size, dtype=np.uint16) + 1
  batches = loader.validation_batches(stream, length, batch_size, limit)
  scored = []
  for batch in batches:
    tokens, weights = batch['tokens'], batch['weights']
    assert tokens.shape == (batch_size, length + 1)
    assert weights.shape == (batch_size, length)
    assert (tokens.dtype, weights.dtype) == (np.int32, np.float32)
    assert set(np.unique(weights)) <= {0.0, 1.0}
    assert weights.any()
    kept = weights == 1
    scored += tokens[:, 1:][kept].tolist()
    np.testing.assert_array_equal(tokens[:, 1:][kept], tokens[:, :-1][kept] + 1)
    assert not tokens[:, 1:][~kept].any()
  targets = min(max(0, size - 1), limit)
  assert scored == list(range(2, targets + 2))
  assert len(batches) == -(-targets // (batch_size * length))


@pytest.mark.parametrize(('batch_size', 'length'), [(16, 128)])
def test_batches_are_fast(tmp_path, batch_size, length):
  path = tmp_path / 'tokens.npy'
  np.save(path, np.zeros(1_500_000, np.uint16))
  stream = np.load(path, mmap_mode='r').view(np.ndarray)
  windows = loader.Windows(stream, length)
  batches = loader.Batches(windows, batch_size, 0)
  times = []
  for i in range(200):
    start = time.perf_counter()
    batches[i]
    times.append(time.perf_counter() - start)
  assert np.median(times) < 1e-3
