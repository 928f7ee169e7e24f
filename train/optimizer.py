"""A config as an optax chain, in the documented order: clip, power, optimizer.

After it, where asked for, the multiples of Blockwise LR.

`docs/order.md` has the reasons for the order and the measurements.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from jax.sharding import Mesh
from optax.contrib import MuonDimensionNumbers

from gradpower_optax import muon, sign_power
from gradpower_optax.blockwise import scale_by_blockwise
from models import sharding
from models.blocks import blocks
from models.matrices import Matrix, matrices
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
  powered: Callable[[Any], Any]
  """Gradients to what the base optimizer takes: clipped, then powered, then
  scaled back where `match_norm` says so."""


def make_optimizer(
  config: Config, model: nnx.Module | None = None, mesh: Mesh | None = None
) -> Optimizer:
  """Returns the chain; its gradients are means over the global batch.

  State and updates are those of `optax.chain`; `_clip_and_power` has what
  compilers make of it. The norms take no further pass over the gradients, but
  for a CPU without a clip. They are nan or inf where a gradient is. The last is
  also 0 or inf where |g|^(2 power) leaves the range of float32, as AdamW's
  second moment does.

  Args:
    config: The run.
    model: Abstract, of whose parameters Muon takes the matrices and
      `blockwise` the blocks; AdamW alone need not know it.
    mesh: Where the parameters lie, if on several devices.
  """
  c = config.optimizer
  clip = (optax.clip_by_global_norm(c.clip_norm),) if c.clip_norm else ()
  base = _base(config, model, mesh)
  chain = optax.chain(*clip, sign_power(c.power, eps=c.power_eps), base)

  def update(grads, state, params):
    norm = optax.tree.norm(grads)
    into_base, powered_norm = _clip_and_power(c, grads, norm)
    if c.match_norm:
      into_base = _match(into_base, powered_norm, _clip(c, norm, norm))
    *others, of_base = state
    updates, of_base = base.update(into_base, of_base, params)
    norms = {
      'grad_norm': norm,
      'clipped_norm': _clip(c, norm, norm),
      'powered_norm': powered_norm,
    }
    return updates, (*others, of_base), norms

  def powered(grads):
    norm = optax.tree.norm(grads)
    into_base, powered_norm = _clip_and_power(c, grads, norm)
    if c.match_norm:
      into_base = _match(into_base, powered_norm, _clip(c, norm, norm))
    return into_base

  return Optimizer(chain.init, update, powered)


def _base(
  config: Config, model: nnx.Module | None, mesh: Mesh | None
) -> optax.GradientTransformation:
  """What takes the powered gradients."""
  c = config.optimizer
  optimizer = _adamw_or_muon(config, model, mesh)
  if not c.blockwise:
    return optimizer
  if model is None:
    raise ValueError('blockwise needs the model: which parameter is of which')
  steps = config.steps if c.schedule == 'wsd' else None
  # Weight decay is multiplied too: a block has a learning rate of its own.
  return optax.chain(
    optimizer, scale_by_blockwise(blocks(model), c.warmup_steps, steps)
  )


def _adamw_or_muon(
  config: Config, model: nnx.Module | None, mesh: Mesh | None
) -> optax.GradientTransformation:
  c = config.optimizer
  rate = schedule(c, config.steps)
  adamw = optax.adamw(
    rate,
    b1=c.b1,
    b2=c.b2,
    eps=c.eps,
    mu_dtype=c.mu_dtype,
    weight_decay=c.weight_decay,
  )
  if c.name == 'adamw':
    return adamw
  if model is None:
    raise ValueError('muon needs the model: which parameters are matrices')
  table = jax.tree.map(
    lambda matrix: matrix and MuonDimensionNumbers(*matrix),
    matrices(model, per_head=c.per_head),
    is_leaf=lambda x: x is None or isinstance(x, Matrix),
  )
  # As in Liu et al, arXiv 2502.16982, and the authors' script: one learning
  # rate and decay for all, matrices' updates scaled to the size of AdamW's,
  # which is without Nesterov momentum. (Muon's own Adam has it with Muon.)
  of_matrices = muon(
    rate,
    beta=0.95,
    eps=c.eps,
    weight_decay=c.weight_decay,
    mu_dtype=c.mu_dtype,
    muon_weight_dimension_numbers=table,
    consistent_rms=0.2,
    param_shardings=mesh and sharding.param_shardings(model, mesh),
  )
  labels = jax.tree.map(
    lambda numbers: 'adamw' if numbers is None else 'muon',
    table,
    is_leaf=lambda x: x is None or isinstance(x, MuonDimensionNumbers),
  )
  groups = {'adamw': adamw, 'muon': of_matrices}
  return optax.partition(groups, labels)


def _clip(c: OptimizerConfig, tree: Any, norm: jax.Array) -> Any:
  """As `optax.clip_by_global_norm`, of a norm that is known."""
  if not c.clip_norm:
    return tree

  def clip(x):
    scaled = (x / norm.astype(x.dtype)) * c.clip_norm
    return lax.select(norm < c.clip_norm, x, scaled)

  return jax.tree.map(clip, tree)


def _match(tree: Any, norm: jax.Array, wanted: jax.Array) -> Any:
  """Scales a tree of that norm to another; one of norm 0 stays."""
  factor = jnp.where(norm > 0, wanted / norm, 1.0)
  return jax.tree.map(lambda x: x * factor.astype(x.dtype), tree)


def _clip_and_power(
  c: OptimizerConfig, grads: Any, norm: jax.Array
) -> tuple[Any, jax.Array]:
  """Clips and takes the power; to the bit what the links of the chain do.

  Args:
    c: What to do.
    grads: Of any structure.
    norm: Theirs.

  Returns:
    The powered gradients, and their norm.
  """
  transform = sign_power(c.power, eps=c.power_eps)

  def power(grads):
    return transform.update(grads, optax.EmptyState())[0]

  def fused(grads, norm):
    powered = power(_clip(c, grads, norm))
    if c.power_eps:
      return powered, optax.tree.norm(powered)
    # With f = clipped norm / norm, the norm of (f g)^p is f^p times that of
    # g^p, which is computed where the norm of g is: one pass over g, and one
    # reduction over the devices.
    factor = _clip(c, jnp.ones_like(norm), norm)
    return powered, factor**c.power * optax.tree.norm(power(grads))

  def branched(grads, norm):
    # On a CPU, XLA makes a loop of each output of AdamW and of each sum, and
    # computes the power in every one. It does not fuse across a branch. (AdamW
    # apart from the power may round the last bit of a moment otherwise.)
    def measured(grads):
      powered = power(grads)
      return powered, optax.tree.norm(powered)

    return lax.cond(
      norm < c.clip_norm,
      measured,
      lambda grads: measured(_clip(c, grads, norm)),
      grads,
    )

  if c.power == 1 and not c.power_eps:
    return _clip(c, grads, norm), _clip(c, norm, norm)
  if not c.clip_norm:
    return fused(grads, norm)
  return lax.platform_dependent(grads, norm, cpu=branched, default=fused)
