import importlib.util
import json
from types import SimpleNamespace

import pytest

from train import recipes
from train.__main__ import main as entry_point
from train.aot import collectives, command, report, search, show, topology
from train.aot import compile as compile_lib
from train.aot.chips import CHIPS
from train.aot.estimate import Estimate, Kernel
from train.errors import UserError


def run(capsys, *arguments):
  """Status and last line of errors of `python -m train aot`."""
  status = entry_point(['aot', *arguments])
  captured = capsys.readouterr()
  return status, captured.err.strip()


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['demo'], 'the following arguments are required: --topology'),
    (['nothing', '--topology', 'v5p:4x4x2'], "no recipe 'nothing'"),
    (['demo', '--topology', 'v5p'], "--topology 'v5p' is not known"),
    (['demo', '--topology', 'v9:2x2'], "--topology 'v9:2x2' is not known"),
    (['demo', '--topology', 'v5e:2x2x2'], 'a v5e slice has 2 dimensions'),
    (['demo', '--topology', 'v5p:2x2'], 'a v5p slice has 3 dimensions'),
    (['demo', '--topology', 'v5p:2x2x1', '--slices', '0'], 'not at least 1'),
    (['demo', '--topology', 'v5p:2x2x1', '--slices', '400000'],
     'argument --slices: 400000 is above 256'),
    (['demo', '--topology', 'v5p:2x2x1', '--json', '/nowhere/x'],
     '/nowhere/x cannot be written: No such file'),
    (['demo', '--topology', 'v5p:2x2x1', '--model.n_experts', '4'],
     '--model.n_experts is not an option of a llama model'),
  ],
)  # fmt: skip
def test_mistakes_are_one_line(capsys, arguments, message):
  status, error = run(capsys, *arguments)
  assert status == 2
  assert message in error
  assert '\n' not in error


def test_without_libtpu_one_line_says_what_to_install(capsys, monkeypatch):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=r"pip install -e '\.\[train,tpu\]'"):
    topology.devices_of('v5p:2x2x1')


def made(config, seconds=0.01, peak=10**9):
  """A report as `compile_step` would return it."""
  chip = CHIPS['v5p']
  return report.Report(
    config=compile_lib.with_vocabulary(config),
    topology='v5p:2x2x2',
    slices=1,
    chip=chip,
    mesh={'data': 1, 'fsdp': 8, 'tensor': 1, 'expert': 1},
    bytes=report.Bytes(300, 700, peak, 100, 200, 300),
    fits=peak <= chip.hbm_bytes,
    collectives=[
      collectives.Collective('all-gather', 'fsdp', 2, 64, 1e-6, False),
      collectives.Collective('all-gather', 'fsdp', 1, 36, 1e-6, True),
      collectives.Collective('all-reduce', 'data', 1, 500, 1e-6, False),
    ],
    estimate=Estimate(
      10**6, [Kernel('splash_mha_fwd', 3, 10**9)], 0, seconds, 0.0, 0.0, 0.0
    ),
    compile_seconds=1.0,
    text='HloModule f',
  )


@pytest.fixture
def compiles(monkeypatch):
  """Replaces compilation: bigger batches are faster, above 4 do not fit."""
  calls = []

  def compile_step(config, name, slices=1):
    del name, slices
    rows = config.data.batch_size // 8
    calls.append((config.mesh.fsdp, config.model.remat, rows))
    if rows > 4:
      raise compile_lib.DoesNotFitError(200 * 10**9, 95 * 10**9)
    slow = {'none': 1.0, 'minimal': 1.5, 'full': 2.0}[config.model.remat]
    slow *= 1 if config.mesh.fsdp == 4 else 1.1
    return made(config, seconds=slow * (1 + rows))

  devices = [object()] * 8
  mesh = SimpleNamespace(shape={'data': 1, 'fsdp': 8})
  for module in (search, topology):
    monkeypatch.setattr(module, 'devices_of', lambda name, slices: devices)
  for module in (search, command):
    monkeypatch.setattr(module, 'make_mesh', lambda *_: mesh)
  monkeypatch.setattr(search, 'check', lambda config, mesh: None)
  monkeypatch.setattr(report, 'versions', dict)
  for module in (search, compile_lib):
    monkeypatch.setattr(module, 'compile_step', compile_step)
  return calls


def test_json_and_table(compiles, capsys, tmp_path):
  out, program = tmp_path / 'aot.json', tmp_path / 'step.hlo'
  status, _ = run(
    capsys, 'demo', '--topology', 'v5p:2x2x2', '--json', str(out),
    '--hlo', str(program),
  )  # fmt: skip
  assert status == 0
  written = json.loads(out.read_text())
  assert written['topology'] == 'v5p:2x2x2'
  assert written['devices'] == 8
  assert written['fits'] is True
  assert written['bytes_per_device'] == {
    'arguments': 300, 'temporary': 700, 'peak': 10**9,
    'parameters': 100, 'moments': 200, 'activations': 300,
  }  # fmt: skip
  assert written['collectives'] == [
    {'kind': 'all-reduce', 'axis': 'data', 'count': 1, 'bytes': 500},
    {'kind': 'all-gather', 'axis': 'fsdp', 'count': 3, 'bytes': 100},
  ]
  assert written['estimated_cycles'] == 10**6
  assert written['predicted_seconds'] > 0
  assert 0 < written['predicted_mfu'] < 1
  assert 'not a measurement' in written['warning']
  assert written['config']['model']['vocab_size'] == 2048
  assert program.read_text() == 'HloModule f'


def test_the_table_says_what_matters():
  table = show.table(made(recipes.get('demo')))
  for text in (
    'v5p:2x2x2: 8 devices', 'fits, there are 102.01 GB', '1.00 GB',
    'all-reduce over data', 'splash_mha_fwd', 'MFU', 'not a measurement',
  ):  # fmt: skip
    assert text in table
  big = made(recipes.get('demo'), peak=2 * 10**11)
  assert 'DOES NOT FIT' in show.table(big)


def test_what_the_compiler_refuses_is_an_error_and_json(
  compiles, capsys, tmp_path
):
  out = tmp_path / 'aot.json'
  status, error = run(
    capsys, 'demo', '--topology', 'v5p:2x2x2', '--data.batch_size', '40',
    '--json', str(out),
  )  # fmt: skip
  assert status == 2
  assert 'does not fit on v5p:2x2x2: it needs 200.0 GB' in error
  written = json.loads(out.read_text())
  assert keys(written) == keys(made(recipes.get('demo')).to_json())
  assert written['fits'] is False
  assert written['devices'] == 8
  assert written['mesh'] == {'data': 1, 'fsdp': 8}
  assert written['bytes_per_device']['peak'] == 200 * 10**9
  assert written['bytes_per_device']['temporary'] is None
  assert written['memory_per_device'] == CHIPS['v5p'].hbm_bytes
  assert written['predicted_seconds'] is None


def keys(written):
  """Those of a report, in order, with those of its parts."""
  parts = ('bytes_per_device', 'seconds')
  return list(written), [list(written[part]) for part in parts]


def test_a_peak_above_the_memory_is_an_error_after_the_table(
  compiles, capsys, monkeypatch
):
  monkeypatch.setattr(
    compile_lib,
    'compile_step',
    lambda config, *_: made(config, peak=2 * 10**11),
  )
  assert entry_point(['aot', 'demo', '--topology', 'v5p:2x2x2']) == 2
  captured = capsys.readouterr()
  assert 'DOES NOT FIT' in captured.out
  assert 'it needs 200.0 GB a device' in captured.err


def test_the_search_walks_batches_then_meshes(compiles, capsys):
  status = entry_point(['aot', 'demo', '--topology', 'v5p:2x2x2', '--search'])
  out = capsys.readouterr().out
  assert status == 0
  # Up to the batch that does not fit, for each policy; then other meshes.
  policies = ('none', 'minimal', 'full')
  assert compiles[:12] == [
    (8, remat, rows) for rows in (1, 2, 4, 8) for remat in policies
  ]
  meshes = {call for call in compiles if call[0] < 8}
  assert {(remat, rows) for _, remat, rows in meshes} == {('none', 4)}
  best = next(line for line in out.splitlines() if 'the best:' in line)
  assert best == (
    'the best: --mesh.fsdp 4 --mesh.tensor 1 --mesh.expert 1 '
    '--model.remat none --data.batch_size 32'
  )


def test_the_search_is_bounded(compiles, capsys):
  entry_point(
    ['aot', 'demo', '--topology', 'v5p:2x2x2', '--search', '--trials', '3']
  )
  assert len(compiles) == 3
  assert '3/3' in capsys.readouterr().out


def test_the_search_says_what_it_changed_of_the_recipe(compiles, capsys):
  entry_point(
    ['aot', 'demo', '--topology', 'v5p:2x2x2', '--search', '--accumulate', '2',
     '--mesh.data', '2']
  )  # fmt: skip
  out = capsys.readouterr().out
  assert 'the best: --mesh.data 0 --mesh.fsdp 4' in out
  assert '--data.batch_size 32 --accumulate 1\n' in out


def test_nothing_fits(compiles, capsys, monkeypatch, tmp_path):
  def compile_step(*args):
    raise compile_lib.DoesNotFitError(2, 1)

  monkeypatch.setattr(search, 'compile_step', compile_step)
  out = tmp_path / 'aot.json'
  status, error = run(
    capsys, 'demo', '--topology', 'v5p:2x2x2', '--search', '--json', str(out)
  )
  assert status == 2
  assert 'nothing that was tried fits into memory of v5p:2x2x2' in error
  written = json.loads(out.read_text())
  assert keys(written) == keys(made(recipes.get('demo')).to_json())
  assert written['fits'] is False
  assert written['mesh'] is None
  assert written['bytes_per_device']['peak'] is None


@pytest.mark.parametrize(
  ('text', 'needed'),
  [
    ('... Used 21.50G of 15.75G hbm. Exceeded hbm capacity by 5.75G.', 21.5),
    ('... the total memory required for HLO temporaries (262.82G) exceeds '
     'available HBM (15.75G).', 262.82),
  ],
)  # fmt: skip
def test_reading_the_compilers_refusal(text, needed):
  error = compile_lib._too_large(RuntimeError(f'RESOURCE_EXHAUSTED: {text}'))
  assert isinstance(error, compile_lib.DoesNotFitError)
  assert error.needed == int(needed * 2**30)
  assert error.available == int(15.75 * 2**30)


def test_other_errors_of_the_compiler_stay():
  other = RuntimeError('INTERNAL')
  assert compile_lib._too_large(other) is other
