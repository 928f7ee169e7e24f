import hashlib
import itertools
import json
import threading

import numpy as np
import pytest

from train import errors
from train.data import corpus, split, text_files


class Texts:
  """Documents in memory; `changes` makes them differ at each digest."""

  def __init__(self, texts, changes=False):
    self.texts = texts
    self.reads = 0
    self._changes = changes
    self._digests = 0

  def digest(self):
    self._digests += 1
    number = self._digests if self._changes else 0
    return hashlib.sha256(
      json.dumps([number, *self.texts]).encode()
    ).hexdigest()

  def __iter__(self):
    self.reads += 1
    return iter(self.texts)


TEXTS = [f'Document {i} says {i * 7919 % 1000} ü é\n' * 3 for i in range(600)]


def prepare(tmp_path, texts=TEXTS, vocab_size=300, fraction=0.2):
  return corpus.prepare(Texts(texts), vocab_size, fraction, tmp_path)


def documents_of(prepared, name):
  """Cuts a stream at its end-of-text tokens and decodes the documents."""
  tokens = prepared.streams[name]
  ends = np.flatnonzero(tokens == prepared.tokenizer.end_of_text)
  assert ends[0] == 0
  assert ends[-1] == len(tokens) - 1
  return [
    prepared.tokenizer.decode(tokens[a + 1 : b])
    for a, b in itertools.pairwise(ends)
  ]


def test_every_document_is_in_its_split(tmp_path):
  prepared = prepare(tmp_path)
  held_out = [split.is_held_out(split.text_hash(t), 0.2) for t in TEXTS]
  train = [t for t, held in zip(TEXTS, held_out, strict=True) if not held]
  validation = [t for t, held in zip(TEXTS, held_out, strict=True) if held]
  assert documents_of(prepared, 'train') == train
  validation.sort(key=split.text_hash)
  assert documents_of(prepared, 'validation') == validation
  assert prepared.documents == {
    'train': len(train), 'validation': len(validation)
  }  # fmt: skip
  assert prepared.streams['train'].dtype == np.uint16


def test_copies_stay_together(tmp_path):
  prepared = prepare(tmp_path, TEXTS + TEXTS[::-1])
  train = set(documents_of(prepared, 'train'))
  assert not train & set(documents_of(prepared, 'validation'))


def test_held_out_text_does_not_shape_the_vocabulary(tmp_path):
  train = [t for t in TEXTS if not split.is_held_out(split.text_hash(t), 0.2)]
  alone = prepare(tmp_path / 'alone', train)
  assert alone.documents['validation'] == 0
  both = prepare(tmp_path / 'both')
  assert both.tokenizer.digest() == alone.tokenizer.digest()
  assert both.source_hash != alone.source_hash


def test_large_vocabulary_needs_wider_integers(tmp_path):
  letters = str.maketrans('0123456789', 'ghijklmnop')  # Long words.
  texts = [
    hashlib.sha256(str(i).encode()).hexdigest().translate(letters)
    for i in range(3600)
  ]
  prepared = prepare(tmp_path, texts, vocab_size=70_000)
  assert prepared.tokenizer.vocab_size > 2**16
  assert prepared.streams['train'].dtype == np.uint32
  assert prepared.streams['train'].max() >= 2**16
  assert (
    documents_of(prepared, 'train')[:5]
    == [t for t in texts if not split.is_held_out(split.text_hash(t), 0.2)][:5]
  )


def test_cached(tmp_path):
  texts = Texts(TEXTS)
  first = corpus.prepare(texts, 300, 0.2, tmp_path)
  reads = texts.reads
  second = corpus.prepare(texts, 300, 0.2, tmp_path)
  assert texts.reads == reads > 0
  assert second.source_hash == first.source_hash
  for name in corpus.SPLITS:
    np.testing.assert_array_equal(second.streams[name], first.streams[name])
  elsewhere = prepare(tmp_path / 'elsewhere')
  assert elsewhere.source_hash == first.source_hash


@pytest.mark.parametrize(
  'change',
  [{'texts': TEXTS[1:]}, {'vocab_size': 301}, {'fraction': 0.25},
   {'texts': TEXTS[::-1]}],
)  # fmt: skip
def test_never_stale(tmp_path, change):
  before = prepare(tmp_path)
  after = prepare(tmp_path, **change)
  assert after.source_hash != before.source_hash
  fresh = prepare(tmp_path / 'fresh', **change)
  assert after.source_hash == fresh.source_hash


@pytest.mark.parametrize(
  'name', ['meta.json', 'tokenizer.json', 'train.npy', 'validation.npy']
)
@pytest.mark.parametrize('damage', ['cut', 'gone'])
def test_damaged_cache_is_built_anew(tmp_path, caplog, name, damage):
  first = prepare(tmp_path)
  (path,) = tmp_path.rglob(name)
  content = path.read_bytes()
  path.unlink()
  if damage == 'cut':
    path.write_bytes(content[: len(content) // 2])
  assert prepare(tmp_path).source_hash == first.source_hash
  assert path.read_bytes() == content
  assert 'anew' in caplog.text


def test_text_changes_meanwhile(tmp_path):
  with pytest.raises(errors.UserError, match='changed while'):
    corpus.prepare(Texts(TEXTS, changes=True), 300, 0.2, tmp_path)
  assert list((tmp_path / 'tokens').iterdir()) == []


def test_full_disk_leaves_nothing(tmp_path, monkeypatch):
  def write(self, tokens):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(corpus._TokenWriter, 'write', write)
  with pytest.raises(errors.UserError, match='no space left') as caught:
    prepare(tmp_path)
  assert str(tmp_path) in str(caught.value)
  assert list((tmp_path / 'tokens').iterdir()) == []


def test_errors_of_the_text_come_through_training(tmp_path):
  path = tmp_path / 'a.jsonl'
  path.write_text('{"text": "a"}\n{"text"')
  files = text_files.TextFiles(str(path))
  with pytest.raises(errors.UserError, match='line 2 is not JSON'):
    corpus.prepare(files, 300, 0.2, tmp_path / 'cache')


def test_two_at_once(tmp_path):
  hashes = []
  threads = [
    threading.Thread(
      target=lambda: hashes.append(prepare(tmp_path).source_hash)
    )
    for _ in range(4)
  ]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(hashes) == 4
  assert len(set(hashes)) == 1
  assert len(list((tmp_path / 'tokens').iterdir())) == 1
