r"""The signed power :math:`\varphi_p(x) = \mathrm{sign}(x)\,|x|^p`.

Two forms of one function: :func:`reference` is the formula as the paper prints
it (arXiv 2505.24275, Section 3), :func:`signed_power` the one that the
transform runs. The reference rounds p to the array's dtype and, in float32,
is several units in the last place off (60 at the ends of the range), while a
float32 ``pow`` makes an AdamW update on a CPU several times as long. The fast
form writes, with q = p - 1,

.. math:: \varphi_p(x) = x \cdot 2^{q \log_2 |x|},

so that sign, zeros, infinities and NaN come from the one multiplication by x,
and only a factor close to 1 (p is) has to be computed. The factor is a few
integer operations, two short polynomials and nothing that XLA counts as
expensive: it fuses into whatever reads the gradient.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# A power of x is split as |x| = 2^e m with m from sqrt(1/2) to sqrt(2). The
# coefficients, of log2(m) / (m - 1) about m = 1, are minimax fits (Lawson's
# algorithm, in double precision) on that interval;
# `tests/gradpower_optax/power_test.py` measures their error.
_SQRT_HALF = 0x3F3504F3  # As a float32's bits.
_LOG2_8 = (1.4426947724269723, -0.7213571489157123, 0.4809394449319664,
           -0.3600872161955019, 0.28670745272514864, -0.2500690356531648,
           0.23689039627590838, -0.14574451236110852)  # fmt: skip
_LOG2_9 = (1.4426948685559562, -0.7213471284676731, 0.48092252889816395,
           -0.36072119546753123, 0.28765667557629915, -0.2385194349259958,
           0.2173793762324445, -0.2103033550794631,
           0.12541246977803852)  # fmt: skip
# (2^f - 1) / f for |f| <= 0.5 and 0.6: each rounded to float32, the rest
# refitted.
_EXP2 = (0.6931471824645996, 0.24022647738456726, 0.05550359934568405,
         0.009618505835533142, 0.0013390807434916496,
         0.0001532647293061018)  # fmt: skip
_EXP2_NEAR = (0.6931472420692444, 0.24022641777992249, 0.05550253763794899,
              0.009618816897273064, 0.0013426459627225995,
              0.00015322172839660197)  # fmt: skip

# Up to this |p - 1| a degree 8 logarithm without compensation stays within two
# units in the last place; beyond it errors of the logarithm are magnified.
_NEAR_ONE = 0.2

_f32 = np.float32


def reference(x: jax.Array, p: Any, eps: float = 0.0) -> jax.Array:
  """The signed power as printed: ``sign(x) * (abs(x) + eps) ** p``.

  Args:
    x: Real floating array of any shape.
    p: The power.
    eps: Added to the magnitude.

  Returns:
    An array of x's shape and dtype. Exact to the dtype's ``pow``; give it
    float64 to judge a float32 result.
  """
  p = jnp.asarray(p, x.dtype)
  return jnp.sign(x) * (jnp.abs(x) + jnp.asarray(eps, x.dtype)) ** p


def signed_power(x: jax.Array, p: Any, eps: Any = 0.0) -> jax.Array:
  r"""Computes :math:`\mathrm{sign}(x)(|x| + \epsilon)^p` per element.

  In float32 and with eps = 0 the result is within 2 units in the last place for
  p up to 3, and within p / 3 + 1 for greater p, wherever input and result are
  normal numbers. Narrower dtypes are computed in float32 and rounded once;
  float64 uses the backend's ``pow`` (1.2 units at most, measured on a CPU).
  Subnormal float32 inputs and results are flushed to zero where the backend
  does so (XLA on a CPU), and are inaccurate where it does not.

  The derivative with respect to x is :math:`p|x|^{p-1}`; at x = 0 (with eps =
  0) it is 0, or 1 where p = 1, also for p < 1, where the true one is infinite.
  At infinity it is the limit, and at NaN it is NaN unless p = 1.
  The derivative with respect to p is :math:`\varphi_p(x)\log|x|`, 0 at 0.

  Args:
    x: Real floating array of any shape and sharding.
    p: A Python number, taken as the double that it is, or a scalar array,
      taken as the float32 (for a float64 x, the float64) value that it holds.
    eps: Added to the magnitude: a number or a scalar array, >= 0.

  Returns:
    An array of x's shape, dtype and sharding.
  """
  static_p = None
  if isinstance(p, (int, float)):
    static_p = float(p)  # np.float64 is a float; make equal powers one jit key.
  no_eps = isinstance(eps, (int, float)) and eps == 0
  if static_p == 1.0 and no_eps:
    return x
  return _signed_power(x, p, eps, static_p, not no_eps)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _signed_power(x, p, eps, static_p, has_eps):
  """Widens and narrows."""
  dtype = x.dtype if x.dtype == jnp.float64 else jnp.float32
  p = jnp.asarray(p, dtype)
  eps = jnp.asarray(eps, dtype)
  y = _phi(x.astype(dtype), p, eps, static_p, has_eps).astype(x.dtype)
  if static_p is None:
    y = _where_bits((p == 1) & (eps == 0), x, y)
  return y


@jax.custom_jvp
def _where_bits(condition, x, y):
  """Where condition x, to the bit, else y; its derivative is always y's."""
  # Selected as integers: compilers may widen a bfloat16 select to float32,
  # which loses subnormals and the payloads of NaNs.
  # XLA before jax 0.7 cannot bitcast four bits, and float4 has no NaN.
  if jnp.finfo(x.dtype).bits < 8:
    return jnp.where(condition, x, y)
  uint = f'uint{8 * x.dtype.itemsize}'
  x_bits = lax.bitcast_convert_type(x, uint)
  y_bits = lax.bitcast_convert_type(y, uint)
  bits = jnp.where(condition, x_bits, y_bits)
  return lax.bitcast_convert_type(bits, x.dtype)


@_where_bits.defjvp
def _where_bits_jvp(primals, tangents):
  # x is y where p is 1, but knows nothing of the derivative with respect to p.
  return _where_bits(*primals), tangents[2]


@functools.partial(jax.custom_jvp, nondiff_argnums=(3, 4))
def _phi(x, p, eps, static_p, has_eps):
  """The signed power of a float32 or float64 array; p as in `_times_power`."""
  if x.dtype == jnp.float64:
    # Not x |x|^(p - 1): where p < 0.5 the subtraction rounds.
    y = (jnp.abs(x) + eps) ** (p if static_p is None else static_p)
    return jnp.where(x == 0, _signed_zeros(x), jnp.copysign(y, x))
  if not has_eps:
    return _times_power(x, x, p, static_p)
  y = jnp.abs(x) + eps
  y = _times_power(y, y, p, static_p)
  return jnp.where(x == 0, _signed_zeros(x), jnp.copysign(y, x))


def _signed_zeros(x):
  """Not x itself: where subnormals count as zero, one would come through."""
  return jnp.copysign(jnp.zeros_like(x), x)


@functools.partial(_phi.defjvp, symbolic_zeros=True)
def _phi_jvp(static_p, has_eps, primals, tangents):
  x, p, eps = primals
  x_dot, p_dot, eps_dot = tangents
  out = _phi(x, p, eps, static_p, has_eps)
  y = jnp.abs(x) + eps
  at_zero = jnp.where(p == 1, jnp.ones_like(p), jnp.zeros_like(p))
  slope = jnp.where(y == 0, at_zero, p * _factor(y, p, static_p))
  log_y = jnp.log(jnp.where(y == 0, jnp.ones_like(y), y))
  sign = jnp.sign(x)
  return out, _sum_of_products(
    out, (slope, x_dot), (out * log_y, p_dot), (sign * slope, eps_dot)
  )


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _factor(x, p, static_p):
  """|x|^(p - 1), as a function that can itself be differentiated."""
  y = _times_power(jnp.ones_like(x), x, p, static_p)
  return jnp.where(jnp.isfinite(x), y, jnp.abs(x) ** (p - 1))


@functools.partial(_factor.defjvp, symbolic_zeros=True)
def _factor_jvp(static_p, primals, tangents):
  x, p = primals
  x_dot, p_dot = tangents
  out = _factor(x, p, static_p)
  less = None if static_p is None else static_p - 1.0
  is_zero = x == 0
  dx = jnp.sign(x) * (p - 1) * _factor(x, p - 1, less)
  dx = jnp.where(is_zero, jnp.zeros_like(x), dx)
  log = jnp.log(jnp.where(is_zero, jnp.ones_like(x), jnp.abs(x)))
  return out, _sum_of_products(out, (dx, x_dot), (out * log, p_dot))


def _sum_of_products(like, *pairs):
  """Sum of derivative times tangent over the arguments that have a tangent.

  Where a result overflows, a tangent of zeros would turn the sum into NaN.
  """
  total = jnp.zeros_like(like)
  for derivative, tangent in pairs:
    if not isinstance(tangent, jax.custom_derivatives.SymbolicZero):
      total = total + derivative * tangent
  return total


def _times_power(scale, x, p, static_p):
  """Computes scale |x|^(p - 1); both are float32, or float64, of one shape.

  static_p, where not None, is p in double precision; the scalar array p is
  then there for the derivatives alone.
  """
  if x.dtype == jnp.float64:
    q = p - 1 if static_p is None else static_p - 1.0
    # At x = 0 a p < 1 would give inf, and inf * 0 is NaN.
    return scale * jnp.where(x == 0, jnp.ones_like(x), jnp.abs(x)) ** q
  if static_p is None:
    return _times_exp2(scale, x, _split_traced(p), wide=True, far=True)
  q = static_p - 1.0
  near_one = abs(q) <= _NEAR_ONE
  split = _split_static(q, _LOG2_8 if near_one else _LOG2_9)
  # |log2 x| <= 128, and 2^n with |n| <= 126 is a normal number.
  far = abs(q) * 128 > 126
  return _times_exp2(scale, x, split, wide=not near_one, far=far)


def _head(value):
  """The leading 12 of a float32's 24 bits: products of two heads are exact."""
  if isinstance(value, float):
    bits = np.float32(value).view(np.int32) & np.int32(-4096)
    return float(bits.view(np.float32))
  return _float(_bits(value) & -4096)


def _split_static(q: float, log2):
  """The constants of `_times_exp2` for a q known at trace time."""
  q_head = _head(q)
  q_tail = q - q_head
  c = [q * c for c in log2]
  slope_head = _head(c[0])
  slope_tail = c[0] - slope_head
  return tuple(map(_f32, (q_head, q_tail, slope_head, slope_tail, *c)))


def _split_traced(p):
  """The same constants from a float32 scalar p, in float32 operations.

  Every head is made by masking bits, which no compiler simplifies away, so
  that each difference below is exact.
  """
  q = p - 1
  q_head = _head(q)
  q_tail = p - (1 + q_head)  # Where p < 0.5 the subtraction p - 1 rounded.
  c = [_f32(c) * q for c in _LOG2_9]
  log_head = _head(_LOG2_9[0])
  slope = q_head * _f32(log_head)
  slope_head = _head(slope)
  slope_tail = (slope - slope_head) + (
    q_head * _f32(_LOG2_9[0] - log_head) + q_tail * _f32(_LOG2_9[0])
  )
  return (q_head, q_tail, slope_head, slope_tail, *c)


def _times_exp2(scale, x, split, *, wide: bool, far: bool):
  """Computes scale 2^(q log2|x|) in float32, with q given by its constants.

  Args:
    scale: float32 array of x's shape.
    x: float32 array. Zeros count as 2^-127, inf as 2^128, subnormals and NaN
      as numbers of such a size: the factor stays finite.
    split: From `_split_static` or `_split_traced`.
    wide: Whether to carry the logarithm's leading term exactly; needed where
      |q| magnifies its rounding.
    far: Whether the factor may leave the range of normal numbers. It is then
      applied in two halves: the product may be normal all the same.

  Returns:
    A float32 array of x's shape.
  """
  q_head, q_tail, slope_head, slope_tail, *c = split
  bits = _bits(jnp.abs(x))
  e_bits = (bits - _SQRT_HALF) & -(2**23)
  e = e_bits.astype(jnp.float32)  # The exponent times 2^23.
  m = _float(bits - e_bits)
  r = m - 1  # Exact.
  a = e * (q_head * _f32(2**-23))  # Exact: 8 and 12 bits.
  b = e * (q_tail * _f32(2**-23))
  if wide:
    m_head = _head(m)
    r_head = m_head - 1
    exact = r_head * slope_head
    b = b + ((m - m_head) * c[0] + r_head * slope_tail)
    b = b + (r * r) * _polynomial(r, c[1:])
    n = lax.round(a + (exact + b), lax.RoundingMethod.TO_NEAREST_EVEN)
    f = ((a - n) + exact) + b
    exp2 = _EXP2
  else:
    # n without the logarithm of m, at most 0.1, so that it need not wait.
    n = lax.round(a, lax.RoundingMethod.TO_NEAREST_EVEN)
    f = (a - n) + (b + r * _polynomial(r, c))
    exp2 = _EXP2_NEAR
  if far:
    n = jnp.clip(n, -252, 252)
    half = lax.round(n * _f32(0.5), lax.RoundingMethod.TO_NEAREST_EVEN)
    scale = scale * _float(_shifted(half) + 0x3F800000)
    n = n - half
    f = jnp.clip(f, -1, 1)  # A p in the thousands leaves no digits to f.
  mantissa = 1 + f * _horner(f, tuple(map(_f32, exp2)))
  return scale * _float(_bits(mantissa) + _shifted(n))


def _bits(x):
  return lax.bitcast_convert_type(x, jnp.int32)


def _float(bits):
  return lax.bitcast_convert_type(bits, jnp.float32)


def _shifted(n):
  """An integral float32 as an int32 in the place of the exponent's bits."""
  # 1.5 * 2^23 leaves n in the lowest bits of the sum; a conversion would
  # saturate, which costs five instructions more. (Rounding by the same
  # addition would save one, but some XLA versions fold (t + c) - c to t.)
  return _bits(n + _f32(1.5 * 2**23)) << 23


def _horner(x, coefficients):
  """Sum of coefficients[i] x^i: fewest roundings."""
  y = coefficients[-1]
  for c in coefficients[-2::-1]:
    y = y * x + c
  return y


def _polynomial(x, coefficients):
  """The same by Estrin's scheme: independent products fill the pipeline."""
  terms = list(coefficients)
  while len(terms) > 1:
    pairs = [a + x * b for a, b in zip(terms[::2], terms[1::2], strict=False)]
    terms = pairs + terms[len(terms) - len(terms) % 2 :]
    x = x * x
  return terms[0]
