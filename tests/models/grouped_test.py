"""Grouped matrix products against a loop over the groups in numpy."""

import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import models.grouped
from models.grouped import grouped_matmul

# (rows, D, F): below, on and beside the size of a tile, and a larger tile.
SHAPES = [(7, 5, 3), (128, 8, 16), (333, 140, 150), (333, 16, 24)]
GROUPS = 5


@functools.partial(jax.jit, static_argnames='platform')
def run(x, w, sizes, dy, platform):
  f = lambda x, w: grouped_matmul(x, w, sizes, platform)
  y, vjp = jax.vjp(f, x, w)
  return y, *vjp(dy)


def expected(x, w, sizes, dy):
  y, dx, dw = (np.zeros(a.shape, np.float64) for a in (dy, x, w))
  start = 0
  for group, size in enumerate(sizes):
    rows = slice(start, start + size)
    y[rows] = x[rows] @ w[group]
    dx[rows] = dy[rows] @ w[group].T
    dw[group] = x[rows].T @ dy[rows]
    start += size
  return y, dx, dw


def operands(shape, seed=0):
  rows, width, hidden = shape
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
  return (
    normal(rows, width),
    normal(GROUPS, width, hidden),
    normal(rows, hidden),
  )


@st.composite
def cases(draw):
  """A shape, and sizes of groups that need not use all rows."""
  shape = draw(st.sampled_from(SHAPES))
  cuts = st.integers(0, shape[0])
  bounds = sorted(draw(st.lists(cuts, min_size=GROUPS, max_size=GROUPS)))
  return shape, np.diff([0, *bounds]).astype(np.int32)


def check(case, platform):
  shape, sizes = case
  x, w, dy = operands(shape)
  got = run(x, w, jnp.asarray(sizes), dy, platform)
  for ours, theirs in zip(got, expected(x, w, sizes, dy), strict=True):
    # Sums of at most 333 float32 products of order 1.
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
  # Padding, to the bit.
  used = sizes.sum()
  assert not np.any(got[0][used:])
  assert not np.any(got[1][used:])


@settings(max_examples=60, deadline=None)
@given(cases())
def test_cpu_product_and_gradients(case):
  check(case, 'cpu')


@settings(max_examples=20, deadline=None)
@given(cases())
def test_gpu_product_and_gradients(case):
  """`ragged_dot` runs anywhere; its kernels only on their devices."""
  check(case, 'gpu')


@pytest.mark.parametrize('share', [(1, 1, 1, 1, 1), (0, 3, 0, 0, 1)])
def test_tpu_gradient_interpreted(monkeypatch, share):
  """The kernel of a TPU, interpreted: its tiles, padding and empty groups."""
  # By name: as an attribute of its package `gmm` is a function.
  gmm = importlib.import_module('jax.experimental.pallas.ops.tpu.megablox.gmm')
  kernel = functools.partial(gmm.tgmm, interpret=True)
  monkeypatch.setattr(gmm, 'tgmm', kernel)
  shape = SHAPES[-1]
  x, w, dy = operands(shape)
  sizes = np.asarray(share) * (shape[0] // GROUPS)
  got = models.grouped._tpu_outer(x, dy, jnp.asarray(sizes, jnp.int32))
  want = expected(x, w, sizes, dy)[2]
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('platform', ['cpu', 'gpu'])
def test_bfloat16(platform):
  shape = SHAPES[-1]
  x, w, dy = (a.astype(jnp.bfloat16) for a in operands(shape))
  sizes = np.array([100, 0, 133, 50, 50], np.int32)
  got = run(x, w, jnp.asarray(sizes), dy, platform)
  wide = (np.asarray(a, np.float32) for a in (x, w, dy))
  x, w, dy = wide
  for ours, theirs in zip(got, expected(x, w, sizes, dy), strict=True):
    assert ours.dtype == jnp.bfloat16
    # bfloat16 has 8 bits; what is lost is the rounding of the result alone.
    np.testing.assert_allclose(
      np.asarray(ours, np.float32), theirs, rtol=2**-7, atol=2**-7
    )
