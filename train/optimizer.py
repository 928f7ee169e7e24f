"""A config as an optax chain, in the documented order: clip, power, AdamW.

`docs/order.md` has the reasons for the order and the measurements.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from gradpower_optax import sign_power
from train.config import Config, OptimizerConfig


def schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
  """The learning rate at each step count, from 0 to steps - 1.

  Args:
    config: The peak, the kind of decay and where it ends.
    steps: Optimizer steps of the whole run.

  Returns:
    A function from the step count to a learning rate. Under 'wsd' it is
    constant until two thirds of the steps (the authors' code), then linear.
  """
  peak, warmup = config.learning_rate, config.warmup_steps
  final = peak * config.final_lr_ratio
  warm = optax.linear_schedule(0.0, peak, warmup)
  if config.schedule == 'constant':
    return optax.join_schedules([warm, optax.constant_schedule(peak)], [warmup])
  if config.schedule == 'cos':
    cosine = optax.cosine_decay_schedule(
      peak, steps - warmup, config.final_lr_ratio
    )
    return optax.join_schedules([warm, cosine], [warmup])
  decay_from = max(warmup, 2 * steps // 3)
  decay = optax.linear_schedule(peak, final, steps - decay_from)
  return optax.join_schedules(
    [warm, optax.constant_schedule(peak), decay], [warmup, decay_from]
  )


class Optimizer(NamedTuple):
  """An optax transform that also tells what it measured on its way."""

  init: Callable[[Any], optax.OptState]
  """Parameters to the state of the chain."""
  update: Callable[
    [Any, optax.OptState, Any],
    tuple[Any, optax.OptState, dict[str, jax.Array]],
  ]
  """(gradients, state, parameters) to updates, state, and float32 scalars:
  global norms 'grad_norm' before clipping, 'clipped_norm' after it and
  'powered_norm' after the power."""


def make_optimizer(config: Config) -> Optimizer:
  """Returns the chain; its gradients are means over the global batch."""
  c = config.optimizer
  clip = (optax.clip_by_global_norm(c.clip_norm),) if c.clip_norm else ()
  chain = optax.chain(
    *clip,
    sign_power(c.power, eps=c.power_eps),
    optax.adamw(
      schedule(c, config.steps),
      b1=c.b1,
      b2=c.b2,
      eps=c.eps,
      weight_decay=c.weight_decay,
    ),
  )

  def update(grads, state, params):
    updates, state = chain.update(grads, state, params)
    return updates, state, {'grad_norm': optax.tree.norm(grads)}

  return Optimizer(chain.init, update)
