import json
import math

import jax
import numpy as np
import pytest

from benchmarks import transform


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
  names = [(entry['clip'], entry['power']) for entry in measured['programs']]
  forms = [None, *transform.FORMS]
  assert names == [(clip, form) for clip in (False, True) for form in forms]


def test_entries_hold_numbers_that_can_be(measured):
  for entry in measured['programs']:
    assert set(entry) == {
      'clip', 'power', 'ms', 'ratio', 'ratio_quartiles', 'temporaries',
      'words_read', 'words_written', 'worst_ulp',
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


def test_sign_power_moves_no_more_than_the_update_without(measured):
  base = {
    entry['clip']: entry
    for entry in measured['programs']
    if entry['power'] is None
  }
  for entry in measured['programs']:
    without = base[entry['clip']]
    if entry['power'] and entry['power'].startswith('sign_power'):
      for key in ('temporaries', 'words_read', 'words_written'):
        assert entry[key] < without[key] + 0.1, (entry, key)


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
      arrays = transform.Arrays(4096, 1.2)
      arrays.grads = 100 * arrays.grads  # Of norm 6.
      program = arrays.compile(clip, form, 1.2)
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
])  # fmt: skip
def test_bad_options_are_refused(argv, capsys):
  with pytest.raises(SystemExit) as stopped:
    transform.main(argv)
  assert stopped.value.code == 2
  assert 'error: ' in capsys.readouterr().err.splitlines()[-1]


def test_table_shows_every_program(measured):
  text = transform.format_result(measured)
  rows = text.split('\n\n')[1].splitlines()
  assert len(rows) == 1 + 2 * (1 + len(transform.FORMS))
  assert rows[0].split() == [
    'update', 'ms', 'ratio', 'quartiles', 'temporaries', 'read', 'written',
    'worst', 'ulp',
  ]  # fmt: skip
