"""Steps that change nothing: a loss or gradient that is no number, a spike.

The decision is part of the step's program, so that neither parameters nor
moments nor counters have changed by the time that anyone could look. The batch
is spent all the same: the next step takes the next one.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from train.config import GuardConfig

_DECAY = 0.98  # Of the running estimates: they look back about 50 steps.
_LEAST_SEEN = 50  # Steps before the estimates are trusted.


class Guard(NamedTuple):
  """What the decision rests on; scalars, but for the estimates."""

  bad_in_row: jax.Array
  """int32: steps up to this one without a finite loss and gradient."""
  skipped: jax.Array
  """int32: steps that changed nothing, in all."""
  seen: jax.Array
  """int32: steps that the estimates hold."""
  mean_2: jax.Array
  """float32 (2,): running means of the loss and of the gradient's norm."""
  variance_2: jax.Array
  """float32 (2,): running means of their squared distance from it."""


def init() -> Guard:
  """Before the first step."""
  zero, zeros = jnp.zeros((), jnp.int32), jnp.zeros(2, jnp.float32)
  return Guard(zero, zero, zero, zeros, zeros)


def judge(
  config: GuardConfig,
  guard: Guard,
  loss: jax.Array,
  norms: dict[str, jax.Array],
) -> tuple[jax.Array, Guard]:
  """Decides whether a step may change anything.

  A spike is a loss or gradient norm more than `config.spike` standard
  deviations above its running mean. It enters the estimates as if it lay on
  that border, so that a lasting change of level is accepted in the end.

  Args:
    config: What to skip.
    guard: From before the step.
    loss: Of the batch, float32 scalar.
    norms: Of `train.optimizer.Optimizer`; all of them must be finite. (One that
      overflows would end in the moments as infinity, for good.)

  Returns:
    A scalar, true where the step counts; and the guard after it.
  """
  finite = jnp.isfinite(loss)
  for norm in norms.values():
    finite &= jnp.isfinite(norm)
  take = finite
  if config.spike:
    now_2 = jnp.stack([loss, norms['grad_norm']])
    border_2 = guard.mean_2 + config.spike * jnp.sqrt(guard.variance_2)
    trusted = guard.seen >= _LEAST_SEEN
    take &= ~(trusted & jnp.any(now_2 > border_2))
    held_2 = jnp.where(trusted, jnp.minimum(now_2, border_2), now_2)
    guard = keep(finite, _seen(guard, held_2), guard)
  return take, guard._replace(
    bad_in_row=jnp.where(finite, 0, guard.bad_in_row + 1),
    skipped=guard.skipped + ~take,
  )


def _seen(guard: Guard, now_2: jax.Array) -> Guard:
  """The estimates with one more step: plain means at first, then decaying."""
  weight = jnp.maximum(1 - _DECAY, 1 / (guard.seen + 1.0))
  away_2 = now_2 - guard.mean_2
  return guard._replace(
    seen=guard.seen + 1,
    mean_2=guard.mean_2 + weight * away_2,
    variance_2=(1 - weight) * (guard.variance_2 + weight * away_2**2),
  )


def keep(take: jax.Array, new: Any, old: Any) -> Any:
  """The new tree where the step counts, else the old; in one pass over both."""
  return jax.tree.map(lambda a, b: jnp.where(take, a, b), new, old)
