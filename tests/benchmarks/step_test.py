import argparse
import dataclasses
import gc
import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from benchmarks import first_step, shapes, step, step_result
from benchmarks.own_step import POWER, OwnStep
from benchmarks.peers.process import PeerError
from models import accounting
from models.config import LlamaConfig, Qwen2MoeConfig, RopeScaling
from train import cli, recipes

_SMALL = [
  '--batch', '8', '--length', '8', '--rounds', '2', '--steps', '2',
  '--side', '32', '--model.n_layers', '1', '--model.d_model', '16',
  '--model.n_heads', '2', '--model.vocab_size', '20',
]  # fmt: skip
_LLAMA = LlamaConfig(vocab_size=20, d_model=16, n_layers=1, n_heads=2, d_ff=24)

_BLOCKED = """
import sys

class Blocker:
  names = ('array_record', 'grain', 'orbax', 'tensorflow', 'tokamax',
           'tensorflow_datasets', 'tokenizers', 'tqdm', 'torch', 'etils')
  def find_spec(self, name, path=None, target=None):
    if name.partition('.')[0] in self.names:
      raise ImportError(f'{name} is not installed')

sys.meta_path.insert(0, Blocker())
from benchmarks.step import main
main(sys.argv[1:])
"""
_FAKE_PYTHON = """#!/bin/sh
echo '@step {"versions": {"torch": "0"}, "parameters": PARAMETERS}'
while read steps; do echo '@step {"seconds": 0.05}'; done
"""


@pytest.fixture(scope='module')
def measured(tmp_path_factory):
  """A result on all devices, without the libraries of data and kernels."""
  folder = tmp_path_factory.mktemp('results')
  config = dataclasses.replace(
    shapes.DEFAULT, n_layers=1, d_model=16, n_heads=2, vocab_size=20
  )
  count = accounting.parameters(config).total
  (folder / 'python').write_text(_FAKE_PYTHON.replace('PARAMETERS', str(count)))
  (folder / 'python').chmod(0o755)
  path = folder / 'step.json'
  result = subprocess.run(
    [sys.executable, '-c', _BLOCKED, *_SMALL, '--json', str(path),
     '--torch', str(folder / 'python'), '--maxtext', sys.executable],
    # Compiles in half the time.
    env=os.environ | {'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'},
    capture_output=True,
    text=True,
    check=False,
  )  # fmt: skip
  assert result.returncode == 1, result.stderr  # There is no MaxText here.
  return json.loads(path.read_text()), result.stdout


def test_the_step_runs_without_the_libraries_of_data_and_kernels(measured):
  result, _ = measured
  assert result['settings']['devices'] == 8
  assert [entry['program'] for entry in result['programs']] == [
    'step, power 1', 'step, power 1.2', 'loop, power 1.2',
    'transformers, eager',
  ]  # fmt: skip
  for entry in result['programs']:
    assert 0 < entry['ms'] < math.inf
    assert entry['mfu'] is None
    rate = entry['tokens_per_second']
    assert rate == pytest.approx(64 / (entry['ms'] / 1e3))
  assert 0 < result['loss'] < 10
  assert 0 < result['first_call_seconds'] < math.inf


def test_a_peer_is_compared_and_a_missing_one_told(measured):
  result, text = measured
  *ours, peer = result['programs']
  assert peer['ms'] == 50
  assert peer['ours_is'] > 0
  assert peer['versions'] == {'torch': '0'}
  assert all('ours_is' not in entry for entry in ours)
  assert set(result['failed']) == {'MaxText, scanned', 'MaxText, unrolled'}
  assert 'MaxText, scanned: not measured (MaxText, scanned: ' in text
  assert result['targets'] == []  # At another shape.


def test_the_host_is_watched(measured):
  host = measured[0]['host']
  assert set(host['ms']) == {'batch', 'dispatch', 'log', 'thread'}
  assert all(ms > 0 for ms in host['ms'].values())
  assert host['idle_dispatch_ms'] > 0
  assert host['thread_share'] > 0


def test_the_text_fits_80_columns(measured):
  _, text = measured
  lines = [line for line in text.splitlines()[1:] if 'not measured' not in line]
  assert max(map(len, lines)) <= 80


@pytest.fixture(scope='module')
def own(tmp_path_factory):
  jax.config.update('jax_disable_most_optimizations', True)
  log = tmp_path_factory.mktemp('own') / 'log'
  yield OwnStep(_LLAMA, 8, 8, 32, log), log
  jax.config.update('jax_disable_most_optimizations', False)


def _steps(own):
  return int(own._take(POWER)[0].step)


@pytest.mark.parametrize('steps', [1, 2, 5])
def test_a_block_takes_its_steps_and_one_more(own, steps):
  own, log = own
  for block in (
    lambda: own.device(1.0, steps),
    lambda: own.device(POWER, steps),
    lambda: own.loop(steps),
  ):
    before = _steps(own)
    assert 0 < block() < math.inf
    assert _steps(own) == before + steps + 1
  lines = [json.loads(line) for line in log.read_text().splitlines()]
  assert [line['step'] for line in lines[-steps - 1 :]] == list(
    range(1, steps + 2)
  )
  assert all(0 < line['loss'] < 10 for line in lines)


def test_with_and_without_the_power_updates_differ(own):
  own, _ = own
  updates = []
  leaves = [np.array(leaf) for leaf in own._leaves]
  for power in (1.0, POWER):
    own._leaves = list(map(jax.numpy.array, leaves))
    own.once(power)
    updates.append([np.array(leaf) for leaf in own._leaves])
  assert any(not np.array_equal(a, b) for a, b in zip(*updates, strict=True))


def test_garbage_is_collected_again_after_a_failure(own, monkeypatch):
  own, _ = own

  def fail():
    assert not gc.isenabled()
    raise RuntimeError('no batch')

  monkeypatch.setattr(own, '_build', fail)
  with pytest.raises(RuntimeError, match='no batch'):
    own.loop(1)
  assert gc.isenabled()


def test_batches_are_windows_of_the_stream(own):
  own, _ = own
  first, second = own._build(), own._build()
  assert first['tokens'].shape == (8, 9)
  assert first['tokens'].dtype == np.int32
  assert not np.array_equal(first['tokens'], second['tokens'])


def test_blocks_run_in_both_orders_after_a_warm_up():
  calls = []

  def program(name):
    return lambda: calls.append(name) or float(len(calls))

  seconds, failed = step.time_blocks({n: program(n) for n in 'abc'}, 3)
  assert ''.join(calls) == 'cba' + 'abc' + 'cba' + 'abc'
  assert seconds == {'a': [4, 9, 10], 'b': [5, 8, 11], 'c': [6, 7, 12]}
  assert failed == {}


def test_a_peer_that_fails_is_left_out():
  answers = iter([1.0, 2.0])

  def fails():
    try:
      return next(answers)
    except StopIteration:
      raise PeerError('b: it has ended') from None

  seconds, failed = step.time_blocks({'a': lambda: 1.0, 'b': fails}, 4)
  assert seconds == {'a': [1.0] * 4}
  assert failed == {'b': 'b: it has ended'}


def _result(config=shapes.DEFAULT, facts=None, **others):
  """Of rounds in which the machine is fast and then slow."""
  facts = {'platform': 'cpu', 'device': 'cpu', 'cpu': 'x', 'cores': 2,
           'load': 0.0, 'python': '3', 'jax': '0', 'jaxlib': '0', 'optax': '0',
           **(facts or {})}  # fmt: skip
  base = {
    step_result.LIMIT: 0.1,
    step_result.PLAIN: 1.0,
    step_result.POWERED: 1.005,
    step_result.LOOP: 1.01,
    'transformers, eager': 1.515,
    'MaxText, scanned': 1.212,
  }
  pace = (1.0, 1.0, 3.0)
  found = step_result.result(
    facts,
    config,
    {'batch': 8, 'length': 256, 'steps': 3, 'rounds': 3, 'side': 1000,
     'devices': 1},
    {name: [s * p for p in pace] for name, s in base.items()},
    host=[{'batch': 1e-3, 'dispatch': 2e-3, 'log': 3e-3, 'thread': 0.0101}],
    idle_dispatch=1e-3,
    first_call_seconds=5.0,
    loss=9.0,
    peers={n: {'versions': {}, 'start_seconds': 1.0} for n in list(base)[4:]},
    failed={},
  ) | others  # fmt: skip
  return found | {'targets': step_result.targets(found)}


def test_ratios_are_of_the_same_round():
  result = _result()
  assert result['power']['share'] == pytest.approx(0.005)
  assert result['power']['share_quartiles'] == pytest.approx([0.005] * 2)
  overhead = 1.01 / 1.005 - 1
  assert result['host']['overhead'] == pytest.approx(overhead)
  assert result['host']['thread_share'] == pytest.approx(0.01)
  assert result['host']['ms']['dispatch'] == 2
  assert result['limit']['flops_per_second'] == pytest.approx(2e10)
  *_, torch, maxtext = result['programs']
  assert torch['ours_is'] == pytest.approx(1.5)
  assert maxtext['ours_is'] == pytest.approx(1.2)
  assert torch['tokens_per_second'] == pytest.approx(2048 / 1.515)
  flops = 2048 * accounting.flops_per_token(shapes.DEFAULT, 256)
  assert torch['of_limit'] == pytest.approx(flops / 1.515 / 2e10)


def test_targets_on_a_cpu():
  targets = {t['name']: t for t in _result()['targets']}
  assert {name: t['met'] for name, t in targets.items()} == {
    'tokens a second over those of transformers, eager': True,
    'tokens a second over those of MaxText, scanned': False,
    'host overhead': True,
  }
  text = step_result.text(_result())
  assert 'MaxText, scanned 1.2, bound 1.3: MISSED' in text
  assert 'eager 1.5, bound 1: met' in text


def test_the_first_step_is_a_target_and_shown():
  first = {'cold': 21.0, 'warm': 9.0}
  result = _result(first_step=first)
  result['targets'] = step_result.targets(result)
  text = step_result.text(result)
  assert 'first step: 21.0 s, with compiled programs kept 9.0 s' in text
  assert 'seconds to the first step 21, bound 20: MISSED' in text


@pytest.mark.parametrize('sparse, met', [(False, False), (True, True)])
def test_mfu_by_hand(sparse, met):
  kind = Qwen2MoeConfig if sparse else LlamaConfig
  config = kind(
    vocab_size=32100, d_model=1024, n_layers=8, n_heads=16, dtype='bfloat16'
  )
  per_token = accounting.flops_per_token(config, 256)
  # As many tokens a second as make 40 % of an H100.
  facts = {'platform': 'gpu', 'device': 'NVIDIA H100 80GB HBM3'}
  result = _result(config, facts)
  result['programs'][2]['mfu'] = 0.4
  assert result['programs'][0]['mfu'] == pytest.approx(
    2048 * per_token / 989e12
  )
  targets = {t['name']: t['met'] for t in step_result.targets(result)}
  assert targets == {
    'MFU': met, 'host overhead': True, 'share of the power': True,
  }  # fmt: skip
  text = step_result.text(result)
  assert '9.89e+14' in text
  assert ' 40.0 %' in text


_TRAINER = """
import pathlib, sys, time
given = sys.argv[sys.argv.index('--run-dir') + 1]
print('on its way', file=sys.stderr)
if 'fail' in sys.argv:
  sys.exit('error: no text')
folder = pathlib.Path(given)
folder.mkdir()
with (folder / 'metrics.jsonl').open('w') as file:
  file.write('{"step": 1}\\n')
pathlib.Path(sys.argv[1]).write_text(str(folder))
import os
cache = pathlib.Path(os.environ['JAX_COMPILATION_CACHE_DIR'])
(cache / 'program').touch()
time.sleep(1000)
"""


def test_time_runs_until_the_first_line(tmp_path):
  command = [sys.executable, '-c', _TRAINER, str(tmp_path / 'told')]
  folder = tmp_path / 'one'
  for fresh in (True, False):
    assert 0 < first_step.time_first_line(command, folder, fresh=fresh) < 1000
  assert not pathlib.Path((tmp_path / 'told').read_text()).exists()
  assert (folder / 'compiled' / 'program').exists()
  with pytest.raises(ValueError, match='compiled programs'):
    first_step.time_first_line(command, folder, fresh=True)


def test_a_trainer_that_ends_is_an_error(tmp_path):
  command = [sys.executable, '-c', _TRAINER, 'told', 'fail']
  with pytest.raises(first_step.RunError, match='ended: error: no text'):
    first_step.time_first_line(command, tmp_path, fresh=True)


@pytest.mark.parametrize('config', [
  shapes.DEFAULT,
  dataclasses.replace(_LLAMA, scan_layers=True, remat='minimal'),
  Qwen2MoeConfig(vocab_size=4096, n_layers=2, d_expert=64, balance_loss=0.01),
  Qwen2MoeConfig(n_layers=3, dense_layers=(0, 2), qkv_bias=False),
  dataclasses.replace(
    _LLAMA, rope_scaling=RopeScaling(factor=8.0, original_length=64)
  ),
])  # fmt: skip
def test_the_trainer_is_told_the_shape(config):
  name, *given = first_step.options(config, 4, 32)
  parser = argparse.ArgumentParser()
  cli.add_config_options(parser)
  found = cli.with_options(recipes.get(name), parser.parse_args(given))
  assert found.model == dataclasses.replace(
    config, vocab_size=max(2048, config.vocab_size)
  )
  assert (found.data.batch_size, found.data.sequence_length) == (4, 32)


def test_what_the_trainer_cannot_be_told_is_an_error():
  config = dataclasses.replace(_LLAMA, rope_scaling=None)
  with pytest.raises(
    first_step.RunError, match=r'--model\.rope_scaling cannot'
  ):
    first_step.options(config, 4, 32)


@pytest.mark.parametrize('argv, message', [
  (['--batch', '7'], '--batch (7) must be a multiple of the 8 devices'),
  (['--steps', '0'], 'argument --steps: 0 is not at least 1'),
  (['--torch', '/no/python'], '--torch: /no/python is no program'),
  (['--torch-compile', 'no-python'], '--torch-compile: no-python is no'),
  (['--json', '.'], 'cannot write --json .'),
  (['--model.n_experts', '4'], 'a LlamaConfig has no such field'),
  (['--peer', 'x'], 'unrecognized arguments: --peer'),
])  # fmt: skip
def test_bad_options_are_refused_in_one_line(argv, message, capsys):
  with pytest.raises(SystemExit) as stopped:
    step.main(argv)
  assert stopped.value.code == 2
  err = capsys.readouterr().err
  assert message in err
  assert err.startswith('python -m benchmarks.step: error: ')
  assert err.count('\n') == 1
