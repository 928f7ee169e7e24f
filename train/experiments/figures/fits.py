"""Curves through losses, with their uncertainty: numbers in, numbers out."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy import optimize, stats

SIZES_FOR_FLOOR = 4
"""Sizes from which on an irreducible loss is fitted too."""
_DRAWS = 400


@dataclasses.dataclass(frozen=True)
class Vertex:
  """Where the loss is least along p, of the powers tried."""

  best: float
  """Of the parabola, held between the first power and the last; where it has no
  minimum, the power with the lowest mean."""
  tried: tuple[float, float]
  """The first and the last."""
  low: float = -math.inf
  """Of the 95 % set; infinite, as `high`, where seeds do not bound it."""
  high: float = math.inf
  inside: bool = True
  """Whether the parabola has its minimum between the powers tried."""
  convex: bool = True
  """Whether it has one."""

  @property
  def words(self) -> str:
    """For people."""
    first, last = self.tried
    text = f'{self.best:.2f}'
    if not self.convex:
      text += ', the lowest mean, as the parabola has no minimum'
    elif not self.inside:
      text += ', the edge'
    if self.low < first and self.high > last:
      return f'{text} (any power tried may be)'
    low = f'below {first:g}' if self.low < first else f'{self.low:.2f}'
    high = f'above {last:g}' if self.high > last else f'{self.high:.2f}'
    return f'{text} ({low} to {high})'


def best_power(powers: Sequence[float], losses: np.ndarray) -> Vertex | None:
  """The minimum of a parabola in p through the losses.

  Its interval is Fieller's: all p at which the slope of the parabola does not
  differ from 0 by Student's t, so that nothing is assumed of a ratio. What
  seeds share cancels; what is left is taken to be as large at each power, and
  gives (n - 1)(k - 1) degrees of freedom: three seeds bound little otherwise.

  Args:
    powers: (k,), at least 3.
    losses: (n, k) of n seeds.

  Returns:
    None without a seed.
  """
  n = len(losses)
  if not n:
    return None
  p = np.asarray(powers)
  tried = float(p.min()), float(p.max())
  middle = p.mean()
  mean = losses.mean(0)
  to_curve = np.linalg.pinv(np.vander(p - middle, 3))[:2] * [[2.0], [1.0]]
  a, b = to_curve @ mean  # Slope at p: b + a (p - middle).
  if a <= 0:
    lowest = float(p[mean.argmin()])
    return Vertex(lowest, tried, inside=False, convex=False)
  vertex = middle - b / a
  low, high = -math.inf, math.inf
  if n > 1:
    freedom = (n - 1) * (len(p) - 1)
    left = losses - mean - losses.mean(1, keepdims=True) + losses.mean()
    error = (left**2).sum() / freedom / n
    (aa, ab), (_, bb) = (
      to_curve @ to_curve.T * error * stats.t.ppf(0.975, freedom) ** 2
    )
    lead, half, rest = a * a - aa, a * b - ab, b * b - bb
    if lead > 0:
      reach = math.sqrt(max(half * half - lead * rest, 0.0)) / lead
      low = float(middle - half / lead - reach)
      high = float(middle - half / lead + reach)
  inside = tried[0] <= vertex <= tried[1]
  return Vertex(float(np.clip(vertex, *tried)), tried, low, high, bool(inside))


@dataclasses.dataclass(frozen=True)
class PowerLaw:
  """L = E + A N^-alpha, E shared by the arms."""

  floor: float
  """E, in nats a token; 0 where it was not fitted."""
  alpha: np.ndarray
  """(arms,)."""
  log_a: np.ndarray
  """(arms,), natural logarithm."""

  def at(self, sizes: np.ndarray) -> np.ndarray:
    """Losses, (arms, k), at (k,) sizes."""
    logs = self.log_a[:, None] - np.outer(self.alpha, np.log(sizes))
    return self.floor + np.exp(logs)


def power_law(sizes: np.ndarray, means: np.ndarray) -> PowerLaw:
  """Fits losses against size by least squares in nats.

  With fewer than `SIZES_FOR_FLOOR` sizes E is 0, a straight line in log-log:
  they could not tell E from a smaller exponent.

  Args:
    sizes: (m,) parameters, m >= 2.
    means: (m, arms) mean losses, positive.
  """
  if len(sizes) < SIZES_FOR_FLOOR:
    return _lines(0.0, sizes, means)

  def squares(floor: float) -> float:
    fit = _lines(floor, sizes, means)
    return float(((fit.at(sizes).T - means) ** 2).sum())

  most = 0.999 * means.min()
  found = optimize.minimize_scalar(squares, bounds=(0, most), method='bounded')
  return _lines(float(found.x), sizes, means)


def _lines(floor: float, sizes: np.ndarray, means: np.ndarray) -> PowerLaw:
  x = np.log(sizes)[:, None]
  y = np.log(means - floor)
  # An error of log(L - E) is that of L over L - E.
  weight = (means - floor) ** 2
  weight = weight / weight.sum(0)
  x_mean, y_mean = (weight * x).sum(0), (weight * y).sum(0)
  spread = (weight * (x - x_mean) ** 2).sum(0)
  slope = (weight * (x - x_mean) * (y - y_mean)).sum(0) / spread
  return PowerLaw(floor, -slope, y_mean - slope * x_mean)


@dataclasses.dataclass(frozen=True)
class Scaling:
  """A power law, and how far seeds leave it open."""

  law: PowerLaw
  at: np.ndarray
  """(k,) sizes of the bands."""
  low: np.ndarray | None = None
  """(arms, k): the 95 % band; None where no size has two seeds."""
  high: np.ndarray | None = None
  alpha: np.ndarray | None = None
  """(2, arms): the 95 % intervals of the exponents."""
  steeper: np.ndarray | None = None
  """(2,): that of the last arm's exponent minus the first's."""


def scaling(
  sizes: Sequence[int], losses: Sequence[np.ndarray], at: np.ndarray
) -> Scaling:
  """Fits a power law and draws it again under the noise of seeds.

  The noise is multivariate t about the means, its covariance between arms that
  of paired seeds, pooled over sizes; what the law itself misses is not in it.

  Args:
    sizes: (m,) parameters, m >= 2.
    losses: Of each size, (n, arms), n >= 1 seeds.
    at: (k,) sizes for the band.
  """
  x = np.asarray(sizes, np.float64)
  means = np.stack([each.mean(0) for each in losses])
  law = power_law(x, means)
  freedom = sum(len(each) - 1 for each in losses)
  if not freedom:
    return Scaling(law, at)
  scatter = sum((e - e.mean(0)).T @ (e - e.mean(0)) for e in losses)
  values, vectors = np.linalg.eigh(scatter / freedom)
  root = vectors * np.sqrt(np.maximum(values, 0.0))
  errors = 1 / np.sqrt([len(each) for each in losses])
  rng = np.random.default_rng(0)
  curves, alphas = [], []
  for _ in range(_DRAWS):
    noise = rng.standard_normal(means.shape) @ root.T * errors[:, None]
    noise *= math.sqrt(freedom / rng.chisquare(freedom))
    drawn = power_law(x, np.maximum(means + noise, 1e-3))
    curves.append(drawn.at(at))
    alphas.append(drawn.alpha)
  low, high = np.quantile(curves, (0.025, 0.975), axis=0)
  by_arm = np.stack(alphas)
  return Scaling(
    law,
    at,
    low,
    high,
    np.quantile(by_arm, (0.025, 0.975), axis=0),
    np.quantile(by_arm[:, -1] - by_arm[:, 0], (0.025, 0.975)),
  )
