"""What is done to a series of measurements before it is drawn."""

import math
from collections.abc import Iterable, Sequence

Points = Sequence[tuple[float, float]]


def smooth(points: Points, limit: int = 1000) -> Points:
  """A centred triangular mean over 2% of the points to either side.

  Triangular, so that a spike gives a small peak and not a box. Narrower at
  the start, where the curve is steep, and one-sided at the end, where it is
  flat and a hook of noise would mislead. Non-finite values are left out of
  their neighbours' means and stay gaps. Of a long series, about limit means
  are taken; each is summed afresh, since running sums would never recover
  from one value of 1e30.
  """
  last = len(points) - 1
  half = max(1, len(points) // 50)
  out = []
  for i in sorted({*range(0, last + 1, max(1, last // limit)), last} - {-1}):
    x, mean = points[i]
    if math.isfinite(mean):
      h = min(half, i)
      near = [
        (h + 1 - abs(k), points[i + k][1])
        for k in range(-h, min(h, last - i) + 1)
        if math.isfinite(points[i + k][1])
      ]
      total = math.fsum(weight * y for weight, y in near)
      mean = total / sum(weight for weight, _ in near)
    out.append((x, mean))
  return out


def thin(points: Points, limit: int = 500) -> Points:
  """Lowest and highest point of each of limit buckets, so spikes survive."""
  if len(points) <= 2 * limit:
    return points
  kept = set()
  for i in range(limit):
    bucket = range(len(points) * i // limit, len(points) * (i + 1) // limit)
    finite = [j for j in bucket if math.isfinite(points[j][1])]
    if len(finite) < len(bucket):
      kept.add(next(j for j in bucket if not math.isfinite(points[j][1])))
    if finite:
      kept.add(min(finite, key=lambda j: points[j][1]))
      kept.add(max(finite, key=lambda j: points[j][1]))
  return [points[j] for j in sorted(kept | {0, len(points) - 1})]


def quantile(values: Iterable[float], q: float) -> float:
  """The q-quantile (nearest rank) of the finite values; nan without any."""
  ranked = sorted(v for v in values if math.isfinite(v))
  return ranked[round(q * (len(ranked) - 1))] if ranked else math.nan
