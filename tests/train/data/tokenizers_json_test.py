"""Ids of a tokenizer.json against the library's own."""

import numpy as np
import pytest
import tokenizers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers

from train import errors
from train.data import vocabulary
from train.data.tokenizers_json import END_OF_TEXT, TokenizersJson

SPECIAL = ['<unk>', '[UNK]', '</s>', END_OF_TEXT, '<pad>', 'é']
WORDS = ['the', 'cat', 'sat', 'on', 'mat', 'a', 'b', 'ab', 'aba']
# Words of the vocabulary, and what is in none: emoji, CJK, braces, controls.
TEXT = st.lists(
  st.sampled_from([*WORDS, ' ', '\n', '{', '}', '<', 'é', '😀', '数', '\x07'])
  | st.characters(exclude_categories=['Cs']),
  max_size=12,
).map(''.join)


def numbered(*names):
  return {name: i for i, name in enumerate(dict.fromkeys(names))}


def bpe(unknown='<unk>', fallback=False):
  """Merges also make the names of the special tokens."""
  pieces = ['</', 's>', '</s>', '▁', '▁the', *WORDS, *'thecasonm</>{']
  merges = [('</', 's>'), ('<', '/'), ('s', '>'), ('a', 'b'), ('ab', 'a')]
  merges += [('t', 'h'), ('th', 'e'), ('▁', 'the')]
  vocab = numbered(
    '<unk>', '</s>', *pieces, 'th', *(f'<0x{i:02X}>' for i in range(256))
  )
  model = models.BPE(
    vocab, merges, unk_token=unknown, byte_fallback=fallback, fuse_unk=True
  )
  return model, pre_tokenizers.Metaspace(), None


def unigram(fallback=False):
  names = ['<unk>', '</s>', '<pad>', '▁', *WORDS, 'é', '{', '<', '/', 's', '>']
  names += [f'<0x{i:02X}>' for i in range(256)] if fallback else []
  pieces = [(name, -float(i)) for i, name in enumerate(dict.fromkeys(names))]
  model = models.Unigram(pieces, 0, fallback)
  return model, pre_tokenizers.Metaspace(), normalizers.NFKC()


def word_level(pre_tokenizer):
  vocab = numbered('[UNK]', '</s>', END_OF_TEXT, 'é', '<', '{', *WORDS)
  return models.WordLevel(vocab, '[UNK]'), pre_tokenizer, None


def word_piece():
  pieces = [f'##{word}' for word in WORDS]
  vocab = numbered('[UNK]', '<pad>', '</s>', '<', '/', 'é', *WORDS, *pieces)
  model = models.WordPiece(vocab, unk_token='[UNK]')
  return (
    model, pre_tokenizers.BertPreTokenizer(), normalizers.BertNormalizer()
  )  # fmt: skip


def byte_level():
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  model = models.BPE(
    numbered('</s>', *alphabet, 'at', 'Ġs', 'Ġsat'),
    [('a', 't'), ('Ġ', 's'), ('Ġs', 'at')],
  )
  return model, pre_tokenizers.ByteLevel(add_prefix_space=False), None


def clip():
  """As CLIP's: an end of words is marked, and merges make it."""
  pieces = ['<unk>', '</s>', *'thecaso{', *(f'{c}</w>' for c in 'thecaso')]
  merges = [('t', 'h'), ('th', 'e</w>'), ('a', 't</w>'), ('s', 'at</w>')]
  made = [a + b for a, b in merges]
  model = models.BPE(
    numbered(*pieces, *made),
    merges,
    unk_token='<unk>',
    end_of_word_suffix='</w>',
  )
  splits = [
    pre_tokenizers.WhitespaceSplit(),
    pre_tokenizers.Digits(individual_digits=True),
    pre_tokenizers.Punctuation(),
  ]
  return model, pre_tokenizers.Sequence(splits), normalizers.Lowercase()


def continued():
  """A BPE whose later pieces bear a mark, which merges take off."""
  pieces = ['<unk>', '</s>', *'thecaso<', *(f'##{c}' for c in 'thecaso/>')]
  merges = [('t', '##h'), ('th', '##e'), ('##a', '##t'), ('s', '##at')]
  model = models.BPE(
    numbered(*pieces, 'th', 'the', '##at', 'sat'),
    merges,
    unk_token='<unk>',
    continuing_subword_prefix='##',
  )
  return model, pre_tokenizers.Split(' ', 'removed'), None


KINDS = {
  'bpe with ends of words': clip(),
  'bpe with continued words': continued(),
  'bpe': bpe(),
  'bpe without unknown': bpe(unknown=None),
  'bpe with bytes': bpe(fallback=True),
  'unigram': unigram(),
  'unigram with bytes': unigram(fallback=True),
  'words': word_level(pre_tokenizers.WhitespaceSplit()),
  'words and signs': word_level(pre_tokenizers.Whitespace()),
  'pieces of words': word_piece(),
  'bytes': byte_level(),
}


def library(kind):
  model, pre_tokenizer, normalizer = KINDS[kind]
  made = tokenizers.Tokenizer(model)
  made.pre_tokenizer = pre_tokenizer
  if normalizer:
    made.normalizer = normalizer
  made.add_special_tokens(SPECIAL)
  made.add_tokens(['sat on'])
  return made


@pytest.fixture(scope='module', params=KINDS)
def both(request):
  made = library(request.param)
  return made, TokenizersJson(made.to_str().encode())


def normal(made, text):
  return made.normalizer.normalize_str(text) if made.normalizer else text


@given(text=TEXT)
@settings(max_examples=40)
def test_ids_are_the_librarys(both, text):
  theirs, ours = both
  spelled = normal(theirs, text)
  assume(not any(name in text or name in spelled for name in SPECIAL[:-1]))
  theirs.encode_special_tokens = 'é' in text  # It has no other spelling.
  wanted = theirs.encode(text, add_special_tokens=False).ids
  theirs.encode_special_tokens = False
  [ids] = ours.encode_batch([text])
  assert ids.dtype == np.uint32
  assert ids.tolist() == wanted
  assert ours.known()[ids].all()
  if 'é' not in text:  # The library leaves it out, as special.
    assert ours.decode(ids) == theirs.decode(wanted)


# With a form of '</s>' that NFKC makes it of.
PARTS = [*SPECIAL, 'the', ' ', '\uff1c/s\uff1e', '\uffff', '😀']


@given(parts=st.lists(st.sampled_from(PARTS)))
@settings(max_examples=40)
def test_special_tokens_are_never_made_of_text(both, parts):
  theirs, ours = both
  [ids] = ours.encode_batch([''.join(parts)])
  others = [theirs.token_to_id(name) for name in SPECIAL[2:-1]]
  assert not set(others) & set(ids.tolist())
  known = ours.known()[others].tolist()
  assert known == [token == ours.end_of_text for token in others]


def test_an_unknown_word_is_the_unknown_token():
  vocab = numbered('[UNK]', END_OF_TEXT, 'the', 'cat', 'sat', 'on', 'mat')
  made = tokenizers.Tokenizer(models.WordLevel(vocab, '[UNK]'))
  made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
  made.add_special_tokens(['[UNK]', END_OF_TEXT])
  ours = TokenizersJson(made.to_str().encode())
  text = f'the word0 cat sat on {END_OF_TEXT} mat [UNK]'
  [ids] = ours.encode_batch([text])
  assert ids.tolist() == [2, 0, 3, 4, 5, 0, 6, 0]
  assert ours.decode(ids) == 'the cat sat on mat'
  assert ours.end_of_text == 1


def test_the_same_text_has_the_same_ids():
  """Dropout is for those who train on the text as it is encoded."""
  made = library('bytes')
  made.model.dropout = 0.5
  ours = TokenizersJson(made.to_str().encode())
  made.model.dropout = None
  text = 'the cat sat on the mat ' * 9
  wanted = made.encode(text, add_special_tokens=False).ids
  assert [ids.tolist() for ids in ours.encode_batch([text] * 9)] == [wanted] * 9


def test_an_end_of_text_for_unknown_words_is_refused():
  vocab = numbered(END_OF_TEXT, 'the')
  made = tokenizers.Tokenizer(models.WordLevel(vocab, END_OF_TEXT))
  made.add_special_tokens([END_OF_TEXT])
  ours = TokenizersJson(made.to_str().encode())
  assert ours.encode_batch(['the'])[0].tolist() == [1]
  with pytest.raises(errors.UserError, match="as in 'zyzzy': name a tokenizer"):
    ours.encode_batch(['the', 'zyzzy'])


@pytest.mark.parametrize(('kind', 'is_old'), [('bytes', True), ('bpe', False)])
def test_the_hash_changed_where_unknown_text_had_other_ids(kind, is_old):
  ours = TokenizersJson(library(kind).to_str().encode())
  older = vocabulary.digest('tokenizer.json', ours.content)
  assert (ours.digest() == older) == is_old
