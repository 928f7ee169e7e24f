import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.train.data import prepared_maker
from train.data import layouts, loader

# Token i of a stream is i, so a token tells where it came from.
LENGTHS = st.integers(1, 9)
LAYOUTS = st.sampled_from(layouts.LAYOUTS)
SEEDS = st.integers(0, 2**63)


def stream(count, length, layout='stream', first=0):
  tokens = np.arange(first, first + count * length + 1)
  rows = prepared_maker.stream_rows(tokens.astype(np.uint32), length)
  return prepared_maker.MemoryWindows(layout, length, rows)


def split(layout, length=6, documents=60, seed=0):
  """A split in any layout."""
  if layout in layouts.CONTIGUOUS:
    return stream(documents, length, layout)
  lengths = np.random.default_rng(seed).integers(1, 20, documents)
  rows = prepared_maker.document_rows(layout, lengths, length)
  return prepared_maker.MemoryWindows(layout, length, rows)


@given(st.integers(1, 40), LENGTHS, st.integers(1, 7), SEEDS)
@settings(max_examples=40)
def test_each_epoch_takes_each_window_once(count, length, batch_size, seed):
  batches = loader.Batches([stream(count, length)], batch_size, seed)
  # As many batches as take every window `batch_size` times.
  rows = np.concatenate([batches[i]['tokens'] for i in range(count)])
  assert rows.shape == (count * batch_size, length + 1)
  assert rows.dtype == np.int32
  np.testing.assert_array_equal(rows[:, 1:], rows[:, :-1] + 1)
  first = rows[:, 0].reshape(batch_size, count) // length
  for epoch in first:
    np.testing.assert_array_equal(np.sort(epoch), np.arange(count))


def test_random_rows_begin_anywhere():
  count, length = 30, 8
  batches = loader.Batches([stream(count, length, 'random')], 500, 0)
  rows = np.concatenate([batches[i]['tokens'] for i in range(20)])
  np.testing.assert_array_equal(rows[:, 1:], rows[:, :-1] + 1)
  last = (count - 1) * length
  seen = np.bincount(rows[:, 0], minlength=last + 1)
  assert len(seen) == last + 1  # Each begins where a whole window fits.
  expected = 10_000 / len(seen)
  assert (abs(seen - expected) < 6 * np.sqrt(expected)).all()


@pytest.mark.parametrize('layout', layouts.LAYOUTS)
def test_batches_have_what_the_layout_has(layout):
  windows = split(layout)
  batch = loader.Batches([windows], 4, 0)[3]
  wanted = layouts.batch_shapes(layout, 6)
  assert {n: (a.shape, a.dtype) for n, a in batch.items()} == {
    name: ((4, *shape), dtype) for name, (shape, dtype) in wanted.items()
  }


@given(LAYOUTS, st.integers(0, 10**9), SEEDS, st.integers(0, 10**6))
@settings(max_examples=50)
def test_batch_depends_on_seed_and_index_alone(layout, index, seed, other):
  windows = [split(layout), split(layout, seed=1)]
  batches = loader.Batches(windows, 4, seed)
  expected = batches[index]
  _ = batches[other]
  fresh = loader.Batches(windows, 4, seed)
  for again in (batches[index], fresh[index]):
    for name, array in expected.items():
      np.testing.assert_array_equal(again[name], array)


@given(
  layout=LAYOUTS,
  mixed=st.booleans(),
  batch_size=st.integers(1, 12),
  data=st.data(),
  index=st.integers(0, 10**6),
)
@settings(max_examples=60)
def test_processes_read_parts_that_make_the_batch(
  layout, mixed, batch_size, data, index
):
  stages = [(0, [3, 1]), (500_000, [1, 2])] if mixed else None

  def sources():
    return [split(layout), split(layout, seed=1)][: 1 + mixed]

  whole = loader.Batches(sources(), batch_size, 3, stages)[index]
  # Whose each row is: 1, 2, 4 or more processes, of any rows.
  owner = np.asarray(
    data.draw(
      st.lists(st.integers(0, 3), min_size=batch_size, max_size=batch_size)
    )
  )
  for process in set(owner.tolist()):
    rows = np.flatnonzero(owner == process)
    own = sources()
    part = loader.Batches(own, batch_size, 3, stages).rows(index, rows)
    assert part.keys() == whole.keys()
    for name, array in part.items():
      np.testing.assert_array_equal(array, whole[name][rows])
      assert array.dtype == whole[name].dtype
    # One read of each source, and of no other rows.
    reads = [n for windows in own for n in windows.reads]
    assert sum(reads) == len(rows)
    assert all(len(windows.reads) <= 1 for windows in own)


@given(st.integers(1, 300), st.integers(1, 50), SEEDS)
@settings(max_examples=20)
def test_sources_are_mixed_by_step(second_stage, batch_size, seed):
  sources = [stream(40, 3), stream(25, 3, first=1000)]
  stages = [(0, [3, 1]), (second_stage, [1, 4])]
  batches = loader.Batches(sources, batch_size, seed, stages)
  steps = second_stage + 10
  rows = np.concatenate([batches[i]['tokens'][:, 0] for i in range(steps)])
  taken = [(rows < 1000).sum(), (rows >= 1000).sum()]
  assert batches.taken(steps) == taken
  # Over both stages, a source's epochs take each of its windows once.
  for windows, own in zip(
    sources, (rows[rows < 1000], rows[rows >= 1000] - 1000), strict=True
  ):
    for epoch in range(len(own) // len(windows)):
      seen = own[epoch * len(windows) :][: len(windows)] // 3
      np.testing.assert_array_equal(np.sort(seen), np.arange(len(windows)))


@pytest.mark.parametrize('layout', ['stream', 'random'])
def test_sources_have_orders_of_their_own(layout):
  sources = [stream(100, 3, layout), stream(100, 3, layout, first=1000)]
  rows = loader.Batches(sources, 100, 0)[0]['tokens'][:, 0]
  one, other = rows[rows < 1000], rows[rows >= 1000] - 1000
  both = min(len(one), len(other))
  assert (one[:both] != other[:both]).mean() > 0.9
  # The first has the order that it has alone.
  alone = loader.Batches(sources[:1], 100, 0)[0]['tokens'][:, 0]
  np.testing.assert_array_equal(one, alone[: len(one)])


def test_the_shares_of_a_stage_are_exact():
  sources = [stream(40, 3), stream(25, 3, first=1000)]
  batches = loader.Batches(sources, 100, 0, [(0, [3, 1]), (100, [1, 4])])
  assert batches.taken(100) == [7500, 2500]
  assert batches.taken(200) == [9500, 10_500]


@pytest.mark.parametrize('layout', ['stream', 'random'])
def test_any_batch_of_a_billion_rows_is_found_at_once(layout):
  windows = prepared_maker.CountedWindows(10**9, 8)
  windows.layout = layout
  start = time.perf_counter()
  batches = loader.Batches([windows, windows], 512, 0, [(0, [1, 1])])
  batches[10**12]
  assert time.perf_counter() - start < 1


def test_a_batch_of_a_single_window():
  batches = loader.Batches([stream(1, 4)], 3, 0)
  np.testing.assert_array_equal(batches[7]['tokens'], [[0, 1, 2, 3, 4]] * 3)
  batches = loader.Batches([stream(1, 4, 'random')], 3, 0)
  np.testing.assert_array_equal(batches[7]['tokens'], [[0, 1, 2, 3, 4]] * 3)


@given(LAYOUTS, st.integers(1, 50), st.integers(1, 7), st.integers(1, 400))
def test_validation_scores_the_first_windows(layout, documents, size, limit):
  windows = split(layout, documents=documents)
  batches = loader.validation_batches([windows], size, limit)
  counts = layouts.row_targets(layout, windows.arrays)
  kept = max(1, int((np.cumsum(counts) <= limit).sum()))
  assert len(batches) == -(-kept // size)
  wanted = layouts.to_batch(
    layout, {n: a[:kept] for n, a in windows.arrays.items()}, weights=True
  )
  for name, array in wanted.items():
    assert all(len(batch[name]) == size for batch in batches)
    rows = np.concatenate([batch[name] for batch in batches])
    np.testing.assert_array_equal(rows[:kept], array)
    assert rows.dtype == array.dtype
    assert not rows[kept:].any()
  scored = sum(batch['weights'].sum() for batch in batches)
  assert scored == counts[:kept].sum()
  assert scored <= limit or kept == 1
  # It reads little more than it scores.
  assert sum(windows.reads) <= kept + size


def test_sources_share_what_is_scored():
  sources = [stream(40, 5), stream(40, 5, first=1000), stream(2, 5, first=2000)]
  batches = loader.validation_batches(sources, 4, 100)
  rows = np.concatenate([b['tokens'] for b in batches])
  assert [b['tokens'].shape for b in batches] == [(4, 6)] * 4
  # 33 targets each: 6 windows of 5, or the 2 that there are.
  first = [0, 5, 10, 15, 20, 25]
  expected = first + [1000 + i for i in first] + [2000, 2005]
  assert rows[:14, 0].tolist() == expected
  assert not rows[14:].any()
  weights = np.concatenate([b['weights'] for b in batches])
  np.testing.assert_array_equal(weights, np.arange(16)[:, None] < [[14] * 5])
