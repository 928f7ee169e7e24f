"""Runs the Python of docs/muon.md, from top to bottom, as one program."""

import ast
import pathlib
import re
import subprocess
import sys

import pytest

_ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_the_pages_code_runs():
  page = (_ROOT / 'docs' / 'muon.md').read_text()
  blocks = re.findall(r'```python\n(.*?)```', page, re.DOTALL)
  assert len(blocks) == 2
  flags = '--xla_force_host_platform_device_count=8'
  code = f'import os\nos.environ["XLA_FLAGS"] = "{flags}"\n' + '\n'.join(blocks)
  done = subprocess.run(
    [sys.executable, '-W', 'error', '-c', code],
    cwd=_ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  ours, theirs = (
    ast.literal_eval(line.split(' ', 1)[1].strip())
    for line in done.stdout.splitlines()
  )
  # Two shapes of matrices, each out and back.
  assert ours == {
    'all-to-all': 4, 'all-gather': 0, 'all-reduce': 0, 'collective-permute': 0,
  }  # fmt: skip
  assert sum(theirs.values()) > 40
