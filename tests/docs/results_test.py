"""The page of results says what the cells beside it say."""

import importlib.util
import json
import pathlib
import re

import pytest

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


def test_every_cell_is_in_a_comparison(store):
  used = {
    cell['cell']
    for name in NAMES
    for arm in json.loads((EVIDENCE / f'{name}.json').read_text())[
      'arms'
    ].values()
    for cell in arm['seeds'].values()
  }
  there = {path.stem for path in (EVIDENCE / 'cells').glob('*.json')}
  assert there
  assert there <= used


def test_a_page_that_is_out_of_date_is_noticed(store):
  text = make.PAGE.read_text()
  changed = re.sub(r'\| [+-]0\.\d{4} \|', '| +9.9999 |', text, count=1)
  assert changed != text
  assert make.fill(changed, store) == text
