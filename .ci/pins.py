"""Rewrites constraints.txt with the newest versions that fit pyproject.toml.

    python .ci/pins.py python3.11 python3.12 python3.13

Installs the extras into a fresh environment of each interpreter, and merges
what pip chose; where they differ, a marker names the Python version.
"""

import pathlib
import subprocess
import sys
import tempfile

_ROOT = pathlib.Path(__file__).resolve().parents[1]
_HEADER = """\
# The versions that CI and `make` install: `pip install -c constraints.txt ...`.
# Written by .ci/pins.py; edit pyproject.toml instead.
"""


def chosen(interpreter: str) -> tuple[str, dict[str, str]]:
  """Returns an interpreter's 'X.Y' and the versions that pip chose for it."""
  with tempfile.TemporaryDirectory() as directory:
    subprocess.run([interpreter, '-m', 'venv', directory], check=True)
    python = f'{directory}/bin/python'
    pip = [python, '-m', 'pip']
    subprocess.run(
      [*pip, 'install', '--quiet', f'{_ROOT}[train,test,ray]'], check=True
    )
    freeze = subprocess.run(
      [*pip, 'freeze', '--exclude', 'gradpower-optax'],
      check=True, capture_output=True, text=True,
    )  # fmt: skip
    version = subprocess.run(
      [python, '-c', 'import sys; print("%d.%d" % sys.version_info[:2])'],
      check=True, capture_output=True, text=True,
    )  # fmt: skip
  pins = dict(line.split('==') for line in freeze.stdout.split())
  return version.stdout.strip(), pins


def merged(by_python: dict[str, dict[str, str]]) -> str:
  """One line a package where all agree, else one a version."""
  lines = []
  names = {name for pins in by_python.values() for name in pins}
  for name in sorted(names, key=str.lower):
    versions: dict[str, list[str]] = {}
    for python, pins in by_python.items():
      if name in pins:
        versions.setdefault(pins[name], []).append(python)
    everywhere = sum(map(len, versions.values())) == len(by_python)
    for version, pythons in versions.items():
      marker = ' or '.join(f"python_version == '{p}'" for p in pythons)
      only = '' if everywhere and len(versions) == 1 else f' ; {marker}'
      lines.append(f'{name}=={version}{only}')
  return _HEADER + '\n'.join(lines) + '\n'


if __name__ == '__main__':
  if len(sys.argv) < 2:
    sys.exit(__doc__)
  text = merged(dict(chosen(interpreter) for interpreter in sys.argv[1:]))
  (_ROOT / 'constraints.txt').write_text(text)
