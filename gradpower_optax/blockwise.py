"""Learning rates by block: the published ratios, their warm-up and return."""

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

# A tree of block names, a prefix of one, or a function from parameters to it.
Labels: TypeAlias = Any | Callable[[optax.Params], Any]

#: Learning rates over the base's: norms, value and output projections, the
#: feed-forward network, query and key projections, embedding, output head.
RATIOS: Mapping[str, float] = MappingProxyType(
  {'norm': 1, 'vo': 4, 'ffn': 6, 'qk': 8, 'embedding': 10, 'lm_head': 1}
)


def blockwise_schedule(
  ratio: float, warmup_steps: int, steps: int | None = None
) -> optax.Schedule:
  r"""What one block's learning rate is over the base's, step by step.

  It is 1 while the base warms up, and then ``count / warmup_steps`` until it
  is the ratio: in all, the block climbs at the base's slope, through ``ratio``
  times its warm-up, to ``ratio`` times its peak. Given the steps of a
  warm-up-stable-decay run, the ratio holds for a third of them and falls
  linearly to 1 by two thirds, where that schedule begins to decay. So does the
  authors' code; but where the climb would not be done after a third, here it
  ends where it meets the fall.

  Under a base that decays from its warm-up on, a cosine say, the multiple is
  this library's reading: it climbs and then stays, while in the authors' code
  such a block's own cosine begins at the end of its own warm-up.

  Args:
    ratio: Peak learning rate over the base's, finite and at least 1.
    warmup_steps: Of the base, in steps, at least 0.
    steps: Of the whole run under warm-up-stable-decay, at least 1; None where
      the ratio is not to return, as under a cosine.

  Returns:
    A schedule: a function from the step count, of any integer dtype, to a
    float32 scalar from 1 to the ratio, finite also where the base's is 0.

  Raises:
    ValueError: one of them is out of range.

  Examples:
    >>> from gradpower_optax import blockwise_schedule
    >>> multiplier = blockwise_schedule(4.0, warmup_steps=10, steps=300)
    >>> print(*(f'{multiplier(t):.1f}' for t in (0, 10, 20, 40, 100, 150, 200)))
    1.0 1.0 2.0 4.0 4.0 2.5 1.0

  References:
    Wang et al, `The Sharpness Disparity Principle in Transformers for
    Accelerating Language Model Pre-Training
    <https://arxiv.org/abs/2502.19002>`_, 2025
  """
  if not (1 <= ratio < math.inf):
    raise ValueError(f'blockwise: a ratio must be at least 1, not {ratio}')
  if not (0 <= warmup_steps < math.inf):
    raise ValueError(
      f'blockwise: warmup_steps must be at least 0, not {warmup_steps}'
    )
  if steps is not None and not (1 <= steps < math.inf):
    raise ValueError(f'blockwise: steps must be at least 1, not {steps}')

  def schedule(count):
    count = jnp.asarray(count, jnp.float32)
    rise = count / warmup_steps if warmup_steps else jnp.full_like(count, ratio)
    boost = jnp.clip(rise, 1.0, ratio)
    if steps is None:
      return boost
    back = jnp.clip(2.0 - 3.0 * count / steps, 0.0, 1.0)
    return jnp.minimum(boost, 1.0 + (ratio - 1.0) * back)

  return schedule


def scale_by_blockwise(
  labels: Labels,
  warmup_steps: int,
  steps: int | None = None,
  ratios: Mapping[str, float] = RATIOS,
) -> optax.GradientTransformation:
  """Gives each block of parameters its own multiple of the learning rate.

  Chain it after an optimizer that has the base learning rate. It multiplies
  whatever that has made of a block's gradients, decoupled weight decay
  included, as a learning rate of the block's own would. The state counts
  steps, each call being one.

  Args:
    labels: The block that each parameter belongs to, a key of ``ratios``: a
      tree of names with the structure of the parameters, a prefix of one, or
      a function from parameters to one.
    warmup_steps: Of the base schedule, as in :func:`blockwise_schedule`.
    steps: As in :func:`blockwise_schedule`.
    ratios: Peak learning rates over the base's, each at least 1.

  Returns:
    A :class:`optax.GradientTransformation` object. Updates keep their dtype,
    shape and sharding and are rounded once.

  Raises:
    ValueError: as :func:`blockwise_schedule`; or, from ``init`` and
      ``update``, labels do not have the structure of the parameters or of a
      prefix, or hold a name that ``ratios`` lacks.

  Examples:
    >>> import jax.numpy as jnp
    >>> import optax
    >>> from gradpower_optax import adamw_power, scale_by_blockwise
    >>> tx = optax.chain(
    ...   adamw_power(optax.linear_schedule(0.0, 1e-3, 100), clip_norm=1.0),
    ...   scale_by_blockwise(
    ...     {'query': 'qk', 'gain': 'norm'}, warmup_steps=100, steps=9000
    ...   ),
    ... )
    >>> params = {'query': jnp.ones((4, 4)), 'gain': jnp.ones(4)}
    >>> state = tx.init(params)
    >>> updates, state = tx.update(params, state, params)
    >>> print(int(state[1].count))
    1

  References:
    Wang et al, `The Sharpness Disparity Principle in Transformers for
    Accelerating Language Model Pre-Training
    <https://arxiv.org/abs/2502.19002>`_, 2025
  """
  schedules = {
    name: blockwise_schedule(ratio, warmup_steps, steps)
    for name, ratio in ratios.items()
  }

  def names_of(tree):
    """One for each leaf."""
    if not jax.tree.leaves(tree):
      return []  # Such as what optax.tree.map_params inits with.
    found: list[Any] = []
    try:
      jax.tree.map(
        lambda name, part: found.extend([name] * len(jax.tree.leaves(part))),
        labels(tree) if callable(labels) else labels,
        tree,
      )
    except ValueError as error:
      raise ValueError(
        'scale_by_blockwise: labels must have the structure of the parameters,'
        ' or of a prefix, with a name for each'
      ) from error
    for name in found:
      if not isinstance(name, str) or name not in schedules:
        raise ValueError(
          f'scale_by_blockwise: {name!r} is no block, which are'
          f' {", ".join(schedules)}'
        )
    return found

  def init_fn(params):
    names_of(params)
    return optax.ScaleByScheduleState(count=jnp.zeros([], jnp.int32))

  def update_fn(updates, state, params=None):
    del params
    names = names_of(updates)
    now = {name: schedules[name](state.count) for name in {*names}}
    leaves, structure = jax.tree.flatten(updates)
    scaled = [
      (now[name] * leaf).astype(jnp.result_type(leaf))
      for name, leaf in zip(names, leaves, strict=True)
    ]
    count = optax.safe_increment(state.count)
    state = optax.ScaleByScheduleState(count=count)
    return jax.tree.unflatten(structure, scaled), state

  return optax.GradientTransformation(init_fn, update_fn)
