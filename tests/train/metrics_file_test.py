import errno
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.train.syncs import watch_syncs
from train import metrics_file
from train.errors import UserError
from train.metrics_file import MetricsFile, dumps, parse

ROOT = pathlib.Path(__file__).parents[2]
LINE = {'step': 5, 'split': 'train', 'loss': 2.5, 'text': 'é\u2028'}


def numbered(count, first=0):
  return [{'step': step} for step in range(first, first + count)]


@pytest.fixture
def path(tmp_path):
  return tmp_path / 'metrics.jsonl'


@pytest.fixture
def no_patience(monkeypatch):
  monkeypatch.setattr(metrics_file, '_PATIENCE', 0.0)


class Disk:
  """Has so many bytes left; a write takes what fits, as on a real one."""

  def __init__(self, monkeypatch):
    self.room = 10**9
    self.writes = 0
    self.fails_to_close = self.fails_to_truncate = False
    real = pathlib.Path.open

    def open_(path, mode='r', *args, **kwargs):
      file = real(path, mode, *args, **kwargs)
      return _File(file, self) if kwargs.get('buffering') == 0 else file

    monkeypatch.setattr(pathlib.Path, 'open', open_)


class _File:
  def __init__(self, file, disk):
    self._file, self._disk = file, disk

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._file.close()
    if self._disk.fails_to_close:
      raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

  def tell(self):
    return self._file.tell()

  def write(self, content):
    self._disk.writes += 1
    if not self._disk.room:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    written = self._file.write(content[: self._disk.room])
    self._disk.room -= written
    return written

  def truncate(self, size):
    if self._disk.fails_to_truncate:
      raise OSError(errno.EIO, os.strerror(errno.EIO))
    self._disk.room += self._file.tell() - size
    self._file.truncate(size)


@pytest.fixture
def disk(monkeypatch):
  return Disk(monkeypatch)


def test_lines_are_there_at_once(path):
  file = MetricsFile(path)
  assert not path.exists()
  assert file.lines() == []
  file.append(LINE, {'step': 6})
  assert path.read_text() == dumps([LINE, {'step': 6}])
  assert file.lines() == MetricsFile(path).lines() == [LINE, {'step': 6}]
  assert file.behind == ''


@pytest.mark.parametrize('cut', range(1, len(dumps([LINE]).encode())))
def test_a_line_cut_off_anywhere_is_completed_or_dropped(path, cut):
  path.write_bytes(dumps(numbered(3)).encode() + dumps([LINE]).encode()[:cut])
  whole = numbered(3)
  if cut == len(dumps([LINE]).encode()) - 1:
    whole.append(LINE)
  file = MetricsFile(path)
  assert file.lines() == whole
  assert file.version == 1
  file.append({'step': 6})
  assert path.read_text() == dumps([*whole, {'step': 6}])


def test_what_a_full_disk_refuses_is_written_later(path, disk, no_patience):
  file = MetricsFile(path)
  file.append(*numbered(2))
  disk.room = len(dumps(numbered(1))) + 3  # A line and a part of the next.
  file.append(*numbered(3, 2))
  assert path.read_text() == dumps(numbered(2))
  assert file.behind == (
    f'no space left to write {path}; 3 lines of it wait in memory'
  )
  file.append({'step': 5})
  assert file.lines() == numbered(6)
  assert file.content() == dumps(numbered(6)).encode()
  with pytest.raises(UserError, match='no space left'):
    file.sync()
  disk.room = 10**9
  file.append({'step': 6})
  assert file.behind == ''
  assert path.read_text() == dumps(numbered(7))


def test_a_full_disk_is_not_tried_all_the_time(path, disk):
  file = MetricsFile(path)
  disk.room = 0
  for line in numbered(50):
    file.append(line)
  assert disk.writes == 1
  disk.room = 10**9
  file.sync()  # Waits for nothing.
  assert path.read_text() == dumps(numbered(50))


def test_lines_refused_at_the_very_end_are_not_doubled(path, disk, no_patience):
  # As over a network, where a full quota is told when a file is closed.
  file = MetricsFile(path)
  file.append(*numbered(2))
  disk.fails_to_close = True
  file.append({'step': 2})
  assert 'no space left' in file.behind
  file.append({'step': 3})
  assert file.lines() == numbered(4)
  disk.fails_to_close = False
  file.append({'step': 4})
  assert file.behind == ''
  assert path.read_text() == dumps(numbered(5))


def test_a_part_of_a_line_that_could_not_be_cut_off_is_later(
  path, disk, no_patience
):
  file = MetricsFile(path)
  file.append(*numbered(2))
  disk.room, disk.fails_to_truncate = 5, True
  file.append({'step': 2})
  assert path.read_bytes() == dumps(numbered(2)).encode() + b'{"ste'
  disk.room = 10**9
  file.append({'step': 3})  # Nothing goes after the part.
  assert file.lines() == numbered(4)
  assert 'cannot write' in file.behind
  disk.fails_to_truncate = False
  file.append({'step': 4})
  assert file.behind == ''
  assert path.read_text() == dumps(numbered(5))


def test_syncing_makes_the_name_durable_too(path, monkeypatch):
  synced = watch_syncs(monkeypatch)
  file = MetricsFile(path)
  file.append(LINE)
  assert synced == []
  file.sync()
  assert synced == [path, path.parent]


def test_one_line_waits(path, disk):
  disk.room = 0
  file = MetricsFile(path)
  file.append({'step': 1})
  assert file.behind.endswith('; 1 line of it waits in memory')


@given(
  st.lists(st.tuples(st.integers(0, 3), st.integers(0, 40)), max_size=20),
  st.integers(0, 200),
)
def test_whatever_the_room_lines_stay_whole_and_in_order(
  tmp_path_factory, steps, room
):
  path = tmp_path_factory.mktemp('file') / 'metrics.jsonl'
  with pytest.MonkeyPatch.context() as monkeypatch:
    monkeypatch.setattr(metrics_file, '_PATIENCE', 0.0)
    disk = Disk(monkeypatch)
    disk.room = room
    file = MetricsFile(path)
    count = 0
    for many, more in steps:
      disk.room += more
      file.append(*numbered(many, count))
      count += many
      on_disk = path.read_bytes() if path.exists() else b''
      assert on_disk == dumps(numbered(len(parse(on_disk)))).encode()
      assert file.lines() == numbered(count)
    disk.room = 10**9
    file.sync()
    assert path.read_text() == dumps(numbered(count))


def test_a_real_limit_on_size(path):
  # The file cannot grow past the limit: a write is cut off in a line.
  program = (
    'import json, pathlib, resource, sys\n'
    'from train import metrics_file\n'
    'metrics_file._PATIENCE = 0\n'
    'limits = resource.getrlimit(resource.RLIMIT_FSIZE)\n'
    'resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))\n'
    'path = pathlib.Path(sys.argv[1])\n'
    'file = metrics_file.MetricsFile(path)\n'
    'for step in range(100): file.append({"step": step})\n'
    'assert len(path.read_bytes()) <= 1000\n'
    'assert path.read_bytes().endswith(b"}\\n"), path.read_bytes()[-20:]\n'
    'assert "File too large" in file.behind, file.behind\n'
    'resource.setrlimit(resource.RLIMIT_FSIZE, limits)\n'
    'file.sync()\n'
  )
  subprocess.run(
    [sys.executable, '-c', program, str(path)], cwd=ROOT, check=True
  )
  assert path.read_text() == dumps(numbered(100))


def test_a_file_that_goes_away_is_begun_again(path):
  file = MetricsFile(path)
  file.append(*numbered(3))
  path.unlink()
  file.append({'step': 3})
  assert path.read_text() == dumps([{'step': 3}])


def test_replacing_drops_what_waits(path, disk):
  file = MetricsFile(path)
  file.append(*numbered(4))
  disk.room = 0
  file.append({'step': 4})
  file.replace(numbered(2))
  assert file.behind == ''
  assert path.read_text() == dumps(numbered(2))
  disk.room = 10**9
  file.append({'step': 2})
  assert file.lines() == numbered(3)


def test_a_file_in_the_way_is_named(tmp_path):
  (tmp_path / 'metrics.jsonl').mkdir()
  with pytest.raises(UserError, match='cannot write'):
    MetricsFile(tmp_path / 'metrics.jsonl')


def test_versions_tell_changes(path):
  file = MetricsFile(path)
  versions = [file.version]
  file.append(LINE)
  versions.append(file.version)
  file.sync()
  assert file.version == versions[-1]
  file.replace([])
  versions.append(file.version)
  assert len(set(versions)) == 3


def test_it_is_read_while_it_is_written(path):
  file = MetricsFile(path)
  done = threading.Event()
  seen = []

  def read():
    while not done.is_set():
      seen.append(file.content())

  thread = threading.Thread(target=read)
  thread.start()
  for line in numbered(300):
    file.append(line)
  done.set()
  thread.join()
  for content in seen:
    assert content == dumps(numbered(content.count(b'\n'))).encode()


def test_a_kill_leaves_at_most_one_line_cut_off(path):
  program = (
    'import itertools, pathlib, sys\n'
    'from train.metrics_file import MetricsFile\n'
    'file = MetricsFile(pathlib.Path(sys.argv[1]))\n'
    'for step in itertools.count(): file.append({"step": step})\n'
  )
  command = [sys.executable, '-c', program, str(path)]
  with subprocess.Popen(command, cwd=ROOT) as process:
    while not path.exists() or path.stat().st_size < 5000:
      time.sleep(0.01)
      assert process.poll() is None
    process.send_signal(signal.SIGKILL)
  found = MetricsFile(path).lines()
  assert found == numbered(len(found))
  assert len(found) > 100


def test_a_line_costs_little(path):
  file = MetricsFile(path)
  line = {f'number_{i}': i / 7 for i in range(12)}
  file.append(line)
  took = []
  for _ in range(200):
    start = time.perf_counter()
    file.append(line)
    took.append(time.perf_counter() - start)
  assert sorted(took)[100] < 1e-3  # 30 us on a laptop.


@pytest.mark.parametrize('junk', ['[]', '3', '{"loss": 1}', 'x', '[' * 10**5])
def test_what_is_no_line_is_left_out(junk):
  assert parse(f'{junk}\n{json.dumps(LINE)}\n'.encode()) == [LINE]
