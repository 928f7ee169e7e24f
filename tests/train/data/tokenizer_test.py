import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.data import tokenizer as tokenizer_lib

TEXTS = [
  f'The {animal} and the {i}th {animal}s went there, then further.\n\tÜber {i}!'
  for i in range(40)
  for animal in ('dog', 'horse', 'antelope', 'sea lion')
]
UNICODE = st.text(st.characters(exclude_categories=['Cs']))


@pytest.fixture(scope='module')
def tokenizer():
  return tokenizer_lib.ByteLevelBPE.train(TEXTS, 320)


def test_size(tokenizer):
  assert tokenizer.vocab_size == 320
  assert len(tokenizer.encode_batch(['the'])[0]) < 3


def test_smallest_is_bytes():
  tokenizer = tokenizer_lib.ByteLevelBPE.train(TEXTS, 257)
  assert tokenizer.vocab_size == 257
  assert len(tokenizer.encode_batch(['aé'])[0]) == 3


def test_little_text_gives_a_smaller_vocabulary():
  assert tokenizer_lib.ByteLevelBPE.train(['ab'], 400).vocab_size == 258
  assert tokenizer_lib.ByteLevelBPE.train([], 400).vocab_size == 257


@given(UNICODE)
def test_round_trip(tokenizer, text):
  (tokens,) = tokenizer.encode_batch([text])
  assert tokenizer.decode(tokens) == text
  assert all(0 <= token < tokenizer.vocab_size for token in tokens)


@given(UNICODE, UNICODE)
def test_end_of_text_is_never_in_text(tokenizer, a, b):
  text = a + tokenizer_lib.END_OF_TEXT + b
  (tokens,) = tokenizer.encode_batch([text])
  assert tokenizer.end_of_text not in tokens
  assert tokenizer.decode(tokens) == text


def test_end_of_text_has_no_text(tokenizer):
  (tokens,) = tokenizer.encode_batch(['dog'])
  both = [*tokens, tokenizer.end_of_text, *tokens]
  assert tokenizer.decode(both) == 'dogdog'


def test_cut_character_decodes(tokenizer):
  (tokens,) = tokenizer.encode_batch(['\U0001f600'])
  assert tokenizer.decode(tokens[:2]) == '\ufffd'


def test_content(tokenizer):
  again = tokenizer_lib.from_content(tokenizer.file_name, tokenizer.content)
  assert again.digest() == tokenizer.digest()
  for a, b in zip(
    again.encode_batch(TEXTS), tokenizer.encode_batch(TEXTS), strict=True
  ):
    np.testing.assert_array_equal(a, b)
  # Not stored in the JSON.
  (tokens,) = again.encode_batch([tokenizer_lib.END_OF_TEXT])
  assert again.end_of_text not in tokens


def test_so_many_characters_are_learned_from(monkeypatch):
  monkeypatch.setattr(tokenizer_lib, '_LARGEST_SAMPLE', 30)
  read = []

  def texts():
    for text in ('a' * 20, 'b' * 20, 'never read'):
      read.append(text)
      yield text

  tokenizer = tokenizer_lib.ByteLevelBPE.train(texts(), 400)
  assert len(read) == 2
  monkeypatch.undo()
  same = tokenizer_lib.ByteLevelBPE.train(['a' * 20, 'b' * 10], 400)
  assert tokenizer.content == same.content


@pytest.mark.parametrize(
  'environment',
  [
    {'TOKENIZERS_PARALLELISM': 'false'},
    {'TOKENIZERS_PARALLELISM': 'true', 'RAYON_NUM_THREADS': '5'},
  ],
)
def test_training_does_not_depend_on_threads(tokenizer, environment):
  program = (
    'import sys, json; from train.data.tokenizer import ByteLevelBPE;'
    'content = ByteLevelBPE.train(json.load(sys.stdin), 320).content;'
    'sys.stdout.buffer.write(content)'
  )
  result = subprocess.run(
    [sys.executable, '-c', program],
    input=json.dumps(TEXTS),
    env={**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path), **environment},
    capture_output=True,
    text=True,
    check=True,
  )
  assert result.stdout.encode() == tokenizer.content
