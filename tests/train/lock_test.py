import fcntl
import json
import logging
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
from etils import epath

from tests.train.memory_store import MemoryStore
from train import lock
from train.errors import UserError
from train.lock import FileLock, ObjectLock

ROOT = pathlib.Path(__file__).parents[2]
PLACE = epath.Path('gs://bucket/run')
NAME = 'gs://bucket/run/lock.json'
HERE = f'process {os.getpid()} on {socket.gethostname()}'

HOLD = (
  'import pathlib, sys, time\n'
  'from train.lock import FileLock\n'
  'held = FileLock(pathlib.Path(sys.argv[1]))\n'
  'print("held", flush=True)\n'
  'time.sleep(60)\n'
)


@pytest.fixture
def holding(tmp_path):
  """Another process, which holds the lock of tmp_path."""
  command = [sys.executable, '-c', HOLD, str(tmp_path)]
  process = subprocess.Popen(
    command, cwd=ROOT, stdout=subprocess.PIPE, text=True
  )
  with process:
    assert process.stdout.readline() == 'held\n'
    yield process
    process.kill()


def test_another_process_is_named_and_a_kill_frees_the_lock(tmp_path, holding):
  for _ in range(2):
    with pytest.raises(UserError) as error:
      FileLock(tmp_path)
    message = str(error.value)
    where = f'process {holding.pid} on {socket.gethostname()}'
    assert f'{tmp_path} is in use by {where}' in message
    assert '\n' not in message
  holding.send_signal(signal.SIGKILL)
  holding.wait()
  FileLock(tmp_path).release()


def test_a_process_excludes_itself_too(tmp_path):
  first = FileLock(tmp_path)
  found = json.loads((tmp_path / 'lock').read_text())
  assert found['pid'] == os.getpid()
  assert found['host'] == socket.gethostname()
  assert abs(found['started'] - time.time()) < 60
  with pytest.raises(UserError, match='in use'):
    FileLock(tmp_path)
  first.check()
  first.confirm()
  first.release()
  first.release()
  FileLock(tmp_path).release()


@pytest.mark.parametrize('content', ['', '{', '[]', '{"pid": 1}', '\xff'])
def test_a_damaged_lock_is_a_lock(tmp_path, content):
  held = FileLock(tmp_path)
  (tmp_path / 'lock').write_bytes(content.encode('latin-1'))
  with pytest.raises(UserError, match='in use by another process'):
    FileLock(tmp_path)
  held.release()
  FileLock(tmp_path).release()


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch, caplog):
  def flock(*_):
    raise OSError(38, 'Function not implemented')

  monkeypatch.setattr(fcntl, 'flock', flock)
  monkeypatch.setattr(logging.getLogger('train'), 'propagate', True)
  FileLock(tmp_path).release()
  assert 'cannot be locked (Function not implemented)' in caplog.text


def test_a_directory_that_cannot_be_written(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match=r'cannot write .*Not a directory'):
    FileLock(tmp_path / 'file')


@pytest.fixture
def store(monkeypatch):
  monkeypatch.setattr(lock, '_BEAT', 0.04)
  monkeypatch.setattr(lock, '_STALE', 1.0)
  monkeypatch.setattr(lock, '_SETTLE', 0.05)
  with MemoryStore().entered(monkeypatch) as store:
    yield store


def left(store, age=0.0, **facts):
  """A lock that nobody writes any more."""
  found = {
    'token': 'theirs', 'host': 'elsewhere', 'pid': 7, 'machine': 'another',
    'started': 0.0, 'beat': time.time() - age,
  }  # fmt: skip
  store.objects[NAME] = json.dumps(found | facts).encode()


def held(store):
  return json.loads(store.objects[NAME])


def test_it_beats_until_it_is_released(store):
  heart = ObjectLock(PLACE)
  first = held(store)
  assert (first['host'], first['pid']) == (socket.gethostname(), os.getpid())
  time.sleep(0.3)
  then = held(store)
  assert then['beat'] > first['beat']
  assert then | {'beat': 0} == first | {'beat': 0}
  heart.check()
  heart.confirm()
  heart.release()
  assert NAME not in store.objects
  time.sleep(0.1)
  assert NAME not in store.objects
  heart.release()
  again = ObjectLock(PLACE)
  again.release()


def test_a_run_that_beats_refuses_a_second(store):
  heart = ObjectLock(PLACE)
  start = time.monotonic()
  with pytest.raises(UserError) as error:
    ObjectLock(PLACE)
  assert time.monotonic() - start < 0.9
  assert f'{PLACE} is in use by {HERE}' in str(error.value)
  heart.confirm()
  heart.release()


def test_one_that_beats_no_more_is_waited_for(store, monkeypatch, caplog):
  monkeypatch.setattr(logging.getLogger('train'), 'propagate', True)
  caplog.set_level(logging.INFO, 'train')
  left(store, age=0.6)
  start = time.monotonic()
  heart = ObjectLock(PLACE)
  assert 0.3 < time.monotonic() - start < 4
  assert 'was in use by process 7 on elsewhere' in caplog.text
  assert held(store)['pid'] == os.getpid()
  heart.release()


@pytest.mark.parametrize('beat', [0.0, -1e9])
def test_an_old_one_is_waited_for_a_few_beats(store, beat):
  left(store, beat=beat)
  start = time.monotonic()
  ObjectLock(PLACE).release()
  assert 2.5 * lock._BEAT < time.monotonic() - start < 0.8


@pytest.mark.parametrize('ahead', [-3600.0, 3600.0])
def test_a_run_that_beats_is_alive_whatever_its_clock_says(
  store, monkeypatch, ahead
):
  monkeypatch.setattr(lock, '_BEAT', 0.1)
  ended = threading.Event()

  def beat():
    while not ended.wait(0.1):
      left(store, age=-ahead)

  left(store, age=-ahead)
  other = threading.Thread(target=beat)
  other.start()
  try:
    with pytest.raises(UserError, match='in use by process 7 on elsewhere'):
      ObjectLock(PLACE)
    assert held(store)['token'] == 'theirs'
  finally:
    ended.set()
    other.join()


@pytest.mark.parametrize('beat', [1e12, None, 'soon', [1]])
def test_a_clock_that_is_wrong_is_not_waited_for_long(store, beat):
  left(store, beat=beat)
  start = time.monotonic()
  ObjectLock(PLACE).release()
  assert 0.9 < time.monotonic() - start < 4


def test_one_that_died_here_is_taken_at_once(store):
  with subprocess.Popen([sys.executable, '-c', '']) as process:
    process.wait()
  left(store, pid=process.pid, machine=lock._machine())
  start = time.monotonic()
  ObjectLock(PLACE).release()
  assert time.monotonic() - start < 0.8
  left(store, pid=os.getppid(), machine=lock._machine())
  with pytest.raises(UserError, match='in use'):
    threading.Timer(0.2, left, [store]).start()
    ObjectLock(PLACE)


@pytest.mark.parametrize('content', [b'', b'{', b'[]', b'3'])
def test_a_damaged_object_is_no_lock(store, content):
  store.objects[NAME] = content
  ObjectLock(PLACE).release()


def test_of_those_that_begin_at_once_one_goes_on(store, monkeypatch):
  monkeypatch.setattr(lock, '_SETTLE', 0.3)
  won, lost = [], []

  def begin():
    try:
      won.append(ObjectLock(PLACE))
    except UserError as error:
      lost.append(str(error))

  threads = [threading.Thread(target=begin) for _ in range(5)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(won) == 1
  assert len(lost) == 4
  assert all('in use' in message for message in lost)
  time.sleep(0.1)
  won[0].confirm()
  won[0].release()


def test_a_run_whose_directory_is_taken_over_hears_of_it(store):
  heart = ObjectLock(PLACE)
  left(store)
  theirs = store.objects[NAME]
  with pytest.raises(UserError, match='taken over by process 7 on elsewhere'):
    heart.confirm()
  time.sleep(0.1)
  with pytest.raises(UserError, match='taken over'):
    heart.check()
  heart.release()
  assert store.objects[NAME] == theirs


def test_the_beat_notices_too(store):
  heart = ObjectLock(PLACE)
  left(store)
  end = time.monotonic() + 5
  with pytest.raises(UserError, match='taken over'):
    while time.monotonic() < end:
      heart.check()
      time.sleep(0.01)
  heart.release()


def test_a_store_that_fails_for_a_while_is_survived(store):
  heart = ObjectLock(PLACE)
  before = held(store)['beat']
  store.failing.append('lock')
  time.sleep(0.15)
  heart.check()
  store.failing.clear()
  time.sleep(0.2)
  assert held(store)['beat'] > before
  heart.release()


def test_a_store_that_cannot_be_written_is_one_line(store):
  store.failing.append('lock')
  with pytest.raises(UserError, match=r'cannot write gs://.* network is down'):
    ObjectLock(PLACE)
