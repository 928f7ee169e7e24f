import contextlib
import functools
import math
import re
from unittest import mock

import hypothesis
import jax
import jax.extend as jex
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import NamedSharding

from models import loss, sharding

SCALE = 1 / 7
"""Of the loss under differentiation: as a mean over tokens would have."""

NAMES = ('x', 'head', 'weights')
"""What gradients are of."""

MESHES = [
  {'data': 8},
  {'fsdp': 8},
  {'tensor': 8},
  {'expert': 8},
  {'fsdp': 4, 'tensor': 2},
  {'data': 2, 'fsdp': 2, 'tensor': 2},
  {'data': 2, 'fsdp': 2, 'expert': 2},
  {'data': 2, 'tensor': 2, 'expert': 2},
  {'fsdp': 2, 'tensor': 2, 'expert': 2},
]


def make(batch, length, width, vocab, seed=0, dtype=jnp.float32):
  """Arguments with logits of a few units, and padding of id -100."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(batch, length, width))
  head = rng.normal(size=(width, vocab)) * 3 / math.sqrt(width)
  weights = rng.choice([0, 0.25, 1, 2.5], size=(batch, length))
  targets = rng.integers(0, vocab, size=(batch, length))
  targets = np.where(weights == 0, -100, targets)
  return (
    jnp.asarray(x, dtype),
    jnp.asarray(head, dtype),
    jnp.asarray(targets, jnp.int32),
    jnp.asarray(weights, jnp.float32),
  )


def differentiated(f, **kwargs):
  """Jitted: (sums, gradients of x, head and weights)."""

  def total(*arrays):
    sums = f(*arrays, **kwargs)
    return SCALE * sums[0], sums

  grad = jax.grad(total, argnums=(0, 1, 3), has_aux=True)
  return jax.jit(lambda *arrays: grad(*arrays)[::-1])


@contextlib.contextmanager
def in_chunks_of(tokens):
  with mock.patch.dict(loss.CHUNK_TOKENS, cpu=tokens):
    loss.cross_entropy.clear_cache()  # It has read the constant.
    yield
  loss.cross_entropy.clear_cache()


def assert_near(actual, wanted, tolerance):
  """Errors are relative: to a sum, to the largest entry of a gradient."""
  np.testing.assert_allclose(
    actual[0], wanted[0], rtol=tolerance, atol=tolerance
  )
  for name, a, b in zip(NAMES, actual[1], wanted[1], strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    largest = max(float(jnp.abs(b).max()), 0.1)
    error = float(jnp.abs(a - b).max())
    assert error <= tolerance * largest, f'{name}: {error}, {largest}'


@pytest.mark.parametrize('z_weight', [0.0, 0.3])
def test_plain_matches_numpy(z_weight):
  arrays = make(2, 5, 4, 7)
  x, head, _, w = (np.float64(a) for a in arrays)
  legal = np.maximum(arrays[2], 0)
  logits = x @ head
  lse = np.log(np.exp(logits).sum(-1))
  is_target = np.eye(7)[legal]
  nll = lse - (logits * is_target).sum(-1)
  losses = nll + z_weight * lse**2
  softmax = np.exp(logits - lse[..., None])
  slope = (1 + 2 * z_weight * lse)[..., None] * softmax - is_target
  slope *= SCALE * w[..., None]
  wanted = (
    tuple(np.float32((w * a).sum()) for a in (losses, nll, lse**2)),
    (
      np.float32(slope @ head.T),
      np.float32(np.einsum('btd,btv->dv', x, slope)),
      np.float32(SCALE * losses),
    ),
  )
  plain = differentiated(loss.plain_cross_entropy, z_weight=z_weight)
  assert_near(plain(*arrays), wanted, 2e-6)


@hypothesis.settings(max_examples=8, deadline=None)
@hypothesis.given(
  shape=st.tuples(
    st.integers(1, 3),
    st.sampled_from([1, 2, 3, 5, 7, 13, 16]),
    st.integers(1, 9),
    st.sampled_from([1, 2, 3, 17, 32]),
  ),
  tokens=st.sampled_from([1, 2, 3, 8, 64]),
  z_weight=st.sampled_from([0.0, 0.1]),
  seed=st.integers(0, 99),
)
def test_chunked_equals_plain(shape, tokens, z_weight, seed):
  @jax.jit  # All in one program compiles faster.
  def run(*arrays):
    return (
      differentiated(loss.cross_entropy, z_weight=z_weight)(*arrays),
      loss.cross_entropy(*arrays, z_weight=z_weight),
      differentiated(loss.plain_cross_entropy, z_weight=z_weight)(*arrays),
    )

  with in_chunks_of(tokens):
    actual, sums, wanted = run(*make(*shape, seed=seed))
  assert_near(actual, wanted, 5e-6)
  np.testing.assert_allclose(sums, wanted[0], rtol=5e-6, atol=5e-6)


@pytest.mark.parametrize('tokens', [4, 64])
def test_bfloat16_is_near_float32(tokens):
  # The slopes of logits are rounded once, to 2**-9; a gradient once or twice.
  arrays = make(3, 7, 8, 33, dtype=jnp.bfloat16)
  wide = [a.astype(jnp.float32) for a in arrays[:2]]
  wanted = differentiated(loss.plain_cross_entropy, z_weight=0.1)(
    *wide, *arrays[2:]
  )
  with in_chunks_of(tokens):
    sums, grads = differentiated(loss.cross_entropy, z_weight=0.1)(*arrays)
  assert [g.dtype for g in grads] == ['bfloat16', 'bfloat16', 'float32']
  np.testing.assert_allclose(sums, wanted[0], rtol=1e-5)
  grads = [g.astype(jnp.float32) for g in grads]
  assert_near((sums, grads), wanted, 2**-7)


def test_head_gradient_adds_up_in_float32():
  # Each chunk adds 2**-9 to a sum near 1, which bfloat16 would lose.
  length = 257
  x = jnp.full((1, length, 1), 2.0**-8, jnp.bfloat16).at[0, 0].set(2.0)
  head = jnp.zeros((1, 2), jnp.bfloat16)
  targets, weights = jnp.zeros((1, length), int), jnp.ones((1, length))

  def total(head):
    return loss.cross_entropy(x, head, targets, weights)[0]

  with in_chunks_of(1):
    grad = jax.jit(jax.grad(total))(head)
  assert grad.dtype == jnp.bfloat16
  np.testing.assert_array_equal(np.float32(grad), [[-1.5, 1.5]])


@pytest.mark.parametrize('mesh', [None, {'tensor': 2, 'fsdp': 4}])
def test_logits_of_ten_thousands_stay_finite(mesh):
  mesh = mesh and sharding.make_mesh(**mesh)
  x, head, targets, weights = make(8, 5, 8, 6)
  arrays = (1e2 * x, 1e2 * head, targets, weights)
  logits = np.float64(arrays[0]) @ np.float64(arrays[1])
  assert np.abs(logits).max() > 2e4
  with in_chunks_of(4):
    actual = differentiated(loss.cross_entropy, z_weight=0.1, mesh=mesh)(
      *arrays
    )
  assert all(np.isfinite(a).all() for a in jax.tree.leaves(actual))
  plain = differentiated(loss.plain_cross_entropy, z_weight=0.1)
  assert_near(actual, plain(*arrays), 1e-4)


@pytest.mark.parametrize('f', [loss.cross_entropy, loss.plain_cross_entropy])
def test_without_weight_all_is_zero(f):
  x, head, targets, weights = make(2, 5, 4, 7)
  with in_chunks_of(4):
    sums, grads = differentiated(f, z_weight=0.1)(
      x, head, targets, jnp.zeros_like(weights)
    )
  assert not any(np.any(a) for a in (*sums, *grads[:2]))


@pytest.mark.parametrize('f', [loss.cross_entropy, loss.plain_cross_entropy])
def test_a_target_out_of_range_counts_only_with_a_weight(f):
  x, head, targets, weights = make(2, 5, 4, 7)
  targets = jnp.maximum(targets, 0)
  unweighted, weighted = (weights.at[0, 1].set(w) for w in (0, 0.5))
  run = differentiated(f)
  with in_chunks_of(4):
    wanted = run(x, head, targets, unweighted)
    for target in (-100, -1, 7, 2**31 - 1, -(2**31)):
      wrong = targets.at[0, 1].set(target)
      actual = run(x, head, wrong, unweighted)
      for a, b in zip(
        (*actual[0], *actual[1][:2]), (*wanted[0], *wanted[1][:2]), strict=True
      ):
        np.testing.assert_array_equal(a, b)
      assert np.isnan(run(x, head, wrong, weighted)[0]).all()


@pytest.mark.parametrize('f', [loss.cross_entropy, loss.plain_cross_entropy])
@pytest.mark.parametrize('result', [1, 2])
def test_only_the_first_result_has_a_gradient(f, result):
  x, head, targets, weights = make(2, 5, 4, 7)
  grad = jax.grad(lambda *a: f(*a, targets, weights)[result], argnums=(0, 1))
  assert not any(np.any(g) for g in jax.jit(grad)(x, head))


@pytest.mark.parametrize('tokens', [4, 64])
def test_products_and_loops(tokens):
  arrays = make(2, 5, 4, 7)
  for f, products in (
    (jax.jit(functools.partial(loss.cross_entropy)), 1),  # Not cached.
    (differentiated(loss.cross_entropy), 3),
  ):
    with in_chunks_of(tokens):
      lowered = f.lower(*arrays)
    text = lowered.as_text()
    assert text.count('stablehlo.dot_general') == products
    assert text.count('stablehlo.while') == (1 if tokens < 10 else 0)


def test_whole_logits_never_exist():
  batch, length, width, vocab = 4, 64, 8, 96
  whole = batch * length * vocab
  arrays = make(batch, length, width, vocab)

  def largest(f):
    compiled = differentiated(f).lower(*arrays).compile()
    shapes = re.findall(r'\b[a-z]+\d+\[([\d,]+)\]', compiled.as_text())
    sizes = [math.prod(map(int, shape.split(','))) for shape in shapes]
    return max(sizes), compiled.memory_analysis().temp_size_in_bytes

  with in_chunks_of(32):
    elements, temporary = largest(loss.cross_entropy)
  assert elements < whole / 4
  assert temporary < 4 * whole / 2
  elements, temporary = largest(loss.plain_cross_entropy)
  assert elements >= whole and temporary >= 4 * whole


def shard(arrays, mesh):
  names = (
    ('batch', 'length', 'width'),
    ('embed', 'vocab'),
    ('batch', 'length'),
    ('batch', 'length'),
  )
  return [
    jax.device_put(a, NamedSharding(mesh, sharding.spec(*n)))
    for a, n in zip(arrays, names, strict=True)
  ]


@functools.cache
def on_one_device():
  arrays = make(8, 7, 16, 24)
  return arrays, differentiated(loss.cross_entropy, z_weight=0.1)(*arrays)


@pytest.mark.parametrize('sizes', [*MESHES, {}], ids=str)
def test_every_mesh_equals_one_device(sizes):
  arrays, wanted = on_one_device()
  mesh = sharding.make_mesh(jax.devices()[: math.prod(sizes.values())], **sizes)
  sharded = shard(arrays, mesh)

  def run(*arrays):
    return (
      differentiated(loss.cross_entropy, z_weight=0.1, mesh=mesh)(*arrays),
      loss.cross_entropy(*arrays, z_weight=0.1, mesh=mesh),
    )

  with in_chunks_of(3):
    actual, sums = jax.jit(run)(*sharded)
  assert_near(actual, wanted, 5e-6)
  np.testing.assert_allclose(sums, wanted[0], rtol=5e-6)
  for grad, array in zip(
    actual[1], (sharded[0], sharded[1], sharded[3]), strict=True
  ):
    assert grad.sharding.is_equivalent_to(array.sharding, grad.ndim)


def computations(text):
  """Lines of each computation of an HLO module, by its name."""
  found, lines = {}, []
  for line in text.splitlines():
    if start := re.match(r'(?:ENTRY )?%?([\w.-]+) .*\{$', line):
      lines = found.setdefault(start[1], [])
    lines.append(line)
  return found


def inside_loops(text):
  """Lines of all computations that the bodies of loops reach."""
  lines_of = computations(text)
  names = set(re.findall(r'body=%?([\w.-]+)', text))
  reached = set()
  while names:
    name = names.pop()
    reached.add(name)
    body = '\n'.join(lines_of[name])
    calls = re.findall(r'(?:calls|to_apply|body|condition)=%?([\w.-]+)', body)
    names.update(set(calls) - reached)
  return [line for name in reached for line in lines_of[name]]


def scanned_axes(jaxpr, inside=False):
  """Mesh axes of the collectives in a scan."""
  axes = set()
  for eqn in jaxpr.eqns:
    named = (eqn.params.get(key, ()) for key in ('axes', 'axis_name'))
    if inside and eqn.primitive.name != 'pvary':
      # A reduction's axes are numbers, a collective's names.
      axes.update(a for part in named for a in part if isinstance(a, str))
    for sub in jex.core.jaxprs_in_params(eqn.params):
      axes |= scanned_axes(sub, inside or eqn.primitive.name == 'scan')
  return axes


COLLECTIVE = re.compile(
  r' = (\S+|\(.*?\)) (all-reduce|all-gather|reduce-scatter|all-to-all|'
  r'collective-permute)(?:-start)?\('
)


def collectives(lines):
  return [
    match.groups() for line in lines if (match := COLLECTIVE.search(line))
  ]


@pytest.mark.parametrize(
  'sizes', [{'data': 2, 'fsdp': 2, 'tensor': 2}, {'fsdp': 4, 'expert': 2}]
)
def test_head_moves_once_whatever_the_chunks(sizes):
  mesh = sharding.make_mesh(**sizes)
  arrays = shard(make(8, 7, 16, 24), mesh)
  with in_chunks_of(3):
    run = differentiated(loss.cross_entropy, mesh=mesh)
    traced = run.trace(*arrays)
    text = traced.lower().compile().as_text()
  everywhere = collectives(text.splitlines())
  kinds = [kind for _, kind in everywhere]
  assert kinds.count('all-gather') == kinds.count('reduce-scatter') == 1
  inside = collectives(inside_loops(text))
  assert {kind for _, kind in inside} <= {'all-reduce'}
  head = f'f32[16,{24 // mesh.shape["tensor"]}]'
  assert not any(head in shape for shape, _ in inside), inside
  axes = scanned_axes(traced.jaxpr.jaxpr)
  assert axes == ({'tensor'} if mesh.shape['tensor'] > 1 else set())


X, HEAD = jnp.zeros((2, 3, 4)), jnp.zeros((4, 6))
TARGETS, WEIGHTS = jnp.zeros((2, 3), jnp.int32), jnp.zeros((2, 3))


@pytest.mark.parametrize('f', [loss.cross_entropy, loss.plain_cross_entropy])
@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'x': X[0]}, r'x must be \(batch, length, width\), not \(3, 4\)'),
    ({'head': HEAD.T}, r'head must .* width 4 of x, not \(6, 4\)'),
    ({'head': HEAD[0]}, r'head must .* not \(6,\)'),
    ({'targets': TARGETS[:, :2]}, r'targets must .* \(2, 3\) of x.* \(2, 2\)'),
    ({'weights': WEIGHTS[:1]}, r'weights must .* \(2, 3\) of x, .* \(1, 3\)'),
    ({'x': X[:, :0], 'targets': TARGETS[:, :0], 'weights': WEIGHTS[:, :0]},
     r'x \(2, 0, 4\) and .* empty'),
    ({'head': HEAD[:, :0]}, r'head \(4, 0\) must not be empty'),
    ({'x': X.astype(jnp.float16)}, 'x must be float32 or .*, not float16'),
    ({'head': HEAD.astype(jnp.bfloat16)}, 'head must .* float32 of x, not bfl'),
    ({'targets': WEIGHTS}, 'targets must be integers, not float32'),
    ({'weights': TARGETS}, 'weights must be floats, not int32'),
    ({'mesh': {'data': 4, 'fsdp': 2}}, r'batch of x \(2\) .* multiple of 8'),
    ({'mesh': {'fsdp': 8}, 'x': jnp.zeros((8, 3, 4)),
      'targets': jnp.zeros((8, 3), int), 'weights': jnp.zeros((8, 3))},
     r'width of head \(4\) .* multiple of 8.*fsdp x expert'),
    ({'mesh': {'tensor': 4, 'data': 2}}, r'vocabulary of head \(6\) .* of 4'),
  ],
)  # fmt: skip
def test_illegal_arguments_are_named(f, change, message):
  arguments = {'x': X, 'head': HEAD, 'targets': TARGETS, 'weights': WEIGHTS}
  arguments |= change
  sizes = arguments.pop('mesh', None)
  mesh = sizes and sharding.make_mesh(**sizes)
  with pytest.raises(ValueError, match=message):
    f(*arguments.values(), mesh=mesh)
