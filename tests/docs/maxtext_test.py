"""The patch of docs/guides/maxtext.md, on the installed MaxText's file."""

import ast
import importlib.metadata
import importlib.util
import pathlib
import re
import shutil
import subprocess
import types

import jax
import jax.numpy as jnp
import optax
import pytest

from gradpower_optax import sign_power

PAGE = (
  pathlib.Path(__file__).parents[2] / 'docs' / 'guides' / 'maxtext.md'
).read_text()
[PATCH] = re.findall(r'```diff\n(.*?)```', PAGE, re.DOTALL)
FILE = 'optimizers/optimizers.py'
CONFIG = types.SimpleNamespace(
  opt_type='adamw',
  adam_b1=0.9,
  adam_b2=0.95,
  adam_eps=1e-8,
  adam_eps_root=0.0,
  adam_weight_decay=0.1,
  mu_dtype=jnp.float32,
)


def patched(folder: pathlib.Path) -> pathlib.Path:
  """Applies the patch as the page says, and returns the file."""
  if shutil.which('patch') is None:
    pytest.skip('there is no patch program on this machine')
  subprocess.run(
    ['patch', '-p1', '--fuzz=0', '--directory', str(folder)],
    input=PATCH,
    text=True,
    check=True,
    capture_output=True,
  )
  return folder / FILE


def get_optimizer(source: str):
  """The function of a source, with what of MaxText it needs for AdamW."""
  tree = ast.parse(source)
  kept = [
    node
    for node in tree.body
    if isinstance(node, ast.FunctionDef)
    or (isinstance(node, ast.ImportFrom) and node.module == 'gradpower_optax')
    or isinstance(node, ast.Import)
  ]
  namespace: dict = {}
  exec(compile(ast.Module(kept, []), FILE, 'exec'), namespace)
  return namespace['get_optimizer']


def steps(optimizer):
  params = {'w': jnp.full((4, 8), 0.02), 'b': jnp.zeros(8)}
  state, update = optimizer.init(params), jax.jit(optimizer.update)
  noise = jax.random.normal(jax.random.key(0), (3, 4, 8))
  for g in noise:
    updates, state = update({'w': g, 'b': g[0]}, state, params)
    params = optax.apply_updates(params, updates)
  return params


def test_the_patched_function_adds_the_power(tmp_path):
  installed = importlib.util.find_spec('maxtext')
  if installed is None:
    pytest.skip('MaxText is not installed')
  [package] = installed.submodule_search_locations
  (tmp_path / FILE).parent.mkdir()
  shutil.copyfile(pathlib.Path(package) / FILE, tmp_path / FILE)
  before = get_optimizer((tmp_path / FILE).read_text())(CONFIG, 1e-2)
  after = get_optimizer(patched(tmp_path).read_text())(CONFIG, 1e-2)

  adamw = optax.adamw(1e-2, b2=0.95, weight_decay=0.1)
  powered = steps(optax.chain(sign_power(1.2), adamw))
  equal = lambda a, b: jax.tree.all(jax.tree.map(jnp.array_equal, a, b))
  assert equal(steps(before), steps(adamw))
  assert equal(steps(after), powered)
  assert not equal(steps(after), steps(before))


def test_the_page_names_the_version_it_was_tried_with():
  if importlib.util.find_spec('maxtext') is None:
    pytest.skip('MaxText is not installed')
  assert f'MaxText {importlib.metadata.version("maxtext")}:' in PAGE


def test_the_patch_is_whole(tmp_path):
  """Applies to a file that has nothing but the lines it names."""
  lines, at = [], {}
  for line in PATCH.splitlines()[2:]:
    if line.startswith('@@'):
      lines += [''] * (int(line[4:].split(',')[0]) - 1 - len(lines))
    elif line.startswith('+'):
      at[len(lines)] = line[1:]
    else:
      lines.append(line[1:])
  (tmp_path / FILE).parent.mkdir()
  (tmp_path / FILE).write_text('\n'.join(lines) + '\n')
  after = patched(tmp_path).read_text().splitlines()
  assert len(after) == len(lines) + len(at) == len(lines) + 2
  assert [line for line in after if line not in lines] == list(at.values())
