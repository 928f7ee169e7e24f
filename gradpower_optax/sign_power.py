"""GradPower as a gradient transformation: sign(g) (|g| + eps)^p."""

import math
import numbers
import warnings
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gradpower_optax import power as _power

_LARGEST_POWER = 1e6  # Beyond it float32 has no digit of |g|^p right.

PowerOrSchedule = float | jax.Array | np.ndarray | Callable[..., jax.Array]


def sign_power(
  p: PowerOrSchedule, *, eps: float = 0.0
) -> optax.GradientTransformation:
  r"""Raises every gradient element to a power, keeping its sign.

  .. math::

    g \leftarrow \mathrm{sign}(g)\,(|g| + \epsilon)^p

  Place it after clipping and before the base optimizer, whose hyperparameters
  stay as they are; ``docs/order.md`` of the project shows why. Gradients must
  be averaged over micro-batches and devices first: the power of a mean is not
  the mean of powers.

  Every leaf keeps its dtype, shape and sharding. float16, bfloat16 and float8
  leaves are computed in float32 and rounded once. In float32 and with eps = 0
  the result is within 2 units in the last place for p up to 3, and within
  p / 3 + 1 for greater p, wherever input and result are normal numbers.
  ``p = 1`` returns the same bits. Leaves that are None or masked pass through.

  Equal elements of one dtype give equal bits, whatever the shape and sharding
  of their leaves, with one exception. On a CPU, XLA of jax 0.12 may fuse a
  product into a sum for some elements of a leaf whose last axis has 3 to 16
  elements and not for others. Equal elements may then differ in the last bits,
  within the bound. Where XLA fuses the power into what reads it, the same may
  happen.

  Args:
    p: The power, positive. A Python number is taken as the double that it is
      and kept out of the state. A scalar array is taken as its float32 value
      (float64 for float64 leaves). A schedule, a function of the step count,
      returns the one or the other. Under :func:`optax.inject_hyperparams`,
      pass ``hyperparam_dtype=jnp.float32`` when parameters are in a narrower
      dtype: bfloat16 turns 1.2 into 1.203.
    eps: Added to the magnitude before the power; 0, the default, is the
      paper's formula, 1e-8 what the authors' code computes.

  Returns:
    A :class:`optax.GradientTransformation` object. Its state is empty, or
    counts steps where p is a schedule.

  Raises:
    ValueError: p is not a positive scalar below 1e6, or eps is negative,
      infinite or NaN. A value that is traced, a schedule's under jit say,
      cannot be looked at.
    TypeError: p or eps is not a real number; or, from ``update``, a gradient
      leaf is not a real floating array.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax
    >>> from gradpower_optax import sign_power
    >>> tx = optax.chain(
    ...   optax.clip_by_global_norm(1.0), sign_power(1.2), optax.adamw(1e-3)
    ... )
    >>> params = {'w': jnp.array([1.0, -2.0])}
    >>> state = tx.init(params)
    >>> grads = {'w': jnp.array([0.5, -0.25])}
    >>> updates, state = tx.update(grads, state, params)
    >>> squared, _ = sign_power(2.0).update(grads, optax.EmptyState())
    >>> print(squared['w'])
    [ 0.25   -0.0625]

  References:
    Wang et al, `GradPower: Powering Gradients for Faster Language Model
    Pre-Training <https://arxiv.org/abs/2505.24275>`_, 2025, Section 3
  """
  eps = _checked_eps(eps)

  if callable(p):
    schedule = p

    def init_fn(params):
      del params
      return optax.ScaleByScheduleState(count=jnp.zeros([], jnp.int32))

    def scheduled_update_fn(updates, state, params=None):
      del params
      now = _checked_power(schedule(state.count))
      count = optax.safe_increment(state.count)
      state = optax.ScaleByScheduleState(count=count)
      return _apply(updates, now, eps), state

    return optax.GradientTransformation(init_fn, scheduled_update_fn)

  fixed = _checked_power(p)

  def update_fn(updates, state, params=None):
    del params
    return _apply(updates, fixed, eps), state

  return optax.GradientTransformation(
    lambda params: optax.EmptyState(), update_fn
  )


def _apply(updates, p, eps):
  def leaf(path, g):
    dtype = _dtype(g)
    if not jnp.issubdtype(dtype, jnp.floating):
      name = jax.tree_util.keystr(path) or 'the gradient'
      raise TypeError(
        'sign_power takes gradients of a real floating dtype, but '
        f'{name} is {dtype}; differentiate with respect to real floating '
        'parameters only, or keep other leaves out with optax.masked or '
        'optax.partition.'
      )
    return _power.signed_power(jnp.asarray(g), p, eps)

  return jax.tree_util.tree_map_with_path(leaf, updates)


def _dtype(leaf):
  if hasattr(leaf, 'dtype'):
    return leaf.dtype
  if isinstance(leaf, numbers.Number):
    return jnp.result_type(leaf)
  return np.asarray(leaf).dtype  # No number: something to name in an error.


def _checked_power(p):
  """Returns p as a float or a scalar array, or says what is wrong with it."""
  p = _checked_scalar('p', p, 'a positive number, a scalar array or a schedule')
  if _is_known(p) and not 0 < float(p) < _LARGEST_POWER:
    raise ValueError(
      f'sign_power: p must be positive and below {_LARGEST_POWER:g}, got {p}; '
      'the paper uses 1.2, and 1.0 leaves gradients as they are.'
    )
  if not isinstance(p, float) and jnp.finfo(p.dtype).bits < 32:
    warnings.warn(
      f'sign_power: p arrives as {p.dtype}, which rounds it (bfloat16 turns '
      '1.2 into 1.203). optax.inject_hyperparams casts hyperparameters to '
      "the parameters' dtype: pass it hyperparam_dtype=jnp.float32.",
      stacklevel=3,
    )
  return p


def _checked_eps(eps):
  """Returns eps as a float or a scalar array, or says what is wrong with it."""
  eps = _checked_scalar('eps', eps, 'a number or a scalar array')
  if _is_known(eps) and not (math.isfinite(eps) and eps >= 0):
    raise ValueError(
      f'sign_power: eps must be finite and not negative, got {eps}.'
    )
  return eps


def _is_known(value) -> bool:
  return not isinstance(value, jax.core.Tracer)


def _checked_scalar(name, value, wanted):
  """Returns a Python number as a float, an array as it is if it is scalar."""
  if isinstance(value, np.generic) and not isinstance(
    value, (np.float32, np.float64, np.integer, np.bool_)
  ):
    value = np.asarray(value)  # float16, bfloat16 and their like.
  if isinstance(value, (np.ndarray, jax.Array)):
    if value.shape:
      raise ValueError(
        f'sign_power: {name} must be a scalar, got an array of shape '
        f'{value.shape}; for a value per group use optax.partition.'
      )
    if jnp.issubdtype(value.dtype, jnp.integer):
      return value.astype(jnp.float32)
    if jnp.issubdtype(value.dtype, jnp.floating):
      return value
  elif isinstance(value, numbers.Real) and not isinstance(value, bool):
    try:
      return float(value)
    except OverflowError:  # An int of hundreds of digits.
      return math.inf
  raise TypeError(f'sign_power: {name} must be {wanted}, got {value!r}.')
