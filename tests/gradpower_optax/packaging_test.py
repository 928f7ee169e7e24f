"""What importing the package brings along, and its version."""

import importlib.metadata
import os
import pathlib
import subprocess
import sys

import pytest

import gradpower_optax

HEAVY = ('flax', 'orbax', 'tensorflow', 'tensorflow_datasets', 'grain',
         'tokenizers', 'matplotlib', 'models', 'train', 'mpmath',
         'hypothesis', 'pytest')  # fmt: skip


def modules_after(statements, directory):
  """Top-level modules of a fresh interpreter that ran the statements."""
  root = pathlib.Path(gradpower_optax.__file__).parents[1]
  program = f'import sys\n{statements}\nprint(*sys.modules)'
  done = subprocess.run(
    [sys.executable, '-c', program],
    env={**os.environ, 'PYTHONPATH': str(root)},
    cwd=directory,
    check=True,
    capture_output=True,
    text=True,
  )
  return {name.split('.')[0] for name in done.stdout.split()}


def test_import_needs_jax_and_optax_only(tmp_path):
  base = modules_after('import jax, optax, optax.contrib', tmp_path)
  ours = modules_after('import gradpower_optax', tmp_path)
  assert ours - base - set(sys.stdlib_module_names) == {'gradpower_optax'}
  assert not ours & set(HEAVY)


def test_version():
  assert gradpower_optax.__version__.count('.') == 2
  try:
    version = importlib.metadata.version('gradpower-optax')
  except importlib.metadata.PackageNotFoundError:
    pytest.skip('gradpower-optax is not installed: run from a clone')
  assert gradpower_optax.__version__ == version


def test_public_names():
  for name in gradpower_optax.__all__:
    documented = getattr(gradpower_optax, name).__doc__
    for section in ('Args:', 'Returns:', 'Examples:', 'References:'):
      assert section in documented, (name, section)


def test_is_typed():
  root = pathlib.Path(gradpower_optax.__file__).parent
  assert (root / 'py.typed').is_file()
