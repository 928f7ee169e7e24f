"""What a folder says beside weights and shapes is kept, and written back."""

import importlib.util
import json
import pathlib

import jax
import numpy as np
import pytest
from flax import nnx

from models import huggingface
from models.families import build
from models.huggingface import Facts

_spec = importlib.util.spec_from_file_location(
  'huggingface_reference',
  pathlib.Path(__file__).with_name('huggingface_reference.py'),
)
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)
BASE = reference.BASE
KEPT = {
  'architectures': ['LlamaForCausalLM'], 'attention_dropout': 0.1,
  'bos_token_id': 1, 'eos_token_id': [2, 8, 9], 'initializer_range': 0.05,
  'max_position_embeddings': 131072, 'pad_token_id': -1, 'pretraining_tp': 2,
  'transformers.js_config': {'dtype': 'q4'}, 'transformers_version': '4.43.0',
  'use_cache': False,
}  # fmt: skip
UNTRUE = {
  '_name_or_path': 'somebody/else', 'torch_dtype': 'bfloat16',
  'dtype': 'bfloat16',
}  # fmt: skip
# With a character of two bytes and Windows' line ends: to the byte.
GENERATION = '{"eos_token_id": [2, 8], "temperature": 0.6,\r\n "x": "é"}'


@pytest.fixture
def folder(tmp_path):
  folder = reference.write(tmp_path / 'theirs', BASE | KEPT | UNTRUE)
  (folder / 'generation_config.json').write_bytes(GENERATION.encode())
  return folder


def config_of(folder):
  return json.loads((folder / 'config.json').read_text())


@pytest.mark.parametrize('target', ['theirs', 'another'])
def test_what_was_loaded_is_written_back(target, folder):
  target = folder.with_name(target)
  for _ in range(2):
    huggingface.save(huggingface.load(folder), target)
    written = config_of(target)
    assert {k: v for k, v in written.items() if k in KEPT} == KEPT
    assert written['dtype'] == 'float32'
    assert not {'_name_or_path', 'torch_dtype'} & written.keys()
    generation = (target / 'generation_config.json').read_bytes()
    assert generation == GENERATION.encode()
    folder = target


def test_what_is_left_out_stays_so_and_null_stays_null(tmp_path):
  config = {k: v for k, v in BASE.items() if k != 'max_position_embeddings'}
  theirs = reference.write(tmp_path, config | {'eos_token_id': None})
  huggingface.save(huggingface.load(theirs), tmp_path / 'ours')
  written = config_of(tmp_path / 'ours')
  assert written['eos_token_id'] is None
  absent = {'bos_token_id', 'pad_token_id', 'max_position_embeddings'}
  assert not absent & written.keys()
  assert not (tmp_path / 'ours' / 'generation_config.json').exists()


def test_a_model_keeps_its_facts_while_it_is_trained(folder, tmp_path):
  traces = []

  @jax.jit
  def halved(model):
    traces.append(model.facts)
    return jax.tree.map(lambda x: x / 2, model)

  for _ in range(2):  # Two that say the same share one program.
    model = halved(huggingface.load(folder))
    graph, params = nnx.split(model)
    model = nnx.merge(graph, params)
    assert model.facts == huggingface.load_facts(folder)
  assert len(traces) == 1
  huggingface.save(model, tmp_path / 'ours')
  assert config_of(tmp_path / 'ours')['eos_token_id'] == [2, 8, 9]


def test_facts_of_a_model_trained_here(tmp_path):
  model = build(
    huggingface.load_config(reference.write(tmp_path / 'theirs', BASE)),
    rngs=nnx.Rngs(params=0),
  )
  huggingface.save(model, tmp_path)
  written = config_of(tmp_path)
  # Left out, transformers would end at 2.
  assert written['eos_token_id'] is written['bos_token_id'] is None
  for end in (np.int64(36), [0, np.int32(36)]):
    facts = Facts.of(
      eos_token_id=end, bos_token_id=np.int64(3), max_position_embeddings=256
    )
    huggingface.save(model, tmp_path, facts=facts)
    written = config_of(tmp_path)
    assert written['eos_token_id'] == end
    assert written['bos_token_id'] == 3
    assert written['pad_token_id'] is None
    assert written['max_position_embeddings'] == 256
    assert huggingface.load_facts(tmp_path) == huggingface.load(tmp_path).facts
  assert huggingface.load_config(tmp_path) == model.config


@pytest.mark.parametrize('end', [37, -1, [0, 37], '</s>'])
def test_an_end_that_no_text_reaches_is_refused(end, folder, tmp_path):
  model = huggingface.load(folder)
  facts = Facts(json.dumps({'eos_token_id': end}))
  with pytest.raises(ValueError, match=r'eos_token_id .* the 37 tokens'):
    huggingface.save(model, tmp_path / 'ours', facts=facts)
  assert not (tmp_path / 'ours').exists()
  with pytest.raises(ValueError, match='must be at least 1, not 0'):
    Facts.of(max_position_embeddings=0)


def test_another_models_generation_does_not_stay(folder, tmp_path):
  model = huggingface.load(folder)
  (folder / 'tokenizer.json').write_text('{}')
  huggingface.save(model, folder, facts=Facts())
  names = {path.name for path in folder.iterdir()}
  assert names == {'config.json', 'model.safetensors', 'tokenizer.json'}


def test_a_failed_save_leaves_the_facts(folder, monkeypatch):
  model = huggingface.load(folder)

  def fetch(*_):
    raise OSError('no space left')

  monkeypatch.setattr(huggingface, '_fetch', fetch)
  for facts in (Facts(), Facts('{}', '{}')):
    with pytest.raises(OSError, match='no space left'):
      huggingface.save(model, folder, facts=facts)
    assert config_of(folder) == BASE | KEPT | UNTRUE
    text = (folder / 'generation_config.json').read_bytes()
    assert text == GENERATION.encode()
    assert not list(folder.glob('*.tmp'))


@pytest.mark.parametrize('content', [b'{', b'\xff'])
def test_a_broken_generation_config_is_named(content, folder):
  path = folder / 'generation_config.json'
  path.write_bytes(content)
  with pytest.raises(ValueError, match='is not JSON') as caught:
    huggingface.load(folder)
  assert str(path) in str(caught.value)


@pytest.mark.parametrize('text', ['{', '[]', '{"anything": 1}'])
def test_with_a_config_the_folders_own_may_be_of_something_else(text, folder):
  given = huggingface.load_config(folder)
  (folder / 'config.json').write_text(text)
  assert huggingface.load(folder, config=given).facts is None


def test_weights_alone_with_a_config(folder):
  config = huggingface.load_config(folder)
  (folder / 'config.json').unlink()
  assert huggingface.load(folder, config=config).facts is None
  with pytest.raises(FileNotFoundError, match=r'there is no .*config\.json'):
    huggingface.load_facts(folder)
