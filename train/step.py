"""Train step and evaluation step: pure functions of pytrees.

Shape suffixes: B batch, T tokens, U one more than those.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from models import families
from models.decoder import Decoder, LossSums, mean_losses, total_loss
from train.config import Config

Params = Any


class TrainState(NamedTuple):
  """All that a step changes."""

  params: Params
  """Nested dict of float32 arrays."""
  opt_state: optax.OptState
  """Of the chain in `train/optimizer.py`."""
  step: jax.Array
  """int32 scalar: steps taken."""


def init(
  config: Config,
  optimizer: optax.GradientTransformation,
  mesh: Mesh | None = None,
) -> tuple[Callable[[], TrainState], nnx.GraphDef]:
  """Splits the model into its structure and a function that draws its state.

  Args:
    config: The run; `model.vocab_size` is set.
    optimizer: Whose state to make.
    mesh: Where steps will run; see `models.decoder.Decoder`.

  Returns:
    A function to jit, which returns the state before the first step, and the
    static structure that parameters are merged with.
  """

  def model():
    rngs = nnx.Rngs(params=config.seed)
    return families.build(config.model, rngs=rngs, mesh=mesh)

  graph, _ = nnx.split(nnx.eval_shape(model), nnx.Param)

  def make_state():
    params = nnx.to_pure_dict(nnx.state(model(), nnx.Param))
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))

  return make_state, graph


def train_step(
  graph: nnx.GraphDef,
  optimizer: optax.GradientTransformation,
  state: TrainState,
  batch: dict[str, jax.Array],
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One optimizer step on the mean loss of a global batch.

  Args:
    graph: The model's structure; static.
    optimizer: The chain; static.
    state: To be donated.
    batch: 'tokens', int32 (batch, length + 1).

  Returns:
    The state after the step; and of before it `models.decoder.mean_losses`,
    'grad_norm', a float32 scalar, before clipping, and 'expert_load_max',
    (layers,), in the place of 'expert_load'.
  """

  def loss_fn(params):
    model = nnx.merge(graph, params)
    sums = _loss_sums(model, batch)
    return total_loss(sums, model.config), mean_losses(sums, model.config)

  grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
  (_, metrics), grads = grad_fn(state.params)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  metrics['grad_norm'] = optax.tree.norm(grads)
  if 'expert_load' in metrics:
    metrics['expert_load_max'] = jnp.max(metrics.pop('expert_load'), axis=1)
  return TrainState(params, opt_state, state.step + 1), metrics


def eval_step(
  graph: nnx.GraphDef, params: Params, batch: dict[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
  """Sums the loss of a batch.

  Args:
    graph: The model's structure; static.
    params: Its parameters.
    batch: 'tokens', int32 (batch, length + 1), and 'weights', float32 (batch,
      length), 0 on padding.

  Returns:
    The weighted sum of the cross-entropy in nats, and the sum of weights.
  """
  sums = _loss_sums(nnx.merge(graph, params), batch)
  return sums.cross_entropy, sums.weight


def _loss_sums(model: Decoder, batch: dict[str, jax.Array]) -> LossSums:
  tokens_BU = batch['tokens']
  return model.loss_sums(
    tokens_BU[:, :-1], tokens_BU[:, 1:], batch.get('weights')
  )
