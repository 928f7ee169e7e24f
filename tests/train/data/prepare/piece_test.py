import hypothesis
import numpy as np
from hypothesis import strategies as st

from train.data import layouts
from train.data.prepare import piece

U16 = np.dtype(np.uint16)


def write(directory, sizes, shape):
  """Pieces of so many units each, numbered through; returns them and all."""
  pieces, whole = {}, []
  for i, size in enumerate(sizes):
    path = directory / f'{i}'
    path.mkdir()
    first = sum(len(part) for part in whole)
    units = np.arange(first, first + size)
    array = np.broadcast_to(
      units.reshape(size, *[1] * len(shape)), (size, *shape)
    ).astype(np.uint16)
    with piece.Columns(path) as columns:
      for half in np.array_split(array, 2):
        if len(half):
          columns.append({'tokens': half, 'segments': half})
    pieces[path] = size
    whole.append(array)
  return pieces, np.concatenate(whole)


@hypothesis.settings(max_examples=40)
@hypothesis.given(
  sizes=st.lists(st.integers(0, 12), min_size=1, max_size=5),
  length=st.integers(1, 4),
  data=st.data(),
)
def test_windows_across_pieces(tmp_path_factory, sizes, length, data):
  directory = tmp_path_factory.mktemp('pieces')
  pieces, stream = write(directory, sizes, ())
  rows = piece.Rows(pieces, 'stream', length, U16)
  assert len(rows) == max(0, len(stream) - 1) // length
  hypothesis.assume(len(rows))
  start = data.draw(st.integers(0, len(rows) - 1))
  stop = data.draw(st.integers(start + 1, len(rows)))
  found = rows.read(start, stop)['tokens']
  want = [
    stream[k * length : k * length + length + 1] for k in range(start, stop)
  ]
  np.testing.assert_array_equal(found, want)


@hypothesis.settings(max_examples=30)
@hypothesis.given(
  sizes=st.lists(st.integers(0, 6), min_size=1, max_size=5), data=st.data()
)
def test_rows_across_pieces(tmp_path_factory, sizes, data):
  directory = tmp_path_factory.mktemp('pieces')
  pieces, all_rows = write(directory, sizes, (4,))
  rows = piece.Rows(pieces, 'packed', 3, U16)
  assert len(rows) == sum(sizes)
  hypothesis.assume(len(rows))
  start = data.draw(st.integers(0, len(rows) - 1))
  stop = data.draw(st.integers(start + 1, len(rows)))
  found = rows.read(start, stop)
  assert set(found) == set(layouts.features('packed', 3, U16))
  for values in found.values():
    np.testing.assert_array_equal(values, all_rows[start:stop])


def test_a_summary_is_read_back(tmp_path):
  summary = piece.Summary(digest='x', units=3, skipped={'json': 1})
  summary.write(tmp_path)
  assert piece.summary(tmp_path) == summary


def test_what_was_never_written_is_empty(tmp_path):
  assert len(piece.column(tmp_path, 'nothing', np.uint16)) == 0
