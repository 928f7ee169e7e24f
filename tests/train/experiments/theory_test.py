"""The paper's toy problems: integrals, simulation, fitted rates."""

import jax
import mpmath
import numpy as np
import pytest

from train.experiments import theory

NAN, INF = float('nan'), float('inf')


@pytest.mark.parametrize('noise, power', [
  (2, 0.92), (3, 1.05), (5, 1.14), (10, 1.22), (30, 1.35), (100, 1.53),
  (1000, 2.03),
])  # fmt: skip
def test_best_powers_of_the_example(noise, power):
  best = theory.best_power(noise, 0.05, 4)
  assert best == pytest.approx(power, abs=0.005)


@pytest.mark.parametrize('eps, power', [(1e-10, 1.59), (1e-12, 1.96)])
def test_best_power_grows_as_eps_falls(eps, power):
  best = theory.best_power(10, 0.05, 4, eps=eps)
  assert best == pytest.approx(power, abs=0.011)


def test_the_best_power_is_not_the_end_of_those_tried():
  assert theory.best_power(0.5, 0.1, 4) is None  # Less may be better still.
  assert theory.best_power(10, 0.1, 1.2) is None
  assert theory.best_power(10, 1.23, 4) is None
  found = [theory.best_power(10, *ends) for ends in ((0.1, 1.23), (1.2, 30))]
  np.testing.assert_allclose(found, 1.2201, atol=1e-3)


def exact(p, noise, kind):
  """Closed forms of both moments, in 60 digits."""
  with mpmath.workdps(60):
    s, q, half = mpmath.mpf(noise), 2 * mpmath.mpf(p), mpmath.mpf(1) / 2
    p = q / 2
    if kind == 'uniform':
      first = (1 + s) ** (p + 1) - abs(1 - s) ** (p + 1)
      second = (1 + s) ** (q + 1) - mpmath.sign(1 - s) * abs(1 - s) ** (q + 1)
      return first / (2 * s * (p + 1)), second / (2 * s * (q + 1))
    if kind == 'gaussian':
      # Winkelbauer, arXiv 1209.4340, 2012.
      z, root = -half / s**2, mpmath.sqrt(mpmath.pi)
      first = s ** (p - 1) * 2 ** ((p + 1) / 2) * mpmath.gamma(p / 2 + 1)
      second = s**q * 2**p * mpmath.gamma((q + 1) / 2)
      first *= mpmath.hyp1f1((1 - p) / 2, 3 * half, z) / root
      return first, second * mpmath.hyp1f1(-p, half, z) / root
    b = s / mpmath.sqrt(2)
    # The parts of g < 0, of 0 < g < 1 and of g > 1.
    parts = lambda q: (
      mpmath.exp(-1 / b) * b**q * mpmath.gamma(q + 1) / 2,
      mpmath.hyp1f1(1, q + 2, -1 / b) / ((q + 1) * 2 * b),
      mpmath.hyperu(1, q + 2, 1 / b) / (2 * b),
    )
    below, between, above = parts(p)
    return between + above - below, sum(parts(q))


@pytest.mark.parametrize('kind', ['uniform', 'gaussian', 'laplace'])
def test_moments_are_the_integrals(kind):
  powers = np.array([0.1, 0.7, 1.0, 1.2, 5.0])
  noises = np.array([1e-9, 1e-6, 1e-3, 0.3, 1, 1.5, 30, 1e3, 1e6, 1e9])
  found = theory.moments(powers, noises[:, None], kind)
  expected = [
    [exact(p, noise, kind) for p in powers.tolist()]
    for noise in noises.tolist()
  ]
  expected = np.moveaxis(np.float64(expected), -1, 0)
  np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_the_ratio_is_at_most_1():
  """Steps of one sign and size, but for eps: 1 / (1 + eps / mean^p)."""
  ratios = theory.long_time_ratio(1.2, [1e-3, 1e-6], kind='laplace')
  np.testing.assert_allclose(ratios, 1 / (1 + 10**-0.8), rtol=1e-6)


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


def test_shapes_broadcast():
  ratios = theory.long_time_ratio(np.ones((4, 1)), np.ones(3) * 2)
  assert ratios.shape == (4, 3)


@pytest.mark.parametrize('noise', [30, 100, 1000])
def test_the_best_power_is_within_the_papers_bounds(noise):
  low, high = theory.power_bounds(noise * 1e-6)
  assert low < theory.best_power(noise, 0.5, 3) < high


def adam(gradients, p, eps, b1=0.9, b2=0.95):
  """Adam's updates of one parameter, step by step, in double precision."""
  m = v = 0.0
  updates = []
  for t, g in enumerate(gradients, 1):
    phi = np.sign(g) * np.abs(g) ** p
    m, v = b1 * m + (1 - b1) * phi, b2 * v + (1 - b2) * phi**2
    updates.append(m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps))
  return np.array(updates)


def test_simulation_is_adam_step_by_step(monkeypatch):
  """With the draws that it takes."""
  key, powers, noises = jax.random.key(0), [0.8, 1.2, 2.0], [0.5, 10.0]
  drawn = []
  take = theory._uniform

  def choose(*arguments):
    x = take(*arguments)
    jax.debug.callback(lambda x: drawn.append(np.array(x)), x, ordered=True)
    return x

  monkeypatch.setattr(theory, '_uniform', choose)
  found = theory.simulate(key, powers, noises, steps=10_000)
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


def test_says_what_is_wrong():
  nonsense = 0, -1, NAN, INF, [], [1, NAN], None, 'x'
  key, rate = jax.random.key(0), theory.fitted_rate
  cases = [
    (call, 'must be positive and finite')
    for x in nonsense
    for call in (
      lambda x=x: theory.moments(x, 1),
      lambda x=x: theory.moments(1, x, 'gaussian'),
      lambda x=x: theory.long_time_ratio(1, 1, mean=x),
      lambda x=x: theory.best_power(x, 1, 2),
      lambda x=x: theory.simulate(key, x, [1]),
      lambda x=x: theory.simulate(key, [1], x),
      lambda x=x: theory.simulate(key, [1], [1], mean=x),
      lambda x=x: theory.adagrad_power_gaps(key, x),
      lambda x=x: rate(x, np.ones((2, 2))),
      lambda x=x: rate([1, 2], x),
    )
  ]
  cases += [
    (call, 'must be a positive')
    for x in (0, -1, 10_001.0, NAN, True)
    for call in (
      lambda x=x: theory.simulate(key, [1], [1], steps=x),
      lambda x=x: theory.adagrad_power_gaps(key, [1], steps=x),
      lambda x=x: theory.adagrad_power_gaps(key, [1], repeats=x),
    )
  ]
  cases += [
    (lambda of={name: x}: theory.adagrad_power_gaps(key, [1], **of),
     f'must be at least {int(name == "exponent")}')
    for name in ('exponent', 'relative_noise', 'noise')
    for x in (-1, NAN, INF)
  ]  # fmt: skip
  cases += [
    (lambda x=x: theory.long_time_ratio(1, 1, eps=x), 'must be at least 0')
    for x in (-1, NAN, INF, [])
  ]
  cases += [
    (lambda of=of: theory.power_bounds(*of), 'there are bounds where')
    for of in [(0,), (1,), (-1,), (NAN,), (INF,), (0.1, 0), (0.1, NAN),
               (0.1, 1)]
  ]  # fmt: skip
  cases += [
    (lambda of=of: rate(*of), 'a rate takes gaps of 2 repeats or more')
    for of in [([1], [[1], [1]]), ([1, 1], np.ones((2, 2))),
               ([1, 2], [[1, 2]]), ([1, 2], np.ones((2, 3)))]
  ]  # fmt: skip
  cases += [
    (lambda: theory.simulate(key, [1], [1], steps=123), 'multiple of 10,000'),
    (lambda: theory.simulate(key, 1, [1]), 'powers must have rank 1, not 0'),
    (lambda: theory.adagrad_power_gaps(key, 1), 'powers must have rank 1'),
    (lambda: rate([1, 2], [1, 2]), 'gaps must have rank 2, not 1'),
    (lambda: theory.best_power([1, 2], 1, 2), 'noise must have rank 0'),
    (lambda: theory.moments(1, 1, 'cauchy'),
     "noise is uniform, gaussian, laplace, not 'cauchy'"),
    (lambda: theory.best_power(1, 2, 2), 'no powers lie between 2 and 2'),
    (lambda: theory.best_power(1, NAN, 2), 'no powers lie between nan and'),
    (lambda: theory.best_power(1, -1, 2), 'must be positive'),
    (lambda: theory.moments(300, 1e9), 'at p = 300, noise = 1e.09 does not'),
  ]  # fmt: skip
  for call, words in cases:
    with pytest.raises(ValueError, match=words) as raised:
      call()
    assert '\n' not in str(raised.value)
