import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data import layouts

END = 0
LENGTHS = st.lists(st.integers(0, 40), max_size=30)
SEQUENCE_LENGTHS = st.integers(1, 20)


def made(lengths):
  """Documents of tokens that are all different, and none of them `END`."""
  lengths = np.asarray(lengths, np.int64)
  tokens = np.arange(1, lengths.sum() + 1).astype(np.uint16)
  documents = np.split(tokens, np.cumsum(lengths)[:-1]) if len(lengths) else []
  return tokens, lengths, [document.tolist() for document in documents]


@given(LENGTHS)
def test_contiguous_has_an_end_after_each_document(lengths):
  tokens, lengths, documents = made(lengths)
  stream = layouts.contiguous(tokens, lengths, END)
  assert stream.dtype == tokens.dtype
  assert stream.tolist() == [
    token for document in documents for token in [*document, END]
  ]


@given(LENGTHS, SEQUENCE_LENGTHS)
def test_truncated_keeps_the_beginning_of_each_document(lengths, T):
  tokens, lengths, documents = made(lengths)
  arrays = layouts.truncated(tokens, lengths, END, T)
  assert arrays['tokens'].dtype == tokens.dtype
  assert arrays['length'].dtype == np.int32
  expected = [[*d, END][: T + 1] for d in documents if d]
  assert arrays['length'].tolist() == [len(row) for row in expected]
  assert arrays['tokens'].shape == (len(expected), T + 1)
  for row, kept in zip(arrays['tokens'].tolist(), expected, strict=True):
    assert row == kept + [END] * (T + 1 - len(kept))


def pieces(arrays):
  """The pieces of each row: lists of tokens."""
  found = []
  for tokens, segments in zip(
    arrays['tokens'].tolist(), arrays['segments'].tolist(), strict=True
  ):
    row = []
    for slot, (token, segment) in enumerate(zip(tokens, segments, strict=True)):
      if not segment:  # Padding, and nothing but it until the end.
        assert set(tokens[slot:]) == {END}
        assert not any(segments[slot:])
        break
      if segment == len(row) + 1:
        row.append([])
      assert segment == len(row)
      row[-1].append(token)
    assert row
    found.append(row)
  return found


@given(LENGTHS, SEQUENCE_LENGTHS)
def test_packed_has_each_target_once_with_its_context(lengths, T):
  tokens, lengths, documents = made(lengths)
  arrays = layouts.packed(tokens, lengths, END, T)
  assert arrays['tokens'].dtype == tokens.dtype
  assert arrays['segments'].dtype == np.uint16
  assert arrays['tokens'].shape == arrays['segments'].shape
  assert arrays['tokens'].shape[1] == T + 1
  expected = []
  for document in documents:
    whole = [END, *document, END]
    expected += [whole[i : i + T + 1] for i in range(0, len(whole) - 1, T)]
  found = [piece for row in pieces(arrays) for piece in row]
  assert sorted(found) == sorted(expected)
  pairs = [(a, b) for d in documents for a, b in _pairs([END, *d, END])]
  assert sorted(pairs) == sorted(p for piece in found for p in _pairs(piece))
  assert layouts.targets('packed', arrays) == len(pairs)


def _pairs(tokens):
  return list(itertools.pairwise(tokens))


def best_fit_rows(sizes, capacity):
  """How many rows best-fit decreasing needs, by looking at all of them."""
  rooms = []
  for size in sorted(sizes, reverse=True):
    fitting = [i for i, room in enumerate(rooms) if room >= size]
    if fitting:
      rooms[min(fitting, key=lambda i: rooms[i])] -= size
    else:
      rooms.append(capacity - size)
  return sorted(capacity - room for room in rooms)


@given(LENGTHS, SEQUENCE_LENGTHS)
def test_packed_is_best_fit_decreasing(lengths, T):
  tokens, lengths, _ = made(lengths)
  found = pieces(layouts.packed(tokens, lengths, END, T))
  used = sorted(sum(map(len, row)) for row in found)
  sizes = [len(piece) for row in found for piece in row]
  assert used == best_fit_rows(sizes, T + 1)


@given(st.lists(st.integers(1, 40), max_size=30), SEQUENCE_LENGTHS)
def test_packed_keeps_the_order_of_the_text_within_and_between_rows(lengths, T):
  tokens, lengths, _ = made(lengths)
  found = pieces(layouts.packed(tokens, lengths, END, T))
  # Tokens count up, so a piece's first target tells where it is from, but for
  # an `END` cut off from its document: its context tells.
  order = [[piece[1] or piece[0] + 0.5 for piece in row] for row in found]
  assert all(row == sorted(row) for row in order)
  first = [row[0] for row in order]
  assert first == sorted(first)


@given(LENGTHS, SEQUENCE_LENGTHS, st.integers(1, 4))
def test_packed_in_groups_is_the_same_given_at_once_or_not(lengths, T, size):
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(layouts, 'GROUP', size)
    tokens, lengths, _ = made(lengths)
    whole = layouts.packed(tokens, lengths, END, T)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    step = 2 * size
    apart = [
      layouts.packed(
        tokens[bounds[i] : bounds[min(i + step, len(lengths))]],
        lengths[i : i + step],
        END,
        T,
      )
      for i in range(0, len(lengths), step)
    ]
    for name, array in whole.items():
      np.testing.assert_array_equal(
        array, np.concatenate([array[:0], *(part[name] for part in apart)])
      )


def test_packed_refuses_rows_of_more_pieces_than_it_can_number():
  with pytest.raises(ValueError, match='too many documents'):
    layouts.packed(np.zeros(1, np.uint16), np.ones(1, np.int64), END, 2**17)


@pytest.mark.parametrize('layout', layouts.LAYOUTS)
@given(lengths=LENGTHS, T=SEQUENCE_LENGTHS)
def test_rows_are_as_features_says(layout, lengths, T):
  tokens, lengths, _ = made(lengths)
  if layout in layouts.CONTIGUOUS:
    with pytest.raises(ValueError, match=layout):
      layouts.rows(layout, tokens, lengths, END, T)
    arrays = windows(layouts.contiguous(tokens, lengths, END), T)
  else:
    arrays = layouts.rows(layout, tokens, lengths, END, T)
  features = layouts.features(layout, T, tokens.dtype)
  row_count = len(arrays['tokens'])
  assert arrays.keys() == features.keys()
  for name, (shape, dtype) in features.items():
    assert arrays[name].shape == (row_count, *shape)
    assert arrays[name].dtype == dtype
  by_row = layouts.row_targets(layout, arrays)
  assert by_row.shape == (row_count,)
  assert by_row.sum() == layouts.targets(layout, arrays)
  assert row_count == 0 or by_row.min() > 0


def windows(stream, T):
  count = max(0, len(stream) - 1) // T
  return {'tokens': stream[np.arange(count)[:, None] * T + np.arange(T + 1)]}


@pytest.mark.parametrize('layout', layouts.LAYOUTS)
@given(lengths=LENGTHS, T=SEQUENCE_LENGTHS)
def test_batch_scores_the_targets_and_nothing_else(layout, lengths, T):
  tokens, lengths, documents = made(lengths)
  stream = layouts.contiguous(tokens, lengths, END)
  if layout in layouts.CONTIGUOUS:
    arrays = windows(stream, T)
    assert layouts.to_batch(layout, arrays).keys() == {'tokens'}
  else:
    arrays = layouts.rows(layout, tokens, lengths, END, T)
  batch = layouts.to_batch(layout, arrays, weights=True)
  assert {str(array.dtype) for array in batch.values()} <= {'int32', 'float32'}
  np.testing.assert_array_equal(batch['tokens'], arrays['tokens'])
  assert batch['weights'].dtype == np.float32
  assert batch['weights'].sum() == layouts.targets(layout, arrays)
  scored = batch['weights'] == 1
  found = list(
    zip(
      batch['tokens'][:, :-1][scored].tolist(),
      batch['tokens'][:, 1:][scored].tolist(),
      strict=True,
    )
  )
  if layout in layouts.CONTIGUOUS:
    expected = _pairs(stream.tolist())[: len(arrays['tokens']) * T]
  elif layout == 'truncate':
    expected = [pair for d in documents for pair in _pairs([*d, END][: T + 1])]
  else:
    expected = [pair for d in documents for pair in _pairs([END, *d, END])]
  assert sorted(found) == sorted(expected)


def test_packed_batch_restarts_positions_in_each_piece():
  segments = np.asarray([[1, 1, 1, 2, 2, 0, 0], [1, 2, 2, 3, 3, 3, 3]])
  arrays = {
    'tokens': np.ones((2, 7), np.uint16),
    'segments': segments.astype(np.uint16),
  }
  batch = layouts.to_batch('packed', arrays)
  assert batch['segments'].tolist() == [
    [1, 1, 1, 2, 2, 0],
    [1, 2, 2, 3, 3, 3],
  ]
  assert batch['positions'].tolist() == [
    [0, 1, 2, 0, 1, 0],
    [0, 0, 1, 0, 1, 2],
  ]
  assert batch['weights'].tolist() == [[1, 1, 0, 1, 0, 0], [0, 1, 0, 1, 1, 1]]


@pytest.mark.parametrize(
  'call', [layouts.row_targets, layouts.targets, layouts.to_batch]
)
def test_unknown_layout(call):
  with pytest.raises(ValueError, match='no such layout: tree'):
    call('tree', {'tokens': np.zeros((1, 3), np.uint16)})
