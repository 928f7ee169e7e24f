"""Every kernel equals the formula: forward, gradient, packed, on any mesh."""

import functools
import importlib.util
import pathlib
import re
import types
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding

from models import attention, attention_portable, attention_tpu, sharding

_spec = importlib.util.spec_from_file_location(
  'aot', pathlib.Path(__file__).with_name('aot.py')
)
aot = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(aot)

# Relative to the largest value: float32 sums in another order; bfloat16 has 8
# bits, and kernels round probabilities before or after they divide.
TOLERANCE = {'float32': 2e-6, 'bfloat16': 2e-2}


def draw(batch, length, heads, kv_heads, width, dtype='float32', seed=0):
  """Queries, keys, values, and a cotangent of the result."""
  rng = np.random.default_rng(seed)
  shapes = [(batch, length, n, width) for n in (heads, kv_heads, kv_heads)]
  shapes.append(shapes[0])
  return [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]


def documents(batch, length, seed=0, chance=0.2):
  starts = np.random.default_rng(seed).random((batch, length)) < chance
  return jnp.asarray(np.cumsum(starts, axis=1), jnp.int32)


def with_gradients(function):
  def run(q, k, v, dy, segments=None):
    y, pull = jax.vjp(lambda *args: function(*args, segments), q, k, v)
    return y, *pull(dy)

  return jax.jit(run)


def on_mesh(mesh):
  return lambda q, k, v, segments=None: attention.attend(
    q, k, v, segments_BT=segments, mesh=mesh
  )


def assert_same(found, expected, dtype='float32'):
  for name, x, y in zip(('y', 'dq', 'dk', 'dv'), found, expected, strict=True):
    assert x.dtype == y.dtype == dtype, name
    ours, theirs = np.asarray(x, np.float32), np.asarray(y, np.float32)
    atol = TOLERANCE[dtype] * max(np.abs(theirs).max(), 1)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol, err_msg=name)


portable = on_mesh(None)


@settings(max_examples=8, deadline=None)
@given(
  batch=st.integers(1, 2),
  length=st.integers(1, 12),
  kv_heads=st.integers(1, 3),
  groups=st.integers(1, 3),
  width=st.integers(1, 9),
  packed=st.booleans(),
  dtype=st.sampled_from(['float32', 'bfloat16']),
  seed=st.integers(0, 99),
)
def test_portable_is_the_formula(
  batch, length, kv_heads, groups, width, packed, dtype, seed
):
  heads = kv_heads * groups
  args = draw(batch, length, heads, kv_heads, width, dtype, seed)
  segments = documents(batch, length, seed) if packed else None
  with mock.patch.object(attention_portable, 'BLOCK', 4):
    found = with_gradients(portable)(*args, segments)
  # In float32 throughout: also what bfloat16 should come close to.
  wide = [x.astype(jnp.float32) for x in args]
  expected = with_gradients(attention.reference)(*wide, segments)
  assert_same(found, [x.astype(dtype) for x in expected], dtype)


def test_the_formula_by_hand():
  # Two tokens of width 1; scores of the second: 3 and 0.
  q, k, v = (
    jnp.array(x, jnp.float32).reshape(1, 2, 1, 1)
    for x in ([5, 1], [3, 0], [10, 20])
  )
  p = np.exp(3) / (np.exp(3) + 1)
  y = attention.reference(q, k, v)
  np.testing.assert_allclose(y.ravel(), [10, 10 * p + 20 * (1 - p)], rtol=1e-6)
  y = attention.reference(q, k, v, jnp.array([[0, 1]]))
  np.testing.assert_allclose(y.ravel(), [10, 20])


def test_query_heads_share_the_key_head_of_their_group():
  q, k, v, dy = draw(1, 5, 6, 2, 4)
  found = with_gradients(portable)(q, k, v, dy)
  k6, v6 = (jnp.repeat(x, 3, axis=2) for x in (k, v))
  y, dq, dk, dv = with_gradients(attention.reference)(q, k6, v6, dy)
  dk, dv = (x.reshape(1, 5, 2, 3, 4).sum(axis=3) for x in (dk, dv))
  assert_same(found, (y, dq, dk, dv))


def test_packed_documents_are_separate_sequences():
  length = 13
  args = draw(1, length, 4, 2, 8)
  cuts = [0, 5, 6, length]
  lengths = np.diff(cuts)
  segments = jnp.asarray(np.repeat([7, 3, 7], lengths)[None], jnp.int32)
  # An id may return: then it is the same document.
  same = [np.r_[0:5, 6:length], np.r_[5:6]]
  with mock.patch.object(attention_portable, 'BLOCK', 4):
    found = with_gradients(portable)(*args, segments)
  for rows in same:
    alone = with_gradients(portable)(*(x[:, rows] for x in args))
    assert_same([x[:, rows] for x in found], alone)


@pytest.mark.parametrize('packed', [False, True])
def test_what_must_not_be_seen_changes_no_bit(packed):
  q, k, v, dy = draw(1, 24, 2, 2, 8)
  segments = jnp.asarray(np.repeat([0, 1], 12)[None], jnp.int32)
  segments = segments if packed else None
  run = with_gradients(portable)
  with mock.patch.object(attention_portable, 'BLOCK', 8):
    y = run(q, k, v, dy, segments)[0]
    later = [x.at[:, 15:].multiply(-50.0) for x in (q, k, v)]
    changed = run(*later, dy, segments)[0]
    np.testing.assert_array_equal(y[:, :15], changed[:, :15])
    assert not np.array_equal(y[:, 15:], changed[:, 15:])
    # The first half as a cause: it reaches the second unless packed.
    earlier = [x.at[:, :12].multiply(-50.0) for x in (q, k, v)]
    changed = run(*earlier, dy, segments)[0]
  assert np.array_equal(y[:, 12:], changed[:, 12:]) == packed


def test_scores_of_any_size_stay_finite():
  q, k, v, dy = draw(1, 9, 2, 2, 8)
  found = with_gradients(portable)(q * 1e4, k * 1e4, v, dy)
  assert all(np.isfinite(x).all() for x in found)
  expected = with_gradients(attention.reference)(q * 1e4, k * 1e4, v, dy)
  # Rounding of scores this size is all that their gradients hold.
  np.testing.assert_allclose(found[0], expected[0], atol=1e-6)


MESHES = [
  {'fsdp': 2, 'tensor': 2, 'expert': 2},
  {'data': 2, 'fsdp': 2, 'tensor': 2},
  {'data': 2, 'tensor': 2, 'expert': 2},
]


@pytest.mark.parametrize('sizes', MESHES, ids=str)
def test_a_mesh_is_one_device(sizes):
  mesh = sharding.make_mesh(**sizes)
  args = draw(8, 11, 4, 2, 8)
  segments = documents(8, 11)
  expected = with_gradients(attention.reference)(*args, segments)
  heads, tokens = (
    NamedSharding(mesh, sharding.spec('batch', 'length', *names))
    for names in (('heads', 'head_dim'), ())
  )
  placed = [jax.device_put(x, heads) for x in args]
  placed.append(jax.device_put(segments, tokens))
  step = with_gradients(on_mesh(mesh)).lower(*placed).compile()
  found = step(*placed)
  assert_same(found, expected)
  assert found[0].sharding.is_equivalent_to(heads, 4)
  moves = r'all-gather|all-reduce|all-to-all|collective-permute'
  assert not re.search(moves, step.as_text())


def test_a_batch_that_the_mesh_does_not_divide():
  mesh = sharding.make_mesh(data=4, tensor=2)
  args = draw(3, 7, 4, 2, 8)
  expected = with_gradients(attention.reference)(*args)
  assert_same(with_gradients(on_mesh(mesh))(*args), expected)


@pytest.mark.parametrize('sizes', [None, {'data': 4, 'tensor': 2}], ids=str)
def test_cached_is_full_attention(sizes):
  mesh = None if sizes is None else sharding.make_mesh(**sizes)
  q, k, v, _ = draw(4, 9, 4, 2, 8)
  full = attention.reference(q, k, v)
  cached = jax.jit(functools.partial(attention.attend_cached, mesh=mesh))
  start = 0
  for run in (4, 1, 3, 1):
    stop = start + run
    # Room for more keys; what lies there does not matter.
    room = [jnp.full((4, 12, 2, 8), 1e9).at[:, :stop].set(x[:, :stop])
            for x in (k, v)]  # fmt: skip
    found = cached(q[:, start:stop], *room, start)
    np.testing.assert_allclose(found, full[:, start:stop], atol=1e-6)
    start = stop


def fake_mesh(platform):
  device = types.SimpleNamespace(platform=platform)
  return types.SimpleNamespace(devices=np.array([device]))


@pytest.mark.parametrize(
  ('platform', 'dtype', 'width', 'expected'),
  [
    ('cpu', 'bfloat16', 64, attention_portable.attend),
    ('tpu', 'float32', 64, attention_tpu.attend),
    ('tpu', 'bfloat16', 80, attention_tpu.attend),
    ('gpu', 'bfloat16', 64, attention.cudnn),
    ('cuda', 'float16', 128, attention.cudnn),
    ('gpu', 'float32', 64, attention_portable.attend),
    ('gpu', 'bfloat16', 65, attention_portable.attend),
    ('gpu', 'bfloat16', 136, attention_portable.attend),
  ],
)
def test_the_platform_of_the_mesh_chooses(platform, dtype, width, expected):
  q = jax.ShapeDtypeStruct((1, 4, 2, width), dtype)
  assert attention.kernel(fake_mesh(platform), q) is expected
  assert attention.kernel(None, q) is attention_portable.attend


@pytest.fixture
def no_caches():
  """Programs traced with something patched are nobody else's."""
  jax.clear_caches()
  yield
  jax.clear_caches()


def test_what_cudnn_is_asked_is_the_formula(no_caches, monkeypatch):
  """The call for cuDNN, answered by XLA: mask, padding, gradient."""
  plain = jax.nn.dot_product_attention
  asked = []

  def answer(*args, implementation, **kwargs):
    asked.append(implementation)
    return plain(*args, implementation='xla', **kwargs)

  monkeypatch.setattr(jax.nn, 'dot_product_attention', answer)
  args = draw(2, 7, 4, 2, 8)
  for segments in (None, documents(2, 7)):
    found = with_gradients(attention.cudnn)(*args, segments)
    expected = with_gradients(attention.reference)(*args, segments)
    assert_same(found, expected)
  assert asked == ['cudnn', 'cudnn']


@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('sizes', [None, {'data': 4, 'tensor': 2}], ids=str)
def test_cudnn_is_lowered_with_its_mask(sizes, packed, no_caches, monkeypatch):
  """Lowered for CUDA on this host; not run on a GPU."""
  # jax asks for cuDNN's version when it traces; this host has none.
  monkeypatch.setattr(
    'jax._src.cudnn.fused_attention_stablehlo.cuda_versions',
    types.SimpleNamespace(cudnn_get_version=lambda: 91100),
  )
  mesh = None if sizes is None else sharding.make_mesh(**sizes)
  monkeypatch.setattr(sharding, 'platform', lambda mesh: 'gpu')
  args = draw(4, 33, 4, 2, 64, 'bfloat16')
  args += [documents(4, 33)] * packed
  traced = with_gradients(on_mesh(mesh)).trace(*args)
  text = traced.lower(lowering_platforms=('cuda',)).as_text()
  calls = set(re.findall(r'__cudnn\$(\w+)', text))
  kind = 'fmhaScaleBiasSoftmax' if packed else 'fmhaSoftmax'
  assert calls == {kind, f'{kind}Backward'}
  assert set(re.findall(r'mask_type\W+22\W+22(\w+)\\', text)) == {'CAUSAL'}
  assert 'dot_general' not in text


@pytest.mark.parametrize(
  ('batch', 'length', 'heads', 'kv_heads', 'width', 'packed'),
  [
    (2, 130, 4, 2, 8, True),
    *(
      pytest.param(*case, marks=pytest.mark.slow)
      for case in [
        (1, 1, 2, 2, 16, False),
        (1, 128, 4, 1, 64, True),
        (2, 384, 2, 2, 64, False),
        (1, 300, 2, 1, 128, True),
        (1, 1024, 2, 2, 64, True),
      ]
    ),
  ],
)
def test_splash_is_the_formula(batch, length, heads, kv_heads, width, packed):
  """The TPU's kernel emulated on this host; not run on a TPU."""
  args = draw(batch, length, heads, kv_heads, width)
  segments = documents(batch, length, chance=0.02) if packed else None
  emulated = functools.partial(attention_tpu.attend, interpret=True)
  found = with_gradients(emulated)(*args, segments)
  expected = with_gradients(attention.reference)(*args, segments)
  assert_same(found, expected)


def exponentials(function, policy, args):
  """How often a gradient takes the softmax's exponential."""

  def loss(*args):
    return jnp.sum(jnp.square(function(*args)))

  wrapped = jax.checkpoint(loss, policy=policy)
  return str(jax.make_jaxpr(jax.grad(wrapped, (0, 1, 2)))(*args)).count(' exp ')


@pytest.mark.parametrize('sizes', [None, {'data': 4, 'tensor': 2}], ids=str)
def test_saved_attention_is_not_run_again(sizes):
  mesh = None if sizes is None else sharding.make_mesh(**sizes)
  args = draw(4, 8, 2, 2, 8)[:3]
  policies = jax.checkpoint_policies
  saved = policies.save_only_these_names('attention')
  # Forward and backward take one each.
  assert exponentials(on_mesh(mesh), saved, args) == 2
  assert exponentials(on_mesh(mesh), policies.nothing_saveable, args) == 3


def test_on_the_accelerator_of_this_machine():
  device = jax.devices()[0]
  if device.platform == 'cpu':
    pytest.skip('JAX_PLATFORMS names no accelerator of this machine')
  mesh = sharding.make_mesh([device])
  args = draw(2, 257, 4, 2, 64, 'bfloat16')
  for segments in (None, documents(2, 257, chance=0.02)):
    found = with_gradients(on_mesh(mesh))(*args, segments)
    wide = [x.astype(jnp.float32) for x in args]
    with jax.default_matmul_precision('highest'):
      expected = with_gradients(attention.reference)(*wide, segments)
    assert_same(found, [x.astype('bfloat16') for x in expected], 'bfloat16')


@pytest.mark.slow
@pytest.mark.parametrize('packed', [False, True])
@pytest.mark.parametrize('width', [64, 128])
@pytest.mark.parametrize('topology', ['v5e:2x2', 'v5p:2x2x1'])
def test_splash_is_in_the_program_for_a_tpu(topology, width, packed):
  """Compiled ahead of time on this host; not run on a TPU."""
  mesh = aot.topology_mesh(topology, data=2, tensor=2)
  heads, tokens = (
    NamedSharding(mesh, sharding.spec('batch', 'length', *names))
    for names in (('heads', 'head_dim'), ())
  )
  shapes = [((4, 1000, n, width), jnp.bfloat16, heads) for n in (8, 4, 4, 8)]
  shapes += [((4, 1000), jnp.int32, tokens)] * packed
  args = [jax.ShapeDtypeStruct(s, d, sharding=p) for s, d, p in shapes]
  step = with_gradients(on_mesh(mesh)).lower(*args).compile()
  text = step.as_text()
  assert text.count('custom_call_target="tpu_custom_call"') == 3
  kernels = set(re.findall(r'splash_mha_(fwd|dq|dkv)(_segmented)?', text))
  mark = '_segmented' if packed else ''
  assert kernels == {(phase, mark) for phase in ('fwd', 'dq', 'dkv')}
  # No scores of all tokens with all: 1000, or 1024 when padded.
  assert not re.search(r'\[[\d,]*(1000,1000|1024,1024)[\d,]*\]', text)
  assert 'all-gather' not in text

  # The same process, for CPUs: nothing of the TPU's.
  mesh = sharding.make_mesh(jax.devices()[:4], data=2, tensor=2)
  args = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in args]
  text = with_gradients(on_mesh(mesh)).lower(*args).compile().as_text()
  assert 'tpu_custom_call' not in text
