import dataclasses
import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from benchmarks import model as benchmark
from models import families, sharding
from models.config import LlamaConfig, Qwen2MoeConfig
from models.decoder import total_loss

_SMALL = [
  '--batch', '2', '--length', '8', '--rounds', '2', '--side', '32',
  '--model.n_layers', '1', '--model.d_model', '16', '--model.n_heads', '2',
  '--model.vocab_size', '20',
]  # fmt: skip
_PROGRAMS = benchmark.Programs
_LLAMA = LlamaConfig(vocab_size=20, d_model=16, n_layers=2, n_heads=2, d_ff=24)
_MOE = Qwen2MoeConfig(
  vocab_size=20, d_model=16, n_layers=2, n_heads=2, d_ff=24, n_experts=4,
  experts_per_token=2, d_expert=8, d_shared=16,
)  # fmt: skip


_BLOCKED = """
import sys
for name in ('array_record', 'grain', 'orbax', 'tensorflow', 'tokamax',
             'tensorflow_datasets', 'tokenizers', 'tqdm'):
  sys.modules[name] = None
from benchmarks import timing
from benchmarks.model import main
timing._SAMPLE_SECONDS = 1e-5
main(sys.argv[1:])
"""


@pytest.fixture(scope='module')
def llama(tmp_path_factory):
  """A result of LLaMA's, without the libraries of data and of other kernels."""
  path = tmp_path_factory.mktemp('results') / 'model.json'
  result = subprocess.run(
    [sys.executable, '-c', _BLOCKED, *_SMALL, '--json', str(path)],
    # Compiles in half the time.
    env=os.environ | {'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'},
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 0, result.stderr
  assert 'whole step' in result.stdout
  return json.loads(path.read_text())


@pytest.fixture(scope='module')
def qwen2_moe(tmp_path_factory):
  """A result of Qwen2-MoE's, and the programs."""
  path = tmp_path_factory.mktemp('results') / 'model.json'
  made = []

  def programs(*args):
    made.append(_PROGRAMS(*args))
    return made[0]

  jax.config.update('jax_disable_most_optimizations', True)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('benchmarks.timing._SAMPLE_SECONDS', 1e-5)
    patch.setattr(benchmark, 'Programs', programs)
    benchmark.main([
      *_SMALL, '--preset', 'qwen2_moe_laptop', '--json', str(path),
      '--model.scan_layers', 'true', '--model.remat', 'minimal',
    ])  # fmt: skip
  jax.config.update('jax_disable_most_optimizations', False)
  return json.loads(path.read_text()), made[0]


@pytest.fixture(params=['llama', 'qwen2_moe'])
def measured(request):
  result = request.getfixturevalue(request.param)
  return result if request.param == 'llama' else result[0]


def test_the_result_is_whole(measured):
  model = measured['settings']['model']
  sparse = model['type'] == 'Qwen2MoeConfig'
  assert measured['settings']['batch'] == 2
  assert measured['settings']['length'] == 8
  assert (model['d_model'], model['vocab_size']) == (16, 20)
  assert measured['limit']['flops_per_second'] > 0
  programs = measured['programs']
  assert [entry['program'] for entry in programs] == [
    'embedding', 'attention', 'experts' if sparse else 'MLP', 'head and loss',
    'optimizer', 'whole step',
  ]  # fmt: skip
  for entry in programs:
    low, high = entry['ms_quartiles']
    assert 0 < low <= entry['ms'] <= high < math.inf
    assert (entry['of_limit'] > 0) == (entry['flops'] > 0)
    assert entry['compile_seconds'] > 0
  flops = [entry['flops'] for entry in programs]
  assert sum(flops[:-1]) == flops[-1] == 16 * measured['flops_per_token']
  assert flops[0] == flops[4] == 0
  assert measured['sum_ms'] > 0
  assert measured['sum_over_whole'] > 0
  rate = 16 / (programs[-1]['ms'] / 1e3)
  assert measured['tokens_per_second'] == pytest.approx(rate)


def test_on_a_cpu_there_is_no_mfu(measured):
  assert measured['machine']['platform'] == 'cpu'
  assert measured['mfu'] is None
  assert measured['mfu_causal'] is None
  text = benchmark.format_result(measured)
  assert 'MFU: left out, a CPU has no published peak.' in text
  assert 'in float32' in text


def test_the_text_holds_the_table_and_fits_80_columns(measured):
  text = benchmark.format_result(measured)
  assert max(map(len, text.splitlines()[1:])) <= 80  # The first: a CPU's name.
  table = text.split('\n\n')[1].splitlines()
  assert [line.split('  ')[0] for line in table[1:]] == [
    *(entry['program'] for entry in measured['programs'][:-1]),
    'sum',
    'whole step',
  ]


def test_mfu_by_hand(measured):
  on_gpu = measured | {
    'machine': measured['machine']
    | {'platform': 'gpu', 'device': 'NVIDIA H100 80GB HBM3'},
    'mfu': 0.4321,
    'mfu_causal': 0.4,
  }
  text = benchmark.format_result(on_gpu)
  assert 'MFU 43.2 %' in text
  assert '9.89e+14' in text
  assert '40.0 % with half the scores' in text


@pytest.mark.parametrize('config', [_LLAMA, _MOE])
@pytest.mark.parametrize('tied', [False, True])
@pytest.mark.parametrize('scanned', [False, True])
def test_every_parameter_is_in_a_part(config, tied, scanned):
  fields = {**vars(config), 'tie_embeddings': tied, 'scan_layers': scanned}
  config = type(config)(**fields)
  model = nnx.eval_shape(
    lambda: families.build(config, rngs=nnx.Rngs(params=0))
  )
  paths = [path for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]
  parts = benchmark._parts(config, None)
  for path in paths:
    owners = [name for name, part in parts.items() if part.owns(path)]
    both = tied and path == ('embedding',)
    assert len(owners) == (2 if both else 1), (path, owners)


@pytest.mark.parametrize('config', [
  dataclasses.replace(_LLAMA, n_layers=1),
  dataclasses.replace(_MOE, n_layers=1, balance_loss=0.0, scan_layers=True),
])  # fmt: skip
def test_one_layers_parts_in_turn_are_the_model(config):
  mesh = sharding.make_mesh(jax.devices()[:1])
  graph, params = nnx.split(
    nnx.eval_shape(
      lambda: families.build(config, rngs=nnx.Rngs(params=0), mesh=mesh)
    )
  )
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda p: rng.normal(0.2, 0.2, p.shape), params)
  tokens_BU = rng.integers(0, 20, (2, 9), np.int32)

  @jax.jit
  def losses(params):
    model = nnx.merge(graph, params)
    x: tuple = ()
    for part in benchmark._parts(config, mesh).values():
      x = part.call(model, tokens_BU, *x)[:1]
    sums = model.loss_sums(tokens_BU[:, :-1], tokens_BU[:, 1:])
    return x[0], total_loss(sums, config)

  of_parts, of_model = losses(jax.tree.map(jnp.float32, params))
  np.testing.assert_allclose(of_parts, of_model, rtol=1e-5)
  assert of_model > 1


def test_parts_and_whole_make_numbers(qwen2_moe):
  _, programs = qwen2_moe
  steps = int(programs.state.step)
  before = jax.tree.map(np.array, programs.state.params)
  for name, start in programs.runs.items():
    leaves = jax.tree.leaves(start())
    assert leaves, name
    assert all(np.isfinite(leaf).all() for leaf in leaves), name
  assert programs.state.step == steps + 1
  same = jax.tree.map(np.array_equal, before, programs.state.params)
  assert not any(jax.tree.leaves(same))


@pytest.mark.parametrize('argv, message', [
  (['--batch', '0'], 'argument --batch: 0 is not at least 1'),
  (['--length', 'x'], "argument --length: invalid int value: 'x'"),
  (['--preset', 'llama_7b'], "argument --preset: invalid choice: 'llama_7b'"),
  (['--preset=--'], ''),
  (['--json', '.'], 'cannot write --json .'),
  (['--model.n_heads', '5'], '--model.n_heads (5) must divide model.d_model'),
  (['--model.vocab_size', '0'], '--model.vocab_size is 0'),
  (['--model.n_experts', '4'], 'a LlamaConfig has no such field'),
  (['--model.scan_layers', '1'], "'1' is neither true nor false"),
  (['--model.depth', '4'], 'unrecognized arguments: --model.depth'),
])  # fmt: skip
def test_bad_options_are_refused_in_one_line(argv, message, capsys):
  with pytest.raises(SystemExit) as stopped:
    benchmark.main(argv)
  assert stopped.value.code == 2
  err = capsys.readouterr().err
  assert message in err
  assert err.startswith('python -m benchmarks.model: error: ')
  assert err.count('\n') == 1
