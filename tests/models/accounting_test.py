import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from models import accounting, attention, families
from models.config import LlamaConfig, Qwen2MoeConfig


def leaves(config):
  """The shapes of the real model's parameters by dotted path."""
  make = lambda: families.build(config, rngs=nnx.Rngs(params=0))
  state = nnx.to_pure_dict(nnx.state(nnx.eval_shape(make), nnx.Param))
  flat, _ = jax.tree_util.tree_flatten_with_path(state)
  return {jax.tree_util.keystr(path): leaf.shape for path, leaf in flat}


@st.composite
def configs(draw):
  integers = lambda low, high: draw(st.integers(low, high))
  kv_heads, groups = integers(1, 3), integers(1, 3)
  n_layers = integers(1, 5)
  shape = {
    'vocab_size': integers(1, 99),
    'd_model': kv_heads * groups * 2 * integers(1, 4),
    'n_layers': n_layers,
    'n_heads': kv_heads * groups,
    'n_kv_heads': draw(st.sampled_from([0, kv_heads])),
    'd_ff': integers(1, 40),
    'qkv_bias': draw(st.booleans()),
    'tie_embeddings': draw(st.booleans()),
    'scan_layers': draw(st.booleans()),
  }
  if draw(st.booleans()):
    return LlamaConfig(**shape)
  n_experts = integers(1, 9)
  return Qwen2MoeConfig(
    **shape,
    n_experts=n_experts,
    experts_per_token=integers(1, n_experts),
    d_expert=integers(1, 20),
    d_shared=integers(0, 20),
    sparse_step=integers(1, 3),
    dense_layers=tuple(draw(st.sets(st.integers(0, n_layers - 1)))),
  )


@hypothesis.given(configs())
@hypothesis.settings(max_examples=40, deadline=None)
def test_counts_are_those_of_the_models_arrays(config):
  total = active = non_embedding = matmul = 0
  for path, shape in leaves(config).items():
    size = math.prod(shape)
    used = size
    if "['moe']" in path and 'shared' not in path and 'router' not in path:
      used = size * config.experts_per_token // config.n_experts
    total += size
    active += used
    if 'embedding' not in path and 'head' not in path:
      non_embedding += size
    idle_gate = 'shared_gate' in path and not config.d_shared
    vector = path.endswith(("scale']", "bias']"))
    is_table = 'embedding' in path and not config.tie_embeddings
    if not (vector or idle_gate or is_table):
      matmul += used
  assert accounting.parameters(config) == accounting.Parameters(
    total=total, active=active, non_embedding=non_embedding, matmul=matmul
  )
  assert accounting.training_bytes(config) == 4 * 4 * total


def test_the_published_qwen2_moe():
  """Qwen1.5-MoE-A2.7B: '14.3B parameters in total and 2.7B activated'."""
  config = Qwen2MoeConfig(
    vocab_size=151936,
    d_model=2048,
    n_layers=24,
    n_heads=16,
    n_experts=60,
    experts_per_token=4,
    d_expert=1408,
    d_shared=5632,
  )
  counts = accounting.parameters(config)
  assert counts.total == 14_315_784_192
  assert round(counts.active / 1e9, 1) == 2.7


def _matmul_flops(jaxpr):
  """Operations of all matrix products, those of inner calls as well."""
  flops = 0
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'dot_general':
      (contracted, _), _ = equation.params['dimension_numbers']
      left = equation.invars[0].aval.shape
      inner = math.prod(left[axis] for axis in contracted)
      flops += 2 * inner * math.prod(equation.outvars[0].aval.shape)
    for value in equation.params.values():
      for called in value if isinstance(value, tuple | list) else (value,):
        body = getattr(called, 'jaxpr', called)
        if hasattr(body, 'eqns'):
          flops += _matmul_flops(body)
  return flops


def _einsum_experts(x_BTD, chosen_BTk, weights_BTk, gate, up, down, *, mesh):
  """Each token through its experts and no other, whatever the memory."""
  hidden = jax.nn.silu(jnp.einsum('btd,btkdf->btkf', x_BTD, gate[chosen_BTk]))
  hidden *= jnp.einsum('btd,btkdf->btkf', x_BTD, up[chosen_BTk])
  y_BTkD = jnp.einsum('btkf,btkfd->btkd', hidden, down[chosen_BTk])
  return jnp.sum(y_BTkD * weights_BTk[..., None], axis=2)


@pytest.mark.parametrize('config', [
  LlamaConfig(vocab_size=50, d_model=24, n_layers=3, n_heads=3, d_ff=40),
  LlamaConfig(
    vocab_size=50, d_model=24, n_layers=2, n_heads=6, n_kv_heads=2, d_ff=40,
    qkv_bias=True, tie_embeddings=True,
  ),
  Qwen2MoeConfig(
    vocab_size=50, d_model=24, n_layers=3, n_heads=3, d_ff=40, n_experts=6,
    experts_per_token=2, d_expert=10, d_shared=20, dense_layers=(1,),
  ),
])  # fmt: skip
def test_flops_are_those_of_the_plain_programs_products(config, monkeypatch):
  """Plain: attention by its formula, experts without padding."""
  batch, length = 2, 16
  monkeypatch.setattr(
    'models.layers.attend',
    lambda q, k, v, segments_BT=None, mesh=None: attention.reference(q, k, v),
  )
  monkeypatch.setattr('models.moe.experts', _einsum_experts)
  # What the router reports are sums, not products with a parameter.
  einsum = jnp.einsum
  monkeypatch.setattr(
    'models.moe.jnp.einsum',
    lambda text, *x, **kw: (
      jnp.sum(x[0] * x[1][..., None], axis=1)
      if text == 'bte,bt->be'
      else einsum(text, *x, **kw)
    ),
  )
  model = nnx.eval_shape(
    lambda: families.build(config, rngs=nnx.Rngs(params=0))
  )
  graph, params = nnx.split(model, nnx.Param)
  tokens_BT = jnp.zeros((batch, length), jnp.int32)

  def forward(params):
    return nnx.merge(graph, params)(tokens_BT)

  def both(params):
    logits_BTV, pull = jax.vjp(forward, params)
    return pull(logits_BTV)

  for function, backward in ((forward, False), (both, True)):
    counted = _matmul_flops(jax.make_jaxpr(function)(params).jaxpr)
    expected = accounting.flops_per_token(config, length, backward=backward)
    assert counted == batch * length * expected


def test_flops_by_hand():
  config = LlamaConfig(vocab_size=10, d_model=4, n_layers=3, n_heads=1, d_ff=8)
  matmul = 3 * (4 * 4 * 4 + 3 * 4 * 8) + 4 * 10
  scores = 12 * 3 * 4 * 100
  flops = accounting.flops_per_token
  assert flops(config, 100) == 6 * matmul + scores
  assert flops(config, 100, causal=True) == 6 * matmul + scores // 2
  assert flops(config, 100, backward=False) == 2 * matmul + scores // 3
  assert 3 * flops(config, 7, backward=False) == flops(config, 7)
  assert accounting.flops_by_part(config, 100) == {
    'attention': 6 * 3 * 4 * 4 * 4 + scores,
    'mlp': 6 * 3 * 3 * 4 * 8,
    'head': 6 * 4 * 10,
  }


@pytest.mark.parametrize('length', [0, -1])
def test_a_length_of_nothing_is_refused(length):
  with pytest.raises(ValueError, match='length must be at least 1'):
    accounting.flops_per_token(LlamaConfig(vocab_size=5), length)


def test_an_unset_vocabulary_is_refused():
  for count in (accounting.parameters, accounting.training_bytes):
    with pytest.raises(ValueError, match=r'model\.vocab_size is 0'):
      count(LlamaConfig())
