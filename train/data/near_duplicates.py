"""How many held-out documents are almost the same as a training document.

Two documents are near-duplicates where the Jaccard similarity of their sets of
5-token shingles is at least 0.8: n-grams and threshold of Lee et al. 2022,
"Deduplicating Training Data Makes Language Models Better" (arXiv 2107.06499),
with the tokenizer's tokens for words.

Similarity is estimated from sketches: the 64 smallest hashes of a document's
shingles, a sample of them that is the same for every document that has them
(Broder 1997, "On the resemblance and containment of documents"). The standard
error at the threshold is 0.05. Documents of fewer than 64 shingles are in their
sketch as a whole, so that for two of them the similarity is exact; one shorter
than a shingle is a single shingle.

Pairs to look at are found by locality-sensitive hashing: MinHash of the
sketches, in 20 bands of 3. Simulated at the threshold, it misses none of
20,000 pairs of equal size, and 0.4 % of those where one document is a part of
the other; 1 to 2 % of pairs as similar as 0.1 are looked at in vain.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

SHINGLE = 5
"""Tokens."""
THRESHOLD = 0.8
SKETCH = 64
"""Hashes of a document that are kept, 8 bytes each."""
EXAMPLES = 5
"""Pairs that are named."""

_BANDS = 20
_BAND_ROWS = 3
_PROBES = 8  # Held-out documents of one band that a document is compared with.
_BLOCK_TOKENS = 2**16  # What stays in a core's cache.
_BLOCK_DOCUMENTS = 4096
_BLOCK_PAIRS = 2**14
_NOTHING = np.uint64(2**64 - 1)
# Odd, of random bits: the fractional parts of the golden ratio and of pi.
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_MIXER = np.uint64(0x243F6A8885A308D3)


class Sketches(NamedTuple):
  """Sketches of documents."""

  values: np.ndarray
  """uint64, those of one document after those of another, each in order."""
  counts: np.ndarray
  """int64 (documents,): hashes of each; 0 only where it has no tokens."""


def sketch(tokens: np.ndarray, lengths: np.ndarray) -> Sketches:
  """Returns the sketch of each document; it depends on its tokens alone.

  Args:
    tokens: (N,), unsigned; the documents one after another.
    lengths: int64 (D,), tokens of each.
  """
  lengths = np.asarray(lengths, np.int64)
  bounds = np.concatenate([[0], np.cumsum(lengths)])
  block = bounds[:-1] // _BLOCK_TOKENS
  cuts = [0, *(np.flatnonzero(np.diff(block)) + 1), len(lengths)]
  found = [
    _sketch_block(tokens[bounds[first] : bounds[last]], lengths[first:last])
    for first, last in itertools.pairwise(cuts)
    if first < last
  ]
  table = np.concatenate([np.empty((0, SKETCH), np.uint64), *found])
  is_there = table != _NOTHING
  return Sketches(table[is_there], is_there.sum(axis=1, dtype=np.int64))


def _sketch_block(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
  """Returns uint64 (D, SKETCH), filled up with `_NOTHING`."""
  ends = np.cumsum(lengths)
  starts = ends - lengths
  hashes = _hash_shingles(tokens)
  # Shingles that reach into the next document are none.
  for back in range(1, SHINGLE):
    across = ends - back
    hashes[across[across >= 0]] = _NOTHING
  counts = np.maximum(lengths - SHINGLE + 1, 0)
  # Hashes are spread evenly, so that it is known about how small the smallest
  # ones are; few are to be sorted then.
  wanted = SKETCH * 3 // 2
  limits = np.full(len(lengths), _NOTHING)
  long = counts > wanted
  limits[long] = (2.0**64 * wanted / counts[long]).astype(np.uint64)
  small = np.flatnonzero(hashes < np.repeat(limits, lengths))
  small_counts = np.bincount(
    np.searchsorted(ends, small, side='right'), minlength=len(lengths)
  )
  # Some shingle again and again can be any number of small hashes.
  repetitive = small_counts > 2 * wanted
  chosen = small[~np.repeat(repetitive, small_counts)]
  small_counts[repetitive] = 0
  table = np.full((len(lengths), max(SKETCH, small_counts.max())), _NOTHING)
  table[np.arange(table.shape[1]) < small_counts[:, None]] = hashes[chosen]
  table = _smallest_distinct(table)
  too_few = long & (table[:, -1] == _NOTHING)
  for document in np.flatnonzero(too_few):
    first = starts[document]
    whole = np.unique(hashes[first : first + counts[document]])[:SKETCH]
    table[document, : len(whole)] = whole
  table[:, 0] = _or_whole(table[:, 0], tokens, starts, lengths)
  return table


def _hash_shingles(tokens: np.ndarray) -> np.ndarray:
  """Returns uint64 (N,): the hash of the shingle that begins at each token.

  The last ones, which have no whole shingle, are without meaning.
  """
  hashes = np.zeros(len(tokens), np.uint64)
  whole = tokens.astype(np.uint64)
  for offset in range(SHINGLE):
    hashes *= _FACTOR
    hashes[: max(0, len(hashes) - offset)] += whole[offset:]
  return _mix(hashes)


def _mix(hashes: np.ndarray) -> np.ndarray:
  """Spreads numbers evenly over 64 bits, in place."""
  hashes ^= hashes >> np.uint64(32)
  hashes *= _MIXER
  hashes ^= hashes >> np.uint64(29)
  hashes *= _FACTOR
  hashes ^= hashes >> np.uint64(32)
  return hashes


def _smallest_distinct(table: np.ndarray) -> np.ndarray:
  """Sorts the rows and drops what is twice; returns (D, SKETCH)."""
  table.sort(axis=1)
  is_first = table != _NOTHING
  is_first[:, 1:] &= table[:, 1:] != table[:, :-1]
  rank = np.cumsum(is_first, axis=1)
  kept = is_first & (rank <= SKETCH)
  smallest = np.full((len(table), SKETCH), _NOTHING)
  filled = np.minimum(rank[:, -1], SKETCH)
  smallest[np.arange(SKETCH) < filled[:, None]] = table[kept]
  return smallest


def _or_whole(
  smallest: np.ndarray,
  tokens: np.ndarray,
  starts: np.ndarray,
  lengths: np.ndarray,
) -> np.ndarray:
  """Returns `smallest`, (D,), with a hash of the documents below a shingle."""
  short = np.flatnonzero((lengths > 0) & (lengths < SHINGLE))
  if not len(short):
    return smallest
  hashes = np.zeros(len(short), np.uint64)
  for offset in range(SHINGLE):
    inside = offset < lengths[short]
    position = np.where(inside, starts[short] + offset, 0)
    hashes *= _FACTOR
    # No token is as large as what stands for none.
    hashes += np.where(inside, tokens[position].astype(np.uint64), _NOTHING)
  smallest = smallest.copy()
  smallest[short] = _mix(hashes)
  return smallest


@dataclasses.dataclass(frozen=True)
class Matches:
  """Near-duplicates of held-out documents in some training documents."""

  train_documents: int
  """How many of these are near-duplicates of one."""
  validation_documents: np.ndarray
  """int64, numbers of those that have one here, in order."""
  examples: list[tuple[int, int, float]]
  """The first few: held-out document, training document, similarity."""


class Index:
  """The held-out documents, to look training documents up in.

  Takes about 1 KB a held-out document.
  """

  def __init__(self, validation: Sketches):
    """Indexes them.

    Args:
      validation: in their order, which gives them their numbers.
    """
    self._table = _table(validation)
    documents = np.flatnonzero(validation.counts)
    keys = _band_keys(self._table[documents]).ravel()
    order = np.argsort(keys, kind='stable')
    self._documents = documents[order // _BANDS]
    self._keys, self._first = np.unique(keys[order], return_index=True)
    self._sizes = np.diff(self._first, append=len(order))

  def matches(self, train: Sketches) -> Matches:
    """Returns the near-duplicates among the documents of a part."""
    bounds = np.concatenate([[0], np.cumsum(train.counts)])
    found = []
    for first in range(0, len(train.counts), _BLOCK_DOCUMENTS):
      counts = train.counts[first : first + _BLOCK_DOCUMENTS]
      values = train.values[bounds[first] : bounds[first + len(counts)]]
      for pairs in self._alike(_table(Sketches(values, counts))):
        pairs['train'] += first
        found.append(pairs)
    pairs = np.concatenate([np.empty(0, _PAIR), *found])
    _, first_of_train = np.unique(pairs['train'], return_index=True)
    return Matches(
      train_documents=len(first_of_train),
      validation_documents=np.unique(pairs['validation']),
      examples=[
        (int(pair['validation']), int(pair['train']), float(pair['similarity']))
        for pair in pairs[first_of_train[:EXAMPLES]]
      ],
    )

  def _alike(self, table: np.ndarray) -> Iterator[np.ndarray]:
    """Yields the pairs of near-duplicates, of type `_PAIR`."""
    train, validation = self._candidates(table)
    for first in range(0, len(train), _BLOCK_PAIRS):
      block = slice(first, first + _BLOCK_PAIRS)
      pairs = np.empty(len(train[block]), _PAIR)
      pairs['train'] = train[block]
      pairs['validation'] = validation[block]
      pairs['similarity'] = _similarity(
        self._table[validation[block]], table[train[block]]
      )
      yield pairs[pairs['similarity'] >= THRESHOLD]

  def _candidates(self, table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the pairs that share a band: training, held-out documents."""
    documents = np.flatnonzero(table[:, 0] != _NOTHING)
    if not len(self._keys) or not len(documents):
      return np.empty(0, np.int64), np.empty(0, np.int64)
    keys = _band_keys(table[documents]).ravel()
    place = np.minimum(np.searchsorted(self._keys, keys), len(self._keys) - 1)
    hits = np.flatnonzero(self._keys[place] == keys)
    place, documents = place[hits], documents[hits // _BANDS]
    # Of the many pages that say that there is no page, each is compared with
    # some, and other pages with others.
    sizes = self._sizes[place]
    probes = np.minimum(sizes, _PROBES)
    turn = np.arange(probes.sum()) - np.repeat(
      np.cumsum(probes) - probes, probes
    )
    turn += np.repeat(documents * _PROBES, probes)
    place = np.repeat(place, probes)
    validation = self._documents[self._first[place] + turn % self._sizes[place]]
    pairs = np.unique(
      np.repeat(documents, probes) * len(self._table) + validation
    )
    return np.divmod(pairs, len(self._table))


_PAIR = np.dtype(
  [('train', np.int64), ('validation', np.int64), ('similarity', np.float64)]
)


def _table(sketches: Sketches) -> np.ndarray:
  """Returns uint64 (D, SKETCH), filled up with `_NOTHING`."""
  table = np.full((len(sketches.counts), SKETCH), _NOTHING)
  table[np.arange(SKETCH) < sketches.counts[:, None]] = sketches.values
  return table


def _band_keys(table: np.ndarray) -> np.ndarray:
  """Returns uint64 (D, bands): documents that share one may be alike."""
  is_nothing = table == _NOTHING
  keys = np.zeros((len(table), _BANDS), np.uint64)
  factors = _mix(np.arange(1, _BANDS * _BAND_ROWS + 1, dtype=np.uint64))
  for band, factors_of_band in enumerate(np.split(factors, _BANDS)):
    keys[:, band] = band
    for factor in factors_of_band:
      hashes = table * (factor | np.uint64(1))
      hashes[is_nothing] = _NOTHING
      keys[:, band] = keys[:, band] * _FACTOR + hashes.min(axis=1)
  return _mix(keys)


def _similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """Estimates Jaccard similarities of pairs of sketches, (P, SKETCH) each."""
  union = np.sort(np.concatenate([a, b], axis=1), axis=1)
  is_first = union != _NOTHING
  is_first[:, 1:] &= union[:, 1:] != union[:, :-1]
  is_shared = np.zeros_like(is_first)
  is_shared[:, :-1] = is_first[:, :-1] & (union[:, 1:] == union[:, :-1])
  # Only the smallest of the union are a sample of it; two whole documents are
  # the union itself.
  whole = (a[:, -1] == _NOTHING) & (b[:, -1] == _NOTHING)
  sampled = (
    np.cumsum(is_first, axis=1) <= np.where(whole, 2 * SKETCH, SKETCH)[:, None]
  )
  shared = (is_shared & sampled).sum(axis=1)
  return shared / np.maximum((is_first & sampled).sum(axis=1), 1)


def summary(validation: int, parts: Iterable[Matches]) -> dict[str, Any]:
  """Returns what stats.json says of near-duplicates across the splits.

  Args:
    validation: the number of held-out documents.
    parts: those in each part of the training split, in order.

  Returns:
    `shingle`, `threshold`, `sketch`; `validation_documents`, how many have a
    near-duplicate in the training split; `train_documents`, how many are one;
    `examples`, up to `EXAMPLES` of `{'validation': document, 'train': [part,
    document], 'similarity': estimate}`, documents counted from 0 in the order
    given.
  """
  has_one = np.zeros(validation, bool)
  train_documents = 0
  examples: list[dict[str, Any]] = []
  for part, matches in enumerate(parts):
    has_one[matches.validation_documents] = True
    train_documents += matches.train_documents
    examples += [
      {
        'validation': held_out,
        'train': [part, document],
        'similarity': round(similarity, 3),
      }
      for held_out, document, similarity in matches.examples
    ]
  return {
    'shingle': SHINGLE,
    'threshold': THRESHOLD,
    'sketch': SKETCH,
    'validation_documents': int(has_one.sum()),
    'train_documents': train_documents,
    'examples': examples[:EXAMPLES],
  }
