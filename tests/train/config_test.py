"""What a configuration is in JSON, in this version and in others."""

import copy

import pytest

from models import families
from train import config as config_lib
from train import recipes


def fields(values, prefix=()):
  """The paths of all fields, sections included, but for the model's family."""
  for name, value in values.items():
    path = (*prefix, name)
    if path not in (('model',), ('model', 'family')):
      yield path
    if isinstance(value, dict):
      yield from fields(value, path)


def without(values, path):
  values = copy.deepcopy(values)
  inner = values
  for name in path[:-1]:
    inner = inner[name]
  del inner[path[-1]]
  return values


@pytest.mark.parametrize('family', families.CONFIGS)
def test_a_config_reads_without_any_one_of_its_fields(family):
  # As files of before the field existed, which did what its default does.
  whole = config_lib.defaults(family)
  assert config_lib.to_dict(config_lib.from_dict(whole)) == whole
  paths = list(fields(whole))
  assert len(paths) > 60
  for path in paths:
    read = config_lib.from_dict(without(whole, path))
    assert config_lib.to_dict(read) == whole, path


@pytest.mark.parametrize(
  'damage',
  [
    lambda c: c.clear(),
    lambda c: c.pop('model'),
    lambda c: c['model'].pop('family'),
    lambda c: c['model'].update(family='gpt'),
    lambda c: c['model'].update(width=3),
    lambda c: c['model']['rope_scaling'].update(width=3),
    lambda c: c['model'].update(n_heads=7),
    lambda c: c['keep'].update(hours=3),
    lambda c: c.update(hours=3),
    lambda c: c.update(model=3),
    lambda c: c.update(data=3),
    lambda c: c.update(steps=0),
    lambda c: c.update(steps=None),
  ],
)
def test_a_damaged_config_is_refused(damage):
  values = config_lib.to_dict(recipes.get('demo'))
  damage(values)
  with pytest.raises(ValueError, match=r'not the configuration|model\.n_heads'):
    config_lib.from_dict(values)
