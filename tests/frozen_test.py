"""Values that a change of layout, names or libraries must not move.

`frozen.json` beside this file holds them. Where one is to change, run

    FROZEN=write python -m pytest tests/frozen_test.py

read the difference in git, and say in the commit why each value moved. A key of
a cell or a hash of text that moves orphans the committed evidence.

Losses are compared to 1e-5, since their last bits depend on the processor, the
version of JAX and the compiler's flags. All else is compared exactly, and is
the same on the oldest and the newest versions of constraints.txt.
"""

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import pathlib
import re

import jax
import numpy as np
import pytest
from flax import nnx

from models import families, huggingface
from models.config import LlamaConfig, Qwen2MoeConfig
from train import config as config_lib
from train import paper, recipes
from train.__main__ import main
from train.data import layouts
from train.data.stats import Stats
from train.digest import params_digest
from train.experiments import cells, comparison

FILE = pathlib.Path(__file__).with_name('frozen.json')
EVIDENCE = pathlib.Path(__file__).parents[1] / 'docs' / 'evidence'
COMMANDS = ('demo', 'run', 'compare', 'figure', 'sweep', 'prepare', 'report',
            'sample', 'recipes', 'aot')  # fmt: skip
# One dense, one with experts, one named before `optimizer.blockwise` existed.
CELLS = ('00ad52feadb9c5b4', '015d738ec9145ed5', '0ce5ae80a8e58e6f')
MODELS = {
  'dense': LlamaConfig(
    vocab_size=64, d_model=16, n_layers=2, n_heads=4, n_kv_heads=2, d_ff=24
  ),
  'experts': Qwen2MoeConfig(
    vocab_size=64, d_model=16, n_layers=2, n_heads=2, d_ff=24, n_experts=4,
    experts_per_token=2, d_expert=8, d_shared=16,
  ),
}  # fmt: skip


def text() -> str:
  """Twenty lines of ASCII, accents and emoji."""
  return ''.join(
    f'{i} naïve cats and {i * i} 犬 sat on the mat, {"again " * (i % 5)}🙂.\n'
    for i in range(20)
  )


@pytest.fixture(scope='module')
def lines(tmp_path_factory):
  """A file of JSON lines, ten documents each of the lines above."""
  path = tmp_path_factory.mktemp('text') / 'lines.jsonl'
  documents = [text().splitlines()[i % 20] + f' {i}' for i in range(200)]
  path.write_text(''.join(json.dumps({'text': d}) + '\n' for d in documents))
  return path


def printed(*argv) -> str:
  """What a command of `python -m train` prints."""
  out = io.StringIO()
  with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
    assert main([str(arg) for arg in argv]) == 0
  return out.getvalue()


def keys(tmp_path, lines):
  """The keys of three committed cells."""
  del tmp_path, lines
  found = {}
  for name in CELLS:
    record = json.loads((EVIDENCE / 'cells' / f'{name}.json').read_text())
    found[name] = cells.key(record['config'], record['source_hash'])
  return found


def prepared(tmp_path, lines):
  """The hash of prepared text, by layout: cells name it as source_hash."""
  found = {}
  for layout in layouts.LAYOUTS:
    out = tmp_path / layout
    printed(
      'prepare', '--files', lines, '--out', out, '--vocab-size', 300,
      '--layout', layout, '--seq', 16,
    )  # fmt: skip
    found[layout] = Stats.from_json((out / 'stats.json').read_text()).digest()
  return found


def initial(tmp_path, lines):
  """The digest of parameters before the first step."""
  del tmp_path, lines
  return {
    name: params_digest(
      nnx.to_pure_dict(
        nnx.state(families.build(config, rngs=nnx.Rngs(params=0)), nnx.Param)
      ),
      config,
    )
    for name, config in MODELS.items()
  }


def resolved(tmp_path, lines):
  """Every recipe's configuration, as far as it differs from the defaults."""
  del tmp_path, lines
  defaults = {name: config_lib.defaults(name) for name in families.CONFIGS}
  found = {'defaults': defaults}
  for name in recipes.RECIPES:
    for corpus in (None, *paper.CORPORA):
      config = config_lib.to_dict(recipes.get(name, corpus=corpus))
      changed = difference(config, defaults[config['model']['family']])
      if changed != found.get(name):
        found[f'{name} {corpus}' if corpus else name] = changed
  return found


def difference(values, default, prefix=''):
  found = {}
  for name, value in values.items():
    if isinstance(value, dict):
      found |= difference(value, default[name], f'{prefix}{name}.')
    elif value != default[name]:
      found[prefix + name] = value
  return found


def options(tmp_path, lines):
  """The names of all options of every command."""
  del tmp_path, lines
  return {
    command: sorted(
      set(re.findall(r'(?<![\w-])--[a-z][\w.-]*', printed(command, '--help')))
    )
    for command in COMMANDS
  }


def results(tmp_path, lines):
  """The fields of a results.json, and one of its numbers."""
  del tmp_path, lines
  spec = importlib.util.spec_from_file_location('make', EVIDENCE / 'make.py')
  make = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(make)
  store = cells.Store(EVIDENCE / 'cells')
  found = comparison.to_json(make.load('dense_01m', store))
  return {
    'fields': list(found),
    'of an arm': list(next(iter(found['arms'].values()))),
    'of a pair': list(found['paired'][0]),
    'mean': round(found['paired'][0]['mean'], 12),
  }


def hugging_face(tmp_path, lines):
  """The digests of what is saved, and of what is loaded from it."""
  del lines
  found = {}
  for name, config in MODELS.items():
    folder = tmp_path / name
    model = families.build(config, rngs=nnx.Rngs(params=0))
    huggingface.save(model, folder)
    again = huggingface.load(folder)
    state = nnx.to_pure_dict(nnx.state(again, nnx.Param))
    found[name] = {
      path.name: hashlib.sha256(path.read_bytes()).hexdigest()
      for path in sorted(folder.iterdir())
    } | {'loaded': params_digest(state, again.config)}
  return found


def loss(tmp_path, lines):
  """The training loss at step 20."""
  found = {}
  for recipe in ('demo', 'demo_moe'):
    run = tmp_path / recipe
    printed(
      'run', recipe, '--run-dir', run, '--data.files', lines, '--steps', 20,
      '--data.vocab_size', 300, '--data.sequence_length', 16, '--eval_every',
      20, '--data.batch_size', 8, '--model.d_model', 16, '--model.n_layers', 1,
      '--model.n_heads', 2, '--optimizer.warmup_steps', 3,
    )  # fmt: skip
    for line in (run / 'metrics.jsonl').read_text().splitlines():
      values = json.loads(line)
      if values.get('step') == 20 and values.get('split') == 'train':
        found[recipe] = values['loss']
  return found


VALUES = (keys, prepared, initial, resolved, options, results, hugging_face,
          loss)  # fmt: skip


def lined(frozen) -> str:
  """JSON with one entry a line."""
  groups = [
    f'"{name}": {{\n'
    + ',\n'.join(
      f'"{key}": {json.dumps(entry)}' for key, entry in entries.items()
    )
    + '\n}'
    for name, entries in frozen.items()
  ]
  return '{\n' + ',\n'.join(groups) + '\n}\n'


@pytest.mark.parametrize('value', VALUES, ids=lambda value: value.__name__)
def test_a_value_stands(value, tmp_path, lines, monkeypatch):
  monkeypatch.setenv('GRADPOWER_CACHE', str(tmp_path / 'cache'))
  monkeypatch.setenv('COLUMNS', '200')  # No option's name is cut.
  found = json.loads(json.dumps(value(tmp_path, lines)))
  frozen = json.loads(FILE.read_text()) if FILE.exists() else {}
  if os.environ.get('FROZEN') == 'write':
    frozen[value.__name__] = found
    FILE.write_text(lined(frozen))
  elif value is loss:
    np.testing.assert_equal(sorted(found), sorted(frozen['loss']))
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5),
      found,
      frozen['loss'],
    )
  else:
    assert found == frozen[value.__name__]
