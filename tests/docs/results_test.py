"""The page of results says what the cells beside it say."""

import importlib.util
import json
import pathlib
import re

import pytest

from train.errors import UserError
from train.experiments import cells, comparison

EVIDENCE = pathlib.Path(__file__).parents[2] / 'docs' / 'evidence'
NAMES = sorted(path.stem for path in EVIDENCE.glob('*.json'))

_spec = importlib.util.spec_from_file_location('make', EVIDENCE / 'make.py')
make = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make)


@pytest.fixture(scope='module')
def store():
  return cells.Store(EVIDENCE / 'cells')


def test_the_page_is_made_of_the_cells(store):
  text = make.PAGE.read_text()
  assert make.fill(text, store) == text
  assert {*re.findall(r'<!-- table: (\w+) -->', text)} == {*NAMES}


@pytest.mark.parametrize('name', NAMES)
def test_a_comparison_is_what_its_cells_say(name, store):
  found = json.loads((EVIDENCE / f'{name}.json').read_text())
  again = comparison.to_json(make.load(name, store))
  assert again['paired'] == found['paired']
  assert again['arms'] == found['arms']


def test_cells_name_no_machines_folder(store):
  for record in store.records():
    for key in ('files', 'tokenizer', 'prepared'):
      assert '/' not in record['config']['data'][key]


@pytest.mark.parametrize('name', NAMES)
def test_comparisons_name_no_machines_folder(name):
  found = json.loads((EVIDENCE / f'{name}.json').read_text())
  of_arms = [arm['overrides'] for arm in found['arms'].values()]
  for fields in (found.get('fields', {}), *of_arms):
    assert not any('/' in str(value) for value in fields.values())
  assert '/' not in found['command']


def one_seed(directory, **changes):
  """A results.json of one pair and seed."""
  found = json.loads((EVIDENCE / 'dense_025m.json').read_text())
  arms = {name: found['arms'][name] for name in ('base', 'p12')}
  for arm in arms.values():
    arm['seeds'] = {'0': arm['seeds']['0'], '9': {**arm['seeds']['0']}}
    arm['seeds']['9'] |= {'status': 'not run', 'cell': 'none'}
  pair = {'arm': 'p12', 'baseline': 'base'}
  path = directory / 'results.json'
  path.write_text(
    json.dumps(found | {'arms': arms, 'paired': [pair]} | changes)
  )
  return path


def test_a_comparison_is_added_without_the_machines_folders(store, tmp_path):
  command = (
    "python -m train compare r --arm p12:p=1.2,lr=1e-3 --out '/my home/out' "
    '--data.files=/my/*.txt --store /my/store'
  )
  source = cells.Store(tmp_path / 'source')
  results = one_seed(tmp_path, command=command, notes=['Seeds 1 were added.'])
  written = json.loads(results.read_text())
  arms = written['arms'].values()
  for arm in arms:
    arm['overrides']['data.files'] = '../my/*.txt'
  results.write_text(json.dumps(written))
  for key in (arm['seeds']['0']['cell'] for arm in arms):
    config = store.get(key)['config']
    data = config['data'] | {'files': '/my/*.txt'}
    source.put(key, store.get(key) | {'config': config | {'data': data}})
  here = tmp_path / 'here'
  make.add('new', results, source, here)
  text = ''.join(path.read_text() for path in here.glob('**/*.json'))
  assert '/my' not in text
  assert json.loads((here / 'new.json').read_text())['command'] == (
    'python -m train compare r --arm p12:p=1.2,lr=1e-3 --out out '
    "'--data.files=*.txt' --store store"
  )
  own = cells.Store(here / 'cells')
  test_cells_name_no_machines_folder(own)
  loaded = make.load('new', own, here)
  assert loaded.pairs[0].paired.n == 1
  assert make.table(loaded).endswith('|\n\nSeeds 1 were added.')
  with pytest.raises(UserError, match=r'source2 has no cell .*--store'):
    make.add('new', results, cells.Store(tmp_path / 'source2'), here)
  with pytest.raises(UserError, match='is no comparison'):
    make.add('new', one_seed(tmp_path, arms=3), source, here)


def test_what_a_reader_must_know_stands_under_the_table():
  pair = comparison.Pair('a', 'b', [], None, None, None, None, {}, 'device')
  result = comparison.Comparison(
    't', {}, [pair], ('a', 'b'), seen=2, tuned={'a': 'a-lr0.1'}
  )
  _, *remarks = make.table(result).split('\n\n')
  assert remarks == [
    'The two sides of a seed differ in device too, which is part of their '
    'difference: `a`.',
    'Of the learning rates tried, that of the lowest mean loss: `a`: '
    '`a-lr0.1`.',
    'The headline was named when 2 of its pairs had been finished.',
  ]


def test_every_cell_is_in_a_comparison(store):
  used = {
    cell['cell']
    for name in NAMES
    for arm in json.loads((EVIDENCE / f'{name}.json').read_text())[
      'arms'
    ].values()
    for cell in arm['seeds'].values()
  }
  records = store.records()
  assert len(records) == len([*(EVIDENCE / 'cells').iterdir()])
  in_one = [store.get(key) for key in used]
  assert all(record in in_one for record in records)


def test_a_page_that_is_out_of_date_is_noticed(store):
  text = make.PAGE.read_text()
  changed = re.sub(r'\| [+-]0\.\d{4} \|', '| +9.9999 |', text, count=1)
  assert changed != text
  assert make.fill(changed, store) == text
