"""The promises that no single module keeps: layout, README, links."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob('*.md'), *ROOT.glob('docs/**/*.md')])
ALLOWED = {
  'gradpower_optax': {'gradpower_optax', 'jax', 'numpy', 'optax'},
  'models': {'flax', 'jax', 'ml_dtypes', 'models', 'numpy', 'safetensors'},
}


def _imports(path: pathlib.Path):
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name.split('.')[0] for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      yield node.module.split('.')[0]


@pytest.mark.parametrize('package', ALLOWED)
def test_a_package_imports_only_what_it_may(package):
  for path in (ROOT / package).rglob('*.py'):
    others = set(_imports(path)) - ALLOWED[package] - sys.stdlib_module_names
    assert not others, f'{path.relative_to(ROOT)} imports {sorted(others)}'


def test_the_trainer_is_not_imported_below_it():
  for package in ('gradpower_optax', 'models'):
    for path in (ROOT / package).rglob('*.py'):
      assert 'train' not in set(_imports(path)), path


def _code_lines(path: pathlib.Path) -> int:
  """Lines of code: neither blank, nor comment, nor docstring."""
  text = path.read_text()
  lines = {
    number
    for number, line in enumerate(text.splitlines(), 1)
    if line.strip() and not line.strip().startswith('#')
  }
  for node in ast.walk(ast.parse(text)):
    if (
      isinstance(node, ast.Expr)
      and isinstance(node.value, ast.Constant)
      and isinstance(node.value.value, str)
    ):
      lines -= set(range(node.lineno, node.end_lineno + 1))
  return len(lines)


def test_files_can_be_read_in_one_sitting():
  library = {
    path.name: _code_lines(path)
    for path in (ROOT / 'gradpower_optax').glob('*.py')
  }
  # Moving matrices between devices has a budget of its own.
  assert library.pop('orthogonalize.py') <= 200
  assert library.pop('placement.py') <= 90
  # So have measurements and schedules that no optimizer needs.
  assert library.pop('noise.py') <= 185
  assert library.pop('blockwise.py') <= 90
  assert sum(library.values()) <= 600
  for path in (ROOT / 'models').glob('*.py'):
    assert _code_lines(path) <= 300, path
  assert _code_lines(ROOT / 'train' / 'loop.py') <= 500


def test_the_readmes_python_runs():
  blocks = re.findall(
    r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.DOTALL
  )
  # The last block's folder is the reader's own: huggingface_test runs it.
  names = ['optax', 'optax.contrib', 'models']
  assert [block.split()[1] for block in blocks] == names
  for block in blocks[:-1]:
    subprocess.run([sys.executable, '-c', block], check=True)


def test_the_readmes_make_targets_exist():
  targets = set(
    re.findall(r'^([a-z-]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE)
  )
  named = set(
    re.findall(r'^make (\S+)', (ROOT / 'README.md').read_text(), re.M)
  )
  assert named
  assert named <= targets


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
  for target in re.findall(r'\]\(([^)#\s]+)', page.read_text()):
    if not target.startswith('https://'):
      assert (page.parent / target).exists(), target


@pytest.mark.parametrize('page', ['cli.md', 'data.md', 'experiments.md'])
def test_every_option_in_a_page_exists(page):
  from train import cli, prepare_command
  from train.experiments import compare_command, figure_command, sweep_command

  parser = cli.Parser()
  cli.add_config_options(parser)
  commands = cli.Parser().add_subparsers()
  for command in (
    compare_command, figure_command, prepare_command, sweep_command,
  ):  # fmt: skip
    command.add(commands)
  known = {
    text
    for each in (parser, *commands.choices.values())
    for action in each._actions
    for text in action.option_strings
  }
  known |= {'--run-dir', '--stop-at', '--out', '--path.to.field', '--model'}
  known |= {'--prompt', '--tokens', '--temperature', '--top-p', '--step'}
  known |= {'--coordinator', '--processes', '--process', '--mesh'}
  known |= {'--device', '--mfu', '--topology', '--keep', '--guard'}
  known |= {'--tensorboard', '--wandb', '--layer-statistics', '--profile'}
  known |= {'--noise'}
  known |= {'--runner', '--flink_master'}  # Beam's.
  text = (ROOT / 'docs' / page).read_text()
  named = set(re.findall(r'--[a-z][\w.-]*[a-z]', text))
  assert named
  assert named <= known
