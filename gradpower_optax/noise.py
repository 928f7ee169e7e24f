r"""Gradient noise, measured: how much, how heavy its tails, and which power.

Feed it gradients of parts of a batch, one :func:`update` each; it is a pytree
of sums, and knows of no model:

>>> import jax
>>> from gradpower_optax import noise
>>> params = {'w': jax.numpy.zeros((64, 64))}
>>> stats = noise.init(params)
>>> for key in jax.random.split(jax.random.key(0), 8):
...   stats = noise.update(stats, {'w': 0.5 + jax.random.normal(key, (64, 64))})
>>> found = noise.summarize(stats).overall
>>> print(f'{found.noise_to_signal:.1f} {found.noise_scale:.0f}')
2.0 4

The moments of one element over k gradients are poor; only averages over many
elements are reported. What the power is to be judged by,

.. math:: u(p) = |E \varphi_p(g)| \,/\, \sqrt{E \varphi_p(g)^2},

the length of Adam's mean step where eps does not matter, is averaged as its
square, estimated for an element by

.. math:: s = \Big(\frac{(\sum \varphi_p)^2}{\sum \varphi_p^2} - 1\Big) \Big/
  (k - 1),

which is 1 without noise and has mean 0, for any k and any tail, where noise is
symmetric and there is nothing else. In between it is too small by a part of
order 1 / k, which depends on p and on the tail: a quarter of u(1)^2 at k = 8
and Gaussian noise, for which the average is corrected. At k = 8 what is left
turns u(1.2) / u(1), with little signal, from 1.065 into 1.045 for uniform
noise, from 0.996 into 1.00 for Gaussian and from 0.90 into 0.95 for Laplace's;
it halves as k doubles.

``step_ratio`` has an error of order 1 / k too, uncorrected: of a part's r(1.2),
for noise alone, 8 gradients show 0.964 for 0.968 under uniform noise, 0.945 for
0.940 under Gaussian and 0.929 for 0.902 under Laplace's; 64 show 0.910 for the
last. A batch's own r(1.2) is another number, as its noise is less and nearer to
a Gaussian's: for 8 parts 0.942, 0.940 and 0.933 where noise is all; 0.98 for
each kind where a part's is as large as the signal, of which 8 gradients show
0.951 to 0.953.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gradpower_optax import power as _power


class _Tensor(NamedTuple):
  """Sums over the gradients of one tensor, over its scale, by element."""

  scale: jax.Array  # A power of two near the first gradients' size; 0: none.
  first: jax.Array  # Gradient; the moments are about it.
  moments: list[jax.Array]  # Of order 1 to 4.
  sums: list[list[jax.Array]]  # Of |phi_p|, and of phi_p and phi_p^2 if p != 1.


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Stats:
  """What :func:`update` sums up: a pytree whose powers are static.

  Attributes:
    count: Gradients so far, an int32 scalar.
    tensors: The sums of each tensor, by its path, as 'layers/0/kernel'.
    powers: The grid of p, ascending, 1 among them.
  """

  count: jax.Array
  tensors: dict[str, _Tensor]
  powers: tuple[float, ...] = field(metadata={'static': True})


class Noise(NamedTuple):
  """Statistics of one tensor or of all; tuples go along the powers.

  Attributes:
    size: Elements.
    unseen: Elements whose gradients were all 0 (rows of an embedding, say):
      no part of ``tail``, ``eps_share``, ``u`` and ``step_ratio``.
    signal: Squared norm of the mean gradient, without the noise that k
      gradients leave in it, so that it may come out negative.
    noise: Summed variance of the elements of one part's gradient.
    noise_to_signal: Root of the noise of a whole batch over the signal; inf
      where the signal is not positive.
    noise_scale: Noise of one part over the signal: McCandlish et al's simple
      one, in parts, or in examples where their number is given. Inf where the
      signal is not positive.
    tail: Excess kurtosis of the noise of a whole batch, 0 for a Gaussian;
      elements with more noise weigh more. NaN for less than 4 gradients.
    eps_share: Share of elements where eps is more than a tenth of the root
      mean square of phi_p of a whole batch's gradient, so that it shortens
      Adam's step by 9 % or more.
    u: Root mean square of u(p) over elements, of one part's gradient.
    u_error: Standard error of each u(p).
    step_ratio: Mean of |g|^p over root mean square of it, relative to p = 1:
      the size at p of a step whose sign does not change. Of one part's
      gradient; see above for how far it is from that, and from a batch's.
    power: The p of greatest u(p), within the grid; 1 where no p is best, since
      u(p) is within two standard errors of 0 or, as without noise, the same at
      all p (its square to 1e-5).
    power_error: Its standard error; NaN where no p is best.
  """

  size: int
  unseen: int
  signal: float
  noise: float
  noise_to_signal: float
  noise_scale: float
  tail: float
  eps_share: tuple[float, ...]
  u: tuple[float, ...]
  u_error: tuple[float, ...]
  step_ratio: tuple[float, ...]
  power: float
  power_error: float


class Summary(NamedTuple):
  """What :func:`summarize` returns.

  Attributes:
    gradients: How many are summed up.
    powers: The grid of p.
    overall: Of all tensors: elements weigh alike, in ``tail`` too.
    tensors: By the tensor's path, as 'layers/0/kernel'.
  """

  gradients: int
  powers: tuple[float, ...]
  overall: Noise
  tensors: dict[str, Noise]


def init(params: Any, powers: Sequence[float] = (0.8, 1.0, 1.2, 1.4)) -> Stats:
  """Sums over no gradients yet.

  They take three float32 arrays of a parameter's shape for each power, and
  three more: 15 times the parameters at the default ones.

  Args:
    params: A tree of arrays with gradients' structure, shapes and shardings.
    powers: Grid of p, each in (0, 3]; 1 is added if it is missing. The power
      that is suggested lies within it.

  Returns:
    The :class:`Stats`.

  Raises:
    ValueError: a power is not in (0, 3], or they are less than three; there
      are no parameters, or two have one path.
  """
  grid = tuple(sorted({*map(float, powers), 1.0}))
  if not all(0 < p <= 3 for p in grid) or len(grid) < 3:
    raise ValueError(f'noise: needs three powers in (0, 3], got {grid}')

  def zeros(x):
    new = lambda n: [jnp.zeros_like(x, jnp.float32) for _ in range(n)]
    sums = [new(1 if p == 1 else 3) for p in grid]
    return _Tensor(jnp.float32(0), new(1)[0], new(4), sums)

  tensors = {name: zeros(x) for name, x in _by_name(params).items()}
  if not tensors:
    raise ValueError('noise: there are no parameters')
  return Stats(jnp.int32(0), tensors, grid)


def update(stats: Stats, grad: Any) -> Stats:
  """Adds the gradient of one part of a batch.

  Parts must be of one size and disjoint, at the same parameters or nearly so.
  What is not finite makes its tensor's statistics NaN.

  Args:
    stats: The sums so far.
    grad: The mean gradient of a part's examples, not clipped, of any real
      floating dtypes; computed in float32.

  Returns:
    New sums, of the same types: it may be a scan's body.

  Raises:
    ValueError: gradients have not the structure and shapes of the parameters,
      or are complex.
  """
  grads, sums = _by_name(grad), stats.tensors
  kinds = {n: (g.shape, jnp.isrealobj(g)) for n, g in grads.items()}
  if kinds != {n: (t.first.shape, True) for n, t in sums.items()}:
    raise ValueError("noise: gradients are not of the parameters' shapes")
  count = stats.count + 1
  sums = {n: _add(g, sums[n], count, stats.powers) for n, g in grads.items()}
  return Stats(count, sums, stats.powers)


def _by_name(tree) -> dict[str, jax.Array]:
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator='/')
  found: dict[str, jax.Array] = {}
  for path, x in jax.tree_util.tree_leaves_with_path(tree):
    if name(path) in found:
      raise ValueError(f'noise: two parameters have the path {name(path)!r}')
    found[name(path)] = jnp.asarray(x)
  return found


def _add(g, old, count, powers) -> _Tensor:
  # No square of it, which might underflow.
  size = jnp.mean(jnp.abs(g), dtype=jnp.float32)
  near = jnp.ldexp(jnp.float32(1), jnp.frexp(size)[1])
  scale = jnp.where((old.scale == 0) & (size != 0), near, old.scale)
  g = g.astype(jnp.float32) / jnp.where(scale == 0, 1, scale)
  first = jnp.where(count == 1, g, old.first)
  moments = [m + (g - first) ** i for i, m in enumerate(old.moments, 1)]
  sums = []
  for p, before in zip(powers, old.sums, strict=True):
    phi = _power.signed_power(g, p)
    new = (jnp.abs(phi), phi, phi**2)[: len(before)]
    sums.append([x + y for x, y in zip(before, new, strict=True)])
  return _Tensor(scale, first, moments, sums)


def summarize(
  stats: Stats,
  *,
  eps: float = 1e-8,
  parts: int = 1,
  examples_per_part: int = 1,
  clip_norm: float = math.inf,
) -> Summary:
  """Statistics of the noise, by tensor and overall.

  Noise is that of the gradients that were summed up. That of a batch of many
  parts has the variance over their number, and with ``parts``
  ``noise_to_signal``, ``tail`` and ``eps_share`` are the batch's; ``u``,
  ``step_ratio`` and ``power`` stay those of a part, as no law takes them
  further: by the central limit a batch's noise is nearer to a Gaussian's.

  Standard errors are a jackknife's, over up to 16 blocks along a tensor's last
  axis and, overall, over tensors if they are 8 or more. Those are taken as
  independent: what all of a gradient's elements share does not show, and only
  more gradients tell.

  Args:
    stats: Sums over at least 2 gradients.
    eps: Adam's, at least 0.
    parts: Of the batch that the optimizer sees.
    examples_per_part: The unit of the noise scale is an example if given.
    clip_norm: Global norm, positive, that the batch's gradient is clipped to
      before the power, which ``eps_share`` depends on.

  Returns:
    The :class:`Summary`, of Python numbers.

  Raises:
    ValueError: less than 2 gradients, or another argument is out of its range.

  References:
    McCandlish et al, `An Empirical Model of Large-Batch Training
    <https://arxiv.org/abs/1812.06162>`_, 2018, Appendix A
  """
  count = int(stats.count)
  if count < 2 or not 1 <= parts < math.inf:
    raise ValueError(f'noise: {count} gradients, {parts} parts: too few')
  if not 1 <= examples_per_part < math.inf:
    raise ValueError(
      f'noise: examples_per_part must be at least 1, not {examples_per_part}'
    )
  if not 0 <= eps < math.inf:
    raise ValueError(f'noise: eps must be finite and at least 0, not {eps}')
  if not clip_norm > 0:
    raise ValueError(f'noise: clip_norm must be positive, not {clip_norm}')
  every = jax.tree.map(np.float64, _reduce(stats, eps, parts, clip_norm))
  noise = lambda x: _noise(x, stats.powers, count, parts, examples_per_part)
  tensors = {
    name: noise({k: x[i : i + 1] for k, x in every.items()})
    for i, name in enumerate(sorted(stats.tensors))
  }
  return Summary(count, stats.powers, noise(every), tensors)


@jax.jit
def _reduce(stats, eps, parts, clip_norm):
  """Sums over elements: arrays along tensors, in units of a tensor's scale."""
  # Sorted by name, as jit does.
  found = [_reduce_one(t, stats, parts) for t in stats.tensors.values()]
  norms = [x['scale'] ** 2 * (x['signal'] + x['noise'] / parts) for x in found]
  unit = jnp.minimum(1, clip_norm / jnp.sqrt(jnp.maximum(sum(norms), 0)))
  for x in found:
    size = jnp.sqrt(x.pop('square')) * x['scale'] * unit
    # What has no size has not been seen.
    small = [(size > 0) & (size < (10 * eps) ** (1 / p)) for p in stats.powers]
    x['small'] = jnp.stack([_blocks(below).sum() for below in small])
  return jax.tree.map(lambda *x: jnp.stack(x), *found)


def _reduce_one(t, stats, parts):
  n = stats.count.astype(jnp.float32)
  d1, d2, d3, d4 = (x / n for x in t.moments)
  mean, m2 = t.first + d1, jnp.maximum(d2 - d1**2, 0)
  variance = m2 * n / (n - 1)
  at_1 = [n * mean, n * (m2 + mean**2)]
  sums = [x if len(x) > 1 else x + at_1 for x in t.sums]
  seen = sum(q == 0 for _, _, q in sums) == 0

  def pairs(total, q):
    """Mean product of two different gradients' terms, over the square's."""
    return jnp.where(seen, (total**2 / q - 1) / (n - 1), 0)

  # Unbiased, of each element: the fourth cumulant and the squared variance.
  m4 = d4 - 4 * d1 * d3 + 6 * d1**2 * d2 - 3 * d1**4
  k4 = (n + 1) * m4 - 3 * (n - 1) * m2**2
  k4 *= n**2 / ((n - 1) * (n - 2) * (n - 3))
  return {
    'size': jnp.uint32(mean.size),
    'unseen': _blocks(~seen).sum(),
    'seen': _blocks(seen),
    's': jnp.stack([_blocks(pairs(x, q)) for _, x, q in sums], 1),
    'a': jnp.stack([_blocks(pairs(x, q)).sum() for x, _, q in sums]),
    'scale': t.scale,
    'signal': _blocks(mean**2).sum() - _blocks(variance).sum() / n,
    'noise': _blocks(variance).sum(),
    'k4': _blocks(k4).sum(),
    'squared': (n - 1) / (n + 1) * _blocks(variance**2 - k4 / n).sum(),
    # Of the batch's gradient.
    'square': jnp.maximum(mean**2 - variance / n, 0) + variance / parts,
  }


def _blocks(x, blocks=16):
  """Sums over blocks along the last axis; one of all might round too much."""
  x = jnp.atleast_1d(x).astype(jnp.float32)
  x = jnp.sum(x, tuple(range(x.ndim - 1)))
  which = jnp.arange(x.size) * blocks // x.size == jnp.arange(blocks)[:, None]
  return jnp.sum(jnp.where(which, x, 0), 1)


@np.errstate(divide='ignore', invalid='ignore')
def _noise(x, powers, count, parts, examples) -> Noise:
  """Of tensors whose sums are stacked."""
  powers, a = np.array(powers), x['a'].sum(0)
  signal, noise = (x['scale'] ** 2 @ x[name] for name in ('signal', 'noise'))
  over = np.where(signal <= 0, math.inf, noise / signal)
  weight = np.where(x['squared'] > 0, x['seen'].sum(1), 0)
  tail = weight @ np.where(weight, x['k4'] / x['squared'], 0) / weight.sum()

  group = (lambda y: y.sum(1)) if len(x['size']) >= 8 else np.concatenate
  seen, s = group(x['seen']), group(x['s'])
  seen, s = (y[(seen > 0) | ~seen.any()] for y in (seen, s))
  bias = np.array([*map(_gaussian_bias, powers)]) / count
  unbiased = lambda s: s + bias * s * (1 - s)
  mean = unbiased(s.sum(0) / seen.sum())
  others = unbiased((s.sum(0) - s) / (seen.sum() - seen)[:, None])
  # The jackknife's standard error, of means over all groups but one.
  error = lambda y: np.sqrt(np.var(y, 0) * (len(y) - 1))
  # Without noise all means are 1, up to float32's rounding. NaN compares false.
  best = (mean > 2 * error(others))[np.argmax(mean)] and np.ptp(mean) > 1e-5
  power = float(_top(powers, mean[None])[0]) if best else 1.0
  power_error = float(error(_top(powers, others))) if best else math.nan
  u, upper = np.sqrt(np.maximum([mean, mean + error(others)], 0))
  small, step = x['small'].sum(0) / seen.sum(), np.sqrt(a / a[powers == 1])
  return Noise(
    int(x['size'].sum()), int(x['unseen'].sum()), float(signal), float(noise),
    math.sqrt(over / parts), float(over * examples), float(tail / parts),
    tuple(small.tolist()), tuple(u.tolist()), tuple((upper - u).tolist()),
    tuple(step.tolist()), power, power_error,
  )  # fmt: skip


def _gaussian_bias(p: float) -> float:
  """Of s for Gaussian noise: it comes out by this over k too small, of 1."""
  m = lambda q: 2 ** (q / 2) * math.gamma((q + 1) / 2) / math.sqrt(math.pi)
  above, spread = m(3 * p - 1) / (m(p - 1) * m(2 * p)), m(4 * p) / m(2 * p) ** 2
  return 6 * above - 1 - spread


def _top(powers, s_NP):
  """Where a parabola through the greatest and its neighbours has its top."""
  best = np.argmax(s_NP, 1)
  at = np.clip(best, 1, len(powers) - 2)[:, None] + np.arange(-1, 2)
  x, y = powers[at], np.take_along_axis(s_NP, at, 1)
  slope = np.diff(y) / np.diff(x)
  bend = (slope[:, 1] - slope[:, 0]) / (x[:, 2] - x[:, 0])
  top = (x[:, 0] + x[:, 1]) / 2 - slope[:, 0] / (2 * bend)
  return np.where(bend < 0, np.clip(top, powers[0], powers[-1]), powers[best])
