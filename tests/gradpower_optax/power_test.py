"""The signed power by itself: accuracy, special values, derivatives."""

import functools
import os

import jax
import jax.experimental
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax import export
from jax.sharding import NamedSharding, PartitionSpec

from gradpower_optax import power

# Accuracy is that of programs as users have them, however quickly the rest of
# the tests is compiled: XLA:CPU's older emitters make NaN of what underflows in
# a type without -0.
_OPTIONS = {
  'xla_backend_optimization_level': 3,
  'xla_llvm_disable_expensive_passes': False,
}
if 'xla_cpu_use_fusion_emitters' in os.environ.get('XLA_FLAGS', ''):
  _OPTIONS['xla_cpu_use_fusion_emitters'] = True
compiled = functools.partial(jax.jit, compiler_options=_OPTIONS)
signed_power = power.signed_power
traced_power = compiled(signed_power)  # p is then a tracer.

# Both sides of where the fast form changes its logarithm (|p - 1| = 0.2) and
# applies its factor in two halves (|p - 1| = 0.98), and ordinary values.
INSIDE = (0.5, 0.75, 0.79, 0.8, 0.9, 0.999, 1.001, 1.1, 1.2, 1.21, 1.3, 1.5,
          1.9, 1.99, 2.0, 2.5, 3.0)  # fmt: skip
OUTSIDE = (0.01, 0.1, 0.3, 0.45, 4.7, 10.0, 33.3, 100.0)
TINY = np.finfo(np.float32).tiny
MAX = np.finfo(np.float32).max

if hasattr(jax, 'enable_x64'):
  enable_x64 = jax.enable_x64
else:
  enable_x64 = jax.experimental.enable_x64


def bound(p):
  """Units in the last place that `signed_power` documents."""
  return 2 if p <= 3 else p / 3 + 1


def normals(size, seed=0):
  """float32 normal numbers of both signs, uniform in their bits."""
  rng = np.random.default_rng(seed)
  bits = rng.integers(TINY.view(np.int32), MAX.view(np.int32) + 1, size)
  return bits.astype(np.int32).view(np.float32) * rng.choice([-1, 1], size)


def edges(p):
  """The ends of the range, powers of two, and where the result leaves it."""
  with np.errstate(over='ignore'):
    centers = np.array(
      [TINY, MAX, 1.0, *np.exp2(np.arange(-126.0, 128.0))]
      + [np.longdouble(end) ** (1 / np.longdouble(p)) for end in (TINY, MAX)]
    ).astype(np.float32)
  centers = centers[np.isfinite(centers) & (centers >= TINY)]
  bits = centers.view(np.int32)[:, None] + np.arange(-64, 65)
  bits = bits[(bits >= TINY.view(np.int32)) & (bits <= MAX.view(np.int32))]
  x = np.unique(bits).astype(np.int32).view(np.float32)
  return np.concatenate([x, -x])


def truth(x, p):
  """The signed power in longdouble; p is the exact value of its argument."""
  with np.errstate(over='ignore', under='ignore', invalid='ignore'):
    return np.sign(x) * np.abs(x.astype(np.longdouble)) ** np.longdouble(p)


def ulps(y, exact):
  """Errors in units in the last place, where the exact result is normal."""
  normal = (np.abs(exact) >= TINY) & (np.abs(exact) <= MAX)
  y, exact = y[normal].astype(exact.dtype), exact[normal]
  _, e = np.frexp(np.abs(exact))
  return np.abs(y - exact) / np.ldexp(exact.dtype.type(1), e - 24)


def double_truth(x, p):
  """As `truth`, of positive x, to 1e-8 units: ten times sooner."""
  return x.astype(np.float64) ** np.float64(p)


def bits_of(x):
  x = np.asarray(x)
  return x.view(f'uint{8 * x.dtype.itemsize}')


# Accuracy.


@pytest.mark.parametrize('p', INSIDE + OUTSIDE)
@pytest.mark.parametrize('traced', [False, True])
def test_error_in_float32(p, traced):
  x = np.concatenate([normals(50_000), edges(p)])
  if traced:
    p = np.float32(p)
    y = traced_power(x, p)
  else:
    y = compiled(lambda x: signed_power(x, p))(x)
  error = ulps(np.asarray(y), truth(x, p))
  assert error.size > 1000
  assert error.max() <= bound(p)


@settings(max_examples=50, deadline=None)
@given(p=st.floats(0.5, 3, width=32), seed=st.integers(0, 2**32 - 1))
def test_error_in_float32_at_any_p(p, seed):
  x = normals(4096, seed)
  y = np.asarray(traced_power(x, np.float32(p)))
  assert ulps(y, truth(x, p)).max() <= 2


@pytest.mark.slow
@pytest.mark.parametrize('p', [0.1, 0.5, 0.7, 0.9, 1.2, 1.3, 1.5, 3.0, 4.7])
@pytest.mark.parametrize('traced', [False, True])
def test_error_along_all_bit_patterns(p, traced):
  static = compiled(lambda x: signed_power(x, p))
  exact_p = np.float32(p) if traced else p
  stride, chunk = 127, 1 << 21
  ends = TINY.view(np.int32), MAX.view(np.int32)
  worst = 0.0
  for start in range(int(ends[0]), int(ends[1]) + 1, stride * chunk):
    bits = start + stride * np.arange(chunk, dtype=np.int64)
    x = np.minimum(bits, ends[1]).astype(np.int32).view(np.float32)
    y = traced_power(x, exact_p) if traced else static(x)
    error = ulps(np.asarray(y), double_truth(x, exact_p))
    worst = max(worst, error.max(initial=0.0))
  assert 0 < worst <= bound(p)


@pytest.mark.slow
def test_error_of_every_number():
  p = 1.2
  function = compiled(lambda x: signed_power(x, p))
  chunk = 2**14  # Stays in the processor's caches.
  low_bits = np.arange(chunk, dtype=np.uint32)
  worst = 0.0
  for start in range(1 << 23, 255 << 23, chunk):
    x = (low_bits + np.uint32(start)).view(np.float32)
    error = ulps(np.asarray(function(x)), double_truth(x, p))
    worst = max(worst, error.max(initial=0.0))
  assert 1.5 < worst <= 2


def test_reference_agrees():
  x = normals(10_000)
  x = x[np.abs(np.log2(np.abs(x))) < 40]
  for p in (0.5, 1.2, 3.0):
    with enable_x64(True):
      exact = power.reference(jnp.asarray(x, jnp.float64), p)
      assert exact.dtype == jnp.float64
      error = ulps(np.asarray(signed_power(x, p)), np.asarray(exact))
    assert error.max() <= 2


def test_python_float_p_is_the_double_that_it_is():
  x = np.float32([1e-38, 1e-20, 1e20, 1e31])
  as_double, as_float32 = truth(x, 1.2), truth(x, np.float32(1.2))
  assert ulps(as_float32.astype(np.float32), as_double).max() > 30
  assert ulps(np.asarray(signed_power(x, 1.2)), as_double).max() <= 2
  y = np.asarray(signed_power(x, jnp.float32(1.2)))
  assert ulps(y, as_float32).max() <= 2


@pytest.mark.parametrize('p', [0.01, 0.3, 0.5, 0.9, 1.2, 2.0, 3.0, 4.7, 33.3])
@pytest.mark.parametrize('traced', [False, True])
def test_error_in_float64(p, traced):
  rng = np.random.default_rng(0)
  ends = np.float64([1e-300, 1e300]).view(np.int64)
  x = rng.integers(*ends, 1000).view(np.float64)
  with enable_x64(True), mpmath.workprec(160):
    x = jnp.asarray(x)
    y = signed_power(x, jnp.float64(p) if traced else p)
    assert y.dtype == jnp.float64
    worst = mpmath.mpf(0)
    for x_i, y_i in zip(x.tolist(), y.tolist(), strict=True):
      exact = mpmath.mpf(x_i) ** mpmath.mpf(p)
      if mpmath.mpf(2) ** -1022 <= exact <= np.finfo(np.float64).max:
        _, e = mpmath.frexp(exact)
        worst = max(worst, abs(y_i - exact) / mpmath.mpf(2) ** (e - 53))
  # The backend's pow; 0.51 on a CPU, 1.2 where p is a whole number.
  assert worst <= 2


@pytest.mark.parametrize(
  ('name', 'bound'), [('_LOG2_8', 4.9e-8), ('_LOG2_9', 6.7e-9)]
)
def test_error_of_logarithm(name, bound):
  m = np.linspace(np.sqrt(0.5), np.sqrt(2), 200_001)
  r = m - 1
  y = r * np.polynomial.polynomial.polyval(r, getattr(power, name))
  assert 0.9 * bound < np.abs(y - np.log2(m)).max() < bound


@pytest.mark.parametrize(
  ('name', 'reach', 'bound'),
  [('_EXP2', 0.5, 3.1e-9), ('_EXP2_NEAR', 0.6, 7.5e-9)],
)
def test_error_of_exponential(name, reach, bound):
  f = np.linspace(-reach, reach, 200_001)
  y = 1 + f * np.polynomial.polynomial.polyval(f, getattr(power, name))
  assert 0.9 * bound < np.abs(y / np.exp2(f) - 1).max() < bound


# Where an element stands.

WAYS = (1.2, 2.5, np.float32(1.2))  # Near one, wide, traced.


def function_of(p):
  """Of one array or of a list, p being a tracer where it is an array."""
  if isinstance(p, np.float32):
    call = compiled(
      lambda xs, p: jax.tree.map(lambda x: signed_power(x, p), xs)
    )
    return functools.partial(call, p=p)
  return compiled(lambda xs: jax.tree.map(lambda x: signed_power(x, p), xs))


@pytest.mark.parametrize('way', range(len(WAYS)))
def test_equal_numbers_give_equal_bits_in_any_shape(way):
  # All axes are tried by one way or another. `sign_power` names the exception.
  last_axes = [*range(1, 41)]
  if jax.__version_info__ >= (0, 11) and jax.default_backend() == 'cpu':
    last_axes = [1, 2, *range(17, 41)]
  shapes = [(67, last) for last in last_axes[way :: len(WAYS)]]
  some = normals(61)  # A prime: each place sees every number.
  shapes += [some.shape, (5,), (3, 2, 33)]
  *found, single = function_of(WAYS[way])(
    [np.resize(some, shape) for shape in (*shapes, some.shape)]
  )
  for y in found:
    expected = np.resize(bits_of(single), y.shape)
    np.testing.assert_array_equal(bits_of(y), expected, str(y.shape))


@pytest.mark.parametrize('p', WAYS)
def test_shards_and_slices_have_the_bits_of_the_whole(p):
  if len(jax.devices()) < 8:
    pytest.skip('needs 8 devices; tests/conftest.py asks for fake ones')
  function, x = function_of(p), normals((48, 35))
  expected = bits_of(function(x))
  mesh = jax.make_mesh((8,), ('rows',))
  where = NamedSharding(mesh, PartitionSpec('rows'))
  sharded = function(jax.device_put(x, where))
  np.testing.assert_array_equal(bits_of(sharded), expected)
  np.testing.assert_array_equal(bits_of(function(x[5:, 3:])), expected[5:, 3:])


@pytest.mark.parametrize('p', [1.1, 1.2, 4.7])
def test_shapes_may_be_symbolic(p):
  function = jax.jit(lambda x: signed_power(x, p))
  rows, columns = export.symbolic_shape('rows, columns')
  symbolic = jax.ShapeDtypeStruct((rows, columns), 'float32')
  exported = export.export(function)(symbolic)
  for shape in ((3, 5), (64, 65)):
    x = normals(shape)
    np.testing.assert_array_max_ulp(exported.call(x), function(x), 2)


@pytest.mark.parametrize('platform', ['cpu', 'cuda', 'tpu'])
def test_a_program_names_the_power_once(platform):
  leaves = [jax.ShapeDtypeStruct((8, 8), 'float32')] * 50
  function = jax.jit(lambda xs: [signed_power(x, 1.2) for x in xs])
  text = function.trace(leaves).lower(lowering_platforms=(platform,)).as_text()
  assert text.count('stablehlo.round_nearest_even') == 1


# Other dtypes.

NARROW = ('bfloat16', 'float16', 'float8_e3m4', 'float8_e4m3',
          'float8_e4m3b11fnuz', 'float8_e4m3fn', 'float8_e4m3fnuz',
          'float8_e5m2', 'float8_e5m2fnuz', 'float8_e8m0fnu',
          'float4_e2m1fn')  # fmt: skip


def all_values(name):
  """Every value of a narrow dtype, as a NumPy array."""
  dtype = jnp.dtype(getattr(jnp, name))
  patterns = np.arange(2 ** jnp.finfo(dtype).bits)
  return patterns.astype(f'uint{8 * dtype.itemsize}').view(dtype)


def test_every_narrow_dtype_is_listed():
  names = {
    name
    for name in dir(jnp)
    if name.startswith(('float', 'bfloat'))
    and isinstance(getattr(jnp, name), type(jnp.float32))
  }
  # XLA:CPU does not compute with the two of six bits.
  unsupported = {'float6_e2m3fn', 'float6_e3m2fn'}
  aliases = {'float32', 'float64', 'float_', 'float'}
  assert names - unsupported - aliases <= set(NARROW)
  assert {'float16', 'bfloat16', 'float8_e5m2', 'float8_e4m3fn'} <= names


@pytest.mark.parametrize('name', NARROW)
@pytest.mark.parametrize('p', [0.5, 1.2, 3.0])
@pytest.mark.parametrize('traced', [False, True])
def test_narrow_dtypes_are_rounded_once(name, p, traced):
  x = all_values(name)
  p = np.float32(p) if traced else p
  fixed = compiled(lambda x: signed_power(x, p))
  y = traced_power(x, p) if traced else fixed(x)
  assert y.dtype == x.dtype
  with np.errstate(invalid='ignore'):  # NaN.
    y = np.asarray(y).astype(np.float64)
    wide = x.astype(np.float64)
  exact = truth(wide, p).astype(np.float64)

  # Where float32 is normal, y is the nearest value, up to float32's error.
  def normal(v):
    return (v == 0) | ~np.isfinite(v) | (np.abs(v) >= TINY)

  here = normal(wide) & normal(exact)
  assert np.count_nonzero(here) >= min(x.size, 250) / 2
  near = False
  with np.errstate(over='ignore', invalid='ignore'):
    for wobble in (-(2.0**-21), 0.0, 2.0**-21):
      rounded = (exact * (1 + wobble)).astype(x.dtype).astype(np.float64)
      near |= (y == rounded) | (np.isnan(y) & np.isnan(rounded))
  assert np.all(near | ~here), (x[~near & here], y[~near & here])


# Special values.


@pytest.mark.parametrize('p', [0.01, 0.5, 0.9, 1.2, 1.31, 2.5, 33.3])
@pytest.mark.parametrize('eps', [0.0, 1e-8])
@pytest.mark.parametrize('traced', [False, True])
def test_zeros_infinities_and_nan(p, eps, traced):
  x = jnp.array([0.0, -0.0, jnp.inf, -jnp.inf, jnp.nan, 1.0, -1.0])
  y = signed_power(x, jnp.float32(p) if traced else p, eps)
  np.testing.assert_array_equal(y[:5], x[:5])
  np.testing.assert_array_equal(jnp.signbit(y[:4]), jnp.signbit(x[:4]))
  np.testing.assert_allclose(y[5:], [1.0, -1.0], rtol=2e-6)


@pytest.mark.parametrize('eps', [0.0, 'traced 0', 1e-8])
@pytest.mark.parametrize('traced', [False, True])
@pytest.mark.parametrize('p', [0.5, 1.2, 3.0])
def test_subnormals_keep_their_sign_and_stay_small(p, traced, eps):
  x = np.float32([1e-40, -1e-40, 1e-45, -1e-45])
  y = signed_power(
    jnp.asarray(x),
    jnp.float32(p) if traced else p,
    jnp.float32(0) if eps == 'traced 0' else eps,
  )
  y = np.asarray(y)
  np.testing.assert_array_equal(np.signbit(y), np.signbit(x))
  assert np.all(np.abs(y) <= TINY**p * 1.001)
  if jax.default_backend() == 'cpu':
    np.testing.assert_array_equal(y, 0)  # XLA flushes them there.


@pytest.mark.parametrize('p', [1.2, 3.0])
def test_results_below_the_range_vanish_and_above_it_overflow(p):
  y = signed_power(jnp.array([-1.2e-38, 3e38]), p)
  assert abs(y[0]) < TINY
  assert jnp.signbit(y[0])
  assert y[1] == jnp.inf


@pytest.mark.parametrize('name', ['float32', *NARROW])
def test_one_returns_the_same_bits(name):
  if name == 'float32':
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 1 << 16, dtype=np.uint32)
    special = [0, 1, 2**31, 2**31 + 1, 0x007FFFFF, 0x7F800000, 0xFF800000,
               0x7F800001, 0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF]  # fmt: skip
    x = np.concatenate([bits, special]).astype(np.uint32).view(np.float32)
  else:
    x = all_values(name)
  given_array = jnp.asarray(x)
  np.testing.assert_array_equal(bits_of(given_array), bits_of(x))
  static = functools.partial(signed_power, p=1.0)
  traced = functools.partial(signed_power, p=jnp.float32(1))
  for one in (static, jax.jit(static), traced, jax.jit(traced)):
    np.testing.assert_array_equal(bits_of(one(given_array)), bits_of(x))
  y = traced_power(given_array, jnp.float32(1))
  np.testing.assert_array_equal(bits_of(y), bits_of(x))
  y = traced_power(given_array, jnp.float32(1), jnp.float32(0))
  np.testing.assert_array_equal(bits_of(y), bits_of(x))
  assert signed_power(given_array, 1).dtype == x.dtype  # An int is a number.


@pytest.mark.parametrize('p', [0.5, 1.0, 1.2, 2.5])
@pytest.mark.parametrize('traced', [False, True])
def test_eps_is_the_authors_formula(p, traced):
  eps = 1e-8
  x = np.concatenate([normals(20_000), np.float32([1e-7, -1e-8, 1e-9, 0.0])])
  x = x[np.abs(x) < 1e10]
  arguments = (np.float32(p), np.float32(eps)) if traced else (p, eps)
  y = traced_power(x, *arguments) if traced else signed_power(x, *arguments)
  exact = truth(np.abs(x).astype(np.longdouble) + eps, arguments[0])
  exact *= np.sign(x)
  # The sum rounds once, and so does eps: (p + 1) 2^-24 of relative error.
  error = ulps(np.asarray(y), exact)
  assert error.max() <= 2 + p + 1
  assert y[-1] == 0


def test_eps_leaves_zero_and_its_sign():
  y = signed_power(jnp.array([0.0, -0.0]), 1.2, 1e-8)
  np.testing.assert_array_equal(bits_of(y), bits_of(np.float32([0.0, -0.0])))


# Algebra.

moderate = hnp.arrays(
  np.float32,
  32,
  elements=st.floats(2.0**-12, 2.0**12, width=32)
  | st.floats(-(2.0**12), -(2.0**-12), width=32),
)
eighths = st.integers(4, 24).map(lambda n: n / 8)  # Products are exact.


def assert_within(actual, expected, units):
  expected = np.asarray(expected, np.longdouble)
  error = np.abs(np.asarray(actual, np.longdouble) - expected)
  assert np.all(error <= units * 2.0**-23 * np.abs(expected))


@settings(max_examples=60, deadline=None)
@given(
  x=hnp.arrays(np.float32, 32, elements=st.floats(width=32)),
  p=st.floats(0.125, 16, width=32),
)
def test_odd(x, p):
  y, minus_y = traced_power(x, p), traced_power(-x, p)
  same = bits_of(minus_y) == bits_of(-np.asarray(y))
  assert np.all(same | np.isnan(x))


@settings(max_examples=60, deadline=None)
@given(x=moderate, p=eighths, c=st.floats(2.0**-10, 2.0**10, width=32))
def test_scale_law(x, p, c):
  scaled = np.float32(c) * x  # Half a unit, times p.
  expected = truth(np.float32(c), p) * np.asarray(traced_power(x, p))
  assert_within(traced_power(scaled, p), expected, 2 + 2 + p / 2 + 0.1)


@settings(max_examples=60, deadline=None)
@given(x=moderate, p=eighths, q=eighths)
def test_powers_compose(x, p, q):
  twice = traced_power(traced_power(x, q), p)
  assert_within(twice, truth(x, p * q), 2 * p + 2 + 0.1)
  once = traced_power(x, p * q)
  assert_within(twice, once, 2 * p + 2 + bound(p * q) + 0.1)


@settings(max_examples=40, deadline=None)
@given(x=moderate, p=eighths)
def test_increasing(x, p):
  y = np.asarray(traced_power(np.sort(x), p), np.float64)
  assert np.all(np.diff(y) >= -4 * 2.0**-23 * np.abs(y[1:]))


# Derivatives.

MODERATE = (1e-6, -0.003, 0.5, -1.0, 2.0, 300.0)


def _at(x, p):
  return signed_power(jnp.float32(x), p)


@pytest.mark.parametrize('p', [0.3, 0.9, 1.0, 1.2, 2.0, 3.0])
@pytest.mark.parametrize('traced', [False, True])
@pytest.mark.parametrize('derivative', [jax.grad, jax.jacfwd])
def test_derivative_with_respect_to_x(p, traced, derivative):
  p_given = jnp.float32(p) if traced else p
  x = np.float32(MODERATE)
  slope = jax.vmap(derivative(lambda x: signed_power(x, p_given)))(x)
  np.testing.assert_allclose(slope, p * np.abs(x) ** (p - 1), rtol=3e-6)
  second = jax.vmap(jax.grad(derivative(lambda x: signed_power(x, p_given))))
  expected = p * (p - 1) * np.sign(x) * np.abs(x.astype(np.float64)) ** (p - 2)
  np.testing.assert_allclose(second(x), expected, rtol=3e-6, atol=1e-30)


@pytest.mark.parametrize('p', [0.3, 0.9, 1.0, 1.2, 2.0, 3.0])
@pytest.mark.parametrize('derivative', [jax.grad, jax.jacfwd])
def test_derivatives_with_respect_to_p(p, derivative):
  x = np.float32(MODERATE)
  wide, log = x.astype(np.float64), np.log(np.abs(x.astype(np.float64)))
  y = np.sign(wide) * np.abs(wide) ** p

  def along(order):
    f = signed_power
    for argnums in order:
      f = derivative(f, argnums)
    return jax.vmap(f, (0, None))(x, jnp.float32(p))

  np.testing.assert_allclose(along([1]), y * log, rtol=3e-6)
  np.testing.assert_allclose(along([1, 1]), y * log**2, rtol=3e-6)
  mixed = np.abs(wide) ** (p - 1) * (1 + p * log)
  np.testing.assert_allclose(along([0, 1]), mixed, rtol=3e-6)
  np.testing.assert_allclose(along([1, 0]), mixed, rtol=3e-6)


@pytest.mark.parametrize('p', [1.0, 1.2, 2.0, 3.0])
@pytest.mark.parametrize('eps', [0.0, 1e-8])
@pytest.mark.parametrize('traced', [False, True])
def test_derivatives_are_finite_from_one_on(p, eps, traced):
  # Up to where the result itself is finite.
  x = normals(4096)
  x = x[np.abs(x) < 1e12]
  x = np.concatenate([x, np.float32([0.0, -0.0, 1e-40, -1e-45, TINY, 1.0])])
  p_given = jnp.float32(p) if traced else p
  f = lambda x: signed_power(x, p_given, eps)
  assert np.all(np.isfinite(jax.vmap(jax.grad(f))(x)))
  _, tangent = jax.jvp(f, (x,), (np.ones_like(x),))
  assert np.all(np.isfinite(tangent))
  by_p = jax.vmap(jax.grad(signed_power, 1), (0, None, None))
  assert np.all(np.isfinite(by_p(x, jnp.float32(p), eps)))


@pytest.mark.parametrize('p', [0.3, 1.0, 1.2, 2.0])
@pytest.mark.parametrize('zero', [0.0, -0.0])
@pytest.mark.parametrize('traced', [False, True])
def test_derivatives_at_zero(p, zero, traced):
  p_given = jnp.float32(p) if traced else p
  f = lambda x: signed_power(x, p_given)
  expected = 1.0 if p == 1.0 else 0.0
  assert jax.grad(f)(zero) == expected
  assert jax.jacfwd(f)(zero) == expected
  assert jax.grad(jax.grad(f))(zero) == 0.0
  assert jax.grad(signed_power, 1)(jnp.float32(zero), jnp.float32(p)) == 0.0


@pytest.mark.parametrize(
  ('name', 'eps', 'traced'),
  [
    ('float32', 0.0, False),
    ('float32', 0.0, True),
    ('float32', 1e-3, False),
    ('bfloat16', 0.0, False),
    ('float16', 1e-3, True),
    ('float64', 0.0, False),
  ],
)
@pytest.mark.parametrize('p', [0.5, 1.0, 1.2, 3.0])
def test_ends_of_the_range(p, name, eps, traced):
  """The value and two derivatives are the limits; a NaN shows in each."""
  with enable_x64(name == 'float64'), np.errstate(all='ignore'):
    dtype = jnp.dtype(getattr(jnp, name))
    info = jnp.finfo(dtype)
    x = np.array([0, info.tiny, 0.5, info.max, np.inf, np.nan], np.float64)
    x = np.concatenate([x, -x]).astype(dtype)
    size = np.abs(x.astype(np.float64))
    p_given = jnp.float32(p) if traced else p
    f = lambda x: signed_power(x, p_given, eps)
    first, second = jax.grad(f), jax.grad(jax.grad(f))
    found = [f(x), jax.vmap(first)(x), jax.vmap(second)(x)]
    _, tangent = jax.jvp(f, (x,), (np.ones_like(x),))
    y, odd = size + eps, np.where(np.signbit(x), -1, 1)
    p = float(np.float32(p)) if traced else p
    exact = [odd * y**p, p * y ** (p - 1), odd * p * (p - 1) * y ** (p - 2)]
    exact[0][size == 0] = 0
    if p == 1:  # The identity, whose second derivative at NaN is 0 or NaN.
      exact[1][:] = 1
      exact[2][:] = 0
      found[2] = np.where(np.isnan(x), 0, found[2])
    if eps == 0:  # As documented.
      exact[1][size == 0] = p == 1
      exact[2][size == 0] = 0
    else:
      exact[2][size == 0] = np.nan  # A jump: not looked at.
    found.append(tangent)
    for actual, expected in zip(found, [*exact, exact[1]], strict=True):
      here = ~((size == 0) & np.isnan(expected))
      np.testing.assert_allclose(
        np.asarray(actual).astype(np.float64)[here],
        expected.astype(dtype).astype(np.float64)[here],
        rtol=4 * max(float(info.eps), 1e-6),
        atol=4 * float(info.tiny),
      )


def test_derivative_is_finite_where_only_the_result_overflows():
  x = jnp.float32(1e30)  # x^1.3 is infinite, its slope is not.
  for p in (1.3, jnp.float32(1.3)):
    y, slope = jax.jvp(lambda x, p=p: signed_power(x, p), (x,), (1.0,))
    assert y == jnp.inf
    np.testing.assert_allclose(slope, 1.3e9, rtol=1e-5)


def test_derivative_with_respect_to_eps():
  eps = 0.25
  slope = jax.grad(signed_power, 2)(jnp.float32(-0.75), 2.0, eps)
  np.testing.assert_allclose(slope, -2.0, rtol=1e-6)  # -d(|x| + eps)^2.


@pytest.mark.parametrize('name', ['bfloat16', 'float16'])
def test_derivative_in_narrow_dtypes(name):
  x = jnp.asarray([0.5, -2.0, 0.0], getattr(jnp, name))
  slope = jax.vmap(jax.grad(lambda x: signed_power(x, 1.5)))(x)
  assert slope.dtype == x.dtype
  expected = 1.5 * np.sqrt(np.abs(np.asarray(x, np.float32)))
  np.testing.assert_allclose(np.asarray(slope, np.float32), expected, rtol=0.01)
