"""The real vocabularies of T5 and GPT-2, against their own libraries."""

import base64
import itertools
import json
import lzma
import os
import pathlib

import numpy as np
import pytest
import sentencepiece
import tiktoken
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from train.data import tokenizer

pytestmark = pytest.mark.skipif(
  'GRADPOWER_DATA' not in os.environ,
  reason='GRADPOWER_DATA names no directory with prose and vocabularies',
)
UNICODE = st.text(st.characters(exclude_categories=['Cs']), max_size=80)
# As OpenAI published it; tiktoken has a faster equivalent.
GPT2_PATTERN = (
  r"'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|"
  r'\s+(?!\S)|\s+'
)


def path(name):
  return pathlib.Path(os.environ['GRADPOWER_DATA']) / name


def texts(every):
  with lzma.open(path('prose.jsonl.xz'), 'rt', encoding='utf-8') as lines:
    return [
      json.loads(line)['text'] for i, line in enumerate(lines) if i % every == 0
    ]


@pytest.fixture(scope='module')
def sample():
  return texts(every=50)


@pytest.fixture(scope='module')
def t5():
  return tokenizer.open_tokenizer(str(path('t5.spiece.model')))


@pytest.fixture(scope='module')
def gpt2():
  return tokenizer.open_tokenizer(str(path('gpt2.tiktoken')))


@pytest.fixture(scope='module')
def their_t5():
  return sentencepiece.SentencePieceProcessor(
    model_file=str(path('t5.spiece.model'))
  )


@pytest.fixture(scope='module')
def ranks():
  lines = path('gpt2.tiktoken').read_bytes().splitlines()
  pairs = [line.split() for line in lines]
  return {base64.b64decode(token): int(rank) for token, rank in pairs}


@pytest.fixture(scope='module')
def their_gpt2(ranks):
  return tiktoken.Encoding(
    'theirs', pat_str=GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={}
  )


def merge(token, ranks):
  """The two tokens that a token is made of: by the merges of less rank."""
  parts = [bytes([byte]) for byte in token]
  while len(parts) > 2:
    pairs = [a + b for a, b in itertools.pairwise(parts)]
    at = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], len(ranks)))
    parts[at : at + 2] = [pairs[at]]
  return parts


@pytest.fixture(scope='module')
def gpt2_json(ranks):
  """What a tokenizer.json of GPT-2 is."""
  # A byte that is no printable character is one past the 256.
  printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
  others = itertools.count(256)
  characters = [
    chr(byte if byte in printable else next(others)) for byte in range(256)
  ]
  spelled = lambda token: ''.join(characters[byte] for byte in token)
  merges = [
    tuple(map(spelled, merge(token, ranks)))
    for token in sorted(ranks, key=ranks.get)
    if len(token) > 1
  ]
  made = tokenizers.Tokenizer(
    models.BPE({spelled(token): rank for token, rank in ranks.items()}, merges)
  )
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.decoder = decoders.ByteLevel()
  made.add_special_tokens(['<|endoftext|>'])
  return tokenizer.from_content('tokenizer.json', made.to_str().encode())


def test_the_vocabularies_of_the_paper(t5, gpt2, gpt2_json):
  assert t5.padded_vocab_size == t5.vocab_size == 32100
  assert t5.end_of_text == 1
  assert t5.known().sum() == 31999  # Not <pad>, nor the sentinels.
  for made in (gpt2, gpt2_json):
    assert made.padded_vocab_size == 50304
    assert made.vocab_size == 50257
    assert made.end_of_text == 50256
    assert made.known().all()


def check_t5(t5, their_t5, texts):
  encoded = t5.encode_batch(texts)
  for text, ids in zip(texts, encoded, strict=True):
    assert ids.tolist() == their_t5.EncodeAsIds(text)
    # Unknown characters aside, what comes back is the text as normalised.
    if their_t5.unk_id() not in ids:
      normal = their_t5.Normalize(text).replace('▁', ' ')
      assert t5.decode(ids) == normal.strip()


def check_gpt2(gpt2, their_gpt2, gpt2_json, texts):
  for text, ids, of_json in zip(
    texts, gpt2.encode_batch(texts), gpt2_json.encode_batch(texts), strict=True
  ):
    np.testing.assert_array_equal(ids, their_gpt2.encode_to_numpy(text))
    np.testing.assert_array_equal(ids, of_json)
    assert gpt2.decode(ids) == gpt2_json.decode(ids) == text


def test_t5_of_prose(t5, their_t5, sample):
  check_t5(t5, their_t5, sample)


def test_gpt2_of_prose(gpt2, their_gpt2, gpt2_json, sample):
  check_gpt2(gpt2, their_gpt2, gpt2_json, sample)


@pytest.mark.slow
def test_t5_of_all_the_prose(t5, their_t5):
  check_t5(t5, their_t5, texts(every=1))


@pytest.mark.slow
def test_gpt2_of_all_the_prose(gpt2, their_gpt2, gpt2_json):
  check_gpt2(gpt2, their_gpt2, gpt2_json, texts(every=1))


@given(text=UNICODE)
def test_t5_of_any_text(t5, their_t5, text):
  check_t5(t5, their_t5, [text])


@given(text=UNICODE)
def test_gpt2_of_any_text(gpt2, their_gpt2, gpt2_json, text):
  check_gpt2(gpt2, their_gpt2, gpt2_json, [text])


def test_known_encodings(gpt2, t5):
  """Published examples."""
  [ids] = gpt2.encode_batch(['hello world'])
  assert ids.tolist() == [31373, 995]
  [ids] = t5.encode_batch(['translate English to German: That is good.'])
  assert ids.tolist() == [13959, 1566, 12, 2968, 10, 466, 19, 207, 5]


@pytest.mark.slow
@pytest.mark.parametrize('text', ['a', ' ', '\n', '東', 'Aé', '7', '=-'])
def test_the_largest_document(gpt2, t5, text):
  """2**24 characters without a word's end: no crash, and not minutes."""
  text = (text * 2**24)[: 2**24]
  [ids] = gpt2.encode_batch([text])
  assert gpt2.decode(ids) == text
  assert t5.encode_batch([text])[0].dtype == np.uint32
