"""What a cell is known by, and the store of what it has come to."""

import dataclasses
import json
import pathlib

import pytest

from models import families
from train import config as config_lib
from train import recipes
from train.config import KeepConfig, MeshConfig
from train.errors import UserError
from train.experiments import cells
from train.experiments.cells import Cell, Store, key

CONFIG = dataclasses.replace(
  recipes.demo(),
  model=dataclasses.replace(recipes.demo().model, vocab_size=2048),
)
CELL = Cell('base', 0, CONFIG, 'abc')


def record(cell=CELL, **fields):
  return {
    'status': 'done', 'validation_loss': 3.5, 'validation': [[1, 2, 3.5]],
    'train': [], 'config': config_lib.to_dict(cell.config),
    'source_hash': cell.source_hash, 'parameters': 1, 'flops': 1.0,
    'seconds': 1.0, 'device': 'a machine', 'versions': {}, **fields,
  }  # fmt: skip


def changed(**fields):
  return dataclasses.replace(
    CELL, config=dataclasses.replace(CONFIG, **fields)
  ).key


def test_what_does_not_change_the_numbers_does_not_change_the_key():
  assert changed(save_every=7) == CELL.key
  assert changed(keep=KeepConfig(last=5)) == CELL.key
  assert changed(mesh=MeshConfig(fsdp=2)) == CELL.key
  assert changed(accumulate=2) == CELL.key
  elsewhere = dataclasses.replace(CONFIG.data, files='other/*.txt')
  assert changed(data=elsewhere) == CELL.key
  assert dataclasses.replace(CELL, arm='other').key == CELL.key


@pytest.mark.parametrize(
  'fields',
  [
    {'seed': 1},
    {'steps': 401},
    {'eval_every': 41},
    {'data': dataclasses.replace(CONFIG.data, batch_size=8)},
    {'data': dataclasses.replace(CONFIG.data, validation_tokens=8)},
    {'optimizer': dataclasses.replace(CONFIG.optimizer, power=1.1)},
    {'optimizer': dataclasses.replace(CONFIG.optimizer, match_norm=True)},
    {'model': dataclasses.replace(CONFIG.model, d_ff=16)},
  ],
  ids=str,
)
def test_what_changes_the_numbers_changes_the_key(fields):
  assert changed(**fields) != CELL.key


def test_the_text_changes_the_key():
  assert dataclasses.replace(CELL, source_hash='abd').key != CELL.key


def test_a_record_of_before_a_field_existed_is_still_its_cells(tmp_path):
  old = config_lib.to_dict(CONFIG)
  for name in ('match_norm', 'per_head'):
    del old['optimizer'][name]
  assert key(old, 'abc') == CELL.key
  (tmp_path / 'anything.json').write_text(json.dumps(record(config=old)))
  store = Store(tmp_path)
  assert store.get(CELL.key)['validation_loss'] == 3.5
  # What was written when it had another key finds it too.
  assert store.get('anything') == store.get(CELL.key)
  assert len(store.records()) == 1


EVIDENCE = pathlib.Path(__file__).parents[3] / 'docs' / 'evidence' / 'cells'


def test_the_keys_of_the_committed_evidence_stand(monkeypatch):
  store = Store(EVIDENCE)
  older = {}
  for path in sorted(EVIDENCE.glob('*.json')):
    record = json.loads(path.read_text())
    now = key(record['config'], record['source_hash'])
    # A comparison of then finds it by its name, one of today by its key.
    assert store.get(now) == store.get(path.stem) == record
    if now != path.stem:
      older[path.stem] = record
  assert len(store.records()) == 536 and len(older) == 18
  # These were run and named before `optimizer.blockwise` was a field. Then a
  # key hashed the fields that there were, as it leaves out a later one today.
  late = cells._ALWAYS - {'optimizer.blockwise'}
  monkeypatch.setattr(cells, '_ALWAYS', late)
  for name, record in older.items():
    assert key(record['config'], record['source_hash']) == name


def test_a_later_field_changes_the_key_only_away_from_its_default(monkeypatch):
  later = {'optimizer.match_norm', 'model.rope_scaling.factor', 'seed'}
  monkeypatch.setattr(cells, '_ALWAYS', cells._ALWAYS - later)
  before = config_lib.to_dict(CONFIG)
  del before['optimizer']['match_norm'], before['seed']
  assert key(before, 'abc') == changed() == changed(seed=0)
  assert changed(seed=1) != changed()
  matched = dataclasses.replace(CONFIG.optimizer, match_norm=True)
  assert changed(optimizer=matched) != changed()


def test_the_lists_of_fields_hold_fields_of_today():
  fields = {
    path
    for family in families.CONFIGS
    for path in paths(config_lib.defaults(family))
  }
  assert fields >= cells._ALWAYS | cells._FREE
  assert not cells._ALWAYS & cells._FREE


def paths(values, prefix=''):
  found = {f'{prefix}{name}' for name in values}
  for name, value in values.items():
    if isinstance(value, dict):
      found |= paths(value, f'{prefix}{name}.')
  return found


def test_what_is_put_is_there_again(tmp_path):
  store = Store(tmp_path / 'new' / 'folder')
  assert store.get(CELL.key) is None
  store.put(CELL.key, record(train=[[1, 2, None]]))
  again = Store(tmp_path / 'new' / 'folder')
  assert again.get(CELL.key) == record(train=[[1, 2, None]])
  assert again.records() == [record(train=[[1, 2, None]])]
  (path,) = (tmp_path / 'new' / 'folder').iterdir()
  assert path.name == f'{CELL.key}.json'
  # A field a line, for those who read differences.
  assert len(path.read_text().splitlines()) == len(record()) + 2


@pytest.mark.parametrize(
  'content',
  [
    'nothing',
    '[]',
    '{}',
    json.dumps(record(status='open')),
    json.dumps(record(validation_loss='low')),
    json.dumps(record(config={})),
    json.dumps({k: v for k, v in record().items() if k != 'validation'}),
    json.dumps({k: v for k, v in record().items() if k != 'device'}),
  ],
)
def test_a_file_that_is_no_cells_is_named(tmp_path, content):
  (tmp_path / 'bad.json').write_text(content)
  with pytest.raises(UserError, match=r'holds bad\.json, which is no record'):
    Store(tmp_path)


def test_a_store_that_cannot_be_written(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='file'):
    Store(tmp_path / 'file' / 'store').put(CELL.key, record())
