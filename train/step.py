"""Train step and evaluation step: pure functions of pytrees.

Shape suffixes: B batch, T tokens, U one more than those.
"""

import functools
import pathlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from models import families, precision, sharding
from models.decoder import (
  Decoder,
  LossSums,
  count_targets,
  mean_losses,
  total_loss,
)  # fmt: skip
from train import deterministic, guard
from train.config import Config, GuardConfig
from train.data import layouts
from train.mesh import batch_sharding, check, replicated
from train.optimizer import Optimizer, make_optimizer

Params = Any

# It runs once: on a CPU, compiling it well takes longer than running it.
_INIT_OPTIONS = {'cpu': {'xla_backend_optimization_level': 1}}
# Weights are gathered while the layer before is computed. Read off programs
# compiled ahead of time; not run.
_STEP_OPTIONS = {
  'tpu': {
    'xla_enable_async_all_gather': True,
    'xla_tpu_enable_async_collective_fusion': True,
    'xla_tpu_enable_async_collective_fusion_fuse_all_gather': True,
    'xla_tpu_enable_async_collective_fusion_multiple_steps': True,
    'xla_tpu_overlap_compute_collective_tc': True,
  }
}


class TrainState(NamedTuple):
  """All that a step changes."""

  params: Params
  """Nested dict of float32 arrays."""
  opt_state: optax.OptState
  """Of the chain in `train/optimizer.py`."""
  guard: guard.Guard
  """Which steps have changed nothing."""
  step: jax.Array
  """int32 scalar: steps taken, those too: the next batch's number."""


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
  """Likewise, as of `train.data.layouts.to_batch`: 'tokens', int32 (batch,
  length + 1), and what else the layout of the data has."""


def programs(
  config: Config, mesh: Mesh, directory: pathlib.Path | None = None
) -> Programs:
  """Makes the programs of a run.

  Args:
    config: The run; `model.vocab_size` is set.
    mesh: Over `models.sharding.AXES`.
    directory: Where a deterministic run on a GPU keeps the choice of kernels;
      None for nowhere.

  Raises:
    UserError: the mesh does not fit the config; before anything is compiled.
  """
  check(config, mesh)
  model = abstract_model(config, mesh)
  optimizer = make_optimizer(config, model, mesh)
  make_state, graph = init(config, optimizer, mesh)
  shapes = jax.eval_shape(make_state)
  whole = replicated(mesh)
  of_params = sharding.param_shardings(model, mesh)
  of_opt_state = optax.tree.map_params(
    optimizer,
    lambda x, place: x if isinstance(x, optax.MaskedNode) else place,
    shapes.opt_state,
    of_params,
    transform_non_params=lambda _: whole,
    is_leaf=lambda x: isinstance(x, optax.MaskedNode),
  )
  shardings = shapes._replace(
    params=of_params,
    opt_state=of_opt_state,
    guard=jax.tree.map(lambda _: whole, shapes.guard),
    step=whole,
  )
  state = jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    shapes,
    shardings,
  )
  rows, length = config.data.batch_size, config.data.sequence_length
  split = batch_sharding(mesh)
  batch = {
    name: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=split)
    for name, (shape, dtype) in layouts.batch_shapes(
      config.data.layout or 'stream', length
    ).items()
  }
  step = functools.partial(
    train_step, graph, optimizer, config.guard, mesh, config.accumulate
  )
  platform = sharding.platform(mesh)
  same_bits = deterministic.options(config, platform, directory)
  return Programs(
    init=jax.jit(
      make_state,
      out_shardings=shardings,
      compiler_options=_INIT_OPTIONS.get(platform, same_bits),
    ),
    train_step=jax.jit(
      step,
      donate_argnums=0,
      out_shardings=(shardings, whole),
      compiler_options=_STEP_OPTIONS.get(platform, same_bits),
    ),
    eval_step=jax.jit(
      functools.partial(eval_step, graph),
      out_shardings=whole,
      compiler_options=same_bits,
    ),
    state=state,
    batch=batch,
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
  graph, _ = nnx.split(abstract_model(config, mesh), nnx.Param)

  def make_state():
    params = nnx.to_pure_dict(nnx.state(_model(config, mesh), nnx.Param))
    return TrainState(
      params, optimizer.init(params), guard.init(), jnp.zeros((), jnp.int32)
    )

  return make_state, graph


def abstract_model(config: Config, mesh: Mesh | None = None) -> Decoder:
  """The model of a run with shapes in the place of parameters."""
  return nnx.eval_shape(lambda: _model(config, mesh))


def _model(config: Config, mesh: Mesh | None) -> Decoder:
  rngs = nnx.Rngs(params=config.seed)
  return families.build(config.model, rngs=rngs, mesh=mesh)


def train_step(
  graph: nnx.GraphDef,
  optimizer: Optimizer,
  guarded: GuardConfig,
  mesh: Mesh,
  accumulate: int,
  state: TrainState,
  batch: dict[str, jax.Array],
) -> tuple[TrainState, dict[str, jax.Array]]:
  """One optimizer step on the mean loss of a global batch.

  Args:
    graph: The model's structure; static.
    optimizer: Of `train/optimizer.py`; static.
    guarded: Which steps change nothing but counts; static.
    mesh: Where it runs; static.
    accumulate: Micro-batches to take the batch in; static.
    state: To be donated.
    batch: As in `Programs`.

  Returns:
    The state after the step; and of before it `models.decoder.mean_losses`,
    with 'expert_load_max', (layers,), in the place of 'expert_load'; the norms
    that the optimizer measured; and of after it the int32 'skipped' and
    'bad_in_row' of `train.guard.Guard`.
  """
  grads, metrics = gradients(graph, mesh, accumulate, state.params, batch)
  updates, opt_state, norms = optimizer.update(
    grads, state.opt_state, state.params
  )
  params = optax.apply_updates(state.params, updates)
  take, watch = guard.judge(guarded, state.guard, metrics['loss'], norms)
  params, opt_state = guard.keep(
    take, (params, opt_state), (state.params, state.opt_state)
  )
  counts = {'skipped': watch.skipped, 'bad_in_row': watch.bad_in_row}
  if 'expert_load' in metrics:
    metrics['expert_load_max'] = jnp.max(metrics.pop('expert_load'), axis=1)
  after = TrainState(params, opt_state, watch, state.step + 1)
  return after, metrics | norms | counts


def gradients(
  graph: nnx.GraphDef,
  mesh: Mesh,
  accumulate: int,
  params: Params,
  batch: dict[str, jax.Array],
) -> tuple[Params, dict[str, jax.Array]]:
  """Gradients of the mean loss of a batch, and its `mean_losses`.

  Each micro-batch's loss is divided by the counts of the whole batch, so that
  gradients add up to the batch's. Copies of the model along 'data' add up
  their own in float32 and are reduced once, after the last micro-batch. Along
  the other axes, where no device holds a whole gradient, each micro-batch's is
  reduced to the part that a device keeps.

  A single micro-batch is left to the compiler, which reduces a layer's
  gradients while it computes those of the layer before.
  """
  model = nnx.merge(graph, params)
  if 'weights' not in batch:
    ones = jnp.ones_like(batch['tokens'][:, 1:], jnp.float32)
    batch = {**batch, 'weights': ones}
  counts = count_targets(batch['weights'])

  def loss_fn(params, batch, counts):
    sums = _loss_sums(nnx.merge(graph, params), batch)
    return total_loss(sums._replace(**counts), model.config), sums

  def local(params, batch, counts):
    params = precision.cast(model, params)
    grad_fn = jax.grad(loss_fn, has_aux=True)
    if accumulate == 1:
      grads, sums = grad_fn(params, batch, counts)
      return jax.tree.map(_wide, grads), sums

    def add(totals, batch):
      new = grad_fn(params, batch, counts)
      totals = jax.tree.map(lambda total, x: total + x, totals, new)
      return (place(totals[0]), totals[1]), None

    micro_batches = jax.tree.map(
      functools.partial(_split_batch, mesh, accumulate), batch
    )
    shapes = jax.eval_shape(
      grad_fn, params, jax.tree.map(lambda x: x[0], micro_batches), counts
    )
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)
    totals, _ = jax.lax.scan(add, zeros, micro_batches)
    return totals

  def place(grads):
    if mesh.size == 1:
      return grads
    where = sharding.param_shardings(model, mesh)
    return jax.lax.with_sharding_constraint(grads, where)

  if accumulate > 1 and mesh.shape['data'] > 1:
    grads, sums = jax.shard_map(
      lambda *arrays: jax.lax.psum(local(*arrays), 'data'),
      mesh=mesh,
      in_specs=(PartitionSpec(), PartitionSpec('data'), PartitionSpec()),
      out_specs=PartitionSpec(),
      axis_names={'data'},
      check_vma=False,  # Kernels inside do not say over which axes they vary.
    )(params, batch, counts)
  else:
    grads, sums = local(params, batch, counts)
  return grads, mean_losses(sums, model.config)


def _wide(x):
  return x.astype(jnp.float32)


def _split_batch(mesh, count, x_BU):
  """Rows in `count` micro-batches, (count, B / count, ...).

  Each takes its share of the rows of every device, so that none travels.
  """
  ways = sharding.ways(mesh, 'batch')
  x_DCRU = x_BU.reshape(ways, count, -1, *x_BU.shape[1:])
  x_CBU = x_DCRU.swapaxes(0, 1).reshape(count, -1, *x_BU.shape[1:])
  return sharding.constrain(x_CBU, mesh, None, 'batch', 'length')


def eval_step(
  graph: nnx.GraphDef, params: Params, batch: dict[str, jax.Array]
) -> tuple[jax.Array, jax.Array]:
  """Sums the loss of a batch.

  Args:
    graph: The model's structure; static.
    params: Its parameters.
    batch: As in `Programs`, and 'weights', float32 (batch, length), 0 on
      padding.

  Returns:
    The weighted sum of the cross-entropy in nats, and the sum of weights.
  """
  sums = _loss_sums(nnx.merge(graph, params), batch)
  return sums.cross_entropy, sums.weight


def _loss_sums(model: Decoder, batch: dict[str, jax.Array]) -> LossSums:
  tokens_BU = batch['tokens']
  return model.loss_sums(
    tokens_BU[:, :-1],
    tokens_BU[:, 1:],
    batch.get('weights'),
    batch.get('positions'),
    batch.get('segments'),
  )
