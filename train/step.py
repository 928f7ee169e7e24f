"""Loss, train step and evaluation step: pure functions of pytrees.

Shape suffixes: B batch, T tokens, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from models.llama import Llama
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
  config: Config, optimizer: optax.GradientTransformation
) -> tuple[Callable[[], TrainState], nnx.GraphDef]:
  """Splits the model into its structure and a function that draws its state.

  Args:
    config: The run; `model.vocab_size` is set.
    optimizer: Whose state to make.

  Returns:
    A function to jit, which returns the state before the first step, and the
    static structure that `loss_fn` merges parameters with.
  """

  def model():
    return Llama(config.model, rngs=nnx.Rngs(params=config.seed))

  graph, _ = nnx.split(nnx.eval_shape(model), nnx.Param)

  def make_state():
    params = nnx.to_pure_dict(nnx.state(model(), nnx.Param))
    return TrainState(params, optimizer.init(params), jnp.zeros((), jnp.int32))

  return make_state, graph


def token_losses(graph: nnx.GraphDef, params: Params, tokens_BU: jax.Array):
  """Cross-entropy of every token after the first, in nats.

  Args:
    graph: The model's structure.
    params: Its parameters.
    tokens_BU: int32 (batch, length + 1).

  Returns:
    float32 (batch, length).
  """
  logits_BTV = nnx.merge(graph, params)(tokens_BU[:, :-1])
  return optax.softmax_cross_entropy_with_integer_labels(
    logits_BTV, tokens_BU[:, 1:]
  )


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
    The state after the step; and float32 scalars: the 'loss' before the step
    in nats a token, and 'grad_norm' before clipping.
  """

  def loss_fn(params):
    return jnp.mean(token_losses(graph, params, batch['tokens']))

  loss, grads = jax.value_and_grad(loss_fn)(state.params)
  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  metrics = {'loss': loss, 'grad_norm': optax.tree.norm(grads)}
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
    The weighted sum of losses in nats, and the sum of weights.
  """
  losses_BT = token_losses(graph, params, batch['tokens'])
  return jnp.sum(losses_BT * batch['weights']), jnp.sum(batch['weights'])
