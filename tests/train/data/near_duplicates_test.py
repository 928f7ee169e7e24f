import itertools
import json
import lzma
import os
import pathlib
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data import near_duplicates, split

SEEDS = st.integers(0, 2**32 - 1)


def sketches(documents):
  """Of a list of arrays or lists of tokens."""
  arrays = [np.asarray(document, np.uint32) for document in documents]
  lengths = np.asarray([len(array) for array in arrays], np.int64)
  tokens = np.concatenate([np.empty(0, np.uint32), *arrays])
  return near_duplicates.sketch(tokens, lengths)


def count(validation, parts):
  """All in this process; `prepare` looks the parts up in several."""
  index = near_duplicates.Index(validation)
  return near_duplicates.summary(
    len(validation.counts), (index.matches(part) for part in parts)
  )


def shingles(document):
  size = near_duplicates.SHINGLE
  document = list(document)
  if len(document) < size:
    return {tuple(document)} if document else set()
  return {
    tuple(document[i : i + size]) for i in range(len(document) - size + 1)
  }


def jaccard(a, b):
  a, b = shingles(a), shingles(b)
  return len(a & b) / len(a | b)


def hashed(shingle):
  """The hash of a shingle, in Python's own integers."""
  factor, mixer, low = 0x9E3779B97F4A7C15, 0x243F6A8885A308D3, 2**64 - 1
  value = 0
  for token in shingle:
    value = (value * factor + token) & low
  for _ in range(near_duplicates.SHINGLE - len(shingle)):
    value = (value * factor + low) & low
  value ^= value >> 32
  value = value * mixer & low
  value ^= value >> 29
  value = value * factor & low
  return value ^ value >> 32


@given(
  lengths=st.lists(
    st.one_of(st.integers(0, 12), st.integers(0, 400)), max_size=12
  ),
  alphabet=st.sampled_from([1, 2, 3, 50_000]),
  block=st.sampled_from([1, 100, 2**16]),
  seed=SEEDS,
)
def test_sketch_is_the_smallest_hashes_of_the_shingles(
  lengths, alphabet, block, seed
):
  rng = np.random.default_rng(seed)
  documents = [rng.integers(0, alphabet, length).tolist() for length in lengths]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(near_duplicates, '_BLOCK_TOKENS', block)
    values, counts = sketches(documents)
  assert values.dtype == np.uint64
  assert counts.dtype == np.int64
  found = np.split(values, np.cumsum(counts)[:-1]) if len(counts) else []
  for document, smallest in zip(documents, found, strict=True):
    expected = sorted(hashed(shingle) for shingle in shingles(document))
    assert smallest.tolist() == expected[: near_duplicates.SKETCH]


def test_sketch_of_a_long_document_that_repeats_itself():
  # Few distinct shingles, each again and again: no share of them would do.
  document = np.tile(np.arange(300, dtype=np.uint16), 500)
  values, counts = near_duplicates.sketch(document, np.asarray([len(document)]))
  expected = sorted(hashed(shingle) for shingle in shingles(document.tolist()))
  assert values.tolist() == expected[: near_duplicates.SKETCH]
  assert counts.tolist() == [near_duplicates.SKETCH]


def test_memory_of_one_token_again_and_again_among_short_documents():
  runs = np.repeat(np.arange(100_000, dtype=np.uint32), near_duplicates.SHINGLE)
  hashes = near_duplicates._hash_shingles(runs)[:: near_duplicates.SHINGLE]
  # Every shingle of the last document has a hash small enough to be kept.
  documents = [[1, 2, 3]] * 500 + [[int(hashes.argmin())] * 2**18]
  tracemalloc.start()
  try:
    _, counts = sketches(documents)
    _, peak = tracemalloc.get_traced_memory()
  finally:
    tracemalloc.stop()
  assert counts.tolist() == [1] * 501
  assert peak < 100e6


def test_hashes_are_spread_evenly():
  tokens = np.arange(200_000, dtype=np.uint32)  # As regular as can be.
  hashes = near_duplicates._hash_shingles(tokens)[: -near_duplicates.SHINGLE]
  for shift in (0, 20, 58):
    counts = np.bincount((hashes >> np.uint64(shift)) & np.uint64(63))
    expected = len(hashes) / 64
    assert np.abs(counts - expected).max() < 5 * expected**0.5


def edited(rng, document, share, vocabulary):
  """The document with some tokens replaced, and some left out."""
  chance = rng.random(len(document))
  changed = np.where(
    chance < share, rng.integers(0, vocabulary, len(document)), document
  )
  return changed[(chance < share) | (chance > 1.3 * share)]


def made_documents(rng):
  """Tokens as frequent as words are."""
  return [rng.zipf(1.3, rng.integers(20, 2000)) % 30_000 for _ in range(400)]


def prose_documents(rng):
  """Words of prose, by number."""
  name = pathlib.Path(os.environ['GRADPOWER_DATA']) / 'prose.jsonl.xz'
  vocabulary = {}
  documents = []
  with lzma.open(name, 'rt', encoding='utf-8') as file:
    for line in file:
      words = json.loads(line)['text'].split()
      documents.append(
        [vocabulary.setdefault(word, len(vocabulary)) for word in words]
      )
      if len(documents) == 400:
        break
  return [
    np.asarray(document[: rng.integers(20, 2000)]) for document in documents
  ]


@pytest.mark.parametrize(
  'source',
  [
    made_documents,
    pytest.param(
      prose_documents,
      marks=pytest.mark.skipif(
        'GRADPOWER_DATA' not in os.environ,
        reason='GRADPOWER_DATA does not name a directory with prose.jsonl.xz',
      ),
    ),
  ],
)
def test_precision_and_recall_against_the_exact_similarity(source):
  rng = np.random.default_rng(0)
  held_out = source(rng)
  share = rng.uniform(0, 0.06, len(held_out))
  train = [
    edited(rng, document, s, 30_000)
    for document, s in zip(held_out, share, strict=True)
  ]
  exact = np.asarray(
    [jaccard(a, b) for a, b in zip(held_out, train, strict=True)]
  )
  assert (exact >= 0.8).sum() > 80
  assert (exact < 0.6).sum() > 80
  validation, train_sketches = sketches(held_out), sketches(train)

  estimate = near_duplicates._similarity(
    near_duplicates._table(validation), near_duplicates._table(train_sketches)
  )
  error = estimate - exact
  assert abs(error.mean()) < 0.01
  assert error.std() < 0.06  # 0.061 at a similarity of a half.
  one = near_duplicates.Index(validation).matches(train_sketches)
  found = np.zeros(len(held_out), bool)
  found[one.validation_documents] = True
  # All that are clear, none that are far from it, and half of those between.
  assert found[exact >= 0.92].all()
  assert not found[exact < 0.65].any()
  assert found[exact >= 0.8].mean() > 0.85
  assert (exact[found] >= 0.72).mean() > 0.95
  # What the bands leave out is of no weight.
  assert found.sum() >= 0.99 * (estimate >= near_duplicates.THRESHOLD).sum()
  assert one.train_documents == found.sum()


@given(
  lengths=st.lists(st.integers(0, 60), min_size=1, max_size=10),
  edits=st.integers(0, 3),
  seed=SEEDS,
)
def test_short_documents_are_compared_exactly(lengths, edits, seed):
  rng = np.random.default_rng(seed)
  held_out = [rng.integers(0, 1000, length) for length in lengths]
  train = [document.copy() for document in held_out]
  for document in train:
    if len(document):
      document[rng.integers(0, len(document), edits)] = 2000
  estimate = near_duplicates._similarity(
    near_duplicates._table(sketches(held_out)),
    near_duplicates._table(sketches(train)),
  )
  for a, b, similarity in zip(held_out, train, estimate, strict=True):
    assert similarity == (jaccard(a, b) if len(a) else 0)


def test_documents_below_a_shingle_are_one_shingle():
  held_out = [[7], [7, 8], [1, 2, 3, 4], []]
  found = count(
    sketches(held_out), [sketches([[8, 7], [], [1, 2, 3]]), sketches([[7, 8]])]
  )
  assert found['validation_documents'] == found['train_documents'] == 1
  assert found['examples'] == [
    {'validation': 1, 'train': [1, 0], 'similarity': 1.0}
  ]


@given(
  copies=st.lists(st.integers(0, 3), min_size=1, max_size=12),
  cuts=st.sets(st.integers(1, 30)),
  block=st.integers(1, 5),
  seed=SEEDS,
)
def test_copies_are_counted_wherever_they_are(copies, cuts, block, seed):
  rng = np.random.default_rng(seed)
  held_out = [rng.integers(0, 30_000, 200) for _ in copies]
  train = [
    document
    for document, number in zip(held_out, copies, strict=True)
    for _ in range(number)
  ]
  train += [rng.integers(0, 30_000, 200) for _ in range(3)]
  order = rng.permutation(len(train))
  bounds = [0, *sorted(cut for cut in cuts if cut < len(train)), len(train)]
  parts = [
    [train[i] for i in order[first:last]]
    for first, last in itertools.pairwise(bounds)
  ]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(near_duplicates, '_BLOCK_DOCUMENTS', block)
    patch.setattr(near_duplicates, '_BLOCK_PAIRS', block)
    found = count(sketches(held_out), [sketches(part) for part in parts])
  assert found['train_documents'] == sum(copies)
  assert found['validation_documents'] == sum(number > 0 for number in copies)
  assert len(found['examples']) == min(5, sum(copies))
  for example in found['examples']:
    part, document = example['train']
    np.testing.assert_array_equal(
      parts[part][document], held_out[example['validation']]
    )
    assert example['similarity'] == 1
  assert json.loads(json.dumps(found)) == found


def test_a_crowd_of_copies_is_found_without_comparing_all_pairs():
  rng = np.random.default_rng(0)
  page = rng.integers(0, 30_000, 300)
  held_out, train = (
    sketches([edited(rng, page, 0.001, 30_000) for _ in range(number)])
    for number in (200, 2000)
  )
  index = near_duplicates.Index(held_out)
  pairs, _ = index._candidates(near_duplicates._table(train))
  assert len(pairs) <= 2000 * near_duplicates._BANDS * near_duplicates._PROBES
  found = index.matches(train)
  assert found.train_documents == 2000
  assert len(found.validation_documents) == 200


def test_documents_that_have_nothing_in_common_are_not_compared():
  rng = np.random.default_rng(0)
  held_out, train = (
    sketches([rng.integers(0, 30_000, n) for n in range(1, 200)])
    for _ in range(2)
  )
  index = near_duplicates.Index(held_out)
  pairs, _ = index._candidates(near_duplicates._table(train))
  assert len(pairs) == 0


@pytest.mark.parametrize('held_out', [[], [[]], [[1] * 9]])
@pytest.mark.parametrize('train', [[], [[]], [[2] * 9]])
def test_nothing_alike(held_out, train):
  found = count(sketches(held_out), [sketches(train)])
  assert found == {
    'shingle': 5,
    'threshold': 0.8,
    'sketch': 64,
    'validation_documents': 0,
    'train_documents': 0,
    'examples': [],
  }


@given(
  texts=st.lists(st.text('ab', max_size=3), max_size=40),
  fraction=st.floats(0, 1, exclude_min=True, exclude_max=True),
)
def test_copies_of_a_text_are_never_on_both_sides(texts, fraction):
  sides = {True: [], False: []}
  for text in texts:
    held_out = split.is_held_out(split.text_hash(text), fraction)
    sides[held_out].append(list(text.encode()))
  found = count(sketches(sides[True]), [sketches(sides[False])])
  assert found['validation_documents'] == found['train_documents'] == 0
