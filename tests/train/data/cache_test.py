import errno
import os
import pathlib
import subprocess
import sys
import time

import pytest

from train import errors
from train.data import cache

ROOT = pathlib.Path(cache.__file__).parents[2]


def test_default_directory(monkeypatch, tmp_path):
  monkeypatch.delenv('GRADPOWER_CACHE', raising=False)
  assert cache.default_directory() == ROOT / 'cache'
  monkeypatch.setenv('GRADPOWER_CACHE', str(tmp_path))
  assert cache.default_directory() == tmp_path


def test_built_once(tmp_path):
  calls = []

  def build(directory):
    calls.append(directory)
    (directory / 'file').write_text('content')

  target = tmp_path / 'deep' / 'target'
  for _ in range(2):
    assert cache.build_once(target, build) == target
  assert (target / 'file').read_text() == 'content'
  assert len(calls) == 1
  assert list(target.parent.iterdir()) == [target]


def test_directory_follows_umask(tmp_path):
  before = os.umask(0o022)
  try:
    target = cache.build_once(tmp_path / 'target', lambda _: None)
  finally:
    os.umask(before)
  assert target.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize('stop', [KeyboardInterrupt, ValueError])
def test_nothing_is_left_of_an_interrupted_build(tmp_path, stop):
  def build(directory):
    (directory / 'half').write_text('x')
    raise stop

  with pytest.raises(stop):
    cache.build_once(tmp_path / 'target', build)
  assert list(tmp_path.iterdir()) == []


def test_processes_at_once_build_once(tmp_path):
  code = (
    'import pathlib, sys, time\n'
    'from train.data import cache\n'
    'root = pathlib.Path(sys.argv[1])\n'
    'def build(directory):\n'
    '  with (root / "calls").open("a") as file: file.write("x")\n'
    '  time.sleep(1)\n'
    '  (directory / "file").write_text("content")\n'
    'target = cache.build_once(root / "deep" / "target", build)\n'
    'assert (target / "file").read_text() == "content"\n'
  )
  processes = [
    subprocess.Popen([sys.executable, '-c', code, tmp_path], cwd=ROOT)
    for _ in range(3)
  ]
  assert [process.wait(60) for process in processes] == [0, 0, 0]
  assert (tmp_path / 'calls').read_text() == 'x'
  assert [path.name for path in (tmp_path / 'deep').iterdir()] == ['target']


def test_without_locks_the_first_of_two_builds_stays(tmp_path, monkeypatch):
  def flock(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

  monkeypatch.setattr(cache.fcntl, 'flock', flock)
  target = tmp_path / 'target'

  def other(directory):
    (directory / 'who').write_text('other')

  def build(directory):
    (directory / 'who').write_text('self')
    cache.build_once(target, other)

  cache.build_once(target, build)
  assert (target / 'who').read_text() == 'other'
  assert list(tmp_path.iterdir()) == [target]


def test_remains_of_killed_runs_go_after_a_day(tmp_path):
  old, young = tmp_path / '.incomplete-old', tmp_path / '.incomplete-young'
  for path in (old, young):
    path.mkdir()
    (path / 'tokens').write_text('half')
  long_ago = time.time() - 25 * 3600
  for path in (old / 'tokens', old, young):  # `young` is still written to.
    os.utime(path, (long_ago, long_ago))
  target = cache.build_once(tmp_path / 'target', lambda _: None)
  assert sorted(tmp_path.iterdir()) == [young, target]


@pytest.mark.parametrize(
  'error',
  [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    OSError(errno.EDQUOT, os.strerror(errno.EDQUOT)),
    RuntimeError(f'write() failed: {os.strerror(errno.ENOSPC)}; writing x'),
  ],
)
def test_full_disk_is_one_line(tmp_path, error):
  def build(directory):
    (directory / 'half').write_text('x')
    raise error

  with pytest.raises(errors.UserError, match='no space left') as caught:
    cache.build_once(tmp_path / 'target', build)
  assert str(tmp_path) in str(caught.value)
  assert '\n' not in str(caught.value)
  assert list(tmp_path.iterdir()) == []


def test_file_in_the_way(tmp_path):
  (tmp_path / 'cache').write_text('a file')
  with pytest.raises(errors.UserError, match='cannot write the data cache'):
    cache.build_once(tmp_path / 'cache' / 'target', lambda _: None)
  with pytest.raises(errors.UserError, match='cannot write the data cache'):
    cache.build_once(tmp_path / 'cache' / 'a' / 'target', lambda _: None)


def test_other_errors_pass(tmp_path):
  def build(_):
    raise RuntimeError('a bug')

  with pytest.raises(RuntimeError, match='a bug'):
    cache.build_once(tmp_path / 'target', build)
