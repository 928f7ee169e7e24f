r"""The paper's toy problems, by integration and by simulation.

Example 4.1 has one parameter whose gradients are independent, of mean
:math:`\mu > 0` with noise about it, and asks for which power Adam's update

.. math:: u_t = \frac{\hat m_t}{\sqrt{\hat v_t} + \epsilon}

of their powers is greatest. In the long run it varies about, but does not
average to, :func:`long_time_ratio`; :func:`simulate` shows both. Noise is
:math:`g = \mu\,(1 + \text{noise} \cdot x)`, where x is uniform in (-1, 1), as
in the paper, whose sigma is half the width, or Gaussian or Laplace's of
standard deviation 1.

Section 4.2 has Adagrad with the power on a convex problem:
:func:`adagrad_power_gaps`.

References:
  Wang et al, `GradPower: Powering Gradients for Faster Language Model
  Pre-Training <https://arxiv.org/abs/2505.24275>`_, 2025, Section 4
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike
from scipy import integrate

from gradpower_optax.sign_power import sign_power

Kind: TypeAlias = Literal['uniform', 'gaussian', 'laplace']

# The density of |x|, and where it ends or is below 1e-120 of its peak.
_SIZES: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
  'uniform': (np.ones_like, 1.0),
  'gaussian': (lambda x: np.sqrt(2 / np.pi) * np.exp(-(x**2) / 2), 40.0),
  'laplace': (lambda x: np.sqrt(2) * np.exp(-np.sqrt(2) * x), 200.0),
}
_EPS = 1e-8  # Adam's and Adagrad's.
_B1, _B2 = 0.9, 0.95
_CHUNK = 100  # Steps that are simulated at once.
_BATCHES = 100  # Stretches of a simulation that its error is computed from.


def moments(
  p: ArrayLike, noise: ArrayLike, kind: Kind = 'uniform'
) -> tuple[np.ndarray, np.ndarray]:
  r"""Computes the powered gradient's first two moments over its mean's power.

  Args:
    p: Powers, positive, of any shape.
    noise: Noise over the mean, positive, of a shape that broadcasts with p's.
    kind: The noise's distribution; see the module.

  Returns:
    :math:`E \varphi_p(g / \mu)` and :math:`E \varphi_p(g / \mu)^2` in float64,
    to 12 digits for noise from 1e-9 to 1e9 and p from 0.1 to 5.

  Raises:
    ValueError: p or noise is not positive and finite, kind is unknown, or the
      integrals do not converge.
  """
  p, noise = np.broadcast_arrays(_checked('p', p), _checked('noise', noise))
  if kind not in _SIZES:
    raise ValueError(f'theory: noise is {", ".join(_SIZES)}, not {kind!r}')
  density, end = _SIZES[kind]

  # Noise is symmetric: means of phi at 1 + y and 1 - y, y = noise |x|.
  def first(x, p, noise):
    y = noise * x
    # Beyond y = 1 they differ in sign, and nearly cancel where y is large.
    with np.errstate(divide='ignore'):
      less = -np.expm1(-2 * p * np.arctanh(np.minimum(1 / y, 1)))
    same = (1 + y) ** p + np.abs(1 - y) ** p
    return density(x) / 2 * np.where(y < 1, same, (1 + y) ** p * less)

  def second(x, p, noise):
    y = noise * x
    return density(x) / 2 * ((1 + y) ** (2 * p) + np.abs(1 - y) ** (2 * p))

  zero = np.minimum(1 / noise, end)  # Where the gradient is 0.
  found = []
  for integrand in (first, second):
    parts = [
      integrate.tanhsinh(integrand, low, high, args=(p, noise), minlevel=5)
      for low, high in ((0.0, zero), (zero, end))
    ]
    good = parts[0].success & parts[1].success
    if not good.all():
      at = f'p = {p[~good][0]:g}, noise = {noise[~good][0]:g}'
      raise ValueError(f'theory: the integral at {at} does not converge')
    found.append(np.asarray(parts[0].integral + parts[1].integral))
  return found[0], found[1]


def _checked(
  name: str, value: ArrayLike, rank: int | None = None, or_zero: bool = False
) -> np.ndarray:
  """Returns a value as float64; checks its rank where one is given."""
  try:
    x = np.asarray(value, np.float64)
  except (TypeError, ValueError):
    x = np.asarray(np.nan)
  wrong = x[~(((x >= 0) if or_zero else (x > 0)) & (x < np.inf))]
  if wrong.size or not x.size:
    kind = 'at least 0' if or_zero else 'positive'
    found = f'{wrong[0]:g}' if wrong.size else 'empty'
    raise ValueError(f'theory: {name} must be {kind} and finite, not {found}')
  if rank not in (None, x.ndim):
    raise ValueError(f'theory: {name} must have rank {rank}, not {x.ndim}')
  return x


def long_time_ratio(
  p: ArrayLike,
  noise: ArrayLike,
  *,
  mean: float = 1e-6,
  eps: float = _EPS,
  kind: Kind = 'uniform',
) -> np.ndarray:
  r"""Computes Adam's update where its averages are over infinitely many steps.

  .. math:: E \varphi_p(g) \,/\, (\sqrt{E \varphi_p(g)^2} + \epsilon)

  Args:
    p: As in :func:`moments`.
    noise: As in :func:`moments`.
    mean: Mean gradient, mu, positive.
    eps: Adam's, at least 0.
    kind: As in :func:`moments`.

  Returns:
    The ratio, below 1, of the broadcast shape of p and noise, in float64.

  Raises:
    ValueError: as :func:`moments`; or mean or eps is out of its range.
  """
  first, second = moments(p, noise, kind)
  at, added = _checked('mean', mean, 0), _checked('eps', eps, 0, or_zero=True)
  return first / (np.sqrt(second) + added / at ** np.asarray(p))


def best_power(
  noise: float,
  low: float,
  high: float,
  *,
  mean: float = 1e-6,
  eps: float = _EPS,
  kind: Kind = 'uniform',
) -> float | None:
  """Finds the power of the greatest long-time ratio between two ends.

  Args:
    noise: As in :func:`moments`, a number.
    low: The least power to look at, positive.
    high: The greatest one.
    mean: As in :func:`long_time_ratio`.
    eps: Likewise.
    kind: Likewise.

  Returns:
    The power, to 0.001 if high is at most 30. None if it is low or high: a
    better one may lie beyond. At uniform noise below 1 it is low: signs do not
    change, and sizes change less the lower the power.

  Raises:
    ValueError: as :func:`long_time_ratio`; or low is not below high.
  """
  if not low < high < np.inf:
    raise ValueError(f'theory: no powers lie between {low} and {high}')
  at, ends = _checked('noise', noise, 0), (low, high)
  for _ in range(3):
    powers = np.linspace(low, high, 61)
    ratios = long_time_ratio(powers, at, mean=mean, eps=eps, kind=kind)
    best = int(np.argmax(ratios))
    low, high = powers[max(best - 1, 0)], powers[min(best + 1, 60)]
  return None if powers[best] in ends else float(powers[best])


def power_bounds(sigma: float, eps: float = _EPS) -> tuple[float, float]:
  """Returns the paper's bounds of the best power, for sigma far above the mean.

  Args:
    sigma: Half the width of uniform noise, far below 1, not over the mean.
    eps: Adam's, small enough that ``eps * log(1 / sigma) < 1``.

  Returns:
    The lower and the upper one.

  Raises:
    ValueError: sigma or eps is not in that range.
  """
  if not 0 < sigma < 1 or not 0 < eps * np.log(1 / sigma) < 1:
    raise ValueError(
      'theory: there are bounds where 0 < sigma < 1 and 0 < eps log(1 / sigma) '
      f'< 1, not at sigma = {sigma}, eps = {eps}'
    )
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
  steps: int = 1_000_000,
) -> Simulation:
  """Runs Adam's averages on Example 4.1, for all powers and noises at once.

  Noise is uniform, b1 = 0.9, b2 = 0.95 and eps = 1e-8. Powers and noises share
  their draws. Values are in units of the gradients' size, to fit in float32.

  Args:
    key: For the random gradients.
    powers: P powers, positive.
    noises: N noises over the mean, positive.
    mean: The gradients' mean, positive.
    steps: A multiple of 10,000: the paper's Fig. 7 reads step 1,000,000.

  Returns:
    A :class:`Simulation` with arrays of shape [N, P].

  Raises:
    ValueError: one of them is out of its range.
  """
  noise_N, power_P = (
    _checked('noises', noises, 1),
    _checked('powers', powers, 1),
  )
  _checked('mean', mean, 0)
  _count('steps', steps, _CHUNK * _BATCHES)
  unit_N = np.maximum(noise_N, 1)  # Gradients are over this times the mean.
  eps_P1N = _EPS / (mean * unit_N) ** power_P[:, None, None]
  at = np.arange(_CHUNK)

  def average(decay):
    """Averages a chunk: a triangular product, plus the decayed earlier one."""
    triangle = np.tril((1 - decay) * decay ** np.abs(at[:, None] - at))
    left_C1 = decay ** (at[:, None] + 1.0)

    def apply(before_PN, x_PCN, start):
      new = jnp.einsum('ij,pjn->pin', triangle, x_PCN, precision='highest')
      new += left_C1 * before_PN[:, None]
      return new, new / (1 - decay ** (start + 1.0 + at[:, None]))

    return apply

  first, second = average(_B1), average(_B2)

  def body(carry, start):
    m_PN, v_PN = carry
    x_C = _uniform(jax.random.fold_in(key, start), (_CHUNK,))
    g_CN = ((1 + noise_N * x_C[:, None]) / unit_N).astype(jnp.float32)
    phi_PCN = jax.vmap(_phi, (None, 0))(g_CN, jnp.float32(power_P))
    m_PCN, m_hat = first(m_PN, phi_PCN, start)
    v_PCN, v_hat = second(v_PN, phi_PCN**2, start)
    u_PCN = m_hat / (jnp.sqrt(v_hat) + eps_P1N)
    return (m_PCN[:, -1], v_PCN[:, -1]), (u_PCN.mean(1), u_PCN[:, -1])

  zeros = jnp.zeros((power_P.size, noise_N.size))
  starts = jnp.arange(0, steps, _CHUNK)
  run = jax.jit(lambda: jax.lax.scan(body, (zeros, zeros), starts)[1])
  means, lasts = (np.swapaxes(np.float64(x), 1, 2) for x in run())
  stretches = means.reshape(_BATCHES, -1, *means.shape[1:]).mean(1)
  error = stretches.std(0, ddof=1) / np.sqrt(_BATCHES)
  return Simulation(lasts[-1], means.mean(0), error)


def _count(name: str, value: int, unit: int = 1) -> None:
  multiple = f'multiple of {unit:,}' if unit > 1 else 'whole number'
  whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
  if not whole or value < 1 or value % unit:
    raise ValueError(
      f'theory: {name} must be a positive {multiple}, not {value}'
    )


def _uniform(key, shape):
  return jax.random.uniform(key, shape, minval=-1)


def _phi(g, p):
  return sign_power(p).update(g, ())[0]


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
  steps: int = 10_000,
  repeats: int = 8,
) -> Gaps:
  r"""Runs AdagradPower on a stochastic convex problem of one parameter.

  The objective is :math:`f(\theta) = |\theta|^a / a`, from
  :math:`\theta_0 = 1`, and

  .. math::

    g_t &= f'(\theta_t) (1 + \rho x_t) + \sigma y_t \\
    v_t &= v_{t-1} + \varphi_p(g_t)^2 \\
    \theta_{t+1} &= \theta_t - 0.1 \varphi_p(g_t) / \sqrt{v_t + 10^{-8}}

  with x and y uniform in (-1, 1). With sigma = 0 and rho < 1 noise never turns
  a gradient's sign: the low noise of the theory.

  Args:
    key: Of the draws, which powers share and repeats do not.
    powers: P powers, positive.
    exponent: a, at least 1.
    relative_noise: rho, at least 0.
    noise: sigma, at least 0.
    steps: T of the last gap; gaps are taken at its halves too, down to 100.
    repeats: R runs.

  Returns:
    The :class:`Gaps`.

  Raises:
    ValueError: one of them is out of its range.
  """
  power_P = jnp.float32(_checked('powers', powers, 1))
  if not 1 <= exponent < np.inf:
    raise ValueError(f'theory: exponent must be at least 1, not {exponent}')
  _checked('relative_noise', relative_noise, 0, or_zero=True)
  _checked('noise', noise, 0, or_zero=True)
  _count('steps', steps)
  _count('repeats', repeats)
  shape = (power_P.size, repeats)

  def body(carry, t):
    theta_PR, v_PR, total_PR = carry
    x_2R = _uniform(jax.random.fold_in(key, t), (2, repeats))
    slope = jnp.sign(theta_PR) * jnp.abs(theta_PR) ** (exponent - 1)
    g_PR = slope * (1 + relative_noise * x_2R[0]) + noise * x_2R[1]
    phi_PR = jax.vmap(_phi)(g_PR, power_P)
    v_PR += phi_PR**2
    theta_PR -= 0.1 * phi_PR / jnp.sqrt(v_PR + _EPS)
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
  """Fits the exponent r of gaps that fall as T^-r, to their logarithms.

  Args:
    steps: T, positive and different, of shape [K], at least 2 of them.
    gaps: Of one power, positive, of shape [R, K], of at least 2 repeats.

  Returns:
    The mean of the repeats' exponents, and its standard error.

  Raises:
    ValueError: steps or gaps are not as above.
  """
  T_K, gap_RK = _checked('steps', steps, 1), _checked('gaps', gaps, 2)
  repeats, points = gap_RK.shape
  if repeats < 2 or points != T_K.size or np.unique(T_K).size < 2:
    raise ValueError(
      'theory: a rate takes gaps of 2 repeats or more at 2 steps or more, not '
      f'shapes {gap_RK.shape} and {T_K.shape}'
    )
  fits = -np.polyfit(np.log(T_K), np.log(gap_RK).T, 1)[0]
  return float(fits.mean()), float(fits.std(ddof=1) / np.sqrt(fits.size))
