"""Arms as they are typed."""

import pytest

from train import recipes
from train.errors import UserError
from train.experiments import arms


def test_an_arm_is_a_name_and_what_it_changes():
  arm = arms.parse('p12:power=1.2,lr=2e-3,optimizer.per_head=false')
  assert arm == arms.Arm(
    'p12',
    {
      'optimizer.power': 1.2,
      'optimizer.learning_rate': 2e-3,
      'optimizer.per_head': False,
    },
  )
  assert arms.parse('base') == arms.Arm('base')


@pytest.mark.parametrize('alias', arms.ALIASES)
def test_aliases_are_fields(alias):
  text = {'optimizer': 'muon', 'schedule': 'cos'}.get(alias, '3')
  path, value = arms.parse_change(f'{alias}={text}')
  assert path == arms.ALIASES[alias]
  config = arms.Arm('a', {path: value}).config(recipes.demo())
  for name in path.split('.'):
    config = getattr(config, name)
  assert config == value


def test_an_arm_changes_nothing_else():
  base = recipes.demo()
  config = arms.parse('a:p=1.3').config(base)
  assert config.optimizer.power == 1.3
  back = arms.parse(f'b:p={base.optimizer.power}').config(config)
  assert back == base
  assert arms.Arm('a').config(base) == base


@pytest.mark.parametrize(
  ('texts', 'message'),
  [
    (['base'], 'two arms at least'),
    ([], 'two arms at least'),
    (['base', 'base:p=1.2'], 'two arms are named base'),
    (['base', 'b'], 'base and b change the same'),
    (['base', 'p12:'], "'p12:' is no arm"),
    (['base', ':p=1'], "':p=1' is no arm"),
    (['base', '../x:p=1'], 'is no arm'),
    (['base', 'a:p'], "'p' is no change"),
    (['base', 'a:p='], 'is no change'),
    (['base', 'a:powr=1.2'], "'powr': did you mean power"),
    (['base', 'a:zzzz=1.2'], "there is no field 'zzzz'"),
    (['base', 'a:p=much'], "optimizer.power: 'much' is not a number"),
    (['base', 'a:p=1.2,power=1.3'], 'sets optimizer.power twice'),
    (['base', 'a:batch=3'], 'data.batch_size, which the arms of a pair share'),
    (['base', 'a:seed=3'], 'seeds are --seeds'),
    (['base', 'a:model.d_model=8'], 'which the arms of a pair share'),
    (['base', 'a:steps=8'], 'or use sweep'),
  ],
)
def test_what_is_no_arm(texts, message):
  with pytest.raises(UserError, match=message.replace('(', r'\(')) as caught:
    arms.parse_all(texts)
  assert '\n' not in str(caught.value)


def test_a_field_that_is_gone_is_not_passed_over():
  with pytest.raises(UserError, match=r"no field 'optimizer\.glory'"):
    arms.Arm('a', {'optimizer.glory': 1}).config(recipes.demo())


def test_an_arm_of_values_that_do_not_go_together_is_named():
  with pytest.raises(UserError, match=r'arm a: --optimizer\.power must be '):
    arms.parse('a:p=-1').config(recipes.demo())
