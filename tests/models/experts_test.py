"""Experts against the dense formula, on one device and on meshes."""

import functools
import importlib.util
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

import models.experts
from models.experts import dense_experts, experts
from models.sharding import BATCH, make_mesh


def load(name):
  """A helper beside this file."""
  path = pathlib.Path(__file__).with_name(f'{name}.py')
  spec = importlib.util.spec_from_file_location(name, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


aot, ragged = load('aot'), load('ragged')

# Of products over the widths here, in float32, in units of the largest value.
TOLERANCE = 2e-5

# (B, T, D, F, E, k): one token and expert, all experts, more than a block.
SHAPES = [
  (1, 1, 4, 2, 1, 1),
  (3, 5, 7, 3, 4, 4),
  (2, 83, 6, 5, 7, 2),
]
MESHES = [
  {},
  {'fsdp': 4, 'tensor': 2},
  {'data': 4, 'expert': 2},
  {'expert': 8},
  {'expert': 4, 'tensor': 2},
  {'data': 2, 'fsdp': 2, 'expert': 2},
  {'fsdp': 2, 'tensor': 2, 'expert': 2},
]
SKEWS = ['even', 'one', 'half']


def operands(shape, seed=0, skew='even', dtype=jnp.float32):
  """Random ones; `skew` says how many experts are chosen at all."""
  batch, length, width, hidden, count, k = shape
  rng = np.random.default_rng(seed)
  normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)
  favour = {'even': 0, 'one': k, 'half': max(k, count // 2)}[skew]
  liking = rng.random((batch, length, count))
  liking += 10 * (rng.permutation(count) < favour)
  chosen = np.argsort(-liking, axis=-1)[..., :k]
  weights = rng.random((batch, length, k))
  return (
    normal(batch, length, width),
    jnp.asarray(chosen, jnp.int32),
    jnp.asarray(weights, jnp.float32),
    normal(count, width, hidden),
    normal(count, width, hidden),
    normal(count, hidden, width),
  )


def mesh_of(sizes):
  devices = jax.devices()[: int(np.prod([1, *sizes.values()]))]
  return make_mesh(devices, **sizes)


def value_and_gradients(f):
  """(y, gradients of tokens, weights and the three matrices), compiled."""

  @jax.jit
  def run(x, chosen, weights, *matrices):
    y, vjp = jax.vjp(
      lambda x, weights, *m: f(x, chosen, weights, *m), x, weights, *matrices
    )
    return y, vjp(jnp.cos(jnp.arange(y.size).reshape(y.shape)).astype(y.dtype))

  return run


def close(got, want, tolerance=TOLERANCE):
  pairs = zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True)
  for pair in pairs:
    assert pair[0].dtype == pair[1].dtype
    ours, theirs = (np.asarray(a, np.float32) for a in pair)
    np.testing.assert_allclose(
      ours, theirs, rtol=0, atol=tolerance * max(1, np.abs(theirs).max())
    )


dense = value_and_gradients(dense_experts)
portable = value_and_gradients(experts)


@settings(max_examples=30, deadline=None)
@given(
  st.sampled_from(SHAPES), st.integers(0, 2**32 - 1), st.sampled_from(SKEWS)
)
def test_equals_dense(shape, seed, skew):
  given = operands(shape, seed, skew)
  close(portable(*given), dense(*given))


@pytest.mark.parametrize('sizes', MESHES, ids=str)
def test_mesh_equals_one_device(sizes):
  mesh = mesh_of(sizes)
  run = value_and_gradients(functools.partial(experts, mesh=mesh))
  for skew in SKEWS:
    given = operands((8, 3, 6, 4, 8, 3), skew=skew)
    close(run(*given), dense(*given))


@pytest.fixture
def no_caches():
  """Programs traced with something patched are nobody else's."""
  jax.clear_caches()
  yield
  jax.clear_caches()


def test_device_kernels_on_emulated_collective(no_caches, monkeypatch):
  """What a GPU's mesh would run, but for the machine."""
  monkeypatch.setattr(jax.lax, 'ragged_all_to_all', ragged.emulated)
  monkeypatch.setattr(models.experts, 'platform', lambda mesh: 'gpu')
  run = value_and_gradients(
    functools.partial(experts, mesh=mesh_of({'expert': 4}))
  )
  for skew in SKEWS:
    given = operands((8, 2, 6, 4, 8, 3), skew=skew)
    close(run(*given), dense(*given))


@pytest.mark.parametrize('sizes', [{}, {'fsdp': 2, 'expert': 4}], ids=str)
def test_no_token_is_dropped(sizes):
  """Every expert answers 1 to every token: the sum counts the answers."""
  shape = batch, length, width, hidden, count, k = 8, 33, 1, 1, 16, 4
  ones = jnp.ones
  run = jax.jit(functools.partial(experts, mesh=mesh_of(sizes)))
  for skew in SKEWS:
    answers = run(
      ones((batch, length, width)),
      operands(shape, skew=skew)[1],
      ones((batch, length, k)),
      ones((count, width, hidden)),
      ones((count, width, hidden)),
      ones((count, hidden, width)) / jax.nn.silu(1.0),
    )
    np.testing.assert_allclose(answers, k, rtol=1e-6)


def test_bfloat16():
  mesh = mesh_of({'expert': 2, 'tensor': 2})
  run = value_and_gradients(functools.partial(experts, mesh=mesh))
  shape = 4, 8, 32, 16, 8, 3
  given = operands(shape, dtype=jnp.bfloat16)
  wide = [
    a.astype(jnp.float32) if a.dtype == jnp.bfloat16 else a for a in given
  ]
  want = jax.tree.map(
    lambda a, like: a.astype(like.dtype), dense(*wide), dense(*given)
  )
  # Two roundings of 2**-9 in the hidden values, one of the result; of a sum
  # over 'tensor' one more.
  close(run(*given), want, tolerance=2e-2)


def test_rematerialisation_knows_the_hidden_products():
  given = operands(SHAPES[0])
  policy = jax.checkpoint_policies.save_only_these_names('gate', 'up')
  text = str(jax.make_jaxpr(experts)(*given))
  assert re.findall(r'name=(\w+)\]', text) == ['gate', 'up', 'combine']
  close(
    value_and_gradients(jax.checkpoint(experts, policy=policy))(*given),
    portable(*given),
    tolerance=0,
  )


@pytest.mark.parametrize(
  ('shape', 'message'),
  [
    ((4, 1, 4, 4, 3, 1), 'experts of 3 .* 2 devices'),
    ((4, 1, 4, 3, 4, 1), 'width of 3 .* 2 devices'),
  ],
)
def test_mesh_must_divide(shape, message):
  mesh = mesh_of({'expert': 2, 'tensor': 2})
  with pytest.raises(ValueError, match=message):
    experts(*operands(shape), mesh=mesh)


def test_a_batch_that_the_mesh_does_not_divide():
  given = operands((3, 2, 6, 4, 8, 3))
  mesh = mesh_of({'data': 2, 'expert': 2, 'tensor': 2})
  run = value_and_gradients(functools.partial(experts, mesh=mesh))
  close(run(*given), dense(*given))


def test_more_rows_than_the_sort_can_count():
  shape = jax.ShapeDtypeStruct
  wide, narrow = shape((64, 1, 1), jnp.float32), shape((64, 1, 1), jnp.float32)
  with pytest.raises(ValueError, match='rows for 64 experts'):
    jax.eval_shape(
      experts,
      shape((1, 2**22, 1), jnp.float32),
      shape((1, 2**22, 8), jnp.int32),
      shape((1, 2**22, 8), jnp.float32),
      wide,
      wide,
      narrow,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
  ('topology', 'sizes'),
  [
    ('v5e:2x4', {'fsdp': 2, 'expert': 4}),
    ('v5p:2x2x2', {'tensor': 2, 'expert': 4}),
  ],
)
def test_compiled_for_tpu(topology, sizes):
  """Its kernels and collectives are there, and no more work than buffers."""
  mesh = aot.topology_mesh(topology, **sizes)
  batch, length, width, hidden, count, k = 8, 512, 512, 256, 16, 4
  wide = PartitionSpec('expert', 'fsdp', 'tensor')
  narrow = PartitionSpec('expert', 'tensor', 'fsdp')
  tokens = PartitionSpec(BATCH)

  def abstract(spec, dtype, *shape):
    sharding = NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  given = (
    abstract(tokens, jnp.bfloat16, batch, length, width),
    abstract(tokens, jnp.int32, batch, length, k),
    abstract(tokens, jnp.float32, batch, length, k),
    abstract(wide, jnp.bfloat16, count, width, hidden),
    abstract(wide, jnp.bfloat16, count, width, hidden),
    abstract(narrow, jnp.bfloat16, count, hidden, width),
  )
  forward = functools.partial(experts, mesh=mesh)
  total = lambda *given: jnp.sum(forward(*given).astype(jnp.float32) ** 2)
  gradient = jax.grad(total, argnums=(0, 2, 3, 4, 5))
  # Each of the R ranks has room for the tokens of R, k times (k = E / R here).
  splits = mesh.shape['data'] * mesh.shape['fsdp'] * mesh.shape['expert']
  rows = batch * length // splits * mesh.shape['expert'] * k
  products = 3 * 2 * rows * width * hidden // mesh.shape['tensor']
  for f, passes, exchanges in ((forward, 1, 2), (gradient, 3, 4)):
    compiled = jax.jit(f).lower(*given).compile()
    text = compiled.as_text()
    kernels = re.findall(r'%(\S+) = [^\n]* custom_call_target="tpu_', text)
    kernels = [re.sub(r'\.\d+$', '', kernel) for kernel in kernels]
    # In the gradient: those again, and as many of the rows' gradients.
    assert kernels.count('ragged-dot-none') == (3 if f is forward else 6)
    assert kernels.count('tgmm') == (0 if f is forward else 3)
    assert len(re.findall(r' ragged-all-to-all\(', text)) == exchanges
    # XLA counts a kernel's rows, not those of them that are filled. Every
    # expert for every token would be 4 times this on a rank with 4.
    assert compiled.cost_analysis()['flops'] < 1.2 * passes * products
