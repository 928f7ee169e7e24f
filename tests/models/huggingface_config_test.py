"""config.json: what is understood, what is refused, and by which words."""

import dataclasses
import importlib.util
import json
import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models import huggingface
from models.config import LlamaConfig, Qwen2MoeConfig, RopeScaling
from models.huggingface_config import from_hugging_face, to_hugging_face

_spec = importlib.util.spec_from_file_location(
  'huggingface_reference',
  pathlib.Path(__file__).with_name('huggingface_reference.py'),
)
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)
BASE, MOE, LLAMA3 = reference.BASE, reference.MOE, reference.LLAMA3

# The shapes of Qwen1.5-MoE-A2.7B, as transformers wrote them before 5.
PUBLISHED = {
  'architectures': ['Qwen2MoeForCausalLM'], 'attention_dropout': 0.0,
  'bos_token_id': 151643, 'eos_token_id': 151643, 'hidden_act': 'silu',
  'hidden_size': 2048, 'initializer_range': 0.02, 'intermediate_size': 5632,
  'max_position_embeddings': 8192, 'max_window_layers': 21,
  'model_type': 'qwen2_moe', 'num_attention_heads': 16,
  'num_hidden_layers': 24, 'num_key_value_heads': 16, 'rms_norm_eps': 1e-06,
  'rope_theta': 1000000.0, 'sliding_window': 32768,
  'tie_word_embeddings': False, 'torch_dtype': 'bfloat16',
  'transformers_version': '4.39.0.dev0', 'use_cache': True,
  'use_sliding_window': False, 'vocab_size': 151936, 'decoder_sparse_step': 1,
  'moe_intermediate_size': 1408, 'shared_expert_intermediate_size': 5632,
  'num_experts_per_tok': 4, 'num_experts': 60, 'norm_topk_prob': False,
  'output_router_logits': False, 'router_aux_loss_coef': 0.001,
}  # fmt: skip


def understood(options):
  return from_hugging_face(options, 'config.json')


def without(options, *names):
  return {k: v for k, v in options.items() if k not in names}


def test_the_published_moe():
  assert understood(PUBLISHED) == Qwen2MoeConfig(
    vocab_size=151936,
    d_model=2048,
    n_layers=24,
    n_heads=16,
    n_kv_heads=16,
    d_ff=5632,
    rope_theta=1e6,
    n_experts=60,
    experts_per_token=4,
    d_expert=1408,
    d_shared=5632,
    balance_loss=0.001,
  )


def test_every_option_of_a_moe_is_read():
  options = {
    **MOE,
    'num_hidden_layers': 6,
    'decoder_sparse_step': 2,
    'mlp_only_layers': [1, 2],
    'norm_topk_prob': True,
    'qkv_bias': False,
    'shared_expert_intermediate_size': 0,
    'router_aux_loss_coef': 0,
    'layer_types': ['full_attention'] * 6,
    'head_dim': 6,
    'tie_word_embeddings': True,
  }
  config = understood(options)
  assert config.sparse_step == 2
  assert config.dense_layers == (1, 2)
  assert config.renormalize
  assert not config.qkv_bias
  assert config.d_shared == 0
  assert config.balance_loss == 0.0
  assert config.tie_embeddings
  sparse = [config.is_sparse(i) for i in range(6)]
  assert sparse == [reference.is_sparse(options, i) for i in range(6)]


def test_what_is_left_out_is_as_in_transformers():
  optional = (
    'norm_topk_prob', 'decoder_sparse_step', 'mlp_only_layers', 'qkv_bias',
    'router_aux_loss_coef', 'use_sliding_window', 'rms_norm_eps',
    'tie_word_embeddings', 'rope_parameters', 'hidden_act',
  )  # fmt: skip
  config = understood(without(MOE, *optional))
  assert config == dataclasses.replace(understood(MOE), balance_loss=0.001)
  null = dict.fromkeys(optional)
  assert understood({**MOE, **null}) == config
  llama = understood(without(BASE, 'num_key_value_heads'))
  assert llama.kv_heads == llama.n_heads
  with pytest.raises(ValueError, match='lacks num_key_value_heads'):
    understood(without(MOE, 'num_key_value_heads'))


def test_spellings_of_the_rotary_embedding():
  older = without(LLAMA3, 'rope_theta')
  plain = without(BASE, 'rope_parameters')
  for options in (
    {**plain, 'rope_theta': 500000.0, 'rope_scaling': older},
    {**plain, 'rope_parameters': LLAMA3},
    {**plain, 'rope_parameters': LLAMA3, 'rope_scaling': None},
    {**plain, 'rope_theta': 500000, 'rope_parameters': older},
    {
      **plain,
      'rope_theta': 500000.0,
      'rope_scaling': {**without(older, 'rope_type'), 'type': 'llama3'},
    },
  ):
    config = understood(options)
    assert config.rope_theta == 500000.0
    assert config.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8)
  # Both, as `to_hugging_face` writes them, if they agree.
  theta = {'rope_theta': 500000.0}
  both = {'rope_parameters': LLAMA3, 'rope_scaling': older, **theta}
  assert understood({**plain, **both}) == config
  # The base may be stated once, in either place.
  scaling = without(older, 'rope_theta')
  once = {'rope_parameters': LLAMA3, 'rope_scaling': scaling}
  assert understood({**plain, **once}) == config
  for options in (plain, {**plain, 'rope_scaling': None}):
    assert understood(options).rope_theta == 10000.0
    assert understood(options).rope_scaling == RopeScaling()


@pytest.mark.parametrize(
  ('base', 'change', 'words'),
  [
    (BASE, {'model_type': 'gemma'}, "model_type = 'gemma' is not supported"),
    (BASE, {'model_type': None}, 'lacks model_type'),
    (BASE, {'hidden_act': 'gelu'}, "hidden_act = 'gelu' is not supported"),
    (BASE, {'attention_bias': True}, 'attention_bias = True is not supported'),
    (BASE, {'mlp_bias': True}, 'mlp_bias = True is not supported'),
    (BASE, {'head_dim': 8}, 'head_dim = 8 is not supported, only 6'),
    (BASE, {'sliding_window': 64}, 'unknown options: sliding_window'),
    (BASE, {'num_experts': 4, 'a': 1}, 'unknown options: a, num_experts'),
    (BASE, {'hidden_size': None}, 'lacks hidden_size'),
    (BASE, {'vocab_size': 0}, 'vocab_size must be at least 1, not 0'),
    (BASE, {'vocab_size': -1}, 'vocab_size must be at least 1, not -1'),
    (MOE, {'vocab_size': 0}, 'vocab_size must be at least 1, not 0'),
    (BASE, {'num_key_value_heads': 0}, 'num_key_value_heads must be at least'),
    (MOE, {'num_key_value_heads': -2}, 'num_key_value_heads must be at least'),
    (
      BASE,
      {'hidden_size': 25},
      'num_attention_heads .4. must divide hidden_size',
    ),
    (BASE, {'num_attention_heads': 0}, 'num_attention_heads must be at'),
    (BASE, {'hidden_size': '24'}, "hidden_size must be a whole .* not '24'"),
    (BASE, {'hidden_size': 24.0}, 'hidden_size must be a whole number'),
    (BASE, {'num_hidden_layers': True}, 'num_hidden_layers must be a whole'),
    (BASE, {'rms_norm_eps': '1e-6'}, "rms_norm_eps must be a number, not '1"),
    (BASE, {'rms_norm_eps': 10**400}, 'rms_norm_eps must be a number'),
    (BASE, {'rms_norm_eps': float('nan')}, 'rms_norm_eps must be positive'),
    (BASE, {'tie_word_embeddings': 'no'}, 'tie_word_embeddings must be true'),
    (BASE, {'rope_parameters': 3}, 'rope_parameters must be an object'),
    (
      BASE,
      {'rope_parameters': {'rope_type': 'yarn', 'rope_theta': 1e4}},
      "rope_type 'yarn' is not supported",
    ),
    (
      BASE,
      {'rope_parameters': {**LLAMA3, 'beta': 1}},
      r'unknown options: rope_parameters\.beta',
    ),
    (
      BASE,
      {'rope_parameters': {'rope_type': 'default', 'factor': 2}},
      r'unknown options: rope_parameters\.factor',
    ),
    (
      BASE,
      {'rope_scaling': {'rope_type': 'llama3', 'factor': 8}},
      r'lacks rope_scaling\.low_freq_factor',
    ),
    (
      BASE,
      {'rope_parameters': {**LLAMA3, 'factor': 0.5}},
      r'rope_scaling\.factor must be 1 or more',
    ),
    (
      BASE,
      {'rope_parameters': {**LLAMA3, 'factor': '8'}},
      r'rope_parameters\.factor must be a number',
    ),
    (BASE, {'rope_theta': 500000.0}, 'rope_theta, rope_scaling and rope_para'),
    (BASE, {'rope_scaling': LLAMA3}, 'contradict each other'),
    (
      BASE,
      {'rope_parameters': {'rope_type': 'default', 'type': 'linear'}},
      "rope_parameters.type = 'linear' is not supported, only 'default'",
    ),
    (BASE, {'head_dim': -1}, 'head_dim = -1 is not supported, only 6'),
    (MOE, {'use_sliding_window': True}, 'use_sliding_window = True is not'),
    (
      MOE,
      {'layer_types': ['full_attention', 'sliding_attention']},
      'layer_types = .*sliding_attention.* is not supported',
    ),
    (MOE, {'attention_bias': True}, 'unknown options: attention_bias'),
    (MOE, {'num_experts': None}, 'lacks num_experts'),
    (MOE, {'num_experts': 0}, 'num_experts must be'),
    (MOE, {'num_experts_per_tok': 7}, 'num_experts_per_tok .7. must'),
    (MOE, {'mlp_only_layers': 1}, 'mlp_only_layers must be a list'),
    (MOE, {'mlp_only_layers': ['1']}, 'mlp_only_layers must be a list'),
    (MOE, {'mlp_only_layers': [9]}, 'mlp_only_layers: there is no'),
    (MOE, {'router_aux_loss_coef': -1}, 'router_aux_loss_coef must'),
    (MOE, {'norm_topk_prob': 1}, 'norm_topk_prob must be true or false'),
    (MOE, {'quantization_config': {}}, 'options: quantization_config'),
  ],
)
def test_refuses_what_it_cannot_do(base, change, words):
  with pytest.raises(ValueError, match=words) as caught:
    understood({**base, **change})
  assert str(caught.value).startswith('config.json')
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  ('text', 'words'),
  [
    ('', 'is not JSON'),
    ('{"hidden_size": ', 'is not JSON'),
    ('[' * 100_000, 'is not JSON'),
    ('\udcff', 'is not JSON'),
    ('[]', 'holds no JSON object'),
    ('3', 'holds no JSON object'),
    ('null', 'holds no JSON object'),
  ],
)
def test_names_a_broken_file(text, words, tmp_path):
  path = tmp_path / 'config.json'
  path.write_bytes(text.encode(errors='surrogateescape'))
  with pytest.raises(ValueError, match=words) as caught:
    huggingface.load_config(tmp_path)
  assert str(path) in str(caught.value)


def test_names_a_config_that_cannot_be_read(tmp_path):
  path = tmp_path / 'config.json'
  with pytest.raises(FileNotFoundError) as caught:
    huggingface.load_config(tmp_path)
  assert str(caught.value) == f'there is no {path}'
  path.mkdir()
  with pytest.raises(OSError, match='Is a directory') as caught:
    huggingface.load_config(tmp_path)
  assert str(caught.value) == f'cannot read {path}: Is a directory'
  for folder in (tmp_path / 'nowhere', pathlib.Path(__file__)):
    with pytest.raises(FileNotFoundError) as caught:
      huggingface.load_config(folder)
    assert str(caught.value) == f'there is no folder {folder}'


def shapes(kind, **more):
  """Configs of one family, by the fields that a folder keeps."""
  return st.builds(
    kind,
    vocab_size=st.integers(1, 99),
    d_model=st.sampled_from([16, 32, 48]),
    n_layers=st.integers(3, 5),
    n_heads=st.sampled_from([2, 4, 8]),
    n_kv_heads=st.sampled_from([1, 2]),
    d_ff=st.integers(1, 99),
    norm_eps=st.floats(1e-9, 1e-3),
    rope_theta=st.floats(100, 1e7),
    rope_scaling=st.sampled_from(
      [RopeScaling(), RopeScaling(8.0, 1.0, 4.0, 8192)]
    ),
    qkv_bias=st.booleans(),
    tie_embeddings=st.booleans(),
    **more,
  )


@given(
  shapes(LlamaConfig)
  | shapes(
    Qwen2MoeConfig,
    n_experts=st.integers(4, 9),
    experts_per_token=st.integers(1, 4),
    d_expert=st.integers(1, 9),
    d_shared=st.integers(0, 9),
    renormalize=st.booleans(),
    sparse_step=st.integers(1, 4),
    dense_layers=st.sets(st.integers(0, 2)).map(sorted).map(tuple),
    balance_loss=st.floats(0, 1),
  )
)
def test_ours_to_theirs_and_back(config):
  text = json.dumps(to_hugging_face(config))
  assert understood(json.loads(text)) == config


def test_older_readers_find_the_rotary_embedding():
  """Transformers 4 would take its own base without a word."""
  scaled = to_hugging_face(understood({**BASE, 'rope_parameters': LLAMA3}))
  assert scaled['rope_theta'] == 500000.0
  assert scaled['rope_scaling'] == without(LLAMA3, 'rope_theta')
  assert scaled['rope_parameters'] == LLAMA3
  plain = to_hugging_face(understood(BASE))
  assert plain['rope_theta'] == 10000.0
  assert plain['rope_scaling'] is None
  assert plain['rope_parameters'] == BASE['rope_parameters']


def test_what_only_concerns_us_is_left_out():
  config = Qwen2MoeConfig(vocab_size=9, n_kv_heads=4)
  ours = dataclasses.replace(
    config,
    scan_layers=True,
    remat='full',
    z_loss=1e-4,
    router_z_loss=1e-3,
    init_std=0.1,
    dtype='bfloat16',
  )
  assert to_hugging_face(ours) == to_hugging_face(config)
