"""The paper's toy problems: closed forms, simulation, fitted rates."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gradpower_optax import theory


@pytest.mark.parametrize('noise, power', [
  (2, 0.92), (3, 1.05), (5, 1.14), (10, 1.22), (30, 1.35), (100, 1.53),
  (1000, 2.03),
])  # fmt: skip
def test_best_powers_of_the_example(noise, power):
  assert theory.best_power(noise) == pytest.approx(power, abs=1e-9)


@pytest.mark.parametrize('eps, power', [(1e-10, 1.59), (1e-12, 1.96)])
def test_best_power_grows_as_eps_falls(eps, power):
  assert theory.best_power(10, eps=eps) == pytest.approx(power, abs=0.011)


@given(p=st.floats(0.3, 3), noise=st.floats(0.01, 300))
def test_uniform_moments_are_the_integrals(p, noise):
  nodes, weights = np.polynomial.legendre.leggauss(60)
  edges = [1 - noise, 1 + noise] if noise < 1 else [1 - noise, 0, 1 + noise]
  moments = np.zeros(2)
  for low, high in itertools.pairwise(edges):
    g = (low + high) / 2 + (high - low) / 2 * nodes
    phi = np.sign(g) * np.abs(g) ** p
    moments += (high - low) / 2 * np.array([weights @ phi, weights @ phi**2])
  found = theory.moments(p, noise)
  scale = np.sqrt(found[1])
  np.testing.assert_allclose(
    found[0], moments[0] / (2 * noise), atol=1e-4 * scale
  )
  np.testing.assert_allclose(found[1], moments[1] / (2 * noise), rtol=1e-4)


@pytest.mark.parametrize('kind, drifts', [
  ('uniform', (0.931, 1.065)),
  ('gaussian', (0.995, 0.996)),
  ('laplace', (1.102, 0.902)),
])  # fmt: skip
def test_drift_at_high_noise(kind, drifts):
  noise = 100 * (3**0.5 if kind == 'uniform' else 1)
  ratios = theory.long_time_ratio(
    [0.8, 1, 1.2], noise, mean=1.0, eps=0.0, kind=kind
  )
  np.testing.assert_allclose(ratios[::2] / ratios[1], drifts, atol=6e-4)


@pytest.mark.parametrize('kind', ['gaussian', 'laplace'])
@pytest.mark.parametrize('noise', [0.3, 2, 50])
def test_quadrature_at_p_1_is_exact(kind, noise):
  first, second = theory.moments(1.0, noise, kind)
  assert first == pytest.approx(1, rel=1e-5)
  assert second == pytest.approx(1 + noise**2, rel=1e-5)


def test_a_sample_is_its_own_distribution():
  sample = np.linspace(-1, 1, 20_001)
  powers = np.array([0.7, 1.0, 1.3])
  np.testing.assert_allclose(
    theory.long_time_ratio(powers, 3.0, kind=sample),
    theory.long_time_ratio(powers, 3.0),
    rtol=1e-3,
  )


def test_shapes_broadcast():
  ratios = theory.long_time_ratio(np.ones((4, 1)), np.ones(3) * 2)
  assert ratios.shape == (4, 3)


@pytest.mark.parametrize('noise', [30, 100, 1000])
def test_the_best_power_is_within_the_papers_bounds(noise):
  low, high = theory.power_bounds(noise * 1e-6)
  assert low < theory.best_power(noise) < high


def adam(gradients, p, eps, b1=0.9, b2=0.95):
  """Adam's updates of one parameter, step by step, in double precision."""
  m = v = 0.0
  updates = []
  for t, g in enumerate(gradients, 1):
    phi = np.sign(g) * np.abs(g) ** p
    m, v = b1 * m + (1 - b1) * phi, b2 * v + (1 - b2) * phi**2
    updates.append(m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps))
  return np.array(updates)


@pytest.mark.parametrize('kind', ['uniform', np.array([-1.0, 0.5, 0.5])])
def test_simulation_is_adam_step_by_step(kind, monkeypatch):
  """With the draws that it takes."""
  key, powers, noises = jax.random.key(0), [0.8, 1.2, 2.0], [0.5, 10.0]
  drawn = []
  take = (
    jax.random.choice if isinstance(kind, np.ndarray) else theory._DRAWS[kind]
  )

  def choose(key, *arguments):
    x = take(key, *arguments)
    jax.debug.callback(lambda x: drawn.append(np.array(x)), x, ordered=True)
    return x

  monkeypatch.setitem(theory._DRAWS, 'uniform', choose)
  if isinstance(kind, np.ndarray):
    monkeypatch.setattr(jax.random, 'choice', choose)
  found = theory.simulate(key, powers, noises, steps=10_000, kind=kind)
  jax.effects_barrier()
  x = np.concatenate(drawn).astype(np.float64)
  assert x.size == 10_000
  assert found.last.shape == found.mean.shape == found.error.shape == (2, 3)
  for i, noise in enumerate(noises):
    for j, p in enumerate(powers):
      updates = adam(1e-6 * (1 + noise * x), p, 1e-8)
      np.testing.assert_allclose(
        found.last[i, j], updates[-1], rtol=1e-3, atol=1e-6
      )
      np.testing.assert_allclose(
        found.mean[i, j], updates.mean(), rtol=1e-3, atol=1e-6
      )


def test_simulation_agrees_with_the_closed_form():
  """At low noise: at high the average of a ratio is not that of averages."""
  found = theory.simulate(jax.random.key(1), [0.8, 1.2], [0.5], steps=50_000)
  expected = theory.long_time_ratio([0.8, 1.2], 0.5)
  np.testing.assert_allclose(found.mean[0], expected, rtol=5e-3)
  assert (found.error > 0).all()


@pytest.mark.slow
def test_figure_7():
  """A million steps: averages peak where the closed form does."""
  powers = np.arange(0.6, 2.4, 0.1)
  noises = [2.0, 10.0, 30.0, 100.0]
  found = theory.simulate(jax.random.key(0), powers, noises)
  for noise, mean, error in zip(noises, found.mean, found.error, strict=True):
    ratios = theory.long_time_ratio(powers, noise)
    assert abs(powers[mean.argmax()] - powers[ratios.argmax()]) < 0.11
    assert (np.abs(mean - ratios) < 0.06 * ratios + 4 * error).all()


def test_adagrad_is_that_of_the_paper():
  found = theory.adagrad_power_gaps(
    jax.random.key(0), [0.5, 1.0], relative_noise=0.0, steps=400, repeats=2
  )
  np.testing.assert_array_equal(found.steps, [100, 200, 400])
  for i, p in enumerate([0.5, 1.0]):
    theta, v, total, gaps = 1.0, 0.0, 0.0, {}
    for t in range(1, 401):
      phi = np.sign(theta) * np.abs(theta**3) ** p
      v += phi**2
      theta -= 0.1 * phi / np.sqrt(v + 1e-8)
      total += theta
      gaps[t] = theta**4 / 4, (total / t) ** 4 / 4
    expected = np.array([gaps[t] for t in found.steps])
    np.testing.assert_allclose(found.last[i, 0], expected[:, 0], rtol=1e-3)
    np.testing.assert_allclose(found.averaged[i, 1], expected[:, 1], rtol=1e-3)


def test_rates_of_adagrad_at_low_noise():
  """Those of theta' = -theta^(3p): T^(-4 / (3p - 1)), above theory's bound."""
  powers = [0.8, 1.0, 1.2]
  found = theory.adagrad_power_gaps(jax.random.key(0), powers, steps=6400)
  for p, gaps in zip(powers, found.last, strict=True):
    rate, error = theory.fitted_rate(found.steps, gaps)
    assert rate == pytest.approx(4 / (3 * p - 1), rel=0.06)
    assert 0 < error < 0.02
    assert rate > 1 / (p + 1)


def test_fitted_rate_and_its_error():
  steps = np.array([100, 200, 400, 800])
  gaps = np.stack([steps**-0.5, 3.0 * steps**-0.7])
  rate, error = theory.fitted_rate(steps, gaps)
  assert rate == pytest.approx(0.6)
  assert error == pytest.approx(0.1)


@pytest.mark.parametrize('p, noise, kind, words', [
  (0, 1, 'uniform', 'p and noise must be positive'),
  (1, -1, 'gaussian', 'p and noise must be positive'),
  (1, 1, 'cauchy', "noise is uniform, gaussian, laplace, not 'cauchy'"),
])  # fmt: skip
def test_says_what_is_wrong(p, noise, kind, words):
  with pytest.raises(ValueError, match=words):
    theory.moments(p, noise, kind)


def test_says_how_many_steps_there_may_be():
  for steps in (0, 123):
    with pytest.raises(ValueError, match='no multiple of 10,000'):
      theory.simulate(jax.random.key(0), [1], [1], steps=steps)
