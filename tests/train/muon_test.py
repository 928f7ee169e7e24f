"""Muon in the trainer: whose it is, parity with optax's, any mesh, resuming."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

from gradpower_optax import sign_power
from models.config import LlamaConfig, Qwen2MoeConfig
from train import step
from train.__main__ import main
from train.config import Config, DataConfig, MeshConfig, OptimizerConfig
from train.mesh import make_mesh
from train.optimizer import make_optimizer, schedule

SHAPE = {
  'vocab_size': 256, 'd_model': 32, 'n_layers': 3, 'n_heads': 4, 'd_ff': 64,
  'scan_layers': True,
}  # fmt: skip
MODELS = {
  'llama': LlamaConfig(**SHAPE),
  'moe': Qwen2MoeConfig(**SHAPE, n_experts=8, d_expert=16, d_shared=32),
}
OF_LAYER = {
  'query': (1, (2, 3)), 'key': (1, (2, 3)), 'value': (1, (2, 3)),
  'out': ((1, 2), 3), 'gate': (-2, -1), 'up': (-2, -1), 'down': (-2, -1),
  'router': (-2, -1),
}  # fmt: skip


def config_of(family, sizes=None, **optimizer):
  return Config(
    model=MODELS[family],
    data=DataConfig(sequence_length=16, batch_size=8),
    optimizer=OptimizerConfig(
      name='muon', power=1.2, learning_rate=0.01, warmup_steps=2, **optimizer
    ),
    mesh=MeshConfig(**sizes or {}),
    steps=20,
  )


def by_hand(path, x):
  """Which dimensions of a parameter of stacked layers are a matrix's."""
  name = path[-1].key
  if name not in OF_LAYER:
    return None
  return MuonDimensionNumbers(*OF_LAYER[name])


@pytest.mark.slow
@pytest.mark.parametrize('family', MODELS)
def test_it_is_clip_power_and_optaxs_muon(family):
  config = config_of(family, weight_decay=0.1)
  c = config.optimizer
  model = step.abstract_model(config)
  ours = make_optimizer(config, model)
  shapes = jax.eval_shape(step.init(config, ours)[0]).params
  numbers = jax.tree_util.tree_map_with_path(by_hand, shapes)
  adamw = optax.adamw(
    schedule(c, config.steps), b1=0.9, b2=0.95, weight_decay=0.1
  )
  muon = optax.contrib.muon(
    schedule(c, config.steps),
    weight_decay=0.1,
    muon_weight_dimension_numbers=numbers,
    consistent_rms=0.2,
  )
  is_leaf = lambda x: x is None or isinstance(x, MuonDimensionNumbers)
  labels = jax.tree.map(lambda n: str(n is None), numbers, is_leaf=is_leaf)
  optaxs = optax.chain(
    optax.clip_by_global_norm(1.0),
    sign_power(1.2),
    optax.partition({'True': adamw, 'False': muon}, labels),
  )

  def train(optimizer):
    @jax.jit
    def update(params, state, grads):
      updates, state, *_ = optimizer.update(grads, state, params)
      return optax.apply_updates(params, updates), state

    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.normal(size=x.shape), shapes)
    params = jax.tree.map(np.float32, params)
    state = optimizer.init(params)
    for _ in range(3):
      grads = jax.tree.map(lambda x: rng.normal(size=x.shape), shapes)
      params, state = update(params, state, jax.tree.map(np.float32, grads))
    return params

  params, wanted = train(ours), train(optaxs)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), params, wanted
  )


def test_a_model_is_needed():
  with pytest.raises(ValueError, match='muon needs the model'):
    make_optimizer(config_of('llama'))


def losses(config, devices=None, steps=8):
  programs = step.programs(config, make_mesh(config.mesh, devices))
  state, found = programs.init(), []
  rng = np.random.default_rng(0)
  for _ in range(steps):
    rows = np.cumsum(rng.integers(0, 3, (8, 17)), axis=-1) % 256
    batch = jax.device_put(
      {'tokens': rows.astype(np.int32)}, programs.batch['tokens'].sharding
    )
    state, metrics = programs.train_step(state, batch)
    found.append(metrics['loss'])
  return np.asarray(jax.device_get(found))


@pytest.mark.slow
@pytest.mark.parametrize(
  ('family', 'sizes'),
  [
    ('llama', {'data': 2, 'fsdp': 2, 'tensor': 2}),
    ('moe', {'fsdp': 2, 'tensor': 2, 'expert': 2}),
  ],
)
def test_the_mesh_does_not_matter(family, sizes):
  alone = losses(config_of(family), jax.devices()[:1])
  assert alone[-1] < alone[0] - 0.5
  np.testing.assert_allclose(losses(config_of(family, sizes)), alone, rtol=1e-4)


@pytest.mark.slow
def test_a_step_exchanges_each_class_of_matrices_twice():
  def all_to_alls(name):
    config = config_of('llama', {'fsdp': 4, 'tensor': 2})
    optimizer = dataclasses.replace(config.optimizer, name=name)
    config = dataclasses.replace(config, optimizer=optimizer)
    programs = step.programs(config, make_mesh(config.mesh))
    text = programs.train_step.lower(programs.state, programs.batch).compile()
    return text.as_text().count(' all-to-all(')

  # Two classes: attention's four, and the three of hidden layers.
  assert all_to_alls('muon') == all_to_alls('adamw') + 4


@pytest.mark.slow
def test_a_run_goes_on_also_on_another_mesh(
  tmp_path, tiny, data_cache, monkeypatch
):
  monkeypatch.setenv('GRADPOWER_CACHE', str(data_cache))
  options = [
    *tiny, '--optimizer.name=muon', '--optimizer.mu_dtype=bfloat16',
    '--model.d_model=32',
  ]  # fmt: skip

  def run(*others):
    argv = ['run', 'demo', '--run-dir', str(tmp_path / 'run')]
    assert main([*argv, *options, *others]) == 0
    lines = (tmp_path / 'run' / 'metrics.jsonl').read_text().splitlines()
    return json.loads(lines[-1])

  def back():
    newest = max((tmp_path / 'run' / 'checkpoints').glob('[0-9]*'),
                 key=lambda path: int(path.name))  # fmt: skip
    shutil.rmtree(newest)

  first = run()
  back()
  again = run()
  assert again['params_digest'] == first['params_digest']
  back()
  elsewhere = run('--mesh.fsdp=4')
  assert elsewhere['validation_loss'] == pytest.approx(
    first['validation_loss'], rel=1e-4
  )
