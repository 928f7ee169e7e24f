"""Runs the Python of docs/models.md, from top to bottom, as one program."""

import pathlib
import re
import subprocess
import sys

_ROOT = pathlib.Path(__file__).parents[2]


def test_the_pages_code_runs():
  page = (_ROOT / 'docs' / 'models.md').read_text()
  blocks = re.findall(r'```python\n(.*?)```', page, re.DOTALL)
  *blocks, exports = blocks
  assert 'sample.load(run)' in exports  # Of a run; train/sample_test runs it.
  assert len(blocks) == 3
  # One device, as the page has it, whatever this process has.
  code = 'import os\nos.environ["XLA_FLAGS"] = ""\n' + '\n'.join(blocks)
  done = subprocess.run(
    [sys.executable, '-W', 'error', '-c', code],
    cwd=_ROOT,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr
  cross_entropy, balance, *load = done.stdout.split()
  assert 10 < float(cross_entropy) < 12  # log(50304) is 10.8.
  assert 4 < float(balance) < 8  # 4 experts a token: 4 when balanced.
  assert ''.join(load) == '(4,16)'
