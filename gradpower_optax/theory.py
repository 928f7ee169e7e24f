r"""The paper's toy problems, in closed form and by simulation.

Example 4.1 has one parameter whose gradients are independent, of mean
:math:`\mu > 0` with noise about it, and asks for which power Adam's update

.. math:: u_t = \frac{\hat m_t}{\sqrt{\hat v_t} + \epsilon}

of their powers is greatest. In the long run it varies about, but does not
average to, :func:`long_time_ratio`; :func:`simulate` tells both. Noise is
:math:`g = \mu\,(1 + \text{noise} \cdot x)`, where x is

- 'uniform' in (-1, 1), as in the paper, whose sigma is half the width;
- 'gaussian' or 'laplace', of standard deviation 1;
- or drawn from a sample: an array of values, of measured noise say.

Section 4.2 has Adagrad with the power on a convex problem:
:func:`adagrad_power_gaps`.

References:
  Wang et al, `GradPower: Powering Gradients for Faster Language Model
  Pre-Training <https://arxiv.org/abs/2505.24275>`_, 2025, Section 4
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from gradpower_optax.sign_power import sign_power

Kind: TypeAlias = Literal['uniform', 'gaussian', 'laplace'] | np.ndarray

_DENSITIES = {
  'gaussian': lambda x: np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi),
  'laplace': lambda x: np.exp(-np.sqrt(2) * np.abs(x)) / np.sqrt(2),
}
_DRAWS: dict[str, Any] = {
  'uniform': functools.partial(jax.random.uniform, minval=-1),
  'gaussian': jax.random.normal,
  'laplace': lambda key, shape: jax.random.laplace(key, shape) / np.sqrt(2),
}
# Nodes, in logarithms of |g / mu|, of integrals over a density.
_LOGS = np.linspace(-40, 25, 32_501)
_BATCHES = 100  # Of a simulation's steps, that its error is told by.


def moments(
  p: ArrayLike, noise: ArrayLike, kind: Kind = 'uniform'
) -> tuple[np.ndarray, np.ndarray]:
  r"""First two moments of the powered gradient, in units of its mean's power.

  Args:
    p: Powers, positive, of any shape.
    noise: Noise over the mean, positive, of a shape that goes with p's.
    kind: Of the noise; see the module.

  Returns:
    :math:`E \varphi_p(g / \mu)` and :math:`E \varphi_p(g / \mu)^2` in float64:
    exact for uniform noise and a sample, by quadrature to 6 digits otherwise.

  Raises:
    ValueError: p or noise is not positive, or kind is unknown.
  """
  p, noise = np.broadcast_arrays(np.asarray(p, float), noise)
  if not ((p > 0) & (noise > 0)).all():
    raise ValueError(f'theory: p and noise must be positive, not {p}, {noise}')
  _check(kind)
  if isinstance(kind, str) and kind == 'uniform':
    low, high = 1 - noise, 1 + noise
    first = (high ** (p + 1) - np.abs(low) ** (p + 1)) / (p + 1)
    second = high ** (2 * p + 1) - np.sign(low) * np.abs(low) ** (2 * p + 1)
    return first / (2 * noise), second / (2 * noise * (2 * p + 1))
  p, noise = p[..., None], noise[..., None]
  if not isinstance(kind, str):
    g = 1 + noise * np.ravel(kind)
    size, plus, minus = np.abs(g), g > 0, g < 0
    weight = 1 / g.shape[-1]
  else:
    size = np.exp(_LOGS)
    plus, minus = (_DENSITIES[kind]((x - 1) / noise) for x in (size, -size))
    weight = size * (_LOGS[1] - _LOGS[0]) / noise
  first = np.sum(weight * size**p * (plus * 1.0 - minus), -1)
  return first, np.sum(weight * size ** (2 * p) * (plus * 1.0 + minus), -1)


def _check(kind):
  if isinstance(kind, str) and kind not in _DRAWS:
    raise ValueError(f'theory: noise is {", ".join(_DRAWS)}, not {kind!r}')


def long_time_ratio(
  p: ArrayLike,
  noise: ArrayLike,
  *,
  mean: float = 1e-6,
  eps: float = 1e-8,
  kind: Kind = 'uniform',
) -> np.ndarray:
  r"""What Adam's update is where its averages are over infinitely many steps.

  .. math:: E \varphi_p(g) \,/\, (\sqrt{E \varphi_p(g)^2} + \epsilon)

  Args:
    p: As in :func:`moments`.
    noise: Likewise.
    mean: Of the gradients, mu, positive.
    eps: Adam's.
    kind: As in :func:`moments`.

  Returns:
    The ratio, of the shape of p and noise together, in float64.

  Examples:
    >>> from gradpower_optax import theory
    >>> print(theory.long_time_ratio([1.0, 1.2], noise=10).round(4))
    [0.1704 0.1776]
  """
  first, second = moments(p, noise, kind)
  return first / (np.sqrt(second) + eps / np.float64(mean) ** p)


def best_power(
  noise: float,
  *,
  mean: float = 1e-6,
  eps: float = 1e-8,
  kind: Kind = 'uniform',
  powers: ArrayLike | None = None,
) -> float:
  """The power of the greatest long-time ratio.

  Args:
    noise: As in :func:`moments`, a number.
    mean: As in :func:`long_time_ratio`.
    eps: Likewise.
    kind: Likewise.
    powers: Where to look; None for 0.05, 0.06 and so on to 4.

  Returns:
    The best of the powers. At noise below 1 that is the least one: no sign
    changes, and the less power, the less does the size.

  Examples:
    >>> from gradpower_optax import theory
    >>> print(*(f'{theory.best_power(x):.2f}' for x in (2, 5, 10, 100)))
    0.92 1.14 1.22 1.53
  """
  grid = np.arange(5, 401) / 100 if powers is None else np.asarray(powers)
  ratios = long_time_ratio(grid, noise, mean=mean, eps=eps, kind=kind)
  return float(grid[np.argmax(ratios)])


def power_bounds(sigma: float, eps: float = 1e-8) -> tuple[float, float]:
  """The paper's bounds of the best power, for sigma far above the mean.

  Args:
    sigma: Half the width of uniform noise, far below 1, not over the mean.
    eps: Adam's, small enough that ``eps * log(1 / sigma) < 1``.

  Returns:
    The lower and the upper one.

  Examples:
    >>> from gradpower_optax import theory
    >>> low, high = theory.power_bounds(1e-4)
    >>> print(f'{low:.2f} < {theory.best_power(100):.2f} < {high:.2f}')
    1.33 < 1.53 < 1.76
  """
  above = np.log(eps * np.log(1 / sigma))
  return float(above / (np.log(sigma) - 3)), float(above / np.log(sigma))


class Simulation(NamedTuple):
  """What :func:`simulate` returns: float64 arrays, a row for each noise.

  Attributes:
    last: Adam's update at the last step, one draw of a random number.
    mean: Its average over all steps.
    error: Standard error of the average, from those of 100 stretches.
  """

  last: np.ndarray
  mean: np.ndarray
  error: np.ndarray


def simulate(
  key: jax.Array,
  powers: Sequence[float],
  noises: Sequence[float],
  *,
  mean: float = 1e-6,
  eps: float = 1e-8,
  b1: float = 0.9,
  b2: float = 0.95,
  steps: int = 1_000_000,
  kind: Kind = 'uniform',
) -> Simulation:
  """Runs Adam's averages on Example 4.1, for all powers and noises at once.

  They share their draws. All is in units of the gradients' size, so that
  float32 holds it.

  Args:
    key: Of the gradients' draws.
    powers: P powers.
    noises: N noises over the mean.
    mean: Of the gradients.
    eps: Adam's; b1 and b2 too.
    b1: Decay of the first moment, below 1.
    b2: Decay of the second.
    steps: A multiple of 10,000: the paper's Fig. 7 reads step 1,000,000.
    kind: Of the noise, as in :func:`moments`.

  Returns:
    A :class:`Simulation` with arrays of shape [N, P].

  Raises:
    ValueError: steps is no multiple of 10,000, or kind is unknown.
  """
  _check(kind)
  chunk = 100
  if steps < 1 or steps % (chunk * _BATCHES):
    raise ValueError(f'theory: steps is {steps}, no multiple of 10,000')
  if isinstance(kind, str):
    draw = _DRAWS[kind]
  else:
    draw = lambda key, shape: jax.random.choice(key, np.ravel(kind), shape)
  noise_N, power_P = (np.asarray(x, np.float64) for x in (noises, powers))
  unit_N = np.maximum(noise_N, 1)  # Gradients are over this times the mean.
  eps_P1N = eps / (mean * unit_N) ** power_P[:, None, None]
  at = np.arange(chunk)

  def average(decay):
    """Of a chunk: as a product with a triangle, and what is left of before."""
    triangle = np.tril((1 - decay) * decay ** np.abs(at[:, None] - at))
    left_C1 = decay ** (at[:, None] + 1.0)

    def apply(before_PN, x_PCN, start):
      new = jnp.einsum('ij,pjn->pin', triangle, x_PCN, precision='highest')
      new += left_C1 * before_PN[:, None]
      return new, new / (1 - decay ** (start + 1.0 + at[:, None]))

    return apply

  first, second = average(b1), average(b2)

  def body(carry, start):
    m_PN, v_PN = carry
    x_C = draw(jax.random.fold_in(key, start), (chunk,))
    g_CN = ((1 + noise_N * x_C[:, None]) / unit_N).astype(jnp.float32)
    phi_PCN = _powers_of(g_CN, power_P)
    m_PCN, m_hat = first(m_PN, phi_PCN, start)
    v_PCN, v_hat = second(v_PN, phi_PCN**2, start)
    u_PCN = m_hat / (jnp.sqrt(v_hat) + eps_P1N)
    return (m_PCN[:, -1], v_PCN[:, -1]), (u_PCN.mean(1), u_PCN[:, -1])

  zeros = jnp.zeros((power_P.size, noise_N.size))
  starts = jnp.arange(0, steps, chunk)
  run = jax.jit(lambda: jax.lax.scan(body, (zeros, zeros), starts)[1])
  means, lasts = (np.swapaxes(np.float64(x), 1, 2) for x in run())
  stretches = means.reshape(_BATCHES, -1, *means.shape[1:]).mean(1)
  error = stretches.std(0, ddof=1) / np.sqrt(_BATCHES)
  return Simulation(lasts[-1], means.mean(0), error)


def _powers_of(g, powers):
  """Powers of g, along a new first axis."""
  phi = lambda p: sign_power(p).update(g, ())[0]
  return jax.vmap(phi)(jnp.asarray(powers, jnp.float32))


class Gaps(NamedTuple):
  """What :func:`adagrad_power_gaps` returns.

  Attributes:
    steps: Where the gaps were taken, T, of shape [K].
    last: Objective minus its minimum at the iterate, shape [P, R, K].
    averaged: The same at the average of all iterates.
  """

  steps: np.ndarray
  last: np.ndarray
  averaged: np.ndarray


def adagrad_power_gaps(
  key: jax.Array,
  powers: Sequence[float],
  *,
  exponent: float = 4.0,
  relative_noise: float = 0.1,
  noise: float = 0.0,
  learning_rate: float = 0.1,
  eps: float = 1e-8,
  steps: int = 10_000,
  repeats: int = 8,
) -> Gaps:
  r"""Runs AdagradPower on a stochastic convex problem of one parameter.

  The objective is :math:`f(\theta) = |\theta|^a / a`, from
  :math:`\theta_0 = 1`, and

  .. math::

    g_t &= f'(\theta_t) (1 + \rho x_t) + \sigma y_t \\
    v_t &= v_{t-1} + \varphi_p(g_t)^2 \\
    \theta_{t+1} &= \theta_t - \eta \varphi_p(g_t) / \sqrt{v_t + \epsilon}

  with x and y uniform in (-1, 1). With sigma = 0 and rho < 1 noise never turns
  a gradient's sign: the low noise of the theory.

  Args:
    key: Of the draws, which powers share and repeats do not.
    powers: P powers.
    exponent: a, at least 1.
    relative_noise: rho.
    noise: sigma.
    learning_rate: eta.
    eps: Inside the root.
    steps: T of the last gap; gaps are taken at its halves too, down to 100.
    repeats: R runs.

  Returns:
    The :class:`Gaps`.
  """
  power_P = jnp.asarray(powers, jnp.float32)
  shape = (power_P.size, repeats)

  def body(carry, t):
    theta_PR, v_PR, total_PR = carry
    x_2R = jax.random.uniform(
      jax.random.fold_in(key, t), (2, repeats), minval=-1
    )
    slope = jnp.sign(theta_PR) * jnp.abs(theta_PR) ** (exponent - 1)
    g_PR = slope * (1 + relative_noise * x_2R[0]) + noise * x_2R[1]
    phi = lambda g, p: sign_power(p).update(g, ())[0]
    phi_PR = jax.vmap(phi)(g_PR, power_P)
    v_PR += phi_PR**2
    theta_PR -= learning_rate * phi_PR / jnp.sqrt(v_PR + eps)
    total_PR += theta_PR
    return (theta_PR, v_PR, total_PR), (theta_PR, total_PR / (t + 1))

  start = (jnp.ones(shape), jnp.zeros(shape), jnp.zeros(shape))
  halvings = range(int(np.log2(max(steps / 100, 1))), -1, -1)
  at = np.array([steps >> i for i in halvings])
  run = jax.jit(lambda: jax.lax.scan(body, start, jnp.arange(steps))[1])
  thetas = [np.asarray(x, np.float64)[at - 1] for x in run()]
  last, averaged = (
    np.moveaxis(np.abs(x) ** exponent / exponent, 0, -1) for x in thetas
  )
  return Gaps(at, last, averaged)


def fitted_rate(steps: np.ndarray, gaps: np.ndarray) -> tuple[float, float]:
  """The exponent r of gaps that go as T^-r, fitted to their logarithms.

  Args:
    steps: T, of shape [K].
    gaps: Of one power, positive, of shape [R, K].

  Returns:
    The mean of the repeats' exponents, and its standard error.
  """
  fits = -np.polyfit(np.log(steps), np.log(gaps).T, 1)[0]
  return float(fits.mean()), float(fits.std(ddof=1) / np.sqrt(fits.size))
