import json
import multiprocessing
import platform

import pytest

from benchmarks import allocator
from models.config import LlamaConfig
from train.config import Config, DataConfig, OptimizerConfig

_TINY = Config(
  model=LlamaConfig(vocab_size=20, d_model=16, n_layers=1, n_heads=2, d_ff=24),
  data=DataConfig(sequence_length=8, batch_size=2),
  optimizer=OptimizerConfig(warmup_steps=2),
  steps=10,
)


@pytest.mark.slow
@pytest.mark.skipif(
  platform.libc_ver()[0] != 'glibc', reason='memory is kept by glibc alone'
)
def test_both_ways_are_measured():
  result = allocator.measure({'tiny': _TINY}, rounds=2)
  assert not multiprocessing.active_children()
  assert json.loads(json.dumps(result, allow_nan=False)) == result
  (entry,) = result['shapes']
  assert list(entry['ways']) == ['as it comes', 'memory kept']
  assert entry['ratio'] > 0
  text = allocator.format_result(result)
  for way in entry['ways']:
    assert f'tiny, {way}' in text


def test_bad_options_are_refused(capsys):
  with pytest.raises(SystemExit, match='2'):
    allocator.main(['--shapes', 'dense_9m'])
  assert "no shape 'dense_9m'" in capsys.readouterr().err
