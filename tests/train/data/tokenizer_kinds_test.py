"""Small vocabularies of each kind, as the libraries themselves make them."""

import base64
import io
import itertools
import pickle
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors

from train import errors
from train.data import tiktoken_ranks, tokenizer, vocabulary
from train.data.prompt import PromptTokenizer, TextStream

TEXTS = [
  f'The {animal} and the {i}th {animal}s went there, then further. Über {i}!'
  for i in range(40)
  for animal in ('dog', 'horse', 'antelope', 'sea lion')
]
SPECIAL = ['<|endoftext|>', '</s>', '<s>', '<pad>', '<unk>', '<extra_id_0>']
UNICODE = st.text(st.characters(exclude_categories=['Cs']), max_size=40)


def sentencepiece_model(**options):
  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(TEXTS), model_writer=model, minloglevel=2, **options
  )
  return model.getvalue()


def t5_like():
  return sentencepiece_model(
    model_type='unigram', vocab_size=80, pad_id=0, eos_id=1, unk_id=2,
    bos_id=-1,
  )  # fmt: skip


def llama_like():
  return sentencepiece_model(
    model_type='bpe', vocab_size=330, byte_fallback=True,
    normalization_rule_name='identity', remove_extra_whitespaces=False,
  )  # fmt: skip


def ranks(count):
  """So many: the bytes, and then tokens that no text is made of, or few."""
  tokens = [bytes([byte]) for byte in range(256)]
  tokens += itertools.islice(
    (bytes(t) for n in (2, 3) for t in itertools.product(range(256), repeat=n)),
    count - 256,
  )
  lines = [b'%s %d' % (base64.b64encode(t), i) for i, t in enumerate(tokens)]
  return b'\n'.join(lines) + b'\n'


def tokenizers_json(end='<|endoftext|>', extra=0):
  """A foreign one: its post-processor would begin each text with its end."""
  made = tokenizers.Tokenizer.from_buffer(
    tokenizer.ByteLevelBPE.train(TEXTS, 300).content
  )
  made.add_special_tokens([end, *(f'<{i}>' for i in range(extra))])
  made.post_processor = processors.TemplateProcessing(
    single=f'{end} $A', special_tokens=[(end, made.token_to_id(end))]
  )
  made.enable_truncation(3)
  made.enable_padding(length=64)
  return made.to_str().encode()


def unigram_json():
  """T5's: its special tokens are pieces of the model too."""
  model = sentencepiece.SentencePieceProcessor()
  model.LoadFromSerializedProto(t5_like())
  ids = range(model.GetPieceSize())
  pieces = [(model.IdToPiece(i), model.GetScore(i)) for i in ids]
  made = tokenizers.Tokenizer(models.Unigram(pieces, 2))
  made.pre_tokenizer = pre_tokenizers.Metaspace()
  made.decoder = decoders.Metaspace()
  sentinels = [f'<extra_id_{i}>' for i in range(100)]
  made.add_special_tokens(['<pad>', '</s>', '<unk>', *sentinels])
  return made.to_str().encode()


KINDS = {
  't5': (t5_like, 'tokenizer.model'),
  'llama': (llama_like, 'tokenizer.model'),
  'gpt2': (lambda: ranks(50256), 'tokenizer.tiktoken'),
  'json': (tokenizers_json, 'tokenizer.json'),
  'unigram_json': (unigram_json, 'tokenizer.json'),
  'trained': (
    lambda: tokenizer.ByteLevelBPE.train(TEXTS, 300).content,
    'tokenizer.json',
  ),
}


@pytest.fixture(scope='module')
def kinds():
  return {
    name: tokenizer.from_content(file_name, make())
    for name, (make, file_name) in KINDS.items()
  }


@pytest.fixture(params=KINDS)
def made(request, kinds):
  return kinds[request.param]


@pytest.mark.parametrize(
  ('kind', 'vocab_size', 'padded', 'end'),
  [
    ('t5', 180, 180, 1),
    ('llama', 330, 330, 2),
    ('gpt2', 50257, 50304, 50256),
    ('json', 300, 300, 0),
    ('unigram_json', 180, 256, 1),
    ('trained', 300, 300, 0),
  ],
)
def test_sizes(kinds, kind, vocab_size, padded, end):
  made = kinds[kind]
  assert made.vocab_size == vocab_size
  assert made.padded_vocab_size == padded
  assert made.end_of_text == end


@pytest.mark.parametrize('count', tiktoken_ranks.ENCODINGS)
def test_the_number_of_ranks_tells_the_encoding(count):
  made = tiktoken_ranks.TiktokenRanks(ranks(count))
  assert made.padded_vocab_size % 128 == 0
  assert count <= made.end_of_text < made.vocab_size <= made.padded_vocab_size
  assert made.known().sum() == count + 1
  text = "It's 12345  naïve\n\n 東京 I'LL"
  assert made.decode(made.encode_batch([text])[0]) == text


def test_a_foreign_vocabulary_is_padded():
  made = tokenizer.from_content('tokenizer.json', tokenizers_json('</s>', 200))
  assert made.end_of_text == 0  # <|endoftext|> is there, and comes first.
  assert made.vocab_size == 501
  assert made.padded_vocab_size == 512


def test_a_file_is_told_by_its_content(made, tmp_path):
  path = tmp_path / 'vocab.bin'
  path.write_bytes(made.content)
  opened = tokenizer.open_tokenizer(str(path))
  assert opened.file_name == made.file_name
  assert opened.content == made.content == path.read_bytes()
  assert opened.digest() == made.digest()
  # A folder, as of a run: the file is found by its name.
  path.rename(tmp_path / made.file_name)
  assert tokenizer.open_tokenizer(str(tmp_path)).digest() == made.digest()


def test_digests_differ(kinds):
  assert len({made.digest() for made in kinds.values()}) == len(kinds)


def test_it_can_be_pickled(made):
  again = pickle.loads(pickle.dumps(made))
  assert type(again) is type(made)
  assert again.digest() == made.digest()
  for a, b in zip(
    again.encode_batch(TEXTS), made.encode_batch(TEXTS), strict=True
  ):
    np.testing.assert_array_equal(a, b)


def test_ids(made):
  encoded = made.encode_batch([*TEXTS, ''])
  assert all(ids.dtype == np.uint32 and ids.ndim == 1 for ids in encoded)
  assert len(encoded.pop()) == 0
  known = made.known()
  assert known.shape == (made.vocab_size,)
  assert known[made.end_of_text]
  for text, ids in zip(TEXTS, encoded, strict=True):
    assert known[ids].all()
    assert made.end_of_text not in ids
    assert made.decode(ids) == text
    assert made.decode(made.encode_batch([text])[0].tolist()) == text


@pytest.mark.parametrize(
  ('kind', 'special'),
  [
    ('t5', {0, 1}),  # <unk> is what it gives for '<', which no text had.
    ('llama', {1, 2}),
    ('gpt2', {50256}),
    ('json', {0}),
    ('unigram_json', {0, 1, *range(80, 180)}),
    ('trained', {0}),
  ],
)
def test_no_special_tokens_are_made_of_text(kinds, kind, special):
  for name in SPECIAL:
    for text in (name, f'a{name}b', f'the {name} {name}'):
      [ids] = kinds[kind].encode_batch([text])
      assert len(ids) > 1
      assert not special & set(ids.tolist())


@pytest.mark.parametrize('kind', ['llama', 'gpt2', 'json', 'trained'])
@given(text=UNICODE, name=st.sampled_from(['', *SPECIAL]), tail=UNICODE)
def test_round_trip(kinds, kind, text, name, tail):
  made = kinds[kind]
  text = text + name + tail
  if kind == 'llama':  # Of its own two characters and what is around them.
    text = text.replace('▁', '').replace('\0', '')
  [ids] = made.encode_batch([text])
  assert made.decode(ids) == text
  assert made.end_of_text not in ids
  assert made.known()[ids].all()


@given(text=UNICODE)
def test_t5_normalises(kinds, text):
  made = kinds['t5']
  reference = sentencepiece.SentencePieceProcessor()
  reference.LoadFromSerializedProto(made.content)
  [ids] = made.encode_batch([text])
  assert ids.tolist() == reference.EncodeAsIds(text)
  assert made.decode(ids) == reference.DecodeIds(ids.tolist())


def test_other_ids_have_no_text(made):
  [ids] = made.encode_batch(['the dog'])
  others = [made.end_of_text, made.vocab_size, 2**31 - 1]
  if made.file_name == 'tokenizer.model':
    others += [made.vocab_size - 1] * (made.vocab_size == 180)
  assert made.decode([*ids, *others]) == 'the dog'
  assert made.decode(others) == ''
  assert made.decode([]) == ''


def test_long_runs_of_blanks(kinds):
  """The library panics at a million, and takes them for one word."""
  text = 'a' + ' ' * 1_200_000 + 'b' + '\n' * 300_000
  [ids] = kinds['gpt2'].encode_batch([text])
  assert kinds['gpt2'].decode(ids) == text


@pytest.mark.parametrize('kind', KINDS)
def test_prompts_of_a_run(kinds, kind, tmp_path):
  made = kinds[kind]
  (tmp_path / made.file_name).write_bytes(made.content)
  prompts = PromptTokenizer.of_run(tmp_path)
  [ids] = made.encode_batch(['the horse'])
  end = made.end_of_text
  assert prompts.encode('the horse') == [end, *ids]
  assert prompts.encode('') == [end]
  assert prompts.ends == {end}
  known = prompts.known(made.padded_vocab_size + 1)
  assert known[ids].all() and known[end]
  assert not known[made.vocab_size :].any()
  stream = TextStream(prompts.decode, prompts.encode('dog'))
  text = ''.join([*map(stream.add, [*ids, end]), stream.rest()])
  assert text.strip() == 'the horse'


def write(path, content):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content)


@pytest.mark.parametrize(
  ('content', 'words'),
  [
    (b'', 'it is neither a tokenizer.json nor a sentencepiece model nor'),
    (b'hello\n', 'it is neither'),
    (b'\x80' * 99, 'it is neither'),
    (b'version https://git-lfs.github.com/spec/v1\n', 'pointer of git-lfs'),
    (b'{', 'it is not a tokenizer.json'),
    (b'{"the": 1}', 'it is not a tokenizer.json'),
    (b'{\xff}', 'it is not a tokenizer.json'),
    (b'\n\x80', 'it is not a sentencepiece model'),
    (b'\n\nthe dog', 'it is not a sentencepiece model'),
    (b'IQ== 0\nIg== x\n', 'line 2 is not a token in base64 and its rank'),
    (b'IQ== 0\n\n', 'line 2 is not'),
    (b'IQ== 0\nIg== 2\n', 'its ranks are not 0, 1, 2 and so on'),
    (b'IQ== 0\nIg== 1\n', 'it lacks some of the 256 bytes'),
    (ranks(300), 'it has 300 ranks, which is none of the encodings known: '
     '50256 (gpt2), 100256 (cl100k), 128000 (llama3)'),
  ],
)  # fmt: skip
def test_a_file_that_is_no_tokenizer(tmp_path, content, words):
  path = tmp_path / 'vocab'
  path.write_bytes(content)
  with pytest.raises(errors.UserError) as error:
    tokenizer.open_tokenizer(str(path), '--data.tokenizer')
  message = str(error.value)
  assert message.startswith(
    f'--data.tokenizer: {path} cannot be used as a tokenizer: '
  )
  assert words in message
  assert '\n' not in message


def test_a_vocabulary_without_an_end():
  plain = tokenizers.Tokenizer(models.WordLevel({'a': 0, '</s>': 1}, 'a'))
  with pytest.raises(
    vocabulary.NotATokenizerError,
    match=r'^it is a tokenizer\.json, but it has no end-of-text token: .*; add'
    r' <\|endoftext\|> as a special token and save it again$',
  ):
    tokenizer.from_content('tokenizer.json', plain.to_str().encode())
  content = sentencepiece_model(vocab_size=80, eos_id=-1)
  with pytest.raises(vocabulary.NotATokenizerError, match='no end-of-text'):
    tokenizer.from_content('tokenizer.model', content)


@pytest.mark.parametrize('kind', KINDS)
@given(data=st.data())
def test_damage(kinds, kind, data):
  """Cut short, it is no tokenizer, or another one; never a crash."""
  content = kinds[kind].content
  cut = content[: data.draw(st.integers(0, len(content) - 2))]
  try:
    made = tokenizer.from_content(tokenizer.kind(cut), cut)
  except vocabulary.NotATokenizerError as error:
    assert '\n' not in str(error)
  else:
    assert made.digest() != kinds[kind].digest()


def test_folders(kinds, tmp_path):
  write(tmp_path / 't5' / 'tokenizer.json', kinds['unigram_json'].content)
  write(tmp_path / 't5' / 'spiece.model', kinds['t5'].content)
  opened = tokenizer.open_tokenizer(str(tmp_path / 't5'))
  assert opened.digest() == kinds['t5'].digest()
  # LLaMA 3's own file has the name of a sentencepiece model.
  content = ranks(128000)
  write(tmp_path / 'llama' / 'tokenizer.model', content)
  opened = tokenizer.open_tokenizer(str(tmp_path / 'llama'))
  assert opened.file_name == 'tokenizer.tiktoken'
  assert opened.end_of_text == 128001
  write(tmp_path / 'qwen' / 'qwen.tiktoken', kinds['gpt2'].content)
  opened = tokenizer.open_tokenizer(str(tmp_path / 'qwen'))
  assert opened.digest() == kinds['gpt2'].digest()


def test_what_is_not_there(tmp_path):
  with pytest.raises(errors.UserError, match='holds no tokenizer: none of'):
    tokenizer.open_tokenizer(str(tmp_path))
  names = (str(tmp_path / 'none'), 'data/tokenizer.json', 'gpt2', '')
  for name in names[:3]:
    with pytest.raises(errors.UserError, match='--tokenizer: there is no'):
      tokenizer.open_tokenizer(name)
  with pytest.raises(errors.UserError, match='is not a file'):
    tokenizer.open_tokenizer('/dev/null')
  path = tmp_path / 'tokenizer.json'
  path.mkdir()
  with pytest.raises(errors.UserError, match='Is a directory'):
    tokenizer.read(path)
  with pytest.raises(vocabulary.NotATokenizerError, match='is called x'):
    tokenizer.from_content('x', b'')


@pytest.mark.parametrize(
  ('kind', 'library'), [('t5', 'sentencepiece'), ('gpt2', 'tiktoken')]
)
def test_a_library_that_is_not_installed(kinds, kind, library, monkeypatch):
  made = kinds[kind]
  for name in list(sys.modules):
    if name.startswith(('train.data.sentencepiece', 'train.data.tiktoken')):
      monkeypatch.delitem(sys.modules, name)

  class Finder:
    def find_spec(self, name, *_):
      if name == library:
        raise ModuleNotFoundError(f'No module named {name!r}', name=name)

  monkeypatch.delitem(sys.modules, library)
  monkeypatch.setattr(sys, 'meta_path', [Finder(), *sys.meta_path])
  with pytest.raises(errors.UserError, match=f'needs {library}: pip install'):
    tokenizer.from_content(made.file_name, made.content)


def test_a_worker_starts_fast():
  """Nothing of JAX, and no library of another kind."""
  program = (
    'import sys, train.data.tokenizer\n'
    "heavy = {'jax', 'flax', 'models', 'sentencepiece', 'tiktoken'}\n"
    'print(sorted(heavy & set(sys.modules)))\n'
  )
  command = [sys.executable, '-c', program]
  result = subprocess.run(command, capture_output=True, text=True, check=True)
  assert result.stdout == '[]\n'
