import dataclasses
import json
import os
import pathlib
import re
import sys
import time

import pytest

from benchmarks.peers import torch_peer
from benchmarks.peers.maxtext_peer import MaxTextPeer
from benchmarks.peers.process import PeerError, Process, environment
from benchmarks.peers.torch_peer import TorchPeer
from models import accounting
from models.config import LlamaConfig, Qwen2MoeConfig

_LONG = 120.0
_LLAMA = LlamaConfig(vocab_size=20, d_model=16, n_layers=2, n_heads=2, d_ff=24)
_MOE = Qwen2MoeConfig(
  vocab_size=20, d_model=16, n_layers=2, n_heads=2, d_ff=24, n_experts=4,
  experts_per_token=2, d_expert=8, d_shared=16,
)  # fmt: skip

# Steps until the process is paused; how many is seen from outside.
_COUNT = """
import itertools, sys, time
for i in itertools.count():
  open(sys.argv[1], 'w').write(str(i))
  print('line', i, flush=True)
  time.sleep(0.01)
"""


@pytest.fixture
def start():
  """Starts programs given as Python and ends them."""
  started = []

  def call(program, *arguments):
    command = [sys.executable, '-u', '-c', program, *map(str, arguments)]
    started.append(Process('it', command, environment()))
    return started[-1]

  yield call
  for process in started:
    process.close()


def _state(pid):
  """As the kernel has it: T is stopped."""
  return pathlib.Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2][1]


def _wait_until(holds):
  deadline = time.monotonic() + _LONG
  while not holds():
    assert time.monotonic() < deadline
    time.sleep(0.01)


def test_lines_come_with_their_times(start):
  process = start("print('noise'); print('a 1'); print('b 2')")
  match, first = process.wait_for(re.compile(r'a (\d)'), _LONG)
  assert match[1] == '1'
  match, second = process.wait_for(re.compile(r'b (\d)'), _LONG)
  assert match[1] == '2'
  assert first <= second <= time.perf_counter()


def test_what_is_sent_is_read(start):
  process = start("for line in iter(input, 'end'): print('got', line)")
  for word in ('one', 'two'):
    process.send(word)
    process.wait_for(re.compile(f'got {word}'), _LONG)


def test_an_end_is_told_again_and_again_with_the_reason(start):
  process = start("print('fine'); raise ValueError('no such shape')")
  for _ in range(2):
    with pytest.raises(PeerError, match='it has ended: ValueError: no such'):
      process.wait_for(re.compile('x'), _LONG)
    process.discard()
  with pytest.raises(PeerError, match='it has ended'):
    for _ in range(1000):  # The pipe may take a while to break.
      process.send('x' * 1000)


def test_silence_is_an_error(start):
  process = start("print('so far', flush=True); import time; time.sleep(1e6)")
  with pytest.raises(PeerError, match='it: no answer in 0 s'):
    process.wait_for(re.compile('x'), 0.0)


def test_what_is_no_program_is_an_error(tmp_path):
  with pytest.raises(PeerError, match=r'it: .*none: No such file'):
    Process('it', [str(tmp_path / 'none')], environment())


def test_a_paused_process_stands_still(start, tmp_path):
  process = start(_COUNT, tmp_path / 'count')
  process.wait_for(re.compile('line 3'), _LONG)
  pid = process._process.pid
  process.pause()
  _wait_until(lambda: _state(pid) == 'T')
  process.discard()
  before = int((tmp_path / 'count').read_text() or 0)
  process.resume()
  process.wait_for(re.compile(f'line {before + 3}'), _LONG)
  assert _state(pid) != 'T'


def test_closing_ends_children_and_paused_ones(start, tmp_path):
  program = (
    'import subprocess, sys\n'
    "c = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(9)'])"
    "\nprint('child', c.pid, flush=True)\nc.wait()"
  )
  process = start(program)
  child = int(process.wait_for(re.compile(r'child (\d+)'), _LONG)[0][1])
  process.pause()
  process.close()
  process.close()
  gone = pathlib.Path(f'/proc/{child}')
  _wait_until(lambda: not gone.exists() or _state(child) == 'Z')


def test_a_peer_does_not_see_settings_of_our_jax(monkeypatch):
  monkeypatch.setenv('XLA_FLAGS', '--xla_force_host_platform_device_count=8')
  monkeypatch.setenv('JAX_PLATFORMS', 'tpu')
  monkeypatch.setenv('OTHER', 'kept')
  found = environment(JAX_PLATFORMS='cpu')
  assert 'XLA_FLAGS' not in found
  assert found['JAX_PLATFORMS'] == 'cpu'
  assert found['OTHER'] == 'kept'
  assert found['PATH'] == os.environ['PATH']


_TORCH = """
import json, sys
settings = json.loads(sys.argv[1])
print('a warning')
answer = {'versions': {'torch': '0'}, 'parameters': %d, 'given': settings}
print('@step ' + json.dumps(answer), flush=True)
for line in sys.stdin:
  print('more noise')
  print('@step ' + json.dumps({'seconds': 0.5 * int(line)}), flush=True)
"""


@pytest.fixture
def torch_program(tmp_path, monkeypatch):
  """Stands in for the program that needs torch."""

  def write(text):
    path = tmp_path / 'program.py'
    path.write_text(text)
    monkeypatch.setattr(torch_peer, '_PROGRAM', path)

  return write


def _torch(config, **others):
  given = {'device': 'cpu', 'threads': 2, 'compiled': False} | others
  return TorchPeer(sys.executable, config, 2, 8, **given)


@pytest.mark.parametrize('config', [_LLAMA, _MOE])
def test_torch_is_told_the_shape_and_answers(torch_program, config):
  torch_program(_TORCH % accounting.parameters(config).total)
  peer = _torch(config, compiled=True)
  try:
    assert peer.name == 'transformers, torch.compile'
    assert peer.facts['versions'] == {'torch': '0'}
    assert peer.facts['start_seconds'] > 0
    given = peer.facts['given']
    assert (given['batch'], given['length'], given['threads']) == (2, 8, 2)
    assert given['compiled'] is True
    assert given['dtype'] == 'float32'
    assert given['model']['hidden_size'] == 16
    assert given['model']['initializer_range'] == config.init_std
    assert [peer.block(3), peer.block(4)] == [1.5, 2.0]
  finally:
    peer.close()


def test_torch_must_have_as_many_parameters(torch_program):
  torch_program(_TORCH % 7)
  with pytest.raises(PeerError, match=r'transformers, eager: 7 parameters, '):
    _torch(_LLAMA)


def test_torch_must_be_there(torch_program):
  torch_program('import no_such_thing')
  with pytest.raises(PeerError, match='ended: ModuleNotFoundError: No module'):
    _torch(_LLAMA)


_MAXTEXT = """
import json, os, sys, time
given = dict(word.split('=', 1) for word in sys.argv[1:])
with open(os.path.join(os.path.dirname(__file__), 'given.json'), 'w') as file:
  json.dump(given | {'XLA_FLAGS': os.environ.get('XLA_FLAGS')}, file)
print('I0101 some log')
for i in range(int(given['steps'])):
  time.sleep(0.002)
  print(f'I0101 m.py:1] completed step: {i}, seconds: 0.002, loss: 9.0, x',
        file=sys.stderr, flush=True)
"""


@pytest.fixture
def maxtext(tmp_path, monkeypatch):
  """Stands in for maxtext; returns the folder of its program."""
  folder = tmp_path / 'maxtext' / 'trainers' / 'pre_train'
  folder.mkdir(parents=True)
  (folder / 'train.py').write_text(_MAXTEXT)
  about = tmp_path / 'maxtext-0.1.dist-info'
  about.mkdir()
  (about / 'METADATA').write_text(
    'Metadata-Version: 2.1\nName: maxtext\nVersion: 0.1\n'
  )
  monkeypatch.setenv('PYTHONPATH', str(tmp_path))
  return folder


def _maxtext(config, steps=1000, python=sys.executable):
  return MaxTextPeer(python, config, 2, 8, steps=steps, scan_layers=False)


def test_maxtext_is_told_the_shape_and_rests_between_blocks(maxtext):
  peer = _maxtext(_LLAMA)
  try:
    pid = peer._process._process.pid
    assert peer.name == 'MaxText, unrolled'
    assert peer.facts['versions']['maxtext'] == '0.1'
    given = json.loads((maxtext / 'given.json').read_text())
    assert given['base_emb_dim'] == '16'
    assert given['base_mlp_dim'] == '24'
    assert given['per_device_batch_size'] == '2'
    assert given['max_target_length'] == '8'
    assert given['scan_layers'] == 'false'
    assert given['XLA_FLAGS'] is None
    output = pathlib.Path(given['base_output_directory'])
    assert output.exists()
    for _ in range(3):
      _wait_until(lambda: _state(pid) == 'T')
      assert 0 < peer.block(4) < _LONG
  finally:
    peer.close()
  assert not output.exists()


def test_maxtext_has_steps_for_all_blocks(maxtext):
  peer = _maxtext(_LLAMA, steps=MaxTextPeer.steps_for(5, 3))
  try:
    for _ in range(5):
      peer.block(3)
    with pytest.raises(PeerError, match='MaxText, unrolled: it has ended'):
      peer.block(1000)
  finally:
    peer.close()


@pytest.mark.parametrize('config', [
  _MOE,
  LlamaConfig(vocab_size=20, dtype='bfloat16'),
])  # fmt: skip
def test_maxtext_is_for_a_llama_in_float32(config):
  with pytest.raises(PeerError, match='a LLaMA in float32 alone'):
    _maxtext(config)


def test_maxtext_must_be_there(tmp_path):
  with pytest.raises(PeerError, match='PackageNotFoundError'):
    _maxtext(_LLAMA)
  with pytest.raises(PeerError, match='No such file'):
    _maxtext(_LLAMA, python=str(tmp_path / 'python'))


@pytest.mark.slow
@pytest.mark.parametrize('config', [_LLAMA, _MOE])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_transformers_take_steps(config, dtype):
  pytest.importorskip('torch')
  pytest.importorskip('transformers')
  peer = _torch(dataclasses.replace(config, dtype=dtype))
  try:
    assert peer.facts['parameters'] == accounting.parameters(config).total
    assert 0 < peer.block(2) < _LONG
  finally:
    peer.close()
