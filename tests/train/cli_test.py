import argparse
import dataclasses
import io
import json
import math
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.config import LlamaConfig, Qwen2MoeConfig
from train import cli, recipes
from train import config as config_lib
from train.config import Config, DataConfig, OptimizerConfig
from train.errors import UserError

# For every field, a legal value that no recipe has.
CHANGED = {
  'model.vocab_size': 4096,
  'model.d_model': 96,
  'model.n_layers': 2,
  'model.n_heads': 8,
  'model.n_kv_heads': 2,
  'model.d_ff': 100,
  'model.norm_eps': 1e-5,
  'model.rope_theta': 500.0,
  'model.rope_scaling.factor': 2.0,
  'model.rope_scaling.low_freq_factor': 0.5,
  'model.rope_scaling.high_freq_factor': 3.0,
  'model.rope_scaling.original_length': 1024,
  'model.qkv_bias': True,
  'model.init_std': 0.01,
  'model.tie_embeddings': True,
  'model.scan_layers': True,
  'model.remat': 'gate,up',
  'model.z_loss': 1e-4,
  'model.dtype': 'bfloat16',
  'data.files': 'a b/**/*.txt',
  'data.corpus': 'c4',
  'data.text_field': 'body',
  'data.skip_bad': True,
  'data.tokenizer': 'org/name',
  'data.vocab_size': 512,
  'data.layout': 'packed',
  'data.sequence_length': 33,
  'data.batch_size': 6,
  'data.validation_fraction': 0.25,
  'data.validation_tokens': 77,
  'data.repeat': False,
  'optimizer.name': 'muon',
  'optimizer.power': 1.1,
  'optimizer.power_eps': 1e-8,
  'optimizer.learning_rate': 0.1 + 0.2,
  'optimizer.schedule': 'cos',
  'optimizer.warmup_steps': 7,
  'optimizer.final_lr_ratio': 0.0,
  'optimizer.b1': 0.8,
  'optimizer.b2': 0.99,
  'optimizer.eps': 1e-10,
  'optimizer.weight_decay': 0.0,
  'optimizer.clip_norm': 0.0,
  'optimizer.mu_dtype': 'bfloat16',
  'optimizer.per_head': True,
  'optimizer.match_norm': True,
  'optimizer.blockwise': True,
  'mesh.data': 4,
  'mesh.fsdp': 2,
  'mesh.tensor': 3,
  'mesh.expert': 5,
  'accumulate': 2,
  'steps': 99,
  'seed': 2**32 - 1,
  'eval_every': 3,
  'save_every': 4,
  'keep.last': 3,
  'keep.best': False,
  'keep.every': 8,
  'guard.bad_steps': 4,
  'guard.spike': 6.0,
  'deterministic': True,
}


MOE_CHANGED = {
  'model.n_experts': 8,
  'model.experts_per_token': 2,
  'model.d_expert': 40,
  'model.d_shared': 0,
  'model.renormalize': True,
  'model.sparse_step': 3,
  'model.dense_layers': (0, 2),
  'model.balance_loss': 0.0,
  'model.router_z_loss': 1e-3,
}


def parse(*argv, recipe='demo'):
  parser = cli.Parser(prog='prog')
  cli.add_config_options(parser)
  return cli.with_options(recipes.get(recipe), parser.parse_args(argv))


def flat(config, prefix=''):
  found = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      found |= flat(value, f'{prefix}{field.name}.')
    else:
      found[prefix + field.name] = value
  return found


# What does not go with the others.
ALONE = {'data.prepared': 'data/one=3,data/two=1'}


def test_every_field_has_an_option():
  assert flat(parse()) == flat(recipes.get('demo'))
  assert {**CHANGED, **ALONE}.keys() == flat(Config()).keys()
  argv = [f'--{path}={value}' for path, value in CHANGED.items()]
  config = flat(parse(*argv))
  wanted = CHANGED | dict.fromkeys(ALONE, '')
  assert config == wanted
  assert {k: type(v) for k, v in config.items()} == {
    k: type(v) for k, v in wanted.items()
  }


@pytest.mark.parametrize('path', [*CHANGED, *ALONE])
def test_an_option_changes_its_field_alone(path):
  given = ['--optimizer.name=muon'] if path == 'optimizer.per_head' else []
  base = flat(parse(*given))
  value = {
    'model.n_kv_heads': 2, 'model.n_heads': 8, 'steps': 99
  }.get(path, (CHANGED | ALONE)[path])  # fmt: skip
  assert base[path] != value
  assert flat(parse(*given, f'--{path}', str(value))) == base | {path: value}


@pytest.mark.parametrize('path', MOE_CHANGED)
def test_an_option_of_experts_changes_its_field_alone(path):
  base = flat(recipes.get('demo_moe'))
  assert base.keys() == flat(Config()).keys() | MOE_CHANGED.keys()
  value = MOE_CHANGED[path]
  assert base[path] != value
  text = '0,2' if path == 'model.dense_layers' else str(value)
  changed = flat(parse(f'--{path}', text, recipe='demo_moe'))
  assert changed == base | {path: value}
  assert type(changed[path]) is type(value)
  with pytest.raises(UserError, match=f'--{path} is not an option of a llama'):
    parse(f'--{path}', text)


@pytest.mark.parametrize('recipe', ['demo', 'demo_moe'])
def test_a_config_survives_json(recipe):
  argv = CHANGED | (MOE_CHANGED if recipe == 'demo_moe' else {})
  argv['model.dense_layers'] = '0'
  if recipe == 'demo':
    del argv['model.dense_layers']
  config = parse(*(f'--{k}={v}' for k, v in argv.items()), recipe=recipe)
  text = json.dumps(config_lib.to_dict(config))
  assert config_lib.from_dict(json.loads(text)) == config


def test_checks_see_all_options_together():
  # Neither is legal alone.
  config = parse('--model.d_model', '15', '--model.n_heads', '3',
                 '--model.d_model=30')  # fmt: skip
  assert (config.model.d_model, config.model.n_heads) == (30, 3)
  config = parse('--steps', '20', '--optimizer.warmup_steps', '10')
  assert config.steps == 20


@pytest.mark.parametrize('word', ['true', 'True', 'TRUE'])
def test_booleans(word):
  assert parse('--model.scan_layers', word).model.scan_layers is True
  assert parse('--model.scan_layers', 'false').model.scan_layers is False
  assert parse('--model.scan_layers').model.scan_layers is True
  assert parse('--deterministic', '--steps', '99').deterministic is True


MISTAKES = [
  ('--steps 1.5', "--steps: '1.5' is not a whole number"),
  ('--steps x', "--steps: 'x' is not a whole number"),
  ('--steps', '--steps: expected one argument'),
  ('--steps=', '--steps: it is empty'),
  ('--steps=--', '--steps: '),
  (f'--steps {10**20}', f'--steps: {10**20} is too large'),
  ('--steps 0', '--steps must be at least 1, not 0'),
  ('--steps -3', '--steps must be at least 1'),
  ('--seed -1', '--seed must be at least 0'),
  (f'--seed {2**32}', '--seed must be below'),
  ('--eval_every 0', '--eval_every must be at least 1'),
  ('--save_every 0', '--save_every must be at least 1'),
  ('--model.scan_layers 1', "--model.scan_layers: '1' is neither true nor"),
  ('--model.d_model 30', '--model.n_heads (4) must divide model.d_model'),
  ('--model.d_model 12', '--model.d_model / model.n_heads is 3'),
  ('--model.n_kv_heads 3', '--model.n_kv_heads (3) must divide'),
  ('--model.init_std nan', '--model.init_std must be positive and finite'),
  ('--model.norm_eps inf', '--model.norm_eps must be positive and finite'),
  ('--model.z_loss -1', '--model.z_loss must be zero or more'),
  ('--model.remat some', "--model.remat must be 'none', 'minimal', 'full' or"),
  ('--model.dense_layers 1', 'is not an option of a llama model'),
  ('--model.dense_layers x', "'x' is not whole numbers joined by commas"),
  ('--model.dtype float64', "--model.dtype must be 'float32' or 'bfloat16'"),
  ('--data.vocab_size 256', '--data.vocab_size must be at least 257'),
  ('--data.batch_size 0', '--data.batch_size must be at least 1'),
  ('--data.sequence_length 0', '--data.sequence_length must be at least 1'),
  ('--data.validation_fraction nan', '--data.validation_fraction must be'),
  ('--data.validation_fraction 1', '--data.validation_fraction must be'),
  ('--data.validation_tokens 0', '--data.validation_tokens must be at least'),
  ('--data.text_field=', '--data.text_field: it is empty'),
  ('--data.files=', '--data.files: it is empty'),
  (f'--data.vocab_size {2**25}', '--data.vocab_size must be at most'),
  *(
    (
      f'--data.prepared dir --data.{name} {CHANGED[f"data.{name}"]}',
      f'--data.{name} does not go with --data.prepared',
    )
    for name in config_lib.OF_TEXT
  ),
  ('--optimizer.learning_rate 1e39', '--optimizer.learning_rate must be'),
  ('--optimizer.power_eps 1e50', '--optimizer.power_eps must be zero or more'),
  ('--optimizer.power 2e6', '--optimizer.power must be positive and below 1e6'),
  ('--optimizer.power nan', '--optimizer.power must be positive and below'),
  (
    '--optimizer.power 0',
    '--optimizer.power must be positive and below 1e6, not 0',
  ),
  ('--optimizer.power two', "--optimizer.power: 'two' is not a number"),
  ('--optimizer.learning_rate inf', '--optimizer.learning_rate must be'),
  ('--optimizer.learning_rate -1', '--optimizer.learning_rate must be'),
  ('--optimizer.b1 1', '--optimizer.b1 must be in [0, 1)'),
  ('--optimizer.b2 -0.1', '--optimizer.b2 must be in [0, 1)'),
  ('--optimizer.final_lr_ratio 1.5', '--optimizer.final_lr_ratio must be in'),
  ('--optimizer.clip_norm -1', '--optimizer.clip_norm must be zero or more'),
  ('--optimizer.warmup_steps 480', '--optimizer.warmup_steps (480) must be'),
  ('--optimizer.name sgd', "--optimizer.name must be 'adamw' or 'muon', not"),
  ('--optimizer.mu_dtype int8', "must be 'float32' or 'bfloat16', not 'int8'"),
  ('--optimizer.per_head true', 'goes with --optimizer.name muon'),
  ('--optimizer.schedule linear', "'wsd', 'cos' or 'constant', not 'linear'"),
  ('--step 3', 'unrecognized arguments: --step 3'),
  ('--model.width 3', 'unrecognized arguments: --model.width'),
  ('extra', 'unrecognized arguments: extra'),
]


@pytest.mark.parametrize(('options', 'words'), MISTAKES)
def test_a_mistake_is_one_line_that_names_the_option(options, words):
  with pytest.raises(UserError) as error:
    parse(*options.split())
  assert words in str(error.value)
  assert '\n' not in str(error.value)


@given(st.text(max_size=8))
def test_no_word_for_a_number_escapes(text):
  for option in ('steps', 'model.norm_eps', 'optimizer.power', 'seed'):
    try:
      value = flat(parse(f'--{option}={text}'))[option]
    except UserError:
      continue
    assert math.isfinite(value)


def test_a_name_is_said_where_stdout_is_not_unicode(monkeypatch):
  stdout = io.TextIOWrapper(io.BytesIO(), 'ascii')
  monkeypatch.setattr(sys, 'stdout', stdout)
  cli.say("in größe's")
  assert stdout.buffer.getvalue() == b"in gr\\xf6\\xdfe's\n"


def test_the_defaults_are_legal():
  for config in (
    Config, DataConfig, LlamaConfig, Qwen2MoeConfig, OptimizerConfig
  ):  # fmt: skip
    config()


def options(*argv):
  parser = cli.Parser(prog='prog')
  cli.add_config_options(parser)
  return parser.parse_args(argv)


def test_corpus_and_schedule_decide_what_depends_on_them():
  given = '--data.corpus=openwebtext', '--optimizer.schedule=cos'
  config = cli.config('llama_66m', options(*given))
  assert config == recipes.get('llama_66m', corpus='openwebtext')
  assert config.data.sequence_length == 1024
  assert config.optimizer.final_lr_ratio == 0.05


def test_other_options_come_after_corpus_and_schedule():
  config = cli.config(
    'llama_66m',
    options('--optimizer.final_lr_ratio=0.2', '--data.corpus=openwebtext',
            '--data.sequence_length=512', '--optimizer.power=1'),
  )  # fmt: skip
  assert config.optimizer.final_lr_ratio == 0.2
  assert config.optimizer.power == 1
  assert config.data.sequence_length == 512
  base = recipes.get('llama_66m', corpus='openwebtext')
  assert config.steps == base.steps
  assert config.model == base.model


def test_of_a_recipe_that_takes_neither_only_the_field_changes():
  config = cli.config('demo', options('--optimizer.schedule=cos'))
  assert flat(config) == flat(recipes.get('demo')) | {
    'optimizer.schedule': 'cos'
  }
  with pytest.raises(UserError, match="no recipe 'dem'"):
    cli.config('dem', options())


@pytest.mark.parametrize('text', ['0', '-0.1', '1.01', 'nan', 'x', ''])
def test_a_share_is_above_0_and_at_most_1(text):
  parser = cli.Parser(prog='prog')
  parser.add_argument('--mfu', type=cli.share)
  assert parser.parse_args(['--mfu=1']).mfu == 1
  with pytest.raises(UserError, match=r'--mfu: .*(at most 1|a number|empty)'):
    parser.parse_args([f'--mfu={text}'])


@pytest.mark.parametrize('text', ['0', '-1', 'x', '', '1.5'])
def test_stop_at_takes_a_positive_number(text):
  parser = cli.Parser(prog='prog')
  parser.add_argument('--stop-at', type=cli.positive)
  with pytest.raises(UserError, match='--stop-at'):
    parser.parse_args([f'--stop-at={text}'])


def test_directories(monkeypatch, tmp_path):
  monkeypatch.setenv('HOME', str(tmp_path))
  assert cli.path('~/run') == tmp_path / 'run'
  for text in ('', '~nobody-of-this-name/run'):
    with pytest.raises(argparse.ArgumentTypeError):
      cli.path(text)


@pytest.fixture
def texts(monkeypatch, tmp_path):
  """Files of the current directory, as a shell names them."""
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'c4').mkdir()
  names = [f'c4/train.{i:05}-of-1024.json.gz' for i in range(300)]
  for name in names:
    (tmp_path / name).touch()
  return names


@pytest.mark.parametrize('before', [['demo'], []])
def test_a_glob_without_quotes(texts, before):
  after = [] if before else ['demo']
  with pytest.raises(UserError) as error:
    command_line(*before, '--steps', '3', '--data.files', *texts, *after)
  assert str(error.value) == (
    '--data.files takes one pattern: put it in quotes, as in --data.files'
    " 'c4/*.json.gz' (the shell has made 300 files of it)"
  )


def test_what_is_no_file_is_not_taken_for_a_glob(texts):
  with pytest.raises(UserError, match='unrecognized arguments: too many'):
    command_line('demo', '--data.files', texts[0], 'too', 'many')
  with pytest.raises(UserError, match='unrecognized arguments: --step 3'):
    command_line('demo', '--data.files', texts[0], '--step', '3')


def test_of_many_arguments_some_are_named():
  with pytest.raises(UserError) as error:
    command_line('demo', *map(str, range(2000)))
  assert 'unrecognized arguments: 0 1 2 and 1,997 more (see' in str(error.value)


def command_line(*argv):
  """As of a command of `python -m train`."""
  parser = cli.Parser(prog='train')
  commands = parser.add_subparsers(parser_class=cli.Parser)
  command = commands.add_parser('run')
  command.add_argument('recipe')
  cli.add_config_options(command)
  return parser.parse_args(['run', *argv])
