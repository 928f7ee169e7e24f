import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, processors

from train.data.prompt import PromptTokenizer, TextStream
from train.data.tokenizer import END_OF_TEXT, ByteLevelBPE
from train.errors import UserError

WORDS = ['the dog went there', 'The other dog, then: über naïve 東京 😀!'] * 20
UNICODE = st.text(st.characters(exclude_categories=['Cs']), max_size=30)


@pytest.fixture(scope='module')
def vocabulary():
  return ByteLevelBPE.train(WORDS, 290)


@pytest.fixture(scope='module')
def of_run(vocabulary, tmp_path_factory):
  folder = tmp_path_factory.mktemp('run')
  (folder / 'tokenizer.json').write_bytes(vocabulary.content)
  return PromptTokenizer.of_run(folder)


def llama_like():
  """Bytes for what the vocabulary lacks, words that begin with their space."""
  pieces = ['<unk>', '<s>', '</s>', *(f'<0x{i:02X}>' for i in range(256))]
  pieces += ['▁', 'h', 'i', '▁h', '▁hi', 'é']
  tokenizer = tokenizers.Tokenizer(
    models.BPE(
      {piece: i for i, piece in enumerate(pieces)},
      [('▁', 'h'), ('▁h', 'i')],
      unk_token='<unk>',
      byte_fallback=True,
      fuse_unk=True,
    )
  )
  tokenizer.normalizer = normalizers.Sequence(
    [normalizers.Prepend('▁'), normalizers.Replace(' ', '▁')]
  )
  tokenizer.decoder = decoders.Sequence(
    [
      decoders.Replace('▁', ' '),
      decoders.ByteFallback(),
      decoders.Fuse(),
      decoders.Strip(' ', 1, 0),
    ]
  )
  tokenizer.add_special_tokens(['<s>', '</s>'])
  tokenizer.post_processor = processors.TemplateProcessing(
    single='<s> $A', special_tokens=[('<s>', 1)]
  )
  return tokenizer


def write(folder, tokenizer, config=None, generation=None):
  folder.mkdir(exist_ok=True)
  (folder / 'tokenizer.json').write_text(tokenizer.to_str(), 'utf-8')
  (folder / 'config.json').write_text(json.dumps(config or {}))
  if generation is not None:
    (folder / 'generation_config.json').write_text(json.dumps(generation))
  return folder


def test_a_prompt_begins_a_document(of_run, vocabulary):
  [dog] = vocabulary.encode_batch([' dog'])
  end = vocabulary.end_of_text
  assert of_run.encode(' dog') == [end, *dog]
  assert of_run.encode('') == [end]
  assert of_run.ends == {end}


def test_where_documents_begin_rows_so_do_prompts(vocabulary, tmp_path):
  (tmp_path / 'tokenizer.json').write_bytes(vocabulary.content)
  prompts = PromptTokenizer.of_run(tmp_path, 'truncate')
  [dog] = vocabulary.encode_batch([' dog'])
  assert prompts.encode(' dog') == [*dog]
  assert prompts.encode('') == [vocabulary.end_of_text]


@given(UNICODE)
def test_end_of_text_in_a_prompt_is_text(of_run, text):
  _, *ids = of_run.encode(text + END_OF_TEXT)
  assert not of_run.ends & set(ids)
  assert of_run.decode(ids) == text + END_OF_TEXT


def test_a_prompt_of_bytes_that_are_no_text(of_run):
  with pytest.raises(UserError, match='--prompt is not UTF-8'):
    of_run.encode('a\udcff')


def test_ids_that_nothing_decodes(of_run, vocabulary):
  known = of_run.known(320)
  assert known.shape == (320,)
  assert known[: vocabulary.vocab_size].all()
  assert not known[vocabulary.vocab_size :].any()
  assert of_run.known(5).all()


def test_holes_in_a_vocabulary(tmp_path):
  tokenizer = tokenizers.Tokenizer(models.WordLevel({'a': 0, 'b': 3}, 'a'))
  known = PromptTokenizer.of_json(tokenizer, [], None).known(5)
  assert known.tolist() == [True, False, False, True, False]


def test_hugging_face_says_how_a_prompt_begins(tmp_path):
  folder = write(tmp_path, llama_like(), {'eos_token_id': 2})
  tokenizer = PromptTokenizer.of_hugging_face(folder)
  assert tokenizer.encode('') == [1]
  ids = tokenizer.encode('hi é')
  assert ids[0] == 1
  assert tokenizer.decode(ids) == 'hi é'
  assert tokenizer.ends == {2}


def test_padding_and_truncation_are_switched_off(tmp_path):
  tokenizer = llama_like()
  tokenizer.enable_padding(length=64)
  tokenizer.enable_truncation(2)
  loaded = PromptTokenizer.of_hugging_face(write(tmp_path, tokenizer))
  assert len(loaded.encode('hi hi hi hi')) == 5


@pytest.mark.parametrize(
  ('config', 'generation', 'ends'),
  [
    ({'eos_token_id': 2}, None, {2}),
    ({'eos_token_id': [2, 5]}, None, {2, 5}),
    ({'eos_token_id': 2}, {'eos_token_id': [7, 2]}, {2, 7}),
    ({'eos_token_id': None}, {'eos_token_id': 7}, {7}),
    ({}, None, set()),
  ],
)
def test_the_ends_of_a_text(tmp_path, config, generation, ends):
  folder = write(tmp_path, llama_like(), config, generation)
  assert PromptTokenizer.of_hugging_face(folder).ends == ends


def test_our_own_vocabulary_in_a_hugging_face_folder(tmp_path, vocabulary):
  """What `models.huggingface.save` writes names no special token."""
  plain = tokenizers.Tokenizer.from_buffer(vocabulary.content)
  folder = write(tmp_path, plain, {'eos_token_id': None, 'bos_token_id': None})
  tokenizer = PromptTokenizer.of_hugging_face(folder)
  assert tokenizer.ends == {vocabulary.end_of_text}
  assert tokenizer.encode('') == [vocabulary.end_of_text]
  [dog] = vocabulary.encode_batch(['dog'])
  assert tokenizer.encode('dog') == [*dog]


def test_an_empty_prompt_needs_a_beginning(tmp_path):
  tokenizer = llama_like()
  tokenizer.post_processor = processors.TemplateProcessing(
    single='$A', special_tokens=[]
  )
  loaded = PromptTokenizer.of_hugging_face(write(tmp_path, tokenizer))
  with pytest.raises(UserError, match='give a --prompt'):
    loaded.encode('')
  config = {'bos_token_id': 1, 'eos_token_id': 2}
  loaded = PromptTokenizer.of_hugging_face(write(tmp_path, tokenizer, config))
  assert loaded.encode('') == [1]


@pytest.mark.parametrize('value', ['</s>', [2, None], True, 2.0, {'id': 2}])
def test_an_end_that_is_no_id(tmp_path, value):
  folder = write(tmp_path, llama_like(), {'eos_token_id': value})
  with pytest.raises(UserError, match='eos_token_id must be token ids'):
    PromptTokenizer.of_hugging_face(folder)


@pytest.mark.parametrize('make', ['of_run', 'of_hugging_face'])
def test_files_that_are_missing_or_broken(tmp_path, make):
  make = getattr(PromptTokenizer, make)
  with pytest.raises(UserError, match=r'holds no tokenizer\.json') as error:
    make(tmp_path)
  assert '\n' not in str(error.value)
  for content in (b'', b'{}', b'[1', b'\xff\xfe', b'\0'):
    (tmp_path / 'tokenizer.json').write_bytes(content)
    with pytest.raises(UserError, match='a tokenizer') as error:
      make(tmp_path)
    assert '\n' not in str(error.value)


def test_a_foreign_vocabulary_in_a_run(tmp_path):
  plain = tokenizers.Tokenizer(models.WordLevel({'a': 0}, 'a'))
  write(tmp_path, plain)
  with pytest.raises(UserError, match='it has no end-of-text token'):
    PromptTokenizer.of_run(tmp_path)


def stream(tokenizer, prompt, ids):
  """What comes out at each id, and at the end."""
  text = TextStream(tokenizer.decode, prompt)
  return [*map(text.add, ids), text.rest()]


def whole(tokenizer, prompt, ids):
  return tokenizer.decode([*prompt, *ids])[len(tokenizer.decode(prompt)) :]


@given(UNICODE, UNICODE)
def test_characters_come_whole(of_run, prompt, text):
  """Every byte is a token here, or nearly."""
  before = of_run.encode(prompt)
  _, *ids = of_run.encode(text)
  pieces = stream(of_run, before, ids)
  assert ''.join(pieces) == text
  if '\ufffd' not in text:
    assert not any('\ufffd' in piece for piece in pieces)
    assert pieces[-1] == ''


@pytest.fixture(scope='module')
def of_bytes(tmp_path_factory):
  folder = tmp_path_factory.mktemp('bytes')
  content = ByteLevelBPE.train([], 257).content
  (folder / 'tokenizer.json').write_bytes(content)
  return PromptTokenizer.of_run(folder)


def test_a_character_comes_as_soon_as_it_is_whole(of_bytes):
  _, *ids = of_bytes.encode('é\U0001f680x')
  assert len(ids) == 7
  assert stream(of_bytes, of_bytes.encode(''), ids) == [
    '', 'é', '', '', '', '\U0001f680', 'x', '',
  ]  # fmt: skip


def test_a_character_cut_off_at_the_end_is_shown(of_bytes):
  _, *ids = of_bytes.encode('a\U0001f680')
  assert stream(of_bytes, [], ids[:-1]) == ['a', '', '', '', '\ufffd']


@given(st.lists(st.integers(1, 289), max_size=30), st.integers(0, 30))
def test_no_byte_is_lost(of_run, ids, cut):
  """A model that has learned nothing writes bytes that are no characters."""
  prompt, ids = of_run.encode(of_run.decode(ids[:cut])), ids[cut:]
  assert ''.join(stream(of_run, prompt, ids)) == whole(of_run, prompt, ids)


@given(st.text('hi é東\U0001f680', max_size=12))
def test_words_keep_their_spaces(text):
  """Its decoder drops the space before the first word, and only that one."""
  tokenizer = PromptTokenizer.of_json(llama_like(), [2], 1)
  start, *ids = tokenizer.encode(text)
  assert ''.join(stream(tokenizer, [start], ids)) == text
  for cut in range(len(ids) + 1):
    prompt, rest = [start, *ids[:cut]], ids[cut:]
    if '\ufffd' not in tokenizer.decode(prompt):
      pieces = stream(tokenizer, prompt, rest)
      assert ''.join(pieces) == whole(tokenizer, prompt, rest)


def test_special_tokens_have_no_text():
  tokenizer = PromptTokenizer.of_json(llama_like(), [2], 1)
  hi = tokenizer.encode('hi')[1:]
  assert stream(tokenizer, [1], [*hi, 1, *hi, 2]) == [
    *stream(tokenizer, [1], hi)[:-1], '', ' hi', '', '',
  ]  # fmt: skip


def test_the_work_of_a_token_does_not_grow(of_run):
  lengths = []

  def decode(ids):
    lengths.append(len(ids))
    return of_run.decode(ids)

  text = TextStream(decode, of_run.encode('the dog'))
  for token in of_run.encode('über 東京 ' * 50)[1:]:
    text.add(token)
  assert max(lengths) < 20
