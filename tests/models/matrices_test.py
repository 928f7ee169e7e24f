import jax
import pytest
from flax import nnx

from models import families
from models.config import LlamaConfig, Qwen2MoeConfig
from models.matrices import Matrix, matrices

SMALL = {
  'vocab_size': 64, 'd_model': 16, 'n_layers': 2, 'n_heads': 4,
  'n_kv_heads': 2, 'd_ff': 24,
}  # fmt: skip
INTO_HEADS = Matrix((-3,), (-2, -1))
OUT_OF_HEADS = Matrix((-3, -2), (-1,))
PLAIN = Matrix((-2,), (-1,))
ATTENTION = {
  'query': INTO_HEADS, 'key': INTO_HEADS, 'value': INTO_HEADS,
  'out': OUT_OF_HEADS,
}  # fmt: skip
MLP = {'gate': PLAIN, 'up': PLAIN, 'down': PLAIN}


def found(config, **options):
  """The name of each parameter to what it is, layers apart from the rest."""
  model = nnx.eval_shape(
    lambda: families.build(config, rngs=nnx.Rngs(0), mesh=None)
  )
  tree = matrices(model, **options)
  flat, _ = jax.tree_util.tree_flatten_with_path(
    tree, is_leaf=lambda x: x is None or isinstance(x, Matrix)
  )
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  assert len(flat) == len(jax.tree.leaves(params))
  return {jax.tree_util.keystr(path): value for path, value in flat}


def of(found, name):
  """All that end in a name; they must be alike."""
  values = {v for path, v in found.items() if path.endswith(f"['{name}']")}
  assert len(values) == 1, (name, values)
  return values.pop()


@pytest.mark.parametrize('scan_layers', [True, False])
def test_llama(scan_layers):
  table = found(LlamaConfig(**SMALL, scan_layers=scan_layers))
  for name, wanted in (ATTENTION | MLP).items():
    assert of(table, name) == wanted
  for name in ('embedding', 'head', 'scale'):
    assert of(table, name) is None


def test_experts_are_matrices_each_and_a_gate_to_one_number_is_none():
  config = Qwen2MoeConfig(
    **SMALL, n_experts=4, d_expert=8, d_shared=16, qkv_bias=True
  )
  table = found(config)
  for name, wanted in (ATTENTION | MLP | {'router': PLAIN}).items():
    assert of(table, name) == wanted
  for name in ('shared_gate', 'query_bias', 'key_bias', 'value_bias', 'scale'):
    assert of(table, name) is None


def test_heads_are_matrices_each():
  table = found(LlamaConfig(**SMALL), per_head=True)
  for name in ('query', 'key', 'value'):
    assert of(table, name) == Matrix((-3,), (-1,))
  assert of(table, 'out') == Matrix((-2,), (-1,))
  assert of(table, 'gate') == PLAIN
