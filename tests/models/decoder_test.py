"""What both families promise: layouts, policies, meshes change no number."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding

from models import decoder, families, sharding
from models.config import REMAT_NAMES, LlamaConfig, Qwen2MoeConfig

pytestmark = pytest.mark.usefixtures('kept_programs')

LLAMA = LlamaConfig(
  vocab_size=24, d_model=32, n_layers=2, n_heads=8, d_ff=16, init_std=0.3,
  z_loss=1e-3,
)  # fmt: skip
MOE = Qwen2MoeConfig(
  vocab_size=24, d_model=32, n_layers=4, n_heads=8, d_ff=16, init_std=0.3,
  n_experts=8, experts_per_token=3, d_expert=8, d_shared=16, sparse_step=2,
  balance_loss=0.1, router_z_loss=0.01, z_loss=1e-3,
)  # fmt: skip
FAMILIES = {'llama': LLAMA, 'qwen2_moe': MOE}


def slow(*case):
  """All cases are run, but most not by `make test`: each compiles a model."""
  return pytest.param(*case, marks=pytest.mark.slow)


RNG = np.random.default_rng(0)
TOKENS = RNG.integers(0, 24, (8, 9)).astype(np.int32)
TARGETS = np.roll(TOKENS, -1, axis=1)
WEIGHTS = RNG.choice([0.0, 0.5, 1.0], (8, 9)).astype(np.float32)


def parts(config, mesh=None):
  """Structure and parameters, the same whatever the mesh."""

  def model():
    return families.build(config, rngs=nnx.Rngs(params=0), mesh=mesh)

  graph, _ = nnx.split(nnx.eval_shape(model), nnx.Param)
  alike = dataclasses.replace(config, remat='none', dtype='float32')
  return graph, parameters(alike)


@functools.cache
def parameters(config):
  model = families.build(config, rngs=nnx.Rngs(params=0))
  return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def loss_and_gradients(config, mesh=None, *, batch=(TOKENS, TARGETS, WEIGHTS)):
  _, params = parts(config)
  if mesh is not None:
    params = jax.device_put(params, places(config, mesh))
    place = NamedSharding(mesh, sharding.spec('batch', 'length'))
    batch = jax.device_put(batch, place)
  (loss, sums), grads = program(config, mesh)(params, batch)
  return loss, sums, grads


@functools.cache
def program(config, mesh):
  graph, _ = parts(config, mesh)

  @jax.jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def run(params, batch):
    sums = nnx.merge(graph, params).loss_sums(*batch)
    return decoder.total_loss(sums, config), sums

  return run


def places(config, mesh):
  """Of parameters."""
  model = nnx.eval_shape(
    lambda: families.build(config, rngs=nnx.Rngs(params=0), mesh=mesh)
  )
  return sharding.param_shardings(model, mesh)


@functools.cache
def expected(config):
  loss, sums, grads = loss_and_gradients(config)
  return loss, sums, canonical(grads, config)


def canonical(tree, config):
  layers = decoder.unstacked(tree['layers'], config)
  return jax.device_get({**tree, 'layers': layers})


def assert_same(config, found, wanted, tolerance=2e-5):
  """Each leaf within a tolerance of its largest number."""
  loss, sums, grads = found
  wanted_loss, wanted_sums, wanted_grads = wanted
  np.testing.assert_allclose(loss, wanted_loss, rtol=tolerance)

  def close(a, b):
    a, b = np.asarray(a), np.asarray(b)
    if b.size:
      np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max() + 1e-12)

  jax.tree.map(close, sums, wanted_sums)
  jax.tree.map(close, canonical(grads, config), wanted_grads)


@pytest.mark.parametrize('config', FAMILIES.values(), ids=FAMILIES)
def test_scanned_layers_equal_unrolled_ones(config):
  scanned = dataclasses.replace(config, scan_layers=True)
  ours = canonical(parameters(scanned), scanned)
  jax.tree.map(np.testing.assert_array_equal, ours, parameters(config))
  assert_same(scanned, loss_and_gradients(scanned), expected(config))


@pytest.mark.parametrize(
  ('family', 'scan', 'remat'),
  [
    ('llama', False, 'minimal'),
    ('qwen2_moe', True, 'full'),
    slow('llama', False, 'full'),
    slow('llama', True, 'full'),
    slow('llama', True, 'minimal'),
    slow('llama', False, 'gate,up'),
    slow('llama', True, 'gate,up'),
    slow('qwen2_moe', False, 'full'),
    slow('qwen2_moe', False, 'minimal'),
    slow('qwen2_moe', True, 'minimal'),
    slow('qwen2_moe', False, 'gate,up'),
    slow('qwen2_moe', True, 'gate,up'),
  ],
)
def test_rematerialisation_changes_nothing(family, scan, remat):
  config = dataclasses.replace(FAMILIES[family], scan_layers=scan)
  other = dataclasses.replace(config, remat=remat)
  assert_same(other, loss_and_gradients(other), expected(config), 1e-5)


def residuals(config):
  """Elements kept for the backward pass."""
  graph, params = parts(config)

  def loss(params):
    sums = nnx.merge(graph, params).loss_sums(TOKENS, TARGETS)
    return decoder.total_loss(sums, config)

  _, backward = jax.eval_shape(lambda p: jax.vjp(loss, p), params)
  return sum(leaf.size for leaf in jax.tree.leaves(backward))


def test_each_policy_keeps_what_it_says():
  sizes = {
    remat: residuals(dataclasses.replace(LLAMA, remat=remat))
    for remat in ('none', 'minimal', 'gate', 'full')
  }
  tokens, c = TOKENS.size, LLAMA
  gate = c.n_layers * tokens * c.d_ff
  assert sizes['gate'] - sizes['full'] == gate
  # The kernel of attention may keep its log-normalisers as well.
  names = c.n_layers * tokens * (2 * c.d_ff + 4 * c.d_model)
  assert sizes['minimal'] - sizes['full'] >= names
  assert sizes['none'] > sizes['minimal']


@pytest.mark.parametrize('family', ['llama', slow('qwen2_moe')])
def test_minimal_repeats_one_product_a_layer(family):
  """Attention's projection; its kernel recomputes scores by design."""
  config = FAMILIES[family]

  def products(remat):
    graph, params = parts(dataclasses.replace(config, remat=remat))

    def loss(params):
      sums = nnx.merge(graph, params).loss_sums(TOKENS, TARGETS)
      return decoder.total_loss(sums, config)

    jaxpr = jax.make_jaxpr(jax.grad(loss))(params)
    return sum(
      e.primitive.name == 'dot_general' for e in equations(jaxpr.jaxpr)
    )

  repeated = products('minimal') - products('none')
  assert repeated == config.n_layers
  assert products('full') > products('minimal')


def equations(jaxpr):
  for equation in jaxpr.eqns:
    yield equation
    for value in jax.tree.leaves(
      equation.params, is_leaf=lambda x: hasattr(x, 'eqns')
    ):
      inner = getattr(value, 'jaxpr', value)
      if hasattr(inner, 'eqns'):
        yield from equations(inner)


def meshes():
  for sizes in itertools.product((1, 2, 4, 8), repeat=4):
    if np.prod(sizes) == 8:
      yield dict(zip(sharding.AXES, sizes, strict=True))


QUICK = {
  'llama': {'data': 2, 'fsdp': 2, 'tensor': 2, 'expert': 1},
  'qwen2_moe': {'data': 1, 'fsdp': 2, 'tensor': 2, 'expert': 2},
}
ON_MESHES = [
  pytest.param(
    config,
    sizes,
    marks=() if sizes == QUICK[name] else pytest.mark.slow,
    id='-'.join(map(str, (name, *sizes.values()))),
  )
  for name, config in FAMILIES.items()
  for sizes in meshes()
]


@pytest.mark.parametrize(('config', 'sizes'), ON_MESHES)
def test_every_mesh_equals_one_device(config, sizes):
  assert len(ON_MESHES) == 40
  mesh = sharding.make_mesh(**sizes)
  sharding.check(config, mesh)
  found = loss_and_gradients(config, mesh)
  assert_same(config, found, expected(config))
  # Each gradient is where its parameter is.
  for leaf, place in zip(
    jax.tree.leaves(found[2]),
    jax.tree.leaves(places(config, mesh)),
    strict=True,
  ):
    assert leaf.sharding.is_equivalent_to(place, leaf.ndim)


@pytest.mark.parametrize('family', ['llama', slow('qwen2_moe')])
def test_a_mesh_may_scan_and_rematerialise(family):
  config = dataclasses.replace(
    FAMILIES[family], scan_layers=True, remat='minimal'
  )
  mesh = sharding.make_mesh(fsdp=4, expert=2)
  wanted = expected(dataclasses.replace(config, scan_layers=False))
  assert_same(config, loss_and_gradients(config, mesh), wanted)


@pytest.mark.parametrize('family', [slow('llama'), 'qwen2_moe'])
def test_micro_batches_add_up(family):
  """Loss and gradients: the normalisers are those of the whole batch."""
  config = FAMILIES[family]
  graph, params = parts(config)

  @jax.jit
  @jax.value_and_grad
  def loss(params):
    sums = [
      nnx.merge(graph, params).loss_sums(
        TOKENS[rows], TARGETS[rows], WEIGHTS[rows]
      )
      for rows in (slice(0, 2), slice(2, 3), slice(3, 8))
    ]
    return decoder.total_loss(jax.tree.map(lambda *s: sum(s), *sums), config)

  value, grads = loss(params)
  _, sums, _ = wanted = expected(config)
  assert_same(config, (value, sums, grads), wanted)


@pytest.mark.parametrize(
  ('family', 'scan'),
  [
    ('llama', True),
    slow('llama', False),
    slow('qwen2_moe', True),
    slow('qwen2_moe', False),
  ],
)
def test_packed_documents_equal_separate_ones(family, scan):
  config = dataclasses.replace(FAMILIES[family], scan_layers=scan)
  lengths = (4, 1, 5)
  documents = [RNG.integers(0, 24, (1, n)).astype(np.int32) for n in lengths]
  packed = np.concatenate(documents, axis=1)
  positions = np.concatenate([np.arange(n) for n in lengths])[None]
  segments = np.repeat(np.arange(3), lengths)[None]
  graph, params = parts(config)

  def model(params, *arrays):
    return nnx.merge(graph, params)(*arrays)

  @jax.jit
  @jax.value_and_grad
  def together(params):
    logits = model(params, packed, positions, segments)
    return jnp.sum(jnp.sin(logits))

  @jax.jit
  @jax.value_and_grad
  def apart(params):
    return sum(jnp.sum(jnp.sin(model(params, d))) for d in documents)

  (value, grads), (wanted, wanted_grads) = together(params), apart(params)
  np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-4)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, atol=2e-5 * np.abs(b).max() + 1e-9
    ),
    grads,
    wanted_grads,
  )
  # Without segments they would see each other.
  mixed = model(params, packed, positions)
  assert np.abs(mixed - model(params, packed, positions, segments)).max() > 0.01


@pytest.mark.parametrize(
  ('family', 'scan'),
  [
    ('llama', True),
    ('qwen2_moe', False),
    slow('llama', False),
    slow('qwen2_moe', True),
  ],
)
def test_cached_decoding_equals_the_full_forward(family, scan):
  config = dataclasses.replace(FAMILIES[family], scan_layers=scan)
  graph, params = parts(config)
  wanted = jax.jit(lambda p: nnx.merge(graph, p)(TOKENS))(params)
  step = jax.jit(lambda p, t, cache: nnx.merge(graph, p).decode(t, cache))
  cache = nnx.merge(graph, params).init_cache(8, 11)
  found, at = [], 0
  for length in (4, 1, 1, 3):
    logits, cache = step(params, TOKENS[:, at : at + length], cache)
    found.append(logits)
    at += length
  assert cache.length == 9
  np.testing.assert_allclose(
    jnp.concatenate(found, axis=1), wanted, rtol=1e-4, atol=1e-4
  )


@pytest.mark.parametrize('family', [slow('llama'), 'qwen2_moe'])
def test_one_prompt_on_a_mesh(family):
  """A batch that the mesh does not divide is computed all the same."""
  config = FAMILIES[family]
  mesh = sharding.make_mesh(fsdp=2, tensor=2, expert=2)
  graph, params = parts(config, mesh)
  params = jax.device_put(params, places(config, mesh))
  alone, _ = parts(config)

  def run(graph, params):
    def score(params):
      logits = nnx.merge(graph, params)(TOKENS[:1])
      return jnp.sum(jnp.sin(logits)), logits

    return jax.jit(jax.value_and_grad(score, has_aux=True))(params)

  (_, logits), grads = run(graph, params)
  (_, wanted), wanted_grads = run(alone, parameters(config))
  np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-4)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, atol=2e-5 * np.abs(b).max() + 1e-9
    ),
    grads,
    wanted_grads,
  )
  step = jax.jit(lambda p, t, cache: nnx.merge(graph, p).decode(t, cache))
  cache = nnx.merge(graph, params).init_cache(1, 9)
  decoded, _ = step(params, TOKENS[:1], cache)
  np.testing.assert_allclose(decoded, wanted, rtol=1e-4, atol=1e-4)


def test_a_cache_without_room_is_seen():
  graph, params = parts(LLAMA)
  model = nnx.merge(graph, params)
  with pytest.raises(ValueError, match='9 tokens for a cache that has room fo'):
    model.decode(TOKENS, model.init_cache(8, 8))
  step = jax.jit(model.decode)
  logits, cache = step(TOKENS[:, :5], model.init_cache(8, 8))
  assert np.isfinite(logits).all()
  logits, _ = step(TOKENS[:, :5], cache)
  assert np.isnan(logits).all()


@pytest.mark.parametrize('family', ['llama', slow('qwen2_moe')])
def test_bfloat16_loses_no_sum_over_tokens(family):
  """The gradients of rows of the embedding and of biases are such sums."""
  rows = 16
  tokens = RNG.choice(24, (rows, 257), p=[0.5] + [0.5 / 23] * 23)
  batch = tokens[:, :-1].astype(np.int32), tokens[:, 1:].astype(np.int32)
  config = dataclasses.replace(
    FAMILIES[family], qkv_bias=True, n_layers=2, init_std=0.1
  )
  _, _, wanted = loss_and_gradients(config, batch=batch)
  half = dataclasses.replace(config, dtype='bfloat16')
  _, _, found = loss_and_gradients(half, batch=batch)
  for path, a in jax.tree_util.tree_leaves_with_path(found):
    b = wanted
    for key in path:
      b = b[key.key]
    error = np.linalg.norm(a - b) / np.linalg.norm(b)
    # A key's bias hardly matters: its gradient is what is left of a sum.
    limit = 0.2 if 'key_bias' in str(path) else 0.04
    assert error < limit, (jax.tree_util.keystr(path), error)


def test_bfloat16_and_padding():
  config = dataclasses.replace(MOE, dtype='bfloat16')
  loss, sums, grads = loss_and_gradients(config)
  wanted, wanted_sums, _ = expected(MOE)
  assert abs(float(loss) - float(wanted)) < 0.05 * float(wanted)
  assert loss.dtype == jnp.float32
  assert {g.dtype.name for g in jax.tree.leaves(grads)} == {'float32'}
  assert sums.tokens == wanted_sums.tokens == (WEIGHTS != 0).sum()
  # What a weight of 0 covers is not seen: not even by the routers.
  garbage = np.where(WEIGHTS == 0, -100, TARGETS)
  other, other_sums, _ = loss_and_gradients(
    MOE, batch=(TOKENS, garbage, WEIGHTS)
  )
  assert float(other) == float(wanted)
  assert other_sums.sequences == 8
  nothing = np.zeros_like(WEIGHTS)
  loss, _, grads = loss_and_gradients(MOE, batch=(TOKENS, TARGETS, nothing))
  assert loss == 0
  assert not any(np.any(g) for g in jax.tree.leaves(grads))


@given(
  st.integers(1, 14), st.integers(1, 5), st.sets(st.integers(0, 13)).map(sorted)
)
def test_groups_hold_every_layer_once_in_order(n_layers, step, dense):
  config = Qwen2MoeConfig(
    n_layers=n_layers,
    sparse_step=step,
    dense_layers=tuple(i for i in dense if i < n_layers),
  )
  groups = decoder.layer_groups(config)
  kinds = [k for group in groups for k in group.pattern * group.repeats]
  assert kinds == [config.is_sparse(i) for i in range(n_layers)]
  places = decoder.layer_places(config)
  assert len(set(places)) == len(places) == n_layers
  for i, (group, slot, index) in enumerate(places):
    assert groups[group].pattern[slot] == config.is_sparse(i)
    assert index < groups[group].repeats


def test_regular_layers_are_one_group():
  assert decoder.layer_groups(LLAMA) == [decoder.Group((False,), 2)]
  assert decoder.layer_groups(MOE) == [decoder.Group((False, True), 2)]
  first_dense = Qwen2MoeConfig(n_layers=12, dense_layers=(0,))
  assert decoder.layer_groups(first_dense) == [
    decoder.Group((False,), 1),
    decoder.Group((True,), 11),
  ]


widths = st.integers(1, 6)


@st.composite
def legal(draw):
  kv_heads, group, half = draw(widths), draw(st.integers(1, 3)), draw(widths)
  heads = kv_heads * group
  common = {
    'vocab_size': draw(st.integers(1, 9)),
    'd_model': heads * 2 * half,
    'n_layers': draw(st.integers(1, 3)),
    'n_heads': heads,
    'n_kv_heads': kv_heads,
    'd_ff': draw(widths),
    'tie_embeddings': draw(st.booleans()),
    'scan_layers': draw(st.booleans()),
    'remat': draw(st.sampled_from(['none', 'full', *REMAT_NAMES])),
  }
  if draw(st.booleans()):
    n_experts = draw(widths)
    return Qwen2MoeConfig(
      **common,
      n_experts=n_experts,
      experts_per_token=draw(st.integers(1, n_experts)),
      d_expert=draw(widths),
      d_shared=draw(st.integers(0, 3)),
      sparse_step=draw(st.integers(1, 3)),
    )
  return LlamaConfig(**common)


@settings(max_examples=30, deadline=None)
@given(legal(), st.integers(1, 2), st.integers(1, 5))
def test_any_legal_shape_has_a_program(config, batch, length):
  def run():
    model = families.build(config, rngs=nnx.Rngs(params=0))
    graph, params = nnx.split(model)
    tokens = jnp.zeros((batch, length), jnp.int32)

    def loss(params):
      sums = nnx.merge(graph, params).loss_sums(tokens, tokens)
      return decoder.total_loss(sums, config)

    return model(tokens), params, jax.grad(loss)(params)

  logits, params, grads = jax.eval_shape(run)
  assert logits.shape == (batch, length, config.vocab_size)
  assert jax.tree.map(jnp.shape, grads) == jax.tree.map(jnp.shape, params)


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(legal(), st.integers(1, 2), st.integers(1, 5))
def test_any_legal_shape_runs(config, batch, length):
  tokens = np.zeros((batch, length), np.int32)
  loss, _, grads = loss_and_gradients(config, batch=(tokens, tokens))
  assert np.isfinite(loss)
  assert jax.tree.all(jax.tree.map(lambda g: np.isfinite(g).all(), grads))


ILLEGAL = {
  'n_heads': st.integers(-2, 0),
  'd_model': st.sampled_from([0, 7, 24 + 8]),
  'n_kv_heads': st.sampled_from([-1, 5, 7, 24]),
  'n_layers': st.integers(-2, 0),
  'd_ff': st.integers(-2, 0),
  'norm_eps': st.sampled_from([0.0, -1.0, float('nan'), float('inf')]),
  'z_loss': st.sampled_from([-1.0, float('nan'), float('inf')]),
  'remat': st.sampled_from(['', 'some', 'gate,down', 'gate,,up']),
  'dtype': st.sampled_from(['', 'float16', 'f32']),
  'n_experts': st.integers(-1, 1),
  'experts_per_token': st.sampled_from([-1, 0, 9]),
  'd_expert': st.integers(-2, 0),
  'd_shared': st.integers(-2, -1),
  'sparse_step': st.integers(-2, 0),
  'dense_layers': st.sampled_from([(-1,), (4,), (0, 9)]),
  'balance_loss': st.sampled_from([-0.1, float('nan')]),
  'router_z_loss': st.sampled_from([-0.1, float('inf')]),
}


@settings(max_examples=60)
@given(st.sampled_from(sorted(ILLEGAL)).flatmap(
  lambda name: st.tuples(st.just(name), ILLEGAL[name])
))  # fmt: skip
def test_an_illegal_shape_says_which_field(case):
  name, value = case
  base = dataclasses.replace(MOE, d_model=24, n_heads=6)
  with pytest.raises(ValueError, match=rf'model\.{name}|model\.experts_per'):
    dataclasses.replace(base, **{name: value})


@pytest.mark.parametrize(
  ('change', 'sizes', 'words'),
  [
    ({'n_heads': 4}, {'tensor': 8}, r'model\.n_heads \(4\).* 8.* tensor'),
    ({'n_kv_heads': 2}, {'tensor': 4, 'data': 2}, r'model\.n_kv_heads \(2\)'),
    ({'vocab_size': 23}, {'tensor': 2, 'data': 4}, r'model\.vocab_size \(23\)'),
    ({'d_ff': 15}, {'tensor': 2, 'data': 4}, r'model\.d_ff \(15\)'),
    ({'n_experts': 6}, {'expert': 4, 'data': 2}, r'model\.n_experts \(6\)'),
    ({'d_expert': 9}, {'tensor': 2, 'data': 4}, r'model\.d_expert \(9\)'),
    ({'d_shared': 9}, {'tensor': 2, 'data': 4}, r'model\.d_shared \(9\)'),
    ({'d_model': 48, 'n_heads': 24}, {'fsdp': 8}, None),
    (
      {'d_model': 36, 'n_heads': 18},
      {'fsdp': 4, 'expert': 2},
      r'model\.d_model \(36\) must be a multiple of 8.* fsdp x expert',
    ),
  ],
)
def test_a_mesh_that_does_not_divide_the_model_is_refused(change, sizes, words):
  config = dataclasses.replace(MOE, **change)
  mesh = sharding.make_mesh(**sizes)
  if words is None:
    sharding.check(config, mesh)
    return
  with pytest.raises(ValueError, match=words):
    sharding.check(config, mesh)
