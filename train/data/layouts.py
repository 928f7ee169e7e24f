"""Layouts: how documents of tokens become rows that a model is trained on.

A row has T + 1 tokens: inputs [:-1] and targets [1:]. In the contiguous
layouts a row is a window of one long stream; in 'truncate' and 'packed' it
holds whole documents, or pieces of them.
"""

from collections.abc import Mapping

import numpy as np

LAYOUTS = ('stream', 'random', 'truncate', 'packed')
CONTIGUOUS = ('stream', 'random')
GROUP = 4096
"""Documents that `packed` packs together."""

_MOST_SEGMENTS = 2**16 - 1

Arrays = Mapping[str, np.ndarray]


def stored(layout: str) -> str:
  """Returns the layout as which its files are kept: a stream's serve two."""
  return 'stream' if layout in CONTIGUOUS else layout


def token_dtype(vocab_size: int) -> np.dtype:
  """Returns what tokens of a vocabulary, padding included, are stored as."""
  return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def features(
  layout: str, sequence_length: int, dtype: np.dtype
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
  """Returns shape and dtype of each array of one row, as it is stored.

  Args:
    layout: one of `LAYOUTS`.
    sequence_length: T.
    dtype: of the tokens.
  """
  tokens = ((sequence_length + 1,), np.dtype(dtype))
  if layout in CONTIGUOUS:
    return {'tokens': tokens}
  if layout == 'truncate':
    return {'tokens': tokens, 'length': ((), np.dtype(np.int32))}
  if layout == 'packed':
    segments = ((sequence_length + 1,), np.dtype(np.uint16))
    return {'tokens': tokens, 'segments': segments}
  raise ValueError(f'no such layout: {layout}')


def contiguous(tokens: np.ndarray, lengths: np.ndarray, end: int) -> np.ndarray:
  """Returns the documents as a stream, `end` after each.

  Args:
    tokens: (N,), the documents one after another.
    lengths: int64 (D,), tokens of each.
    end: the end-of-text token.

  Returns:
    (N + D,), of the dtype of `tokens`.
  """
  lengths = np.asarray(lengths, np.int64)
  is_token = np.ones(len(tokens) + len(lengths), bool)
  is_token[np.cumsum(lengths + 1) - 1] = False
  stream = np.full(len(is_token), end, tokens.dtype)
  stream[is_token] = tokens
  return stream


def rows(
  layout: str,
  tokens: np.ndarray,
  lengths: np.ndarray,
  end: int,
  sequence_length: int,
) -> dict[str, np.ndarray]:
  """Lays documents out in rows: `truncated` or `packed`."""
  if layout == 'truncate':
    return truncated(tokens, lengths, end, sequence_length)
  if layout == 'packed':
    return packed(tokens, lengths, end, sequence_length)
  raise ValueError(f'no rows of whole documents in layout {layout}')


def truncated(
  tokens: np.ndarray, lengths: np.ndarray, end: int, sequence_length: int
) -> dict[str, np.ndarray]:
  """One document a row, in order; what does not fit is dropped.

  A row is a document with `end` after it, of which the first T + 1 tokens
  stay, then `end` as padding. A document without tokens gives no row.

  Args:
    tokens: (N,), the documents one after another.
    lengths: int64 (D,), tokens of each.
    end: the end-of-text token.
    sequence_length: T, at least 1.

  Returns:
    `tokens` (R, T + 1), of the dtype of `tokens`, and `length` int32 (R,),
    how many of them are the document's or the `end` after it: at least 2.
  """
  slots = sequence_length + 1
  lengths = np.asarray(lengths, np.int64)
  kept = np.minimum(lengths, slots)
  # Masks pick the tokens and their places in the same order: that of the rows.
  is_kept = np.repeat(
    np.tile([True, False], len(lengths)),
    np.stack([kept, lengths - kept], axis=1).ravel(),
  )
  kept = kept[lengths > 0]
  table = np.full((len(kept), slots), end, tokens.dtype)
  table[np.arange(slots) < kept[:, None]] = tokens[is_kept]
  length = np.minimum(kept + 1, slots).astype(np.int32)
  return {'tokens': table, 'length': length}


def packed(
  tokens: np.ndarray, lengths: np.ndarray, end: int, sequence_length: int
) -> dict[str, np.ndarray]:
  """Packs documents into rows, cutting only those longer than a row.

  A document is `end`, its tokens, `end`: all but the first are targets. It is
  cut into pieces of at most T + 1 tokens, each but the first beginning with
  the last token of the one before, its context. Pieces are packed by best-fit
  decreasing, `GROUP` documents at a time: the rows are the same however many
  are given at once, as long as it is a multiple of `GROUP`.

  Within a group rows are ordered by their earliest piece, and pieces in a row
  as in the text, so that a run of rows is not one of long documents alone.

  Args:
    tokens: (N,), the documents one after another.
    lengths: int64 (D,), tokens of each.
    end: the end-of-text token.
    sequence_length: T, at least 1.

  Returns:
    `tokens` (R, T + 1), of the dtype of `tokens`, and `segments` uint16
    (R, T + 1): the number of its piece, from 1 in each row, or 0 for padding,
    whose token is `end`.
  """
  slots = sequence_length + 1
  if slots // 2 > _MOST_SEGMENTS:
    raise ValueError(f'rows of {slots} tokens could hold too many documents')
  lengths = np.asarray(lengths, np.int64)
  bounds = np.concatenate([[0], np.cumsum(lengths)])
  groups = []
  for first in range(0, max(1, len(lengths)), GROUP):
    group = lengths[first : first + GROUP]
    span = slice(bounds[first], bounds[first + len(group)])
    groups.append(_pack_group(tokens[span], group, end, slots))
  return {
    'tokens': np.concatenate([tokens_RS for tokens_RS, _ in groups]),
    'segments': np.concatenate([segments_RS for _, segments_RS in groups]),
  }


def _pack_group(
  tokens: np.ndarray, lengths: np.ndarray, end: int, slots: int
) -> tuple[np.ndarray, np.ndarray]:
  """Packs documents together; returns tokens and segments, (R, slots)."""
  # Each document's first `end` is the one after the document before.
  stream = np.append(
    np.asarray([end], tokens.dtype), contiguous(tokens, lengths, end)
  )
  starts, sizes = _pieces(lengths, slots)
  row_of = _best_fit_decreasing(sizes, slots)
  # Renumbered by earliest piece; a stable sort keeps pieces in order.
  _, first_piece, row_of = np.unique(
    row_of, return_index=True, return_inverse=True
  )
  row_of = np.argsort(np.argsort(first_piece))[row_of]
  order = np.argsort(row_of, kind='stable')
  starts, sizes, row_of = starts[order], sizes[order], row_of[order]

  row_count = len(first_piece)
  used = np.bincount(row_of, sizes, row_count).astype(np.int64)
  pieces = np.bincount(row_of, minlength=row_count)
  number = np.arange(len(sizes)) - np.repeat(np.cumsum(pieces) - pieces, pieces)
  is_used = np.arange(slots) < used[:, None]
  source = np.repeat(starts - (np.cumsum(sizes) - sizes), sizes)
  source += np.arange(len(source))
  tokens_RS = np.full((row_count, slots), end, tokens.dtype)
  tokens_RS[is_used] = stream[source]
  segments_RS = np.zeros((row_count, slots), np.uint16)
  segments_RS[is_used] = np.repeat((number + 1).astype(np.uint16), sizes)
  return tokens_RS, segments_RS


def _pieces(lengths: np.ndarray, slots: int) -> tuple[np.ndarray, np.ndarray]:
  """Returns where in the stream each piece begins, and its tokens."""
  longest = slots - 1  # Targets of a piece.
  targets = lengths + 1
  counts = -(-targets // longest)
  first = np.repeat(np.cumsum(counts) - counts, counts)
  skipped = (np.arange(len(first)) - first) * longest
  starts = np.repeat(np.cumsum(targets) - targets, counts) + skipped
  sizes = np.minimum(np.repeat(targets, counts) - skipped, longest) + 1
  return starts, sizes


def _best_fit_decreasing(sizes: np.ndarray, capacity: int) -> np.ndarray:
  """Returns the row of each piece: the longest first, the fullest row first.

  Of rows with the same room, the one that came to it last is taken.
  """
  row_of = np.empty(len(sizes), np.int64)
  order = np.argsort(-sizes, kind='stable')
  rows_by_room: dict[int, list[int]] = {}
  rooms = 0  # Bit r is set where a row has room for r tokens.
  row_count = 0
  chosen = []
  for size in sizes[order].tolist():
    fitting = rooms >> size
    if fitting:
      room = size + (fitting & -fitting).bit_length() - 1
      row = rows_by_room[room].pop()
      if not rows_by_room[room]:
        rooms ^= 1 << room
    else:
      room, row = capacity, row_count
      row_count += 1
    chosen.append(row)
    room -= size
    if room > 1:  # The smallest piece has a context and a target.
      rows_by_room.setdefault(room, []).append(row)
      rooms |= 1 << room
  row_of[order] = chosen
  return row_of


def row_targets(layout: str, arrays: Arrays) -> np.ndarray:
  """Returns how many targets each stored row has: int64 (R,)."""
  if layout in CONTIGUOUS:
    row_count, slots = arrays['tokens'].shape
    return np.full(row_count, slots - 1, np.int64)
  if layout == 'truncate':
    return arrays['length'].astype(np.int64) - 1
  if layout == 'packed':
    return _is_target(arrays['segments']).sum(axis=1, dtype=np.int64)
  raise ValueError(f'no such layout: {layout}')


def targets(layout: str, arrays: Arrays) -> int:
  """Returns how many targets stored rows have."""
  return int(row_targets(layout, arrays).sum())


def to_batch(
  layout: str, arrays: Arrays, weights: bool = False
) -> dict[str, np.ndarray]:
  """Makes a batch of stored rows.

  Args:
    layout: one of `LAYOUTS`.
    arrays: B rows, as stored: see `features`.
    weights: whether `weights` are wanted even where all are 1.

  Returns:
    `tokens` int32 (B, T + 1). For 'truncate' and 'packed' also `weights`
    float32 (B, T), 1 where the target counts. For 'packed' also `segments`
    int32 (B, T), the piece of each input, and `positions` int32 (B, T), its
    place in the piece.
  """
  batch = {'tokens': arrays['tokens'].astype(np.int32)}
  shape_BT = (len(batch['tokens']), batch['tokens'].shape[1] - 1)
  place_T = np.arange(shape_BT[1], dtype=np.int32)
  if layout in CONTIGUOUS:
    if weights:
      batch['weights'] = np.ones(shape_BT, np.float32)
    return batch
  if layout == 'truncate':
    is_target_BT = place_T < arrays['length'][:, None] - 1
    batch['weights'] = is_target_BT.astype(np.float32)
    return batch
  if layout == 'packed':
    segments_BS = arrays['segments']
    batch['weights'] = _is_target(segments_BS).astype(np.float32)
    batch['segments'] = segments_BS[:, :-1].astype(np.int32)
    is_first_BT = np.diff(batch['segments'], axis=1, prepend=-1) != 0
    first_BT = np.maximum.accumulate(np.where(is_first_BT, place_T, 0), axis=1)
    batch['positions'] = place_T - first_BT
    return batch
  raise ValueError(f'no such layout: {layout}')


def _is_target(segments_BS: np.ndarray) -> np.ndarray:
  """Whether a row's next token is of the same piece: (B, S - 1)."""
  same = segments_BS[:, 1:] == segments_BS[:, :-1]
  return same & (segments_BS[:, :-1] > 0)


def batch_shapes(
  layout: str, sequence_length: int
) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
  """Returns shape and dtype of each array of a row of `to_batch`."""
  row = {
    name: np.zeros((1, *shape), dtype)
    for name, (shape, dtype) in features(
      layout, sequence_length, np.dtype(np.uint16)
    ).items()
  }
  return {
    name: (array.shape[1:], array.dtype)
    for name, array in to_batch(layout, row).items()
  }
