import math

import jax
import pytest
from flax import nnx

from models import accounting, families, presets
from models.config import LlamaConfig, Qwen2MoeConfig

# Parameters by hand with vocabularies of 32100 and 50304: for LLaMA
# 2 V D + L (4 D D + 12 D D + 2 D) + D.
_LLAMA = {
  'llama_66m': (66_433_536, 85_074_432, 66.4e6),
  'llama_0.2b': (200_325_888, 228_287_232, 200.3e6),
  'llama_0.4b': (396_780_800, 443_383_040, 397e6),
  'llama_1b': (1_003_912_000, 1_062_164_800, 1004e6),
  'llama_2b': (2_010_646_528, 2_085_210_112, 2011e6),
}
_MOE = {  # And how large it says it is.
  'qwen2_moe_0.2b': (195_032_448, 0.2e9),
  'qwen2_moe_0.5b': (487_072_256, 0.5e9),
  'qwen2_moe_1b': (985_800_960, 1e9),
  'qwen2_moe_2b': (2_033_015_808, 2e9),
}


def test_these_are_all():
  assert list(presets.PRESETS) == [*_LLAMA, 'qwen2_moe_laptop', *_MOE]


@pytest.mark.parametrize('name', _LLAMA)
def test_llama_has_the_papers_count(name):
  t5, gpt2, paper = _LLAMA[name]
  for vocab, size, count in (('t5', 32100, t5), ('gpt2', 50304, gpt2)):
    config = presets.get(name, vocab)
    d, layers = config.d_model, config.n_layers
    assert config.vocab_size == size
    assert count == 2 * size * d + layers * (16 * d * d + 2 * d) + d
    assert accounting.parameters(config).total == count
  assert t5 == pytest.approx(paper, rel=1e-3)


def test_the_marks_are_the_papers():
  marks = {name: preset.marks for name, preset in presets.PRESETS.items()}
  assert marks == {
    'llama_66m': ('I',),
    'llama_0.2b': ('C', 'I'),
    'llama_0.4b': ('I',),
    'llama_1b': ('I',),
    'llama_2b': ('I',),
    'qwen2_moe_laptop': ('?',),
    **dict.fromkeys(_MOE, ('?',)),
  }
  assert presets.PRESETS['llama_0.2b'].mark == 'C, I'
  assert all(preset.note for preset in presets.PRESETS.values())


@pytest.mark.parametrize('name', _MOE)
def test_qwen2_moe_is_about_its_size(name):
  total, about = _MOE[name]
  assert accounting.parameters(presets.get(name)).total == total
  assert total == pytest.approx(about, rel=0.03)


def test_the_laptops_is_small():
  counts = accounting.parameters(presets.get('qwen2_moe_laptop'))
  assert counts.total == 11_194_496


@pytest.mark.parametrize('name', presets.PRESETS)
def test_what_all_share(name):
  config = presets.get(name)
  assert config.head_dim == 64
  assert config.kv_heads == config.n_heads
  assert not config.tie_embeddings
  assert config.norm_eps == 1e-6
  assert config.rope_theta == 10000
  assert config.rope_scaling.factor == 1
  assert config.init_std == 0.02
  assert config.z_loss == 0
  assert presets.PRESETS[name].config.vocab_size == 0
  if isinstance(config, LlamaConfig):
    assert config.d_ff == 4 * config.d_model
    assert not config.qkv_bias
    return
  assert isinstance(config, Qwen2MoeConfig)
  assert config.qkv_bias
  assert not config.renormalize
  assert config.balance_loss == 0.001
  assert config.router_z_loss == 0
  assert all(map(config.is_sparse, range(config.n_layers)))
  # Qwen1.5-MoE-A2.7B: 1408 of 2048, shared 5632.
  assert config.d_expert / config.d_model == 1408 / 2048
  assert config.d_shared / config.d_expert == 5632 / 1408
  assert config.experts_per_token == 4
  assert math.gcd(config.n_experts, 8) == 8


@pytest.mark.parametrize('name', presets.PRESETS)
def test_every_model_can_be_made(name):
  config = presets.get(name)
  make = lambda: families.build(config, rngs=nnx.Rngs(params=0))
  state = nnx.state(nnx.eval_shape(make), nnx.Param)
  counted = sum(leaf.size for leaf in jax.tree.leaves(state))
  assert counted == accounting.parameters(config).total


def test_large_models_are_scanned_and_recompute():
  configs = {name: preset.config for name, preset in presets.PRESETS.items()}
  unrolled = {name for name, c in configs.items() if not c.scan_layers}
  assert unrolled == {'llama_66m', 'qwen2_moe_laptop'}
  recompute = {name for name, c in configs.items() if c.remat == 'minimal'}
  assert recompute == {'llama_1b', 'llama_2b', 'qwen2_moe_1b', 'qwen2_moe_2b'}
  assert {c.remat for c in configs.values()} == {'none', 'minimal'}


@pytest.mark.parametrize('name, vocab, message', [
  ('llama_7b', 't5', r"no model 'llama_7b'; the models are llama_66m, .*_2b"),
  ('', 't5', "no model ''"),
  ('llama_2b', 'bert', "no vocabulary 'bert'; the vocabularies are t5, gpt2"),
])  # fmt: skip
def test_an_unknown_name_is_refused(name, vocab, message):
  with pytest.raises(ValueError, match=message):
    presets.get(name, vocab)
