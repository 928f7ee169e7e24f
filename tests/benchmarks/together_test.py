import json
import multiprocessing
import os

import jax
import pytest

from benchmarks import together
from models.config import LlamaConfig
from train.config import Config, DataConfig, OptimizerConfig

_TINY = Config(
  model=LlamaConfig(vocab_size=20, d_model=16, n_layers=1, n_heads=2, d_ff=24),
  data=DataConfig(sequence_length=8, batch_size=2),
  optimizer=OptimizerConfig(warmup_steps=2),
  steps=10,
)


@pytest.fixture(scope='module')
def result():
  found = together.measure({'tiny': _TINY}, runs=3, rounds=2)
  assert not multiprocessing.active_children()
  return found


@pytest.mark.slow
def test_all_ways_are_measured(result):
  assert json.loads(json.dumps(result, allow_nan=False)) == result
  cores = len(os.sched_getaffinity(0))
  assert result['settings']['processes'] == min(3, cores)
  (entry,) = result['shapes']
  ways = entry['ways']
  assert list(ways) == ['one by one', 'vmap', 'processes']
  assert ways['one by one']['gain'] == 1
  for numbers in ways.values():
    assert numbers['ms'] > 0
    low, high = numbers['gain_quartiles']
    assert low <= numbers['gain'] <= high


@pytest.mark.slow
def test_the_table_names_shapes_and_ways(result):
  text = together.format_result(result)
  assert '3 runs at once' in text
  for way in ('one by one', 'vmap', 'processes'):
    assert f'tiny, {way}' in text


@pytest.mark.slow
def test_a_vmapped_run_computes_what_a_run_alone_does():
  runs = together._Runs(_TINY, 2)
  vmapped = together._Vmapped(_TINY, runs)
  for _ in range(2):
    metrics, alone = vmapped(), runs.one_by_one()
  assert metrics['loss'].shape == (2,)
  for i in range(2):
    assert metrics['loss'][i] == pytest.approx(
      float(alone[i]['loss']), rel=1e-5
    )
  jax.tree.map(
    lambda many, one: _close(many[1], one),
    vmapped.state.params,
    runs.states[1].params,
  )


def _close(a, b):
  assert abs(a - b).max() < 1e-5


@pytest.mark.parametrize('argv, message', [
  (['--shapes', 'dense_1m,nonsense'], "there is no shape 'nonsense'"),
  (['--runs', '0'], '0 is not at least 1'),
  (['--json', '/proc/no/file'], 'cannot write --json'),
])  # fmt: skip
def test_a_mistake_is_one_line(argv, message, capsys):
  with pytest.raises(SystemExit) as caught:
    together.main(argv)
  assert caught.value.code == 2
  err = capsys.readouterr().err
  assert message in err
  assert err.count('\n') == 1
