import subprocess
import sys

import pytest

from train import paper, recipe_table, recipes

H100 = 989e12


@pytest.mark.parametrize('name', recipes.RECIPES)
def test_costs(name):
  config = recipes.get(name)
  cost = recipe_table.cost(config)
  c, length = config.model, config.data.sequence_length
  vocab_size = c.vocab_size or config.data.vocab_size
  assert cost.tokens == config.steps * config.data.batch_size * length
  per_token = 6 * cost.parameters.matmul + 12 * c.n_layers * c.d_model * length
  assert cost.flops == cost.tokens * per_token
  assert cost.parameters.total > vocab_size * c.d_model
  hours = cost.hours(H100, 0.4)
  assert hours * 3600 * H100 * 0.4 == pytest.approx(cost.flops)


def test_a_vocabulary_left_open_is_the_tokenizers():
  demo = recipes.get('demo')
  assert demo.model.vocab_size == 0
  layers = 3 * (4 * 128**2 + 3 * 128 * 512 + 2 * 128) + 128
  assert recipe_table.cost(demo).parameters.total == 2 * 2048 * 128 + layers


def configs(corpus=None):
  return {name: recipes.get(name, corpus=corpus) for name in recipes.RECIPES}


def rows(text):
  table, _ = text.split('\n\n')
  header, *lines = (line.split() for line in table.splitlines())
  return {line[0]: dict(zip(header, line, strict=False)) for line in lines}


def test_the_known_run():
  row = rows(recipe_table.table(configs(), 'h100', None))['llama_0.2b']
  assert row == {
    'recipe': 'llama_0.2b', 'family': 'llama', 'params': '200M', 'active': '=',
    'tokens': '4.01B', 'steps': '30568', 'batch': '512x256',
    'FLOPs': '4.37e18', 'hours': '3.1', 'mark': 'C,',
  }  # fmt: skip


def test_a_mixture():
  row = rows(recipe_table.table(configs(), 'h100', None))['qwen2_moe_1b']
  assert row['family'] == 'qwen2_moe'
  assert (row['params'], row['active'], row['mark']) == ('986M', '183M', '?')
  # 1.92e19 / (0.25 x 989e12) / 3600.
  assert row['hours'] == '21.6'


@pytest.mark.parametrize('corpus', [None, *paper.CORPORA])
@pytest.mark.parametrize('device', recipe_table.DEVICES)
def test_every_recipe_has_a_row_in_80_columns(device, corpus):
  text = recipe_table.table(configs(corpus), device, None)
  assert list(rows(text)) == list(recipes.RECIPES)
  assert max(map(len, text.splitlines())) <= 80
  name, peak = recipe_table.DEVICES[device]
  assert f'{name}, {peak / 1e12:g} TFLOP/s' in ' '.join(text.split())


def test_device_and_mfu_decide_the_hours():
  def hours(*options):
    return float(
      rows(recipe_table.table(configs(), *options))['llama_2b']['hours']
    )

  assert hours('v5p', 0.4) == pytest.approx(
    hours('h100', 0.4) * 989 / 459, 0.01
  )
  assert hours('h100', 0.8) == pytest.approx(hours('h100', None) / 2, 0.01)
  text = recipe_table.table(configs(), 'h100', 0.33)
  assert 'assumed MFU of 33 %.' in ' '.join(text.split())


def test_a_tpu7x_is_two_devices():
  text = ' '.join(recipe_table.table(configs(), 'tpu7x', None).split())
  assert 'one core of a TPU7x, 1153.5 TFLOP/s' in text


def test_what_is_not_known_is_not_stated():
  text = ' '.join(recipe_table.table(configs(), 'h100', None).split())
  assert 'an estimate, not a measurement' in text
  assert 'MFU of 40 %, with experts 25 %' in text
  assert (
    'learning rate: of llama_0.2b on C4 1e-3 [P]; of the others [?]' in text
  )
  assert 'On OpenWebText its sequences are [?]' in text
  for name in paper.NAMES:
    expected = '?' if 'moe' in name else 'I'
    line = next(x for x in recipe_table.table(
      configs(), 'h100', None).splitlines() if x.startswith(name))  # fmt: skip
    assert line.endswith(expected)


@pytest.mark.parametrize(
  'number, text',
  [(820_000, '0.82M'), (9_999_000, '10.0M'), (66_433_536, '66.4M'),
   (999_600_000, '1.00B'), (40_212_930_560, '40.2B'), (3e12, '3000B')],
)  # fmt: skip
def test_short(number, text):
  assert recipe_table._short(number) == text


def test_a_reader_may_close_the_pipe():
  done = subprocess.run(
    f'{sys.executable} -m train recipes | head -1',
    shell=True, check=False, capture_output=True, text=True, timeout=60,
  )  # fmt: skip
  assert (done.returncode, done.stderr) == (0, '')
  assert done.stdout.startswith('recipe')


def test_it_needs_no_data_packages():
  code = (
    'import sys, train.recipes, train.recipe_table, train.optimizer\n'
    "print({'grain', 'tensorflow_datasets', 'tokenizers', 'tokamax'}"
    ' & set(sys.modules))'
  )
  done = subprocess.run(
    [sys.executable, '-c', code],
    check=True, capture_output=True, text=True, timeout=60,
  )  # fmt: skip
  assert done.stdout.strip() == 'set()'
