"""Statistics of paired differences: numbers in, numbers out."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

LEAST_FOR_SIGNS = 8
"""Pairs from which on a sign-flip test is made."""
_MOST_EXACT = 20
_DRAWS, _PARTS = 2**20, 64


@dataclasses.dataclass(frozen=True)
class Paired:
  """The differences of pairs, in the unit of the values."""

  n: int
  """Pairs."""
  mean: float
  """Of value minus baseline."""
  sd: float | None = None
  """Standard deviation of the differences; None for a single pair."""
  ci95: tuple[float, float] | None = None
  """Of the mean, by Student's t."""
  p_value: float | None = None
  """Two-sided, of a paired t-test."""
  p_sign_flip: float | None = None
  """Two-sided, of the test that flips signs; None below `LEAST_FOR_SIGNS`.
  Exact up to 20 pairs."""

  @property
  def half_width(self) -> float | None:
    """Of the 95 % interval."""
    return (self.ci95[1] - self.ci95[0]) / 2 if self.ci95 else None


def difference(
  values: Sequence[float], baseline: Sequence[float]
) -> Paired | None:
  """Compares pairs.

  Args:
    values: (n,), finite.
    baseline: (n,), finite: those of the same seeds.

  Returns:
    None without a pair.
  """
  d = np.asarray(values, np.float64) - np.asarray(baseline, np.float64)
  n = len(d)
  if n == 0:
    return None
  mean = float(d.mean())
  if n == 1:
    return Paired(1, mean)
  sd = float(d.std(ddof=1))
  error = sd / math.sqrt(n)
  reach = float(stats.t.ppf(0.975, n - 1)) * error
  # Without any spread t is infinite, or 0 / 0 where all is the same.
  p_value = float(2 * stats.t.sf(abs(mean) / error, n - 1)) if error else None
  signs = _sign_flip(d) if n >= LEAST_FOR_SIGNS else None
  return Paired(n, mean, sd, (mean - reach, mean + reach), p_value, signs)


def _sign_flip(d: np.ndarray) -> float:
  """Share of sign patterns whose sum is as far from 0 as the one seen."""
  seen = abs(d.sum())
  least = seen * (1 - 1e-12)  # Sums differ in the order of addition.
  if len(d) <= _MOST_EXACT:
    first, last = d[: len(d) // 2], d[len(d) // 2 :]
    sums = np.add.outer(_all_sums(first), _all_sums(last))
    return float((np.abs(sums) >= least).mean())
  draws = np.random.default_rng(0)
  hits = 0
  for _ in range(_PARTS):
    flips = draws.choice((-1.0, 1.0), (_DRAWS // _PARTS, len(d)))
    hits += int((np.abs(flips @ d) >= least).sum())
  return (hits + 1) / (_DRAWS + 1)


def _all_sums(d: np.ndarray) -> np.ndarray:
  patterns = itertools.product((-1.0, 1.0), repeat=len(d))
  return np.asarray(list(patterns)).reshape(-1, len(d)) @ d


def holm(p_values: Sequence[float | None]) -> list[float | None]:
  """Adjusts the p-values of a table for their number, by Holm's method.

  Args:
    p_values: None where there is none, which stays and does not count.

  Returns:
    In the same order, at most 1.
  """
  known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
  out: list[float | None] = [None] * len(p_values)
  least = 0.0
  for rank, (p, i) in enumerate(known):
    least = max(least, min(1.0, (len(known) - rank) * p))
    out[i] = least
  return out


def interval(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """The mean over seeds of (n, k) values and its 95 % half-width: (k,) each.

  The half-width is 0 for a single seed.
  """
  n = len(values)
  mean = values.mean(0)
  if n == 1:
    return mean, np.zeros_like(mean)
  reach = stats.t.ppf(0.975, n - 1) / math.sqrt(n)
  return mean, reach * values.std(0, ddof=1)


def needed(sd: float, half_width: float, most: int = 1000) -> int | None:
  """Pairs for which the 95 % interval is expected to be so narrow.

  Args:
    sd: Of the differences, as a pilot has it.
    half_width: Wanted, in the same unit.
    most: To look at.

  Returns:
    None where more than `most` are needed.
  """
  for n in range(2, most + 1):
    if stats.t.ppf(0.975, n - 1) * sd / math.sqrt(n) <= half_width:
      return n
  return None
