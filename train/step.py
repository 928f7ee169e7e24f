"""Train step and evaluation step: pure functions of pytrees.

Shape suffixes: B batch, T tokens, U one more than those.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from models import families, sharding
from models.decoder import Decoder, LossSums, mean_losses, total_loss
from train.config import Config
from train.mesh import batch_sharding, check, replicated
from train.optimizer import Optimizer, make_optimizer

Params = Any


class TrainState(NamedTuple):
  """All that a step changes."""

  params: Params
  """Nested dict of float32 arrays."""
  opt_state: optax.OptState
  """Of the chain in `train/optimizer.py`."""
  step: jax.Array
  """int32 scalar: steps taken."""


class Programs(NamedTuple):
  """What a run compiles: `jax.jit` functions, and the shapes they take.

  For a mesh of devices that are not there, `train_step.lower(state, batch)`
  can be compiled all the same.
  """

  init: Any
  """() to the `TrainState` before the first step, each array on its devices."""
  train_step: Any
  """(state, batch) to (state, metrics); donates the state."""
  eval_step: Any
  """(params, batch with 'weights') to the sums of losses and of weights."""
  state: TrainState
  """`jax.ShapeDtypeStruct`s with shardings."""
  batch: dict[str, jax.ShapeDtypeStruct]
  """Likewise: 'tokens', int32 (batch, length + 1)."""


def programs(config: Config, mesh: Mesh) -> Programs:
  """Makes the programs of a run.

  Args:
    config: The run; `model.vocab_size` is set.
    mesh: Over `models.sharding.AXES`.

  Raises:
    UserError: the mesh does not fit the config; before anything is compiled.
  """
  check(config, mesh)
  optimizer = make_optimizer(config)
  make_state, graph = init(config, optimizer, mesh)
  shapes = jax.eval_shape(make_state)
  whole = replicated(mesh)
  model = nnx.merge(graph, shapes.params)
  of_params = sharding.param_shardings(model, mesh)
  shardings = TrainState(
    of_params,
    optax.tree.map_params(
      optimizer,
      lambda _, place: place,
      shapes.opt_state,
      of_params,
      transform_non_params=lambda _: whole,
    ),
    whole,
  )
  state = jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    shapes,
    shardings,
  )
  rows, length = config.data.batch_size, config.data.sequence_length
  tokens = jax.ShapeDtypeStruct(
    (rows, length + 1), jnp.int32, sharding=batch_sharding(mesh)
  )
  step = functools.partial(
    train_step, graph, optimizer, mesh, config.accumulate
  )
  return Programs(
    init=jax.jit(make_state, out_shardings=shardings),
    train_step=jax.jit(
      step, donate_argnums=0, out_shardings=(shardings, whole)
    ),
    eval_step=jax.jit(
      functools.partial(eval_step, graph), out_shardings=whole
    ),
    state=state,
    batch={'tokens': tokens},
  )


def init(
  config: Config, optimizer: Optimizer, mesh: Mesh | None = None
) -> tuple[Any, nnx.GraphDef]:
  """Splits the model into its structure and a function that draws its state.

  Args:
    config: The run; `model.vocab_size` is set.
    optimizer: Whose state to make.
    mesh: Where steps will run; see `models.decoder.Decoder`.

  Returns:
    A function to jit, which returns the `TrainState` before the first step, and
    the static structure that parameters are merged with.
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
  optimizer: Optimizer,
  mesh: Mesh,
  accumulate: int,
  state: TrainState,
  batch: dict[str, jax.Array],
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One optimizer step on the mean loss of a global batch.

  Args:
    graph: The model's structure; static.
    optimizer: Of `train/optimizer.py`; static.
    mesh: Where it runs; static.
    accumulate: Micro-batches to take the batch in; static.
    state: To be donated.
    batch: 'tokens', int32 (batch, length + 1).

  Returns:
    The state after the step; and of before it `models.decoder.mean_losses`,
    with 'expert_load_max', (layers,), in the place of 'expert_load'; and the
    norms that the optimizer measured.
  """
  grads, metrics = _gradients(graph, mesh, accumulate, state.params, batch)
  updates, opt_state, norms = optimizer.update(
    grads, state.opt_state, state.params
  )
  params = optax.apply_updates(state.params, updates)
  if 'expert_load' in metrics:
    metrics['expert_load_max'] = jnp.max(metrics.pop('expert_load'), axis=1)
  return TrainState(params, opt_state, state.step + 1), metrics | norms


def _gradients(graph, mesh, accumulate, params, batch):
  """Gradients of the mean loss of a batch, and the losses."""
  del mesh, accumulate

  def loss_fn(params):
    model = nnx.merge(graph, params)
    sums = _loss_sums(model, batch)
    return total_loss(sums, model.config), mean_losses(sums, model.config)

  grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
  (_, metrics), grads = grad_fn(params)
  return grads, metrics


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
