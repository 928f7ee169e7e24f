import importlib.util
import json
import math

import jax
import numpy as np
import pytest

from benchmarks import traffic, transform
from benchmarks import transform_programs as made


@pytest.fixture(scope='module')
def measured(tmp_path_factory):
  path = tmp_path_factory.mktemp('results') / 'transform.json'
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(transform, '_ACCURACY_SAMPLE', 2**14)
    patch.setattr('benchmarks.timing._SAMPLE_SECONDS', 1e-4)
    argv = ['--elements', '4096', '--pairs', '2', '--json', str(path)]
    transform.main(argv)
  return json.loads(path.read_text())


def test_result_names_its_settings_and_machine(measured):
  assert measured['benchmark'] == 'transform'
  assert measured['settings'] == {'elements': 4096, 'pairs': 2, 'p': 1.2}
  assert measured['machine']['platform'] == jax.default_backend()
  assert measured['machine']['jax'] == jax.__version__


def test_every_program_is_there_in_order(measured):
  names = [
    (entry['clip'], entry['power'], entry['whole'])
    for entry in measured['programs']
  ]
  forms = [None, *transform.FORMS]
  whole = {False: ['trainer'], True: ['one factor', 'blocks', 'trainer']}
  assert names == [
    row
    for clip in (False, True)
    for row in (
      *((clip, form, None) for form in forms),
      *((clip, 'sign_power', name) for name in whole[clip]),
    )
  ]


def test_entries_hold_numbers_that_can_be(measured):
  for entry in measured['programs']:
    assert set(entry) == {
      'clip', 'power', 'whole', 'ms', 'ratio', 'ratio_quartiles',
      'temporaries', 'words_read', 'words_written', 'least_read',
      'least_written', 'worst_ulp',
    }  # fmt: skip
    assert entry['ms'] > 0
    if entry['power'] is None:
      assert entry['ratio'] is None
      assert entry['ratio_quartiles'] is None
      assert entry['worst_ulp'] is None
    else:
      low, high = entry['ratio_quartiles']
      assert 0 < low <= entry['ratio'] <= high < math.inf
      assert math.isfinite(entry['worst_ulp'])


def test_nothing_is_counted_below_the_least(measured):
  for entry in measured['programs']:
    assert entry['least_read'] == (5 if entry['clip'] else 4)
    assert entry['least_written'] == 3
    if entry['whole'] == 'blocks':  # A loop's text does not show it.
      assert entry['words_read'] is entry['words_written'] is None
    else:
      assert entry['words_read'] >= entry['least_read']
      assert entry['words_written'] >= entry['least_written']


def test_sign_power_moves_no_more_than_the_update_without(measured):
  base = {
    entry['clip']: entry
    for entry in measured['programs']
    if entry['power'] is None
  }
  for entry in measured['programs']:
    without = base[entry['clip']]
    is_ours = entry['power'] and entry['power'].startswith('sign_power')
    if is_ours and entry['whole'] in (None, 'one factor'):
      for key in ('temporaries', 'words_read', 'words_written'):
        # Scalars are 0.001 of 4096 elements.
        assert entry[key] < without[key] + 0.01, (entry, key)


def _counted(update, sharding=None):
  """Words per element of an update of 2^20, to a thousandth."""
  size = 2**20
  compiled = made.compile_update(update, made.shapes(size, sharding))
  moved = traffic.count(compiled.as_text())
  temporary = compiled.memory_analysis().temp_size_in_bytes
  return [
    round(bytes_ / size / 4, 3)
    for bytes_ in (moved.read, moved.written, temporary)
  ]


@pytest.mark.parametrize('p', [1.1, 1.2, 0.8])
@pytest.mark.parametrize('clip', [False, True])
def test_the_power_adds_not_one_word(clip, p):
  without = _counted(made.chain_update(clip, None, p))
  form = transform.FORMS['sign_power']
  assert _counted(made.chain_update(clip, form, p)) == without
  read, written, _ = without
  assert read >= 4 + clip
  assert written >= 3


@pytest.mark.slow
@pytest.mark.parametrize('topology', ['v5e:2x2', 'v5p:2x2x1'])
@pytest.mark.parametrize('clip', [False, True])
def test_on_a_tpu_the_power_adds_not_one_word_to_the_least(topology, clip):
  if importlib.util.find_spec('libtpu') is None:
    pytest.skip('libtpu, which compiles for a TPU, is not installed')
  device = transform.tpu.devices_of(topology)[0]
  sharding = jax.sharding.SingleDeviceSharding(device)
  for form in (None, transform.FORMS['sign_power']):
    words = _counted(made.chain_update(clip, form, 1.2), sharding)
    assert words[:2] == [4 + clip, 3]
    assert words[2] < 0.05  # A million elements have no temporary of theirs.


@pytest.mark.parametrize('clip', [False, True])
def test_other_ways_to_the_whole_update_agree_with_the_chain(clip):
  size = 2**15  # Two blocks.
  results = {}
  for program in made.programs(1.2, size):
    if program.clip == clip and program.power == 'sign_power':
      arrays = made.Arrays(size, 1.2)
      arrays.grads = 100 * arrays.grads  # Of norm 18.
      run = arrays.runner(arrays.compile(program.update))
      run()
      # The second is below the limit.
      arrays.grads = 1e-3 * arrays.grads
      run()
      results[program.whole] = (arrays.params, *arrays.state)
  assert set(results) >= {None, 'trainer'}
  assert ('blocks' in results) == clip
  expected = results.pop(None)
  for name, found in results.items():
    for x, y in zip(found, expected, strict=True):
      np.testing.assert_allclose(x, y, rtol=5e-6, atol=1e-12, err_msg=name)


def test_worst_ulp_tells_the_accurate_form(measured):
  ulp = {entry['power']: entry['worst_ulp'] for entry in measured['programs']}
  assert ulp['sign_power'] <= 2
  assert ulp['sign_power, traced p'] <= 2
  assert ulp['sign(g) * abs(g)**p'] > 10


def test_programs_of_one_power_agree():
  """The forms are forms of one update; clipping and power both have effect."""
  results = {}
  for clip in (False, True):
    for name, form in {None: None, **transform.FORMS}.items():
      arrays = made.Arrays(4096, 1.2)
      arrays.grads = 100 * arrays.grads  # Of norm 6.
      program = arrays.compile(made.chain_update(clip, form, 1.2))
      arrays.runner(program)()
      nu = arrays.state[2]
      results[clip, name] = np.asarray(nu)
  for clip in (False, True):
    for name in transform.FORMS:
      expected = results[clip, 'sign_power']
      np.testing.assert_allclose(results[clip, name], expected, rtol=1e-4)
    without = results[clip, None]
    assert not np.allclose(without, results[clip, 'sign_power'], rtol=0.1)
  for name in (None, *transform.FORMS):
    assert results[True, name].sum() < 0.1 * results[False, name].sum()


@pytest.mark.parametrize('argv', [
  ['--elements', '0'],
  ['--pairs', 'x'],
  ['--p', 'nan'],
  ['--json', '.'],
  ['--topology', 'v9:2x2'],
  ['--topology', 'v5e:nonsense'],
])  # fmt: skip
def test_bad_options_are_refused(argv, capsys):
  with pytest.raises(SystemExit) as stopped:
    transform.main(argv)
  assert stopped.value.code == 2
  assert 'error: ' in capsys.readouterr().err.splitlines()[-1]


def test_compilation_is_timed(tmp_path, capsys):
  path = tmp_path / 'compile.json'
  argv = ['--compile', '--leaves', '2', '--pairs', '1', '--json', str(path)]
  transform.main(argv)
  entries = {
    entry['name']: entry for entry in json.loads(path.read_text())['programs']
  }
  assert [*entries] == [
    'adamw',
    'formula, p = 1.1',
    'sign_power, p = 1.1',
    'formula, p = 1.2',
    'sign_power, p = 1.2',
  ]
  table = capsys.readouterr().out.split('\n\n')[1].splitlines()
  for line, (name, entry) in zip(table[1:], entries.items(), strict=True):
    assert line.startswith(name)
    assert entry['seconds'] > 0
    assert (entry['ratio'] is None) == (not name.startswith('sign_power'))
    assert entry['text_bytes'] > 1000


def test_without_libtpu_a_topology_is_refused(monkeypatch, capsys):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(SystemExit) as stopped:
    transform.main(['--topology', 'v5e:2x2'])
  assert stopped.value.code == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert 'libtpu' in line


@pytest.mark.slow
def test_counts_for_a_tpu_are_printed_and_written(tmp_path, capsys):
  if importlib.util.find_spec('libtpu') is None:
    pytest.skip('libtpu, which compiles for a TPU, is not installed')
  path = tmp_path / 'tpu.json'
  transform.main([
    '--topology', 'v5e:2x2', '--elements', '65536', '--json', str(path),
  ])  # fmt: skip
  result = json.loads(path.read_text())
  assert result['compiler']['topology'] == 'v5e:2x2'
  assert result['compiler']['libtpu']
  assert len(result['programs']) == len(made.programs(1.2, 65536))
  table = capsys.readouterr().out.split('\n\n')[1].splitlines()
  assert table[0].split() == [
    'update', 'temporaries', 'read', 'written', 'least', 'cycles',
  ]  # fmt: skip
  assert len(table) == 1 + len(result['programs'])


def test_table_shows_every_program(measured):
  text = transform.format_result(measured)
  rows = text.split('\n\n')[1].splitlines()
  assert len(rows) == 1 + len(measured['programs'])
  assert rows[0].split() == [
    'update', 'ms', 'ratio', 'quartiles', 'temporaries', 'read', 'written',
    'least', 'worst', 'ulp',
  ]  # fmt: skip
