import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import kernels
from models import sharding

_SHAPES = kernels.SHAPES
_SMALL = {
  'attention': [{'B': 2, 'T': 9, 'N': 4, 'K': 2, 'H': 8}],
  'loss': [{'B': 2, 'T': 5, 'D': 8, 'V': 20}],
  'grouped': [{'M': 24, 'E': 4, 'D': 8, 'F': 6}],
  'experts': [{'B': 2, 'T': 4, 'k': 2, 'E': 4, 'D': 8, 'F': 6}],
}
_ROUTINGS = {
  'attention': [None],
  'loss': [None],
  'grouped': ['equal', 'random', 'all-to-one'],
  'experts': ['equal', 'random', 'all-to-k'],
}
_PEERS = {
  'attention': ['xla'],
  'loss': ['optax'],
  'grouped': ['useful work', 'ragged_dot'],
  'experts': ['useful work'],
}


@pytest.fixture(autouse=True)
def small(monkeypatch):
  monkeypatch.setattr(kernels, 'SHAPES', _SMALL)


@pytest.fixture(scope='module')
def measured(tmp_path_factory):
  path = tmp_path_factory.mktemp('results') / 'kernels.json'
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(kernels, 'SHAPES', _SMALL)
    patch.setattr('benchmarks.timing._SAMPLE_SECONDS', 1e-6)
    jax.config.update('jax_disable_most_optimizations', True)  # Half the time.
    try:
      kernels.main(['--rounds', '1', '--json', str(path)])
    finally:
      jax.config.update('jax_disable_most_optimizations', False)
  return json.loads(path.read_text())


@pytest.fixture
def invented(monkeypatch):
  """A result of made-up times: ours takes 3, 8 and 6 seconds, peers 2."""

  def time_rounds(programs, rounds):
    assert rounds == 3
    return {
      name: (3.0, 8.0, 6.0) if name == 'ours' else (2.0,) * 3
      for name in programs
    }

  monkeypatch.setattr(kernels.timing, 'time_rounds', time_rounds)
  monkeypatch.setattr(kernels, 'compile_program', lambda *args: None)
  return kernels.measure(3)


def test_result_names_its_settings_and_machine(measured):
  assert set(measured) == {
    'benchmark', 'machine', 'settings', 'target', 'rows',
  }  # fmt: skip
  assert measured['benchmark'] == 'kernels'
  assert measured['settings'] == {'rounds': 1, 'only': None}
  assert measured['target'] == 2
  assert measured['machine']['platform'] == jax.default_backend()
  assert measured['machine']['jax'] == jax.__version__


def test_every_row_is_there_in_order(measured):
  found = [
    tuple(row[key] for key in ('kernel', 'routing', 'pass'))
    for row in measured['rows']
  ]
  assert found == [
    (kernel, routing, run)
    for kernel, routings in _ROUTINGS.items()
    for routing in routings
    for run in ('forward', 'gradient')
  ]


def test_rows_hold_numbers_that_can_be(measured):
  for row in measured['rows']:
    assert set(row) == {
      'kernel', 'shape', 'dtype', 'routing', 'pass', 'ms', 'peers',
    }  # fmt: skip
    assert row['shape'] == _SMALL[row['kernel']][0]
    assert row['dtype'] == 'float32'
    assert 0 < row['ms'] < math.inf
    assert [peer['name'] for peer in row['peers']] == _PEERS[row['kernel']]
    for peer in row['peers']:
      assert set(peer) == {'name', 'ms', 'ratio', 'ratio_quartiles'}
      low, high = peer['ratio_quartiles']
      assert 0 < low == peer['ratio'] == high < math.inf
      assert peer['ratio'] == pytest.approx(row['ms'] / peer['ms'])


def test_a_ratio_is_of_our_time_to_the_peers(invented):
  for row in invented['rows']:
    assert row['ms'] == 6000
    for peer in row['peers']:
      assert (peer['ms'], peer['ratio']) == (2000, 3)
      assert peer['ratio_quartiles'] == [2.25, 3.5]


def test_the_text_shows_every_row_in_100_columns(invented):
  for row in invented['rows']:
    longest = max(_SHAPES[row['kernel']], key=lambda x: len(str(x.values())))
    row['shape'] = longest
  text = kernels.format_result(invented)
  assert max(map(len, text.splitlines()[1:])) <= 100  # The first: a CPU's name.
  _, *tables, target = text.split('\n\n')
  assert len(tables) == len(_PEERS)
  for table, (kernel, shapes) in zip(tables, _SHAPES.items(), strict=True):
    _, header, *rows = table.splitlines()
    assert header.startswith('x'.join(shapes[0]))
    assert len(rows) == 2 * len(_ROUTINGS[kernel])
    assert all(row.count('2.25-3.50') == len(_PEERS[kernel]) for row in rows)
    assert all('6000' in row and '2000' in row for row in rows)
  assert target.startswith('target: the grouped product takes at most 2 times')
  assert target.endswith('6 of 6 rows take more')


def test_one_kernel_alone(invented):
  result = kernels.measure(3, 'attention')
  assert {row['kernel'] for row in result['rows']} == {'attention'}
  assert result['settings']['only'] == 'attention'
  text = kernels.format_result(result)
  assert len(text.split('\n\n')) == 2
  assert 'target' not in text


@pytest.mark.parametrize('ms, text', [
  (12345.6, '12346'), (123.4, '123'), (12.34, '12.3'), (1, '1.00'),
  (0.0123, '0.0123'),
])  # fmt: skip
def test_milliseconds_have_three_digits(ms, text):
  assert kernels._ms(ms) == text


def _outputs(program):
  return kernels.compile_program(program, gradient=True)()


@pytest.mark.parametrize('kernel, peer', [
  ('attention', 'xla'), ('loss', 'optax'), ('grouped', 'ragged_dot'),
])  # fmt: skip
def test_a_peer_computes_the_same(kernel, peer):
  for case in kernels.make_cases(kernel):
    found, expected = map(_outputs, (case.ours, case.peers[peer]))
    assert len(found) == 1 + len(case.ours.arrays)
    for ours, theirs in zip(found, expected, strict=True):
      assert np.any(theirs)
      np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_the_useful_work_of_the_grouped_product():
  equal, *_ = kernels.make_cases('grouped')
  ours, useful = equal.ours, equal.peers['useful work']
  y_MF = kernels.compile_program(ours, gradient=False)()
  y_ECF = kernels.compile_program(useful, gradient=False)()
  np.testing.assert_allclose(y_MF, y_ECF.reshape(y_MF.shape), atol=1e-5)


def test_the_useful_work_of_the_experts():
  equal, *_ = kernels.make_cases('experts')
  x_BTD, weights_BTk, *matrices = equal.ours.arrays
  (chosen_BTk,) = equal.ours.others
  x_ECD, *same = equal.peers['useful work'].arrays
  assert all(map(np.array_equal, matrices, same))
  order_M = np.argsort(chosen_BTk.ravel(), stable=True)
  chosen, width = chosen_BTk.shape[-1], x_BTD.shape[-1]
  rows_MD = x_BTD.reshape(-1, width)[order_M // chosen]
  y_ECD = equal.peers['useful work'].function(
    rows_MD.reshape(x_ECD.shape), *matrices
  )
  y_MD = jnp.zeros_like(rows_MD).at[order_M].set(y_ECD.reshape(-1, width))
  y_BTkD = y_MD.reshape(*chosen_BTk.shape, width)
  np.testing.assert_allclose(
    kernels.compile_program(equal.ours, gradient=False)(),
    jnp.sum(y_BTkD * weights_BTk[..., None], axis=2),
    atol=1e-5,
  )


def test_equal_sizes_exist_at_every_shape():
  for shape in _SHAPES['grouped']:
    assert shape['M'] % shape['E'] == 0
  for shape in _SHAPES['experts']:
    assert shape['B'] * shape['T'] * shape['k'] % shape['E'] == 0


def test_routings():
  sizes = {
    case.routing: case.ours.others[0].tolist()
    for case in kernels.make_cases('grouped')
  }
  assert sizes['equal'] == [6, 6, 6, 6]
  assert sum(sizes['random']) == 24
  assert len(set(sizes['random'])) > 1
  assert sorted(sizes['all-to-one']) == [0, 0, 0, 24]
  counts = {}
  for case in kernels.make_cases('experts'):
    (chosen_BTk,) = case.ours.others
    assert (np.diff(np.sort(chosen_BTk)) > 0).all(), 'all different'
    counts[case.routing] = np.bincount(chosen_BTk.ravel(), minlength=4).tolist()
  assert counts['equal'] == [4, 4, 4, 4]
  assert len(set(counts['random'])) > 1
  assert counts['all-to-k'] == [8, 8, 0, 0]


def test_a_gpu_does_attention_in_bfloat16_too(monkeypatch):
  monkeypatch.setattr(sharding, 'platform', lambda mesh: 'gpu')
  cases = list(kernels.make_cases('attention'))
  assert [case.dtype for case in cases] == ['float32', 'bfloat16']
  for case in cases:
    programs = case.ours, *case.peers.values()
    assert all(x.dtype == case.dtype for p in programs for x in p.arrays)


@pytest.mark.parametrize('argv, message', [
  (['--rounds', '0'], 'argument --rounds: 0 is not at least 1'),
  (['--rounds', 'x'], "argument --rounds: invalid int value: 'x'"),
  (['--only', 'optimizer'], "argument --only: invalid choice: 'optimizer'"),
  (['--json', '.'], 'cannot write --json .'),
  (['--json', ''], 'cannot write --json .'),
  (['--only=--'], "'--'"),
  (['attention'], 'unrecognized arguments: attention'),
])  # fmt: skip
def test_bad_options_are_refused_in_one_line(argv, message, capsys):
  with pytest.raises(SystemExit) as stopped:
    kernels.main(argv)
  assert stopped.value.code == 2
  err = capsys.readouterr().err
  assert message in err
  assert err.startswith('python -m benchmarks.kernels: error: ')
  assert err.count('\n') == 1
