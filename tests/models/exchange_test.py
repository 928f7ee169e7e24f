"""The all-to-all of expert parallelism against a model in numpy."""

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from models import exchange
from models.sharding import make_mesh

_spec = importlib.util.spec_from_file_location(
  'ragged', pathlib.Path(__file__).with_name('ragged.py')
)
ragged = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(ragged)

RANKS, LOCAL, ROWS, WIDTH = 4, 3, 10, 2


@functools.partial(jax.jit, static_argnames='platform')
def run(x, sizes, dy, platform):
  """What each rank receives, its own rows back, and the gradient of x."""

  def body(x, sizes, dy):
    route = exchange.plan(sizes)
    limits = {'most': ROWS, 'platform': platform}
    send = lambda x: exchange.dispatch(x, route, **limits)
    y, vjp = jax.vjp(send, x)
    back = lambda y: exchange.combine(y, route, rows=ROWS, **limits)
    returned, back_vjp = jax.vjp(back, y)
    return y, returned, *vjp(dy), *back_vjp(x), route.received

  mesh = make_mesh(jax.devices()[:RANKS], expert=RANKS)
  spec = P('expert')
  return jax.shard_map(
    body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
  )(x, sizes, dy)


def expected(x, sizes):
  """Rows that each rank receives, by (expert, source), and their origins."""
  starts = np.cumsum(sizes, axis=1) - sizes
  received, origins = [], []
  for rank in range(RANKS):
    origin = [
      (source, starts[source, expert] + row)
      for expert in range(rank * LOCAL, (rank + 1) * LOCAL)
      for source in range(RANKS)
      for row in range(sizes[source, expert])
    ]
    rows = np.zeros((RANKS * ROWS, WIDTH), np.float32)
    for place, (source, row) in enumerate(origin):
      rows[place] = x[source, row]
    received.append(rows)
    origins.append(origin)
  return np.stack(received), origins


@st.composite
def all_sizes(draw):
  """Rows of each rank for each expert, some unused, some all for one."""
  cuts = st.lists(
    st.integers(0, ROWS), min_size=RANKS * LOCAL, max_size=RANKS * LOCAL
  )
  one = st.integers(0, RANKS * LOCAL - 1).map(
    lambda expert: ROWS * np.eye(RANKS * LOCAL, dtype=np.int32)[expert]
  )
  spread = cuts.map(lambda cuts: np.diff([0, *sorted(cuts)]))
  return np.stack([draw(one | spread) for _ in range(RANKS)]).astype(np.int32)


@settings(max_examples=50, deadline=None)
@given(all_sizes(), st.integers(0, 3))
def check(platform, sizes, seed):
  rng = np.random.default_rng(seed)
  x, dy = (
    rng.standard_normal((RANKS, rows, WIDTH)).astype(np.float32)
    for rows in (ROWS, RANKS * ROWS)
  )
  got = run(
    x.reshape(-1, WIDTH), sizes.reshape(-1), dy.reshape(-1, WIDTH), platform
  )
  received, returned, dx, dback, counts = (
    np.asarray(a).reshape(RANKS, -1, *a.shape[1:]) for a in got
  )
  want, origins = expected(x, sizes)
  np.testing.assert_array_equal(received, want)
  np.testing.assert_array_equal(counts, sizes.sum(axis=0).reshape(RANKS, LOCAL))
  # Every row that was sent is back at its place; the others are zeros.
  sent = np.arange(ROWS) < sizes.sum(axis=1, keepdims=True)
  np.testing.assert_array_equal(returned, np.where(sent[..., None], x, 0))
  # The transpose of a row's way is its way back.
  want_dx = np.zeros_like(x)
  for rank, origin in enumerate(origins):
    for place, (source, row) in enumerate(origin):
      want_dx[source, row] = dy[rank, place]
  np.testing.assert_array_equal(dx, want_dx)
  np.testing.assert_array_equal(dback, want)


def test_padded_exchange():
  check('cpu')


def test_ragged_exchange(monkeypatch):
  """Offsets and sizes of the ragged path, on an emulated collective."""
  monkeypatch.setattr(exchange.lax, 'ragged_all_to_all', ragged.emulated)
  run.clear_cache()
  check('tpu')
  run.clear_cache()


def test_emulated_collective_is_that_of_the_documentation():
  """The example of `jax.lax.ragged_all_to_all`'s docstring."""
  mesh = make_mesh(jax.devices()[:2], expert=2)
  arguments = [
    [[1, 2, 2], [3, 4, 0]],
    [[0, 0, 0, 0], [0, 0, 0, 0]],
    [[0, 1], [0, 1]],
    [[1, 2], [1, 1]],
    [[0, 0], [1, 2]],
    [[1, 1], [2, 1]],
  ]

  def body(operand, output, *rest):
    return ragged.emulated(
      operand[0, :, None] * 1.0,
      output[0, :, None] * 1.0,
      *(a[0] for a in rest),
      axis_name='expert',
    )[None, :, 0]

  got = jax.shard_map(
    body,
    mesh=mesh,
    in_specs=P('expert'),
    out_specs=P('expert'),
    check_vma=False,
  )(*map(jnp.asarray, arguments))
  np.testing.assert_array_equal(got, [[1, 3, 0, 0], [2, 2, 4, 0]])


def test_the_cpu_still_lacks_the_ragged_collective():
  """When this fails, the padded exchange has had its day."""
  mesh = make_mesh(jax.devices()[:RANKS], expert=RANKS)
  x = jnp.zeros((RANKS * ROWS, WIDTH))
  sizes = jnp.zeros((RANKS * RANKS * LOCAL,), jnp.int32)

  def body(x, sizes):
    route = exchange.plan(sizes)
    return exchange.dispatch(x, route, most=ROWS, platform='tpu')

  call = jax.jit(
    jax.shard_map(
      body,
      mesh=mesh,
      in_specs=P('expert'),
      out_specs=P('expert'),
      check_vma=False,
    )
  )
  with pytest.raises(jax.errors.JaxRuntimeError, match='ragged'):
    call(x, sizes)
