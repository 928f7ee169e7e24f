"""Gradient noise beside a run: the program, its line, and who reads it."""

import dataclasses
import gc
import io
import json
import math

import jax
import numpy as np
import pytest
from flax import nnx

from models.config import LlamaConfig, Qwen2MoeConfig
from train import monitor, noise, noise_words, sinks
from train import step as step_lib
from train.config import Config, DataConfig, MeshConfig, OptimizerConfig
from train.experiments import measured_moments
from train.mesh import make_mesh
from train.report import write_report
from train.run_log import read_run
from train.watch_options import WatchOptions

SMALL = {
  'vocab_size': 264, 'd_model': 16, 'n_layers': 3, 'n_heads': 2,
  'scan_layers': True, 'd_ff': 32,
}  # fmt: skip
MODELS = {
  'llama': LlamaConfig(**SMALL),
  'moe': Qwen2MoeConfig(
    **SMALL, n_experts=4, experts_per_token=2, d_expert=8, d_shared=8,
    dense_layers=(0,),
  ),
}  # fmt: skip
POWERS = [0.8, 1.0, 1.2, 1.4]


def config_of(family='llama', rows=16, accumulate=1, **sizes):
  return Config(
    data=DataConfig(vocab_size=264, sequence_length=12, batch_size=rows),
    model=MODELS[family],
    optimizer=OptimizerConfig(warmup_steps=0),
    mesh=MeshConfig(**sizes),
    accumulate=accumulate,
    steps=10,
  )


@pytest.mark.parametrize(
  ('rows', 'accumulate', 'sizes', 'devices', 'wanted'),
  [
    (8, 1, {}, 1, 8),
    (16, 1, {}, 1, 8),
    (20, 1, {}, 1, 10),
    (14, 1, {}, 1, 14),
    (64, 16, {}, 1, 16),  # No part is larger than a micro-batch.
    (64, 1, {'data': 8}, 8, 8),
    (96, 1, {'data': 8}, 8, 12),
    (64, 1, {'data': 2, 'tensor': 4}, 8, 8),
    (32, 1, {'data': 8}, 8, 8),  # Of four rows, on eight devices.
    (8, 1, {'fsdp': 4, 'data': 2}, 8, 8),
    (32, 4, {'data': 4}, 4, 8),
    (16, 4, {'data': 4}, 4, 8),
  ],
)
def test_parts(rows, accumulate, sizes, devices, wanted):
  config = config_of(rows=rows, accumulate=accumulate, **sizes)
  mesh = make_mesh(config.mesh, jax.devices()[:devices])
  assert noise.parts(config, mesh) == wanted


def test_a_small_batch_is_refused(tmp_path, main, tiny, capsys):
  run_dir = tmp_path / 'run'
  options = ['--noise', 4, '--data.batch_size=4', '--mesh.data=4',
             '--mesh.tensor=2']  # fmt: skip
  assert main('run', 'demo', '--run-dir', run_dir, *tiny, *options) == 2
  *_, line = capsys.readouterr().err.splitlines()
  assert '--data.batch_size (4) must be at least 8' in line
  assert not run_dir.exists()


@pytest.mark.parametrize('config', MODELS.values(), ids=MODELS)
def test_a_stack_is_named_by_its_layers(config):
  model = step_lib.abstract_model(config_of(), None)
  assert model is not None
  dotted = lambda path, c=config: noise._dotted(path, c)
  assert dotted('head') == 'head'
  assert dotted('norm/scale') == 'norm.scale'
  if isinstance(config, LlamaConfig):
    assert dotted('layers/0/0/mlp/up') == 'layers.0:3.mlp.up'
    flat = dataclasses.replace(config, scan_layers=False)
    assert dotted('layers/2/mlp/up', flat) == 'layers.2.mlp.up'
    return
  assert dotted('layers/0/0/mlp/up') == 'layers.0.mlp.up'
  assert dotted('layers/1/0/moe/up') == 'layers.1:3.moe.up'
  turns = dataclasses.replace(config, n_layers=6, dense_layers=(0, 2, 4))
  assert dotted('layers/0/1/moe/up', turns) == 'layers.1:6:2.moe.up'


def overall(**changes):
  return {
    'size': 10, 'unseen': 0, 'signal': 1.0, 'noise': 4.0,
    'noise_to_signal': 2.0, 'noise_scale': 3100.0, 'tail': 0.1,
    'eps_share': [0.0, 0.0, 0.003, 0.1], 'u': [0.3, 0.4, 0.5, 0.4],
    'u_error': [0.1, 0.1, 0.1, 0.1], 'step_ratio': [1.04, 1.0, 0.95, 0.9],
    'power': 1.14, 'power_error': 0.05,
  } | changes  # fmt: skip


UNTOLD = {'power': 1.0, 'power_error': 'nan', 'noise_scale': 'inf'}


def line_of(step, seconds=1.2, **changes):
  found = overall(**changes)
  return {
    'step': step, 'split': 'noise', 'powers': POWERS, 'parts': 8,
    'seconds': seconds, 'overall': found, 'tensors': {'head': found},
  }  # fmt: skip


def test_words():
  words = noise_words.measured(line_of(200), 1.2, 200, 0.5)
  assert words == (
    'noise at step 200: scale 3.1k examples, u best at p = 1.14 +- 0.05 '
    '(advice; overall), r(1.2) = 0.95, eps matters for 0.3% of elements at '
    'p = 1.2; took 1.2 s, as 2.4 steps, 1.2% of the time'
  )
  words = noise_words.measured(line_of(200, **UNTOLD), 1.0, 200, None)
  assert words == (
    'noise at step 200: scale too large to tell, u best at no p that stands '
    'out, r(1.2) = 0.95, eps matters for 0.0% of elements at p = 1; took 1.2 s'
  )
  words = noise_words.measured(line_of(3, signal='nan'), 1.0, 1, None)
  assert words == 'noise at step 3: the gradient is not finite; took 1.2 s'


def test_a_power_at_the_end_of_the_grid_has_no_error():
  low, high = line_of(1, power=0.8), line_of(2, power=1.4)
  words = noise_words.measured(low, 1.2, 200, None)
  assert 'u best at p = 0.80 or below: the grid ends there (adv' in words
  assert '1.40 or above' in noise_words.measured(high, 1.2, 200, None)
  assert noise_words.advice([low, low]) == (
    'noise: 2 measurements: u is best at p = 0.80 or below: the grid ends '
    'there (advice; overall)'
  )
  words = noise_words.advice([low, low, line_of(3)])
  assert 'p = 0.91 on average' in words
  assert '; 2 of them lie where the grid of powers ends (advice' in words
  assert not noise_words.at_end(line_of(3))


def make_run(directory, *lines):
  directory.mkdir()
  (directory / 'config.json').write_text('{"steps": 9}')
  train = [{'step': s, 'split': 'train', 'loss': 3, 'tokens': 9 * s}
           for s in range(1, 9)]  # fmt: skip
  text = ''.join(json.dumps(line) + '\n' for line in (*train, *lines))
  (directory / 'metrics.jsonl').write_text(text)
  return directory


def test_a_run_log_reads_it_back(tmp_path):
  lines = [line_of(4, power=1.3), line_of(2), line_of(6, **UNTOLD)]
  run_dir = make_run(tmp_path / 'run', *lines)
  log = read_run('run', run_dir)
  assert not log.unreadable
  assert list(log.noise) == [2, 4, 6]
  assert log.noise[2]['powers'] == POWERS
  assert log.noise[2]['tensors'] == {'head': overall()}
  assert log.noise[6]['overall']['noise_scale'] == math.inf
  assert measured_moments.step_ratios(run_dir) == {
    0.8: 1.04, 1.0: 1.0, 1.2: pytest.approx(0.95), 1.4: 0.9
  }  # fmt: skip
  assert noise_words.advice(log.noise.values()) == (
    'noise: 3 measurements, 2 of which tell a power: u is best at p = 1.22 on '
    'average, standard deviation 0.11 (advice; overall)'
  )
  assert noise_words.advice([]) == ''
  assert 'none of which' in noise_words.advice([log.noise[6]])

  resumed = make_run(
    tmp_path / 'resumed', *lines, {'event': 'resumed', 'step': 3}
  )
  assert list(read_run('resumed', resumed).noise) == [2]


@pytest.mark.parametrize(
  'change',
  [
    {'powers': [0.8, 1.0]},
    {'powers': [0.8, 1.0, 1.2, 'nan']},
    {'powers': 3},
    {'overall': {}},
    {'overall': overall(step_ratio=1.0)},
    {'overall': overall(power=[1.0] * 4)},
    {'overall': overall(u=['high'] * 4)},
    {'tensors': [1]},
    {'tensors': {'head': overall(u=[1.0])}},
    {'parts': None},
    {'step': -1},
  ],
)
def test_foreign_lines_are_counted_not_believed(tmp_path, change):
  log = read_run('run', make_run(tmp_path / 'run', line_of(2) | change))
  assert log.unreadable == 1
  assert not log.noise


def test_the_report_draws_it(tmp_path):
  runs = {
    'a': make_run(tmp_path / 'a', line_of(2), line_of(4, **UNTOLD)),
    'b': make_run(tmp_path / 'b', line_of(2, power=0.9)),
    'untold': make_run(tmp_path / 'c', line_of(2, **UNTOLD)),
    'low': make_run(tmp_path / 'd', line_of(2, power=0.8)),
  }
  pages = {}
  for names in (['a', 'b'], ['a'], ['untold'], ['low']):
    page = tmp_path / 'page.html'
    write_report(page, {name: runs[name] for name in names}, title='t')
    pages[' '.join(names)] = page.read_text()
  heads = 'Advised power', 'Gradient noise scale'
  assert all(head in pages[name] for name in ('a b', 'a') for head in heads)
  assert not any(head in pages['untold'] for head in heads)
  ends = 'the grid of powers ends there'
  assert [name for name, page in pages.items() if ends in page] == ['low']


class Fake:
  """Measures nothing."""

  def __init__(self, config, mesh):
    del config, mesh

  def __call__(self, step, params, batch):
    assert batch['tokens'].shape[0] == 8
    return line_of(step, power=1.1 + step / 500)


@pytest.mark.slow
def test_a_run_writes_and_says_it(
  tmp_path, main, tiny, capsys, monkeypatch, read_metrics
):
  def command(run_dir, *extra):
    assert main('run', 'demo', '--run-dir', run_dir, *tiny, *extra) == 0
    return capsys.readouterr()

  monkeypatch.setattr(noise, 'Probe', Fake)
  said = command(tmp_path / 'run', '--noise', 10, '--stop-at', 13)
  assert 'noise at step 10: scale 3.1k examples' in said.err
  assert said.err.count('compiling the program that measures noise') == 1
  assert 'noise:' not in said.out
  said = command(tmp_path / 'run', '--noise', 10)
  assert 'noise at step 20: ' in said.err
  # Those of earlier starts too.
  assert said.out.splitlines()[-1] == (
    'noise: 2 measurements: u is best at p = 1.13 on average, standard '
    'deviation 0.01 (advice; overall)'
  )
  lines = read_metrics(tmp_path / 'run')
  found = [line for line in lines if line.get('split') == 'noise']
  for line, step in zip(found, (10, 20), strict=True):
    assert line.pop('time') > 1e9
    assert line == line_of(step, power=1.1 + step / 500)
  steps = [line['step'] for line in lines if line.get('split') == 'train']
  assert steps == list(range(1, 25))


def test_sinks_get_what_is_of_all_tensors(tmp_path, monkeypatch):
  passed = []

  class Recorder:
    def __init__(self, *_):
      self.put, self.close = passed.append, lambda: None

  monkeypatch.setattr(sinks, 'Sinks', Recorder)
  watch = WatchOptions(tensorboard=True, noise=5)
  config, file = config_of(), io.StringIO()
  shown = monitor.Monitor(
    'arm', config, 0, shown=True, local=tmp_path, watch=watch, file=file
  )
  shown.noise(line_of(5, **UNTOLD))
  shown.close()
  assert file.getvalue().startswith('arm: noise at step 5: ')
  [line] = passed
  values = sinks._values(line)
  assert values['noise/u/1.2'] == 0.5
  assert values['noise/seconds'] == 1.2
  assert values['noise/power'] == 1.0
  assert 'noise/noise_scale' not in values  # No number.
  assert len(values) == 8 + 4 * 4


def measured(config, devices=None):
  mesh = make_mesh(config.mesh, devices)
  programs = step_lib.programs(config, mesh)
  rng = np.random.default_rng(0)
  shape = programs.batch['tokens'].shape
  tokens = rng.integers(0, 264, shape).astype(np.int32)
  batch = jax.device_put({'tokens': tokens}, programs.batch['tokens'].sharding)
  params = programs.init().params
  return noise.Probe(config, mesh)(1, params, batch), params, batch


@pytest.mark.slow
@pytest.mark.parametrize(
  'sizes',
  [
    {},
    {'data': 2, 'fsdp': 2, 'tensor': 2},  # A part is two rows, and padding.
  ],
)
def test_moments_are_those_of_the_parts(sizes):
  config = config_of(rows=16, **sizes)
  devices = jax.devices()[: math.prod(sizes.values())]
  before = {id(x) for x in jax.live_arrays()}
  line, params, batch = measured(config, devices)
  gc.collect()
  kept = sum(x.size for x in jax.live_arrays() if id(x) not in before)
  size = sum(x.size for x in jax.tree.leaves(params))
  # The parameters and the batch, not the sums, of 14 and more a parameter.
  assert kept <= size + batch['tokens'].size + 1000
  del before

  mesh = make_mesh(MeshConfig(), jax.devices()[:1])
  graph, _ = nnx.split(step_lib.abstract_model(config, mesh), nnx.Param)
  params, tokens = jax.device_get((params, batch['tokens']))
  grad = jax.jit(
    lambda tokens: step_lib.gradients(
      graph, mesh, 1, params, {'tokens': tokens}
    )[0]
  )
  gradients = [
    np.concatenate([np.float64(x).ravel() for x in jax.tree.leaves(grad(part))])
    for part in tokens.reshape(8, 2, 13)
  ]
  variance = np.var(gradients, 0, ddof=1).sum()
  signal = (np.mean(gradients, 0) ** 2).sum() - variance / 8
  found = line['overall']
  assert line['parts'] == 8
  assert found['size'] == size
  assert found['noise'] == pytest.approx(variance, rel=1e-3)
  assert found['signal'] == pytest.approx(signal, rel=1e-3)
  assert found['noise_scale'] == pytest.approx(2 * variance / signal, rel=2e-3)
  assert line['powers'] == POWERS
  assert {'embedding', 'layers.0:3.attention.query'} <= line['tensors'].keys()


@pytest.mark.slow
def test_the_run_is_the_same_to_the_bit(tmp_path, main, tiny, numbers):
  for name, options in {'plain': [], 'probed': ['--noise', 7]}.items():
    assert main('run', 'demo', '--run-dir', tmp_path / name, *tiny,
                '--model.scan_layers=true', *options) == 0  # fmt: skip
  lines = numbers(tmp_path / 'probed')
  found = [line for line in lines if line.get('split') == 'noise']
  assert [line['step'] for line in found] == [7, 14, 21]
  rest = [line for line in lines if line.get('split') != 'noise']
  assert rest == numbers(tmp_path / 'plain')
