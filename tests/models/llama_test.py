import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.config import LlamaConfig
from models.llama import Llama

# A wide initialization, so that attention is far from uniform.
BASE = LlamaConfig(
  vocab_size=19, d_model=16, n_layers=2, n_heads=4, d_ff=24, init_std=0.4,
  norm_eps=1e-3, rope_theta=50.0,
)  # fmt: skip
VARIANTS = {
  'multi-head': BASE,
  'grouped': dataclasses.replace(BASE, n_kv_heads=2),
  'multi-query': dataclasses.replace(BASE, n_kv_heads=1),
  'tied': dataclasses.replace(BASE, tie_embeddings=True),
}
TOKENS = np.random.default_rng(0).integers(0, 19, (2, 11)).astype(np.int32)


@functools.cache
def split(config, seed=0):
  def model():
    return Llama(config, rngs=nnx.Rngs(params=seed))

  graph, _ = nnx.split(nnx.eval_shape(model))
  return graph, jax.jit(lambda: nnx.to_pure_dict(nnx.state(model())))()


@functools.cache
def logits_fn(config):
  graph, _ = split(config)
  return jax.jit(lambda params, tokens: nnx.merge(graph, params)(tokens))


def logits(config, params, tokens=TOKENS):
  return logits_fn(config)(params, tokens)


# A second implementation, in float64: loops over sequences, heads, positions.


def np_norm(x, scale, eps):
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale


def np_rotate(x_TH, theta):
  turned = np.empty_like(x_TH)
  half = x_TH.shape[1] // 2
  for position, row in enumerate(x_TH):
    for i in range(half):
      z = complex(row[i], row[i + half])
      z *= np.exp(1j * position / theta ** (2 * i / (2 * half)))
      turned[position, i], turned[position, i + half] = z.real, z.imag
  return turned


def np_attention(c, p, x_TD):
  out = np.zeros_like(x_TD)
  for head in range(c.n_heads):
    group = head // (c.n_heads // (c.n_kv_heads or c.n_heads))
    q_TH = np_rotate(x_TD @ p['query'][:, head], c.rope_theta)
    k_TH = np_rotate(x_TD @ p['key'][:, group], c.rope_theta)
    v_TH = x_TD @ p['value'][:, group]
    for t in range(len(x_TD)):
      scores = k_TH[: t + 1] @ q_TH[t] / np.sqrt(q_TH.shape[1])
      weights = np.exp(scores - scores.max())
      out[t] += weights / weights.sum() @ v_TH[: t + 1] @ p['out'][head]
  return out


def np_llama(c, params, tokens_BT):
  p = jax.tree.map(np.float64, params)
  rows = []
  for tokens in tokens_BT:
    x_TD = p['embedding'][tokens]
    for i in range(c.n_layers):
      block = p['layers'][i]
      h_TD = np_norm(x_TD, block['attention_norm']['scale'], c.norm_eps)
      x_TD = x_TD + np_attention(c, block['attention'], h_TD)
      h_TD = np_norm(x_TD, block['mlp_norm']['scale'], c.norm_eps)
      gate = h_TD @ block['mlp']['gate']
      hidden = gate / (1 + np.exp(-gate)) * (h_TD @ block['mlp']['up'])
      x_TD = x_TD + hidden @ block['mlp']['down']
    x_TD = np_norm(x_TD, p['norm']['scale'], c.norm_eps)
    head = p['embedding'].T if c.tie_embeddings else p['head']
    rows.append(x_TD @ head)
  return np.stack(rows)


@pytest.mark.parametrize('config', VARIANTS.values(), ids=VARIANTS)
def test_logits_match_numpy(config):
  _, params = split(config)
  # Scales off 1, so that a norm without its scale would show.
  params = jax.tree.map(
    lambda x: x * jnp.linspace(0.5, 1.5, x.size) if x.ndim == 1 else x, params
  )
  wanted = np_llama(config, params, TOKENS)
  assert wanted.std() > 0.5
  np.testing.assert_allclose(
    logits(config, params), wanted, rtol=1e-4, atol=1e-4
  )


def test_a_token_changes_no_logits_before_it():
  _, params = split(BASE)
  before = logits(BASE, params)
  for t in range(TOKENS.shape[1]):
    tokens = TOKENS.copy()
    tokens[:, t] = (tokens[:, t] + 1) % BASE.vocab_size
    after = logits(BASE, params, tokens)
    np.testing.assert_array_equal(after[:, :t], before[:, :t])
    changed = np.abs(after[:, t:] - before[:, t:]).max(-1)
    assert (changed > 0).all()


def test_sequences_do_not_see_each_other():
  _, params = split(BASE)
  alone = logits(BASE, params, TOKENS[1:])
  np.testing.assert_allclose(logits(BASE, params)[1:], alone, atol=1e-5)


@pytest.mark.parametrize('scan', [False, True])
def test_bfloat16_computes_in_bfloat16(scan):
  config = dataclasses.replace(BASE, dtype='bfloat16', scan_layers=scan)
  graph, params = split(config)
  assert {x.dtype.name for x in jax.tree.leaves(params)} == {'float32'}
  out = logits(config, params)
  assert out.dtype == jnp.float32

  jaxpr = jax.make_jaxpr(lambda p: nnx.merge(graph, p)(TOKENS))(params)
  # Every product with a parameter; attention's own are its kernel's affair.
  halves = [
    {operand.aval.dtype.name for operand in equation.invars} == {'bfloat16'}
    for equation in equations(jaxpr.jaxpr)
    if equation.primitive.name == 'dot_general'
  ]
  assert sum(halves) >= 7 * (1 if scan else BASE.n_layers) + 1

  exact = logits(BASE, split(BASE)[1])  # Of the same parameters.
  error = np.abs(out - exact).max() / np.abs(exact).max()
  assert 1e-4 < error < 0.1


def equations(jaxpr):
  for equation in jaxpr.eqns:
    yield equation
    for value in equation.params.values():
      if hasattr(value, 'jaxpr'):
        yield from equations(value.jaxpr)
      elif hasattr(value, 'eqns'):
        yield from equations(value)


def test_initial_parameters():
  config = LlamaConfig(
    vocab_size=64, d_model=64, n_layers=2, n_heads=2, d_ff=96, init_std=0.02
  )
  _, params = split(config)
  matrices = 0
  for path, x in jax.tree_util.tree_leaves_with_path(params):
    if 'norm' in jax.tree_util.keystr(path):
      assert (x == 1).all()
    else:
      matrices += 1
      assert float(x.std()) == pytest.approx(0.02, rel=0.05)
      assert abs(float(x.mean())) < 0.02 * 5 / x.size**0.5
  assert matrices == 2 + 7 * 2


def test_no_two_parameters_are_drawn_alike():
  _, params = split(BASE)
  firsts = [
    float(x.ravel()[0])
    for path, x in jax.tree_util.tree_leaves_with_path(params)
    if 'norm' not in jax.tree_util.keystr(path)
  ]
  assert len(set(firsts)) == len(firsts) == 2 + 7 * 2


def test_the_seed_decides():
  same, again, other = (split(BASE, seed)[1] for seed in (3, 3, 4))
  jax.tree.map(np.testing.assert_array_equal, same, again)
  assert not jnp.array_equal(same['embedding'], other['embedding'])


def test_a_tied_model_has_no_head():
  _, params = split(VARIANTS['tied'])
  assert 'head' not in params


def test_an_open_vocabulary_is_refused():
  with pytest.raises(ValueError, match=r'model\.vocab_size'):
    Llama(LlamaConfig(), rngs=nnx.Rngs(params=0))
