import collections

import jax
import pytest
from flax import nnx

from gradpower_optax.blockwise import RATIOS
from models import families
from models.blocks import blocks
from models.config import LlamaConfig, Qwen2MoeConfig
from models.layers import normal_param

SMALL = {
  'vocab_size': 64, 'd_model': 16, 'n_layers': 3, 'n_heads': 4,
  'n_kv_heads': 2, 'd_ff': 24,
}  # fmt: skip
CONFIGS = {
  'llama': LlamaConfig(**SMALL),
  'qwen2': LlamaConfig(**SMALL, qkv_bias=True, scan_layers=True),
  'tied': LlamaConfig(**SMALL, tie_embeddings=True),
  'moe': Qwen2MoeConfig(
    **SMALL, n_experts=4, d_expert=8, d_shared=16, dense_layers=(1,)
  ),
  'moe, scanned': Qwen2MoeConfig(
    **SMALL, n_experts=4, d_expert=8, d_shared=16, scan_layers=True
  ),
}
ATTENTION = {
  'query': 'qk', 'key': 'qk', 'value': 'vo', 'out': 'vo',
  'query_bias': 'qk', 'key_bias': 'qk', 'value_bias': 'vo',
}  # fmt: skip


def model_of(config):
  return nnx.eval_shape(
    lambda: families.build(config, rngs=nnx.Rngs(0), mesh=None)
  )


def by_hand(path):
  names = [str(key.key) for key in path]
  if 'attention' in names:
    return ATTENTION[names[-1]]
  if names[-1] == 'scale':
    return 'norm'
  if 'mlp' in names or 'moe' in names:
    return 'ffn'
  return {'embedding': 'embedding', 'head': 'lm_head'}['.'.join(names)]


@pytest.mark.parametrize('name', CONFIGS)
def test_every_parameter_has_the_block_that_it_should(name):
  model = model_of(CONFIGS[name])
  found = blocks(model)
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  assert jax.tree.structure(found) == jax.tree.structure(params)
  wanted = jax.tree_util.tree_map_with_path(
    lambda path, _: by_hand(path), params
  )
  assert found == wanted
  counts = collections.Counter(jax.tree.leaves(found))
  assert counts.keys() <= RATIOS.keys()
  assert ('lm_head' in counts) == (name != 'tied')


def test_every_family_is_covered():
  assert {type(c) for c in CONFIGS.values()} == set(families.CONFIGS.values())


def test_an_unknown_parameter_is_refused():
  class Odd(nnx.Module):
    def __init__(self):
      self.gate = normal_param(nnx.Rngs(0), (2, 2), 1.0, 'embed', 'mlp')

  with pytest.raises(ValueError, match='gate is of no known block'):
    blocks(Odd())
