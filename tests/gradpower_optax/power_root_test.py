"""Powers of 1 + 1/n: on a CPU, by one step from a guess of the root."""

import fractions

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from gradpower_optax import power

ROOTS = [n for n in range(-6, 7) if abs(n) >= 2]
TINY, MAX = 2.0**-126, float(np.finfo(np.float32).max)


def worst_ulp(p):
  """Of signed_power on a log-uniform sample of normal numbers."""
  rng = np.random.default_rng(0)
  x = 2.0 ** rng.uniform(-126, 128, 2**18)
  x = x.astype(np.float32)
  exact = x.astype(np.longdouble) ** np.longdouble(p)
  normal = (exact >= TINY) & (exact <= MAX)
  # A new function, so that nothing compiled before is found.
  y = np.asarray(jax.jit(lambda x: power.signed_power(x, p))(x), np.longdouble)
  unit = np.spacing(exact[normal].astype(np.float32)).astype(np.longdouble)
  return np.max(np.abs(y[normal] - exact[normal]) / unit)


@pytest.mark.parametrize('n', ROOTS)
def test_error_of_every_root(n):
  assert 1 < worst_ulp(1 + 1 / n) <= 2


@pytest.mark.parametrize('p', [0.8, 1.2, 1.5])
def test_error_where_there_is_no_root(p, monkeypatch):
  """What a GPU and a TPU run."""
  monkeypatch.setattr(power, '_whole_inverse', lambda q: None)
  power._signed_power.clear_cache()
  assert 1 < worst_ulp(p) <= 2
  power._signed_power.clear_cache()


@pytest.mark.parametrize('n', ROOTS)
def test_error_of_the_polynomial(n):
  s = 1 / n - 1 if n > 0 else 1 / n
  # log2(1 + m) - m is at most 0.0861, once for x and |n| times for the guess.
  reach = 2 ** (0.0861 / 2 * (abs(n) + 1))
  h = np.linspace(1 / reach - 1, reach - 1, 20_001)
  found = np.polynomial.polynomial.polyval(h, power._root_polynomial(n))
  error = np.abs((1 + h * found) / (1 + h) ** s - 1)
  assert error.max() < 1e-8


def test_which_powers_are_roots():
  assert power._whole_inverse(1.2 - 1) == 5
  assert power._whole_inverse(0.8 - 1) == -5
  assert power._whole_inverse(0.5 - 1) == -2
  assert power._whole_inverse(1 + 1 / 3 - 1) == 3
  for p in (1.0, 1.1, 1.3, 2.0, 0.0, 3.0, float(np.float32(1.2)), 1.19, 5e-324):
    assert power._whole_inverse(p - 1) is None


def test_whole_powers():
  for n in range(1, 12):
    x = jnp.float32(1.5)
    assert power._whole_power(x, n) == float(fractions.Fraction(3, 2) ** n)


def roundings(platform, shape):
  """How many the program has; a root has none."""
  x = jax.ShapeDtypeStruct(shape, jnp.float32)
  traced = jax.jit(lambda x: power.signed_power(x, 1.2)).trace(x)
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  return text.count('stablehlo.round_nearest_even')


@pytest.mark.parametrize('platform', ['cuda', 'tpu'])
def test_elsewhere_the_program_has_no_root(platform):
  assert roundings(platform, (4096,)) == 1


@pytest.mark.parametrize(
  ('shape', 'expected'),
  [((4096,), 0), ((256, 16), 0), ((4095,), 1), ((1000, 8), 1), ((), 1)],
)
def test_small_and_narrow_arrays_have_none(shape, expected):
  assert roundings('cpu', shape) == expected


def test_a_batch_and_a_loop_of_roots():
  x = jnp.linspace(-2, 2, 3 * 4096).reshape(3, 4096)
  expected = power.signed_power(x, 1.2)
  batched = jax.vmap(lambda row: power.signed_power(row, 1.2))(x)
  mapped = lax.map(lambda row: power.signed_power(row, 1.2), x)
  np.testing.assert_array_max_ulp(batched, expected, 2)
  np.testing.assert_array_max_ulp(mapped, expected, 2)


@pytest.mark.parametrize('shape', [(64, 64), (1000, 17), (31, 4, 33)])
def test_an_element_does_not_depend_on_its_place(shape):
  x = jax.random.normal(jax.random.key(0), shape)
  phi = jax.jit(lambda x: power.signed_power(x, 1.2))
  order = np.random.default_rng(0).permutation(len(x))
  np.testing.assert_array_equal(phi(x[order]), phi(x)[order])
  np.testing.assert_array_equal(phi(x.ravel()), phi(x).ravel())
