"""Recipes compiled for TPUs that are not there: `not run`."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[3]
COMMON = {
  'topology': 'v5e:2x4',
  'model.d_model': 512,
  'model.n_layers': 4,
  'model.n_heads': 8,
  'model.vocab_size': 4096,
  'model.dtype': 'bfloat16',
  'model.scan_layers': 'true',
  'model.remat': 'minimal',
  'data.sequence_length': 512,
  'data.batch_size': 16,
}
DENSE = COMMON | {'model.d_ff': 2048, 'mesh.fsdp': 4, 'mesh.tensor': 2}
MOE = COMMON | {
  'model.d_expert': 256, 'model.d_shared': 1024, 'mesh.fsdp': 2,
  'mesh.expert': 4,
}  # fmt: skip
ATTENTION = {'splash_mha_fwd': 4, 'splash_mha_dq': 4, 'splash_mha_dkv': 4}


def start(out, recipe, options):
  """Begins a compilation in a process of its own."""
  given = [f'--{name}={value}' for name, value in options.items()]
  return subprocess.Popen(
    [sys.executable, '-m', 'train', 'aot', recipe, *given, '--json', str(out)],
    cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
  )  # fmt: skip


@pytest.mark.slow
def test_two_recipes_compile_for_a_tpu_at_once(tmp_path):
  if importlib.util.find_spec('libtpu') is None:
    pytest.skip('libtpu, which compiles for a TPU, is not installed')
  jobs = {'demo': DENSE, 'demo_moe': MOE}
  running = {
    recipe: start(tmp_path / recipe, recipe, options)
    for recipe, options in jobs.items()
  }
  reports = {}
  for recipe, process in running.items():
    out, error = process.communicate(timeout=300)
    assert process.returncode == 0, error
    assert 'A prediction, not a measurement' in out
    reports[recipe] = json.loads((tmp_path / recipe).read_text())

  for report in reports.values():
    assert report['devices'] == 8
    assert report['fits']
    assert report['estimated_cycles'] > 10**6
    assert 0 < report['predicted_mfu'] < 1
    parts = report['bytes_per_device']
    assert parts['moments'] == pytest.approx(2 * parts['parameters'], rel=0.01)
    assert parts['arguments'] < parts['peak'] < 500e6

  def kernels(report):
    return {kernel['name']: kernel['count'] for kernel in report['kernels']}

  def axes(report, kind):
    return {one['axis'] for one in report['collectives'] if one['kind'] == kind}

  dense, moe = reports['demo'], reports['demo_moe']
  # Each kernel once a layer: `minimal` does not run the forward one again.
  assert kernels(dense) == ATTENTION
  assert ATTENTION.items() <= kernels(moe).items()
  assert kernels(moe)['tgmm'] == 3 * 4
  assert 'expert' in axes(moe, 'ragged-all-to-all')
  assert 'tensor' in axes(dense, 'all-reduce')
  # Bounds a tenth above what jax 0.10.2 and libtpu 0.0.42 make of them.
  assert dense['bytes_per_device']['temporary'] < 18.4e6
  assert moe['bytes_per_device']['temporary'] < 409e6


@pytest.mark.slow
def test_a_step_too_large_for_a_tpu_is_one_line(tmp_path):
  if importlib.util.find_spec('libtpu') is None:
    pytest.skip('libtpu, which compiles for a TPU, is not installed')
  large = DENSE | {'data.batch_size': 16384, 'model.remat': 'none'}
  process = start(tmp_path / 'large', 'demo', large)
  _, error = process.communicate(timeout=300)
  assert process.returncode == 2, error
  lines = [line for line in error.splitlines() if 'train: error' in line]
  assert len(lines) == 1
  assert 'does not fit on v5e:2x4' in lines[0]
  assert json.loads((tmp_path / 'large').read_text())['fits'] is False
