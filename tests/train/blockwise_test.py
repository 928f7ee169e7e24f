"""Learning rates by block in the trainer: how much, any mesh, resuming."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import optax
import pytest

from gradpower_optax.blockwise import RATIOS, blockwise_schedule
from models.blocks import blocks
from models.config import LlamaConfig, Qwen2MoeConfig
from train import step
from train.config import Config, DataConfig, MeshConfig, OptimizerConfig
from train.mesh import make_mesh
from train.optimizer import make_optimizer

SHAPE = {
  'vocab_size': 256, 'd_model': 16, 'n_layers': 2, 'n_heads': 2, 'd_ff': 32,
  'scan_layers': True,
}  # fmt: skip
MODELS = {
  'llama': LlamaConfig(**SHAPE),
  'moe': Qwen2MoeConfig(**SHAPE, n_experts=4, d_expert=8, d_shared=16),
}
WARMUP, STEPS = 2, 60


def config_of(family='llama', sizes=None, **optimizer):
  settings = {
    'power': 1.2, 'learning_rate': 1e-3, 'warmup_steps': WARMUP,
    'weight_decay': 0.1, 'blockwise': True,
  } | optimizer  # fmt: skip
  return Config(
    model=MODELS[family],
    data=DataConfig(sequence_length=16, batch_size=8),
    optimizer=OptimizerConfig(**settings),
    mesh=MeshConfig(**sizes or {}),
    steps=STEPS,
  )


def updates_of(config, counts, devices=None):
  """What the optimizer makes of drawn gradients after so many steps."""
  mesh = make_mesh(config.mesh, devices)
  model = step.abstract_model(config, mesh)
  optimizer = make_optimizer(config, model, mesh)
  shapes = step.programs(config, mesh).state
  rng = np.random.default_rng(0)
  params, grads = (
    jax.tree.map(
      lambda x: jax.device_put(
        rng.normal(size=x.shape).astype('float32'), x.sharding
      ),
      shapes.params,
    )
    for _ in range(2)
  )
  state = jax.jit(optimizer.init)(params)
  update = jax.jit(optimizer.update)
  found = []
  for count in counts:
    # Where it stands, without the steps on the way.
    at = optax.tree.set(state, count=jax.numpy.int32(count))
    found.append(jax.device_get(update(grads, at, params)[0]))
  return found, blocks(model)


@pytest.mark.parametrize(
  ('family', 'name', 'schedule'),
  [
    ('llama', 'adamw', 'wsd'),
    pytest.param('moe', 'adamw', 'cos', marks=pytest.mark.slow),
    pytest.param('moe', 'muon', 'wsd', marks=pytest.mark.slow),
    pytest.param('llama', 'muon', 'constant', marks=pytest.mark.slow),
  ],
)
def test_updates_are_the_bases_times_the_multiple(family, name, schedule):
  config = config_of(family, name=name, schedule=schedule)
  plain = dataclasses.replace(config.optimizer, blockwise=False)
  counts = (0, 1, 3, 8, 20, 30, 45)
  one = jax.devices()[:1]
  ours, labels = updates_of(config, counts, one)
  base, _ = updates_of(
    dataclasses.replace(config, optimizer=plain), counts, one
  )
  peaks = dict.fromkeys(RATIOS, 1.0)
  for count, got, of_base in zip(counts, ours, base, strict=True):
    multiples = {
      block: float(
        blockwise_schedule(ratio, WARMUP, STEPS if schedule == 'wsd' else None)(
          count
        )
      )
      for block, ratio in RATIOS.items()
    }
    jax.tree.map(
      # Decay is multiplied too: it is in the base's updates.
      lambda label, x, y: np.testing.assert_allclose(
        x, np.float32(multiples[label]) * y, rtol=2e-6, atol=1e-12  # noqa: B023
      ),
      labels, got, of_base,
    )  # fmt: skip
    peaks = {k: max(peaks[k], multiples[k]) for k in peaks}
    if schedule == 'wsd' and count >= 2 * STEPS // 3:
      assert set(multiples.values()) == {1.0}
    if schedule != 'wsd' and count >= 20:
      assert multiples == RATIOS
  assert peaks == {k: pytest.approx(v) for k, v in RATIOS.items()}


@pytest.mark.slow
@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_the_mesh_does_not_matter(name):
  counts = (1, 12)
  many, _ = updates_of(
    config_of(sizes={'fsdp': 4, 'tensor': 2}, name=name), counts
  )
  one, _ = updates_of(config_of(name=name), counts, jax.devices()[:1])
  for x, y in zip(many, one, strict=True):
    near = 1e-3 * max(np.abs(leaf).max() for leaf in jax.tree.leaves(y))
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, 1e-3, near),  # noqa: B023
      x, y,
    )  # fmt: skip


def test_off_it_changes_no_state():
  """Checkpoints of before go on."""
  config = config_of()
  mesh = make_mesh(config.mesh, jax.devices()[:1])
  plain = dataclasses.replace(
    config, optimizer=dataclasses.replace(config.optimizer, blockwise=False)
  )
  before, after = (step.programs(c, mesh).state for c in (plain, config))
  leaves = [len(jax.tree.leaves(x.opt_state)) for x in (before, after)]
  assert leaves[1] == leaves[0] + 1  # Its count of steps.
  kinds = {type(part) for part in before.opt_state}
  assert not kinds & {optax.ScaleByScheduleState}


def test_it_needs_the_model():
  with pytest.raises(ValueError, match='blockwise needs the model'):
    make_optimizer(config_of())


OPTIONS = ['--optimizer.blockwise=true', '--model.scan_layers=true']


@pytest.mark.slow
@pytest.mark.parametrize('name', ['adamw', 'muon'])
def test_a_run_stopped_and_continued_is_the_same(
  tmp_path, main, tiny, numbers, name
):
  def command(run_dir, *extra):
    return main('run', 'demo', '--run-dir', run_dir, *tiny, *OPTIONS,
                f'--optimizer.name={name}', *extra)  # fmt: skip

  assert command(tmp_path / 'straight') == 0
  assert command(tmp_path / 'broken', '--stop-at', 9) == 0
  assert command(tmp_path / 'broken') == 0
  straight, broken = (
    numbers(tmp_path / 'straight'),
    numbers(tmp_path / 'broken'),
  )
  assert straight == broken
  config = json.loads((tmp_path / 'broken' / 'config.json').read_text())
  assert config['optimizer']['blockwise'] is True


@pytest.mark.slow
def test_another_blockwise_is_another_run(tmp_path, main, tiny, capsys):
  def command(*extra):
    return main('run', 'demo', '--run-dir', tmp_path / 'run', *tiny, *extra)

  assert command('--stop-at', 3) == 0
  shutil.copytree(tmp_path / 'run', tmp_path / 'old')
  assert command('--optimizer.blockwise=true') == 2
  assert '--optimizer.blockwise is False there' in capsys.readouterr().err
  # A run of a version that did not know it.
  path = tmp_path / 'run' / 'config.json'
  config = json.loads(path.read_text())
  del config['optimizer']['blockwise']
  path.write_text(json.dumps(config))
  assert command('--stop-at', 5) == 0
