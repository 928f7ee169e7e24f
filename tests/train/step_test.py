import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from models.config import LlamaConfig
from models.decoder import total_loss
from models.llama import Llama
from train import step as step_lib
from train.config import Config, DataConfig, MeshConfig, OptimizerConfig
from train.data import layouts
from train.mesh import make_mesh
from train.optimizer import make_optimizer

CONFIG = Config(
  data=DataConfig(vocab_size=257, sequence_length=12, batch_size=8),
  model=LlamaConfig(
    vocab_size=257, d_model=16, n_layers=1, n_heads=2, d_ff=32, init_std=0.3
  ),
  optimizer=OptimizerConfig(
    power=1.2, learning_rate=0.01, schedule='constant', warmup_steps=0
  ),
  steps=10,
  seed=5,
)
TOKENS = np.random.default_rng(0).integers(0, 257, (8, 13)).astype(np.int32)
BATCH = {'tokens': TOKENS}
OPTIMIZER = make_optimizer(CONFIG)
ALONE = make_mesh(CONFIG.mesh, jax.devices()[:1])
MAKE_STATE, GRAPH = step_lib.init(CONFIG, OPTIMIZER, ALONE)
PURE_STEP = functools.partial(
  step_lib.train_step, GRAPH, OPTIMIZER, CONFIG.guard, ALONE, 1
)


@functools.cache
def initial():
  return jax.jit(MAKE_STATE)()


def fresh():
  """The initial state, free to be donated."""
  return jax.tree.map(jnp.copy, initial())


TRAIN_STEP = jax.jit(PURE_STEP)
EVAL_STEP = jax.jit(functools.partial(step_lib.eval_step, GRAPH))


def logits(tokens=TOKENS):
  run = jax.jit(lambda params, tokens: nnx.merge(GRAPH, params)(tokens))
  return np.float64(run(initial().params, tokens[:, :-1]))


def cross_entropy(logits_BTV, targets_BT):
  shifted = logits_BTV - logits_BTV.max(-1, keepdims=True)
  log_z = np.log(np.exp(shifted).sum(-1))
  picked = np.take_along_axis(shifted, targets_BT[..., None], -1)[..., 0]
  return log_z - picked


def test_the_initial_state_is_the_models():
  @jax.jit
  def wanted():
    model = Llama(CONFIG.model, rngs=nnx.Rngs(params=5))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))

  jax.tree.map(np.testing.assert_array_equal, initial().params, wanted())
  assert initial().step == 0
  assert initial().step.dtype == jnp.int32


def test_the_loss_is_the_mean_cross_entropy():
  losses = cross_entropy(logits(), TOKENS[:, 1:])
  _, metrics = TRAIN_STEP(fresh(), BATCH)
  assert float(metrics['loss']) == pytest.approx(losses.mean(), rel=1e-5)
  assert metrics['loss'].dtype == metrics['grad_norm'].dtype == jnp.float32


def test_a_step_is_optax_on_the_gradient_of_the_mean_loss():
  state = initial()

  @jax.jit
  def by_hand(params, opt_state):
    def loss(params):
      log_p_BTV = jax.nn.log_softmax(
        nnx.merge(GRAPH, params)(TOKENS[:, :-1]), axis=-1
      )
      target_BT = TOKENS[:, 1:]
      total = 0.0
      for row, target in zip(log_p_BTV, target_BT, strict=True):
        total -= row[np.arange(len(target)), target].sum()
      return total / target_BT.size

    grads = jax.grad(loss)(params)
    updates, opt_state, _ = OPTIMIZER.update(grads, opt_state, params)
    squares = [jnp.sum(g**2) for g in jax.tree.leaves(grads)]
    return optax.apply_updates(params, updates), opt_state, sum(squares) ** 0.5

  params, opt_state, norm = by_hand(state.params, state.opt_state)
  after, metrics = TRAIN_STEP(fresh(), BATCH)
  assert after.step == 1
  assert float(metrics['grad_norm']) == pytest.approx(float(norm), rel=1e-5)
  assert_near(after.opt_state, opt_state)
  # Adam's first step is the sign of a gradient, so a tiny one may turn over.
  gaps = jax.tree.map(lambda a, b: jnp.abs(a - b), after.params, params)
  gaps = np.concatenate([np.ravel(x) for x in jax.tree.leaves(gaps)])
  assert np.mean(gaps > 1e-5) < 1e-3
  assert any(
    not jnp.array_equal(a, b)
    for a, b in zip(
      jax.tree.leaves(after.params), jax.tree.leaves(state.params), strict=True
    )
  )


def assert_near(tree, other, tolerance=1e-4):
  """Leaves agree relative to the largest number of each."""
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=tolerance,
      atol=tolerance * float(jnp.abs(jnp.asarray(b)).max()),
    ),
    tree,
    other,
  )  # fmt: skip


def test_the_state_can_be_donated():
  state = fresh()
  step = jax.jit(PURE_STEP, donate_argnums=0)
  after, _ = step(state, BATCH)  # An unusable donation would warn.
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state))
  kept, _ = TRAIN_STEP(fresh(), BATCH)
  jax.tree.map(np.testing.assert_array_equal, after, kept)
  assert jax.tree.structure(after) == jax.tree.structure(state)


def test_evaluation_ignores_padding():
  losses = cross_entropy(logits(), TOKENS[:, 1:])
  weights = np.ones((8, 12), np.float32)
  weights[5, 7:] = weights[6:] = 0
  total, count = EVAL_STEP(
    initial().params, {'tokens': TOKENS, 'weights': weights}
  )
  assert float(count) == 5 * 12 + 7
  assert float(total) == pytest.approx((losses * weights).sum(), rel=1e-5)
  other = TOKENS.copy()
  other[5, 8:] = other[6:] = 0  # Targets after the last with a weight.
  padded, _ = EVAL_STEP(initial().params, {'tokens': other, 'weights': weights})
  assert float(padded) == pytest.approx(float(total), rel=1e-6)


def test_a_batch_is_the_mean_of_its_parts():
  @jax.jit
  @jax.grad
  def grads(params, tokens):
    model = nnx.merge(GRAPH, params)
    return total_loss(
      model.loss_sums(tokens[:, :-1], tokens[:, 1:]), CONFIG.model
    )

  params = initial().params
  parts = [grads(params, TOKENS[i : i + 4]) for i in (0, 4)]
  mean = jax.tree.map(lambda a, b: (a + b) / 2, *parts)
  assert_near(grads(params, TOKENS), mean, 1e-5)


def run_programs(config, devices=None):
  """The state and metrics after a step of the whole programs."""
  mesh = make_mesh(config.mesh, devices)
  programs = step_lib.programs(config, mesh)
  batch = jax.device_put({'tokens': TOKENS}, programs.batch['tokens'].sharding)
  return programs.train_step(programs.init(), batch)


@pytest.mark.parametrize('accumulate', [1, 2, 4])
def test_micro_batches_add_up_to_the_batch(accumulate):
  config = dataclasses.replace(CONFIG, accumulate=accumulate)
  after, metrics = run_programs(config, jax.devices()[:1])
  alone, alone_metrics = TRAIN_STEP(fresh(), BATCH)
  assert metrics.keys() == alone_metrics.keys()
  assert_near(metrics, alone_metrics, 1e-5)
  assert_near(after.opt_state, alone.opt_state)


@pytest.mark.parametrize('accumulate', [1, 2])
def test_padding_weighs_the_same_in_any_micro_batch(accumulate):
  # The first micro-batch has one target, the other many.
  weights = np.zeros((8, 12), np.float32)
  weights[0, :1] = weights[4:] = 1
  step = functools.partial(
    step_lib.train_step, GRAPH, OPTIMIZER, CONFIG.guard, ALONE, accumulate
  )
  _, metrics = jax.jit(step)(fresh(), BATCH | {'weights': weights})
  losses = cross_entropy(logits(), TOKENS[:, 1:])
  mean = (losses * weights).sum() / weights.sum()
  assert float(metrics['loss']) == pytest.approx(mean, rel=1e-5)


def test_each_array_lies_where_the_mesh_says():
  config = dataclasses.replace(
    CONFIG,
    model=dataclasses.replace(CONFIG.model, vocab_size=258),
    mesh=MeshConfig(data=2, fsdp=2, tensor=2),
  )
  after, _ = run_programs(config)
  programs = step_lib.programs(config, make_mesh(config.mesh))
  jax.tree.map(
    lambda x, wanted: (
      x.sharding.is_equivalent_to(wanted.sharding, x.ndim)
      or pytest.fail(f'{x.sharding} is not {wanted.sharding}')
    ),
    after,
    programs.state,
  )
  moments = [optax.tree.get(after.opt_state, name) for name in ('mu', 'nu')]
  for tree in (after.params, *moments):
    parts = {s.data.shape for s in tree['embedding'].addressable_shards}
    assert parts == {(129, 8)}  # Vocabulary over tensor, width over fsdp.


def test_bfloat16_keeps_float32_masters():
  model = dataclasses.replace(CONFIG.model, dtype='bfloat16')
  config = dataclasses.replace(CONFIG, model=model, accumulate=2)
  after, metrics = run_programs(config, jax.devices()[:1])
  dtypes = {x.dtype for x in jax.tree.leaves(after.params)}
  assert dtypes == {jnp.dtype('float32')}
  _, exact = TRAIN_STEP(fresh(), BATCH)
  assert float(metrics['loss']) == pytest.approx(float(exact['loss']), rel=1e-2)
  assert float(metrics['loss']) != float(exact['loss'])


def test_initial_parameters_depend_on_the_seed_alone():
  def params(config):
    make_state, _ = step_lib.init(config, make_optimizer(config))
    return jax.jit(make_state)().params

  power = dataclasses.replace(CONFIG.optimizer, power=1.0, learning_rate=1.0)
  same = params(dataclasses.replace(CONFIG, optimizer=power, steps=99))
  jax.tree.map(np.testing.assert_array_equal, same, initial().params)
  other = params(dataclasses.replace(CONFIG, seed=6))
  assert not jnp.array_equal(other['embedding'], same['embedding'])


@pytest.mark.parametrize('where', ['loss', 'gradient'])
def test_a_step_that_is_not_finite_changes_nothing_but_counts(where):
  once, _ = TRAIN_STEP(fresh(), BATCH)
  poison = np.ones((8, 12), np.float32)
  poison[2, 3] = np.nan if where == 'loss' else 3e38
  spoilt, metrics = TRAIN_STEP(once, BATCH | {'weights': poison})
  for name in ('params', 'opt_state'):
    jax.tree.map(
      np.testing.assert_array_equal, getattr(spoilt, name), getattr(once, name)
    )
  assert spoilt.step == 2
  assert metrics['skipped'] == metrics['bad_in_row'] == 1
  # The next batch is taken as if that one had not been.
  after, metrics = TRAIN_STEP(spoilt, BATCH)
  twice, _ = TRAIN_STEP(once, BATCH)
  for name in ('params', 'opt_state'):
    jax.tree.map(
      np.testing.assert_array_equal, getattr(after, name), getattr(twice, name)
    )
  assert (metrics['skipped'], metrics['bad_in_row']) == (1, 0)


def test_a_packed_row_is_its_documents_one_by_one():
  documents = [TOKENS[0, :4], TOKENS[1, :6], TOKENS[2, :9], TOKENS[3, :0]]
  lengths = np.array([len(tokens) for tokens in documents])
  stored = layouts.packed(np.concatenate(documents), lengths, 256, 12)
  batch = layouts.to_batch('packed', stored)
  assert len(batch['tokens']) < len(documents)
  loss, weight = EVAL_STEP(initial().params, batch)
  alone = 0.0
  for tokens in documents:
    row = np.full((1, 13), 256, np.int32)  # It begins and ends a document.
    row[0, 1 : 1 + len(tokens)] = tokens
    losses = cross_entropy(logits(row), row[:, 1:])
    alone += losses[0, : len(tokens) + 1].sum()
  assert float(weight) == lengths.sum() + len(documents)
  assert float(loss) == pytest.approx(alone, rel=1e-5)


@pytest.mark.parametrize('layout', layouts.LAYOUTS)
def test_a_program_takes_the_batches_of_a_layout(layout):
  config = dataclasses.replace(
    CONFIG, data=dataclasses.replace(CONFIG.data, layout=layout)
  )
  programs = step_lib.programs(config, ALONE)
  stored = {
    name: np.ones((8, *shape), dtype)
    for name, (shape, dtype) in layouts.features(layout, 12, 'uint16').items()
  }
  batch = layouts.to_batch(layout, stored)
  chex.assert_trees_all_equal_shapes_and_dtypes(programs.batch, batch)
