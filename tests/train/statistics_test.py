import dataclasses
import math

import jax
import numpy as np
import optax
import pytest

from models import families
from models.config import LlamaConfig, Qwen2MoeConfig
from train import statistics
from train import step as step_lib
from train.config import Config, DataConfig, MeshConfig, OptimizerConfig
from train.digest import canonical_parameters
from train.mesh import make_mesh
from train.optimizer import make_optimizer

SMALL = {'vocab_size': 264, 'd_model': 16, 'n_layers': 3, 'n_heads': 2}
MODELS = {
  'llama': LlamaConfig(**SMALL, d_ff=32),
  'moe': Qwen2MoeConfig(
    **SMALL, d_ff=32, n_experts=4, experts_per_token=2, d_expert=8, d_shared=8
  ),
}
TOKENS = np.random.default_rng(0).integers(0, 264, (8, 13)).astype(np.int32)


def config(model, **changes):
  return Config(
    data=DataConfig(vocab_size=264, sequence_length=12, batch_size=8),
    model=model,
    optimizer=OptimizerConfig(power=1.2, warmup_steps=0, clip_norm=0.5),
    steps=10,
    **changes,
  )


def measured(config, devices=None):
  mesh = make_mesh(config.mesh, devices)
  programs = step_lib.programs(config, mesh)
  batch = jax.device_put({'tokens': TOKENS}, programs.batch['tokens'].sharding)
  state = programs.init()
  before = jax.device_get(state)
  norms = statistics.program(config, mesh)(state, batch)
  line = statistics.line(norms, config.model)
  after, metrics = programs.train_step(state, batch)
  return line, before, jax.device_get(after), metrics


@pytest.mark.parametrize(
  ('family', 'scan'),
  [('llama', True), pytest.param('moe', False, marks=pytest.mark.slow)],
)
def test_norms_are_those_of_the_step(family, scan):
  model = dataclasses.replace(MODELS[family], scan_layers=scan)
  line, before, after, metrics = measured(config(model), jax.devices()[:1])
  whole = {
    name: math.hypot(*(norms[name] for norms in line.values()))
    for name in statistics.NAMES
  }
  for name in ('grad_norm', 'powered_norm'):
    assert whole[name] == pytest.approx(float(metrics[name]), rel=1e-5)
  assert whole['param_norm'] == pytest.approx(
    float(optax.tree.norm(before.params)), rel=1e-5
  )
  moved = jax.tree.map(np.subtract, after.params, before.params)
  for path, change in canonical_parameters(moved, model).items():
    norms = line[path]
    assert norms.keys() == set(statistics.NAMES)
    # The difference of two float32 parameters has lost digits.
    assert norms['update_norm'] == pytest.approx(
      np.linalg.norm(change.read()), rel=1e-3, abs=1e-7
    )


@pytest.mark.slow
def test_the_mesh_does_not_matter():
  one, *_ = measured(config(MODELS['llama']), jax.devices()[:1])
  many, *_ = measured(
    config(MODELS['llama'], mesh=MeshConfig(fsdp=4, tensor=2), accumulate=2)
  )
  assert one.keys() == many.keys()
  for path, norms in one.items():
    assert norms == pytest.approx(many[path], rel=1e-3, abs=1e-6)


def test_the_powered_gradient_is_what_the_chain_makes():
  settings = config(MODELS['llama'])
  grads = {'a': np.float32([3, -4]), 'b': np.float32([[12]])}
  clipped = {k: g * 0.5 / 13 for k, g in grads.items()}
  wanted = {k: np.sign(g) * np.abs(g) ** 1.2 for k, g in clipped.items()}
  got = make_optimizer(settings).powered(grads)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got,
               wanted)  # fmt: skip


def test_every_family_is_covered():
  kinds = {type(model) for model in MODELS.values()}
  assert kinds == set(families.CONFIGS.values())
