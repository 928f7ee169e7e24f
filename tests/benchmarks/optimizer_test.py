import dataclasses
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import optimizer as benchmark
from benchmarks import optimizer_programs as programs
from benchmarks import (
  optimizer_result,
  optimizer_sharded,
  optimizer_tpu,
  timing,
)
from benchmarks import optimizer_work as work
from models import accounting, presets
from models.config import LlamaConfig, Qwen2MoeConfig
from train.aot import compile as compile_lib
from train.errors import UserError

_LLAMA = LlamaConfig(
  vocab_size=32, d_model=16, n_layers=6, n_heads=2, d_ff=48, scan_layers=True
)
_MOE = Qwen2MoeConfig(
  vocab_size=32, d_model=16, n_layers=4, n_heads=2, d_ff=48, n_experts=4,
  experts_per_token=2, d_expert=8, d_shared=24, scan_layers=True,
)  # fmt: skip
_NAMES = [
  programs.ADAMW, programs.MUON, programs.OPTAX, programs.REST_ADAMW,
  work.LAYERS, work.REST, programs.LIMIT,
]  # fmt: skip


class _Idle:
  """In the place of `Programs`: none of them does anything."""

  def __init__(self, config, batch, length, side):
    self.asked = config, batch, length, side
    self.runs = dict.fromkeys(_NAMES, lambda: jnp.zeros(()))


@pytest.fixture(scope='module')
def measured(tmp_path_factory):
  """A result of programs that do nothing, and what they were asked for."""
  path = tmp_path_factory.mktemp('results') / 'optimizer.json'
  made = []

  def make(*args):
    made.append(_Idle(*args))
    return made[0]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(timing, '_SAMPLE_SECONDS', 1e-5)
    patch.setattr(programs, 'Programs', make)
    benchmark.main([
      '--preset', 'qwen2_moe_0.2b', '--layers', '2', '--tokens', '512',
      '--rounds', '2', '--no-sharded', '--json', str(path),
    ])  # fmt: skip
  return json.loads(path.read_text()), made[0].asked


def test_the_result_is_whole(measured):
  result, (config, batch, length, side) = measured
  assert (config.n_layers, config.dtype) == (2, 'float32')
  assert (batch, length) == (2, 256)
  assert side == round((384**2 * 1056) ** (1 / 3))  # Of a shared expert's.
  assert result['settings']['layers'] == 2
  assert result['settings']['model']['n_layers'] == 8
  names = [entry['program'] for entry in result['programs']]
  assert names == _NAMES
  for entry in result['programs']:
    low, high = entry['ms_quartiles']
    assert 0 < low <= entry['ms'] <= high < math.inf
    assert (entry['flops'] is None) == ('AdamW' in entry['program'])
  assert [entry['devices'] for entry in result['shares']] == [1, 8, 16, 64, 256]
  assert result['ratio'] > 0
  assert result['mfu'] is None and 'CPU' in result['mfu_missing']


def test_the_text_fits_80_columns_and_says_what_is_computed(measured):
  result, _ = measured
  slow = {'ms': 98765.43, 'ms_quartiles': [98765.43] * 2, 'of_limit': 0.5}
  entries = [entry | slow for entry in result['programs']]
  much = {'added_ms': 98765.43, 'share': 1.23, 'share_quartiles': [1.23] * 2}
  shares = [entry | much for entry in result['shares']]
  lines = benchmark.text(
    result | {'programs': entries, 'shares': shares}
  ).splitlines()
  assert max(map(len, lines[1:])) <= 80  # The first: a CPU's name.
  said = [line for line in lines if line.startswith(('1 ', '8 ', '256 '))]
  assert [line.split()[1] for line in said] == [
    'measured', 'computed', 'computed'
  ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize('config', [_LLAMA, _MOE])
def test_programs_do_what_their_names_say(config):
  scanned = config is _MOE
  config = dataclasses.replace(
    config, n_layers=1, dtype='float32', scan_layers=scanned
  )
  jax.config.update('jax_disable_most_optimizations', True)
  made = programs.Programs(config, 2, 8, 32)
  jax.config.update('jax_disable_most_optimizations', False)
  assert list(made.runs) == _NAMES
  layers, rest = (made.runs[name]()[0] for name in (work.LAYERS, work.REST))
  # Each parameter has its gradient in one of them.
  assert list(layers) == ['layers']
  assert sorted(rest) == ['embedding', 'head', 'norm']
  assert all(np.abs(x).max() > 0 for x in jax.tree.leaves((layers, rest)))
  shape = made.runs[work.LAYERS]()[1].shape
  assert shape == (2, 8, config.d_model)
  # From one start, both Muons end where AdamW does not.
  start = jax.tree.map(np.array, made._params)
  after = {}
  for name in (programs.ADAMW, programs.MUON, programs.OPTAX):
    made._params = jax.tree.map(jnp.array, start)
    moved, _ = made.runs[name]()
    after[name] = jax.tree.map(
      lambda x, y: np.asarray(x) - y, moved, start['layers']
    )
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=0.02, atol=2e-7),
    after[programs.MUON],
    after[programs.OPTAX],
  )
  block = (lambda x: x[0][0]) if scanned else (lambda x: x[0])
  query = [
    block(after[name]['layers'])['attention']['query']
    for name in (programs.MUON, programs.ADAMW)
  ]
  assert np.abs(query[0] - query[1]).max() > 2e-6


@pytest.mark.parametrize('devices, expected', [
  # 24 matrices of 16 x 16 and 18 of 16 x 48: of which a device gets so many.
  (1, (24, 18)),
  (8, (3, 3)),
  (16, (2, 2)),
  (48, (1, 1)),  # 3 copies of the parameters, 16 devices each.
])  # fmt: skip
def test_work_of_many_devices_by_hand(devices, expected):
  work_of_one = work.on_devices(_LLAMA, devices)
  square, wide = expected
  flops = square * 5 * (4 * 16**3 + 2 * 16**3)
  flops += wide * 5 * (4 * 16**2 * 48 + 2 * 16**3)
  assert work_of_one.flops == flops
  assert flops == (
    square * work.newton_schulz_flops(16, 16)
    + wide * work.newton_schulz_flops(16, 48)
  )
  fsdp = {48: 16}.get(devices, devices)
  floats = 16 * (16 * square + 48 * wide)
  there_and_back = 2 * 4 * floats * (fsdp - 1) // fsdp
  to_copies = 4 * floats * 2 if devices == 48 else 0
  assert work_of_one.sent == there_and_back + to_copies
  mesh = work.abstract_mesh(_LLAMA, devices)
  assert (mesh.shape['fsdp'], mesh.shape['data']) == (fsdp, devices // fsdp)


def test_work_of_experts_by_hand():
  """Each expert's is a matrix, and so is the router's."""
  flops = 4 * (
    4 * work.newton_schulz_flops(16, 16)
    + 4 * 3 * work.newton_schulz_flops(8, 16)
    + 3 * work.newton_schulz_flops(16, 24)
    + work.newton_schulz_flops(4, 16)
  )
  assert work.on_devices(_MOE, 1).flops == flops
  assert work.largest(_MOE) == (16, 24)


def test_shares_by_hand():
  """Two of six layers timed; medians over rounds."""
  one = {
    programs.ADAMW: 2.0, programs.MUON: 12.0, programs.OPTAX: 13.0,
    programs.REST_ADAMW: 4.0, work.LAYERS: 20.0, work.REST: 30.0,
    programs.LIMIT: 1.0,
  }  # fmt: skip
  seconds = {name: (taken,) * 3 for name, taken in one.items()}
  alone = benchmark.shares(_LLAMA, 2, seconds, 1)
  assert alone['added_ms'] == pytest.approx(1e3 * 3 * (12 - 2))
  assert alone['share'] == pytest.approx(30 / (3 * 2 + 4 + 3 * 20 + 30))
  eight = benchmark.shares(_LLAMA, 2, seconds, 8)
  # 24 and 18 matrices over 8 devices: 3 and 3, of which the last are padding.
  part = (3 * 24 + 3 * 56) / (24 * 24 + 18 * 56)  # In units of 16^3 / 0.8.
  added = 36 * part - 6 / 8
  assert eight['added_ms'] == pytest.approx(1e3 * added)
  assert eight['share'] == pytest.approx(added / (10 / 8 + 90))
  seconds[programs.MUON] = (12.0, 12.0, 100.0)
  assert benchmark.shares(_LLAMA, 2, seconds, 1)['share'] == alone['share']


def test_operations_of_the_parts_are_the_models():
  config = presets.get('llama_0.2b')
  parts = work.forward_and_backward_flops(config, 512, 256)
  whole = accounting.flops_per_token(config, 256)
  assert sum(parts.values()) == 512 * whole


def test_rounds_alternate_and_the_long_warm_up_once(monkeypatch):
  calls = []
  clock = itertools.count()
  monkeypatch.setattr(timing.time, 'perf_counter', lambda: next(clock))

  def program(name):
    return lambda: calls.append(name) or jnp.zeros(())

  runs = {name: program(name) for name in 'abc'}
  seconds = programs.time_rounds(runs, 3)
  assert ''.join(calls) == 'abc' + 'abccbaabc'
  assert seconds == dict.fromkeys('abc', (1.0,) * 3)


@pytest.mark.slow
def test_sharded_updates_are_read_and_timed():
  if jax.device_count() < 8:
    pytest.skip('needs 8 devices; tests/conftest.py asks for fake ones')
  config = dataclasses.replace(_LLAMA, n_layers=8)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(timing, '_SAMPLE_SECONDS', 1e-5)
    (one,) = optimizer_sharded.measure(config, [{'fsdp': 8}], pairs=1)
  (found,) = one['ours']['collectives']
  assert (found['kind'], found['count']) == ('all-to-all', 4)
  assert one['ours']['bytes'] == one['least_bytes']
  assert one['least_bytes'] == 2 * 4 * 8 * (4 * 16 * 16 + 3 * 16 * 48) // 8
  assert one['optax']['bytes'] > 5 * one['least_bytes']
  assert one['ratio'] > 0


def test_sharded_updates_are_a_table():
  def program(ms, **counts):
    return {
      'ms': ms,
      'bytes': 4000 * sum(counts.values()),
      'collectives': [
        {'kind': kind.replace('_', '-'), 'axis': 'fsdp', 'count': n, 'bytes': 9}
        for kind, n in counts.items()
      ],
    }

  one = {
    'mesh': {'fsdp': 4, 'tensor': 2},
    'ours': program(100.0, all_to_all=4),
    'optax': program(
      300.0, all_gather=100, all_reduce=38, collective_permute=1
    ),
    'ratio': 3.0,
    'ratio_quartiles': [2.9, 3.1],
    'least_bytes': 16000,
  }
  lines = optimizer_result._sharded([one])
  assert lines[1].startswith('A small model on eight fake CPU devices')
  assert max(map(len, '\n'.join(lines).splitlines())) <= 80
  _, mesh, ours, theirs = map(str.split, lines[2].splitlines())
  assert mesh == ['fsdp', '4', 'x', 'tensor', '2']
  assert ours == ['ours', '100', '1.00', '4', '0', '0', '0']
  assert theirs == [
    'optax', '300', '3.00', '2.90-3.10', '34.75', '0', '100', '38', '1'
  ]  # fmt: skip
  assert optimizer_result._sharded(None) == []


def test_another_process_that_fails_is_one_line(monkeypatch, tmp_path):
  script = tmp_path / 'python'
  script.write_text('#!/bin/sh\necho first >&2; echo last >&2; exit 1\n')
  script.chmod(0o755)
  monkeypatch.setattr(optimizer_sharded.sys, 'executable', str(script))
  with pytest.raises(optimizer_sharded.SubprocessError, match=r'^last$'):
    optimizer_sharded.measure_apart('llama')


class _Report:
  def __init__(self, seconds, size):
    self.values = {
      'devices': 16,
      'mesh': {'fsdp': 16},
      'bytes_per_device': {'peak': 3 * 10**9},
      'collectives': [
        {'kind': 'all-to-all', 'axis': 'fsdp', 'count': 4, 'bytes': size}
      ],
      'estimated_cycles': 1,
      'seconds': dict.fromkeys(
        ('compute', 'memory', 'network_blocking', 'network_overlapping'), 0.01
      ),
      'predicted_seconds': seconds,
      'compile_seconds': 1.0,
    }

  def to_json(self):
    return self.values


def test_ahead_of_time_it_is_one_step_with_either(monkeypatch, capsys):
  asked = []

  def compile_step(config, topology):
    asked.append((config, topology))
    muon = config.optimizer.name == 'muon'
    return _Report(0.21 if muon else 0.2, 10**6 * (3 if muon else 2))

  monkeypatch.setattr(optimizer_tpu, 'devices_of', lambda name: [None] * 16)
  monkeypatch.setattr(compile_lib, 'compile_step', compile_step)
  monkeypatch.setattr(benchmark, 'versions', lambda: {'libtpu': '1'})
  benchmark.main(['--topology', 'v5e:4x4', '--length', '512'])
  (adamw, topology), (muon, _) = asked
  assert topology == 'v5e:4x4'
  assert adamw.data.batch_size == 8 * 16
  assert adamw.mesh.fsdp == 16
  assert adamw.model.dtype == 'bfloat16'
  assert muon == dataclasses.replace(adamw, optimizer=muon.optimizer)
  out = capsys.readouterr().out
  assert '5.0%' in out and 'nothing ran' in out
  assert max(map(len, out.splitlines()[:-1])) <= 80  # The last: a warning.


@pytest.mark.parametrize('argv, message', [
  (['--preset', 'llama_7b'], "argument --preset: invalid choice: 'llama_7b'"),
  (['--layers', '0'], 'argument --layers: 0 is not at least 1'),
  (['--layers', '17'], '--layers (17): the model has 16'),
  (['--tokens', '100'], '--tokens (100) must be a multiple of --length (256)'),
  (['--json', '.'], 'cannot write --json .'),
  (['--topology', 'v9:2'], "--topology 'v9:2' is not known"),
  (['--model.depth', '4'], 'unrecognized arguments: --model.depth'),
  (
    ['--preset', 'qwen2_moe_0.2b', '--model.sparse_step', '2'],
    'layers with and without experts do not scale',
  ),
])  # fmt: skip
def test_bad_options_are_refused_in_one_line(argv, message, capsys):
  with pytest.raises(SystemExit) as stopped:
    benchmark.main(argv)
  assert stopped.value.code == 2
  err = capsys.readouterr().err
  assert message in err
  assert err.startswith('python -m benchmarks.optimizer: error: ')
  assert err.count('\n') == 1


def test_no_memory_is_one_line(monkeypatch, capsys):
  def measure(*args):
    raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: out of memory')

  monkeypatch.setattr(benchmark, 'measure', measure)
  with pytest.raises(SystemExit):
    benchmark.main(['--no-sharded'])
  assert capsys.readouterr().err == (
    'python -m benchmarks.optimizer: error: no memory for these layers and '
    'tokens\n'
  )


def test_a_step_that_does_not_fit_is_one_line(monkeypatch, capsys):
  def compile_step(config, topology):
    raise compile_lib.DoesNotFitError(20 * 10**9, 16 * 10**9)

  monkeypatch.setattr(optimizer_tpu, 'devices_of', lambda name: [None] * 4)
  monkeypatch.setattr(compile_lib, 'compile_step', compile_step)
  with pytest.raises(UserError, match=r'needs 20\.0 GB a device'):
    optimizer_tpu.point(_LLAMA, 'v5e:2x2', 16, 256)
