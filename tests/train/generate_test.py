import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from models import families, sharding
from models.config import LlamaConfig, Qwen2MoeConfig
from train import generate as generate_lib
from train.errors import UserError
from train.generate import generate, next_token, nucleus

VOCAB = 40
SHAPES = {
  'vocab_size': VOCAB, 'd_model': 16, 'n_heads': 4, 'n_kv_heads': 2, 'd_ff': 32,
}  # fmt: skip
LLAMA = LlamaConfig(**SHAPES, n_layers=1)
MOE = Qwen2MoeConfig(
  **SHAPES, n_layers=2, n_experts=4, experts_per_token=2, d_expert=8,
  d_shared=8, sparse_step=2,
)  # fmt: skip
PROMPT = [3, 14, 15, 9, 2]

pytestmark = pytest.mark.usefixtures('kept_programs')


def build(config):
  """Parameters so large that the logits differ."""
  mesh = sharding.make_mesh(jax.devices()[:1])
  model = nnx.eval_shape(
    lambda: families.build(config, rngs=nnx.Rngs(params=0), mesh=mesh)
  )
  graph, shapes = nnx.split(model)
  rng = np.random.default_rng(0)

  def draw(shape):
    return jnp.asarray(rng.normal(size=shape.shape, scale=0.3), shape.dtype)

  return nnx.merge(graph, jax.tree.map(draw, nnx.to_pure_dict(shapes)))


@pytest.fixture(scope='module')
def llama():
  return build(LLAMA)


@pytest.mark.parametrize(
  'config',
  [
    LLAMA,
    dataclasses.replace(
      LLAMA, n_layers=2, scan_layers=True, tie_embeddings=True
    ),
    MOE,
  ],
  ids=['llama', 'scanned', 'qwen2_moe'],
)
def test_greedy_tokens_are_the_likeliest_of_a_full_forward(config):
  model = build(config)
  tokens = list(generate(model, PROMPT, 12, temperature=0))
  assert len(set(tokens)) > 1
  # One forward: position t sees tokens up to t.
  logits_TV = jax.jit(lambda x: model(x)[0])(jnp.asarray([PROMPT + tokens]))
  first = len(PROMPT) - 1
  assert tokens == jnp.argmax(logits_TV, axis=1)[first:-1].tolist()


def test_a_draw_is_of_the_full_forwards_logits(llama):
  how = {'temperature': 0.7, 'top_p': 0.8}
  tokens = list(generate(llama, PROMPT, 12, seed=5, **how))
  logits_TV = jax.jit(lambda x: llama(x)[0])(jnp.asarray([PROMPT + tokens]))
  first = len(PROMPT)
  keys = [jax.random.fold_in(jax.random.key(5), first + i) for i in range(12)]
  one = jax.jit(functools.partial(next_token, **how))
  assert tokens == [
    int(one(logits_V, key))
    for logits_V, key in zip(logits_TV[first - 1 : -1], keys, strict=True)
  ]


def test_a_long_prompt_is_read_in_parts(llama, monkeypatch):
  prompt = PROMPT * 3
  whole = list(generate(llama, prompt, 5, temperature=0))
  for chunk in (4, 5):
    monkeypatch.setattr(generate_lib, '_CHUNK', chunk)
    assert list(generate(llama, prompt, 5, temperature=0)) == whole


def test_the_seed_and_nothing_else_decides(llama):
  def text(seed, tokens=10):
    return list(generate(llama, PROMPT, tokens, seed=seed))

  first = text(2**32 - 1)
  assert text(2**32 - 1) == first
  assert text(1) != first
  assert text(2**32 - 1, 4) == first[:4]


def test_what_is_not_allowed_never_comes(llama):
  allowed_V = np.arange(VOCAB) % 2 == 1
  for temperature in (0, 1e30):
    tokens = list(
      generate(llama, PROMPT, 20, temperature=temperature, allowed_V=allowed_V)
    )
    assert all(token % 2 == 1 for token in tokens)


@pytest.mark.parametrize('tokens', [1, 9])
def test_one_program_reads_the_prompt_and_one_each_token(
  llama, monkeypatch, tokens
):
  traced = []

  def counting(*args, **kwargs):
    traced.append(args)
    return next_token(*args, **kwargs)

  monkeypatch.setattr(generate_lib, 'next_token', counting)
  steps = generate(llama, PROMPT, tokens)
  assert len(traced) == 2
  assert len(list(steps)) == tokens
  assert len(traced) == 2


def test_logits_that_are_not_finite_are_said(llama):
  graph, params = nnx.split(llama)
  broken = jax.tree.map(lambda x: x * jnp.nan, params)
  with pytest.raises(UserError, match='not finite: its training has diverged'):
    list(generate(nnx.merge(graph, broken), PROMPT, 3))


def test_a_cache_that_does_not_fit_is_said(llama):
  with pytest.raises(UserError, match=r'not enough memory.*lower --tokens'):
    generate(llama, PROMPT, 10**12)


@functools.partial(jax.jit, static_argnums=(2, 3))
def drawn(logits_V, keys, temperature, top_p):
  return jax.vmap(
    lambda key: next_token(logits_V, key, temperature=temperature, top_p=top_p)
  )(keys)


# XLA's CPU backend takes subnormal numbers for 0.
LOGITS = st.lists(
  st.floats(-30, 30, width=32, allow_subnormal=False), min_size=7, max_size=7
)
jitted_nucleus = jax.jit(nucleus)


@settings(deadline=None)
@given(LOGITS, st.floats(1e-6, 0.999999))
def test_the_nucleus_is_the_smallest_that_reaches_p(logits, top_p):
  kept_V = np.asarray(jitted_nucleus(jnp.asarray(logits, jnp.float32), top_p))
  exact = np.asarray(logits, np.float64)
  probabilities_V = np.exp(exact - exact.max())
  probabilities_V /= probabilities_V.sum()
  assert kept_V.any()
  # None outside is likelier than one inside.
  assert min(exact[kept_V]) >= max(exact[~kept_V], default=-np.inf)
  # float32 sums, so to 1e-6.
  mass = probabilities_V[kept_V].sum()
  assert mass >= top_p - 1e-6
  assert mass - probabilities_V[kept_V].min() <= top_p + 1e-6


def test_the_nucleus_by_hand():
  logits_V = jnp.log(jnp.asarray([0.1, 0.4, 0.2, 0.3]))
  for top_p, kept in (
    (1e-50, [1]), (0.39, [1]), (0.41, [1, 3]), (0.69, [1, 3]),
    (0.71, [1, 2, 3]), (0.91, [0, 1, 2, 3]),
  ):  # fmt: skip
    assert np.flatnonzero(jitted_nucleus(logits_V, top_p)).tolist() == kept
  assert jitted_nucleus(jnp.zeros(4), 0.6).tolist() == [True, True, True, False]


@jax.jit
def many(logits_V, top_p):
  """2000 draws, all as at temperature 1."""
  keys = jax.random.split(jax.random.key(0), 2000)
  kept_V = jnp.where(nucleus(logits_V, top_p), logits_V, -jnp.inf)
  return jax.vmap(
    lambda key: next_token(kept_V, key, temperature=1.0, top_p=1)
  )(keys)


@settings(deadline=None)
@given(LOGITS, st.floats(0.05, 0.95))
def test_no_draw_leaves_the_nucleus(logits, top_p):
  logits_V = jnp.asarray(logits, jnp.float32)
  kept_V = np.asarray(jitted_nucleus(logits_V, top_p))
  assert kept_V[np.asarray(many(logits_V, top_p))].all()


@pytest.mark.parametrize(
  ('temperature', 'top_p'), [(1.0, 1.0), (0.5, 1.0), (1.0, 0.75)]
)
def test_the_draws_have_the_distribution(temperature, top_p):
  logits_V = jnp.asarray([0.3, -1.0, 2.0, 0.0, 1.0])
  draws = 20_000
  keys = jax.random.split(jax.random.key(7), draws)
  tokens = drawn(logits_V, keys, temperature, top_p)
  counts_V = np.bincount(np.asarray(tokens), minlength=5)
  wanted_V = np.exp(np.asarray(logits_V, np.float64) / temperature)
  if top_p < 1:  # 0.58 and 0.21 reach 0.75.
    wanted_V[[0, 1, 3]] = 0
  wanted_V *= draws / wanted_V.sum()
  there = wanted_V > 0
  assert counts_V[~there].sum() == 0
  chi_squared = ((counts_V - wanted_V)[there] ** 2 / wanted_V[there]).sum()
  # Of at most four degrees of freedom: exceeded once in 20,000 seeds.
  assert chi_squared < 25


@pytest.mark.parametrize('temperature', [1e-310, 1e-45, 1e-30, 1e-6])
def test_a_temperature_near_zero_takes_the_likeliest(temperature):
  logits_V = jnp.asarray([1.0, 5.0, -jnp.inf, 4.0])
  keys = jax.random.split(jax.random.key(0), 9)
  for top_p in (1.0, 0.5):
    tokens = drawn(logits_V, keys, temperature, top_p)
    assert tokens.tolist() == [1] * 9


@pytest.mark.parametrize('temperature', [1e6, 1e38, 1e300])
def test_a_huge_temperature_draws_from_all_that_is_allowed(temperature):
  logits_V = jnp.asarray([1.0, 5.0, -jnp.inf, 4.0])
  keys = jax.random.split(jax.random.key(0), 300)
  tokens = drawn(logits_V, keys, temperature, 1.0)
  assert set(tokens.tolist()) == {0, 1, 3}
