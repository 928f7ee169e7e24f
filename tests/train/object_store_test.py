import concurrent.futures
import dataclasses
import errno
import importlib.util
import json
import os
import pathlib
import time
import types

import pytest
from etils import epath

from tests.train.fake_gcs import FakeGcs
from tests.train.memory_store import MemoryStore
from train import lock, mirror, storage
from train.config import Config
from train.errors import UserError
from train.metrics_file import parse
from train.run_dir import RunDir
from train.run_log import read_run

CONFIG = Config()
PLACE = epath.Path('gs://bucket/runs/one')
VOCABULARY = types.SimpleNamespace(file_name='tokenizer.json', content=b'{}')


@pytest.fixture
def store(monkeypatch, tmp_path):
  monkeypatch.setattr(lock, '_SETTLE', 0.0)
  monkeypatch.setattr(lock, '_BEAT', 0.05)
  monkeypatch.setattr(mirror, '_PAUSE', 0.01)
  monkeypatch.setattr('tempfile.tempdir', str(tmp_path))
  with MemoryStore().entered(monkeypatch) as store:
    yield store


@pytest.fixture
def run(store):
  run = open_run()
  yield run
  store.failing.clear()
  run.close()


def open_run(config=CONFIG, **kwargs):
  return RunDir(PLACE, config, 'hash', VOCABULARY, **kwargs)


def train_line(step):
  return {'step': step, 'split': 'train', 'loss': 2.5}


def stored(store, name):
  """The steps of the lines that are in the store."""
  lines = parse(store.objects.get(f'{PLACE}/{name}', b''))
  return [line['step'] for line in lines]


def until(condition):
  end = time.monotonic() + 10
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.01)


def test_a_run_lies_there_as_on_a_disk(store, run):
  names = {path.name for path in PLACE.iterdir()}
  assert names == {'config.json', 'lock.json', 'run.json', 'tokenizer.json'}
  run.log(train_line(1), train_line(2))
  run.event('saved', 2)
  assert run.behind == ''
  run.sync()
  assert stored(store, 'metrics.jsonl') == [1, 2]
  assert stored(store, 'events.jsonl') == [2]
  run.close()
  assert not run.local.exists()
  assert {path.name for path in PLACE.iterdir()} == {
    'config.json', 'events.jsonl', 'metrics.jsonl', 'run.json',
    'tokenizer.json',
  }  # fmt: skip
  run.close()


def test_the_next_start_goes_on_with_what_is_there(store, run):
  run.log(*map(train_line, range(1, 5)))
  run.event('began', 0)
  run.close()
  again = open_run()
  again.rewind(2)
  again.log(train_line(3), {'event': 'done', 'step': 3})
  again.event('resumed', 2)
  assert again.done()['step'] == 3
  again.close()
  assert stored(store, 'metrics.jsonl') == [1, 2, 3, 3]
  assert stored(store, 'events.jsonl') == [0, 2]
  log = read_run('one', PLACE)
  assert (log.end, log.resumed, list(log.train)) == ('done', [2], [1, 2, 3])


def test_a_start_uploads_nothing_that_it_has_just_fetched(store, run):
  run.log(train_line(1))
  (run.local / 'wandb-id').write_text('x')
  run.close()
  again = open_run()
  store.objects[f'{PLACE}/metrics.jsonl'] = b'untouched'
  store.objects[f'{PLACE}/wandb-id'] = b'untouched'
  again.close()
  assert store.objects[f'{PLACE}/metrics.jsonl'] == b'untouched'
  assert store.objects[f'{PLACE}/wandb-id'] == b'untouched'


def test_lines_are_uploaded_now_and_then(store, monkeypatch):
  monkeypatch.setattr(mirror, '_EVERY', 0.05)
  run = open_run()
  run.log(train_line(1))
  until(lambda: stored(store, 'metrics.jsonl') == [1])
  run.log(train_line(2))
  until(lambda: stored(store, 'metrics.jsonl') == [1, 2])
  run.close()


def test_what_happens_is_uploaded_soon(store, run):
  run.event('began', 0)
  until(lambda: stored(store, 'events.jsonl') == [0])


def test_many_events_are_not_as_many_uploads(store, monkeypatch):
  monkeypatch.setattr(mirror, '_PAUSE', 0.5)
  run = open_run()
  time.sleep(0.6)
  writes = []
  monkeypatch.setattr(store, 'written', writes.append)
  for step in range(50):
    run.event('skipped', step)
    time.sleep(0.002)
  events = [name for name in writes if 'events' in name]
  assert len(events) <= 2
  run.close()
  assert stored(store, 'events.jsonl') == list(range(50))


def test_other_files_follow(store, run):
  trace = run.local / 'profile' / 'plugins' / 'trace.pb'
  trace.parent.mkdir(parents=True)
  trace.write_bytes(b'trace')
  (run.local / 'half.tmp').write_text('not yet')
  run.upload()
  name = f'{PLACE}/profile/plugins/trace.pb'
  until(lambda: store.objects.get(name) == b'trace')
  trace.write_bytes(b'trace, longer')
  run.close()
  assert store.objects[name] == b'trace, longer'
  assert not any('half' in name for name in store.objects)


def test_what_others_keep_is_fetched(store, run):
  for name in ('autotune/a', 'autotune/b', 'wandb-id', 'profile/c'):
    store.objects[f'{PLACE}/{name}'] = name.encode()
  run.close()
  for options in ({}, {'writes': False}):
    again = open_run(**options)
    local = again.local
    assert (local / 'autotune' / 'b').read_text() == 'autotune/b'
    assert (local / 'wandb-id').read_text() == 'wandb-id'
    assert not (local / 'profile').exists()
    again.close()
    assert not local.exists()


def test_a_process_that_does_not_write(store, run):
  run.log(train_line(1))
  run.sync()
  before = dict(store.objects)
  other = open_run(writes=False)
  assert [line['step'] for line in other.lines()] == [1]
  other.log(train_line(2))
  other.event('began', 0)
  (other.local / 'file').write_text('')
  for act in (other.sync, other.upload, other.close):
    act()
  before.pop(f'{PLACE}/lock.json')  # It beats.
  assert before.items() <= store.objects.items()
  assert len(store.objects) == len(before) + 1
  with pytest.raises(UserError, match='does not see'):
    RunDir(PLACE / 'none', CONFIG, 'hash', VOCABULARY, writes=False)


def test_a_store_that_is_away_for_a_while(store, monkeypatch):
  monkeypatch.setattr(mirror, '_EVERY', 0.05)
  run = open_run()
  store.failing.append('metrics')
  run.log(train_line(1))
  until(lambda: run.behind)
  assert f'cannot write {PLACE}/metrics.jsonl: the network' in run.behind
  assert f'it is kept in {run.local} and tried again' in run.behind
  with pytest.raises(UserError, match='the network is down'):
    run.sync()
  run.log(train_line(2))
  run.event('saved', 2)
  until(lambda: stored(store, 'events.jsonl'))  # The others are not held up.
  store.failing.clear()
  until(lambda: not run.behind)
  assert stored(store, 'metrics.jsonl') == [1, 2]
  run.close()


def test_what_cannot_be_uploaded_at_the_end_is_kept(store, run):
  run.log(train_line(1))
  store.failing.append('metrics')
  with pytest.raises(UserError, match='it is kept in') as error:
    run.close()
  assert '\n' not in str(error.value)
  assert len((run.local / 'metrics.jsonl').read_text().splitlines()) == 1
  store.failing.clear()
  open_run().close()  # It has let go of it all the same.


def test_a_full_local_disk_holds_nothing_up(store, run, monkeypatch):
  real = pathlib.Path.open

  def full(path, mode='r', *args, **kwargs):
    if 'a' in mode:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return real(path, mode, *args, **kwargs)

  with monkeypatch.context() as patch:
    patch.setattr(pathlib.Path, 'open', full)
    run.log(train_line(1), train_line(2))
    run.sync()
  assert run.behind == ''
  assert stored(store, 'metrics.jsonl') == [1, 2]


def test_a_second_run_is_refused(store, run):
  with pytest.raises(UserError, match=f'in use by process {os.getpid()}'):
    open_run()
  run.close()
  open_run().close()


def test_a_run_that_is_taken_over_ends_and_writes_no_more(store):
  run = open_run()
  run.log(train_line(1))
  run.sync()
  theirs = {'token': 'theirs', 'host': 'elsewhere', 'pid': 7}
  store.objects[f'{PLACE}/lock.json'] = json.dumps(theirs).encode()
  run._metrics.append(train_line(2))
  with pytest.raises(UserError, match='taken over by process 7 on elsewhere'):
    run.sync()
  for act in (run.sync, run.close):
    with pytest.raises(UserError, match='taken over'):
      act()
  with pytest.raises(UserError, match='taken over'):
    run.log(train_line(3))
  assert stored(store, 'metrics.jsonl') == [1]
  assert json.loads(store.objects[f'{PLACE}/lock.json']) == theirs


def test_the_store_is_asked_whose_the_directory_is(store, monkeypatch):
  monkeypatch.setattr(lock, '_BEAT', 60.0)  # No beat finds it out first.
  run = open_run()
  run.confirm()
  open_run(writes=False).confirm()
  with monkeypatch.context() as patch:
    patch.setattr(store, 'open', _away)
    with pytest.raises(UserError, match=r'cannot read gs://.*is down'):
      run.confirm()
  theirs = {'token': 'theirs', 'host': 'elsewhere', 'pid': 7}
  store.objects[f'{PLACE}/lock.json'] = json.dumps(theirs).encode()
  with concurrent.futures.ThreadPoolExecutor(4) as threads:
    errors = [
      each.exception() for each in map(threads.submit, 8 * [run.confirm])
    ]
  for error in errors:
    assert 'taken over by process 7 on elsewhere' in str(error)
    assert isinstance(error, UserError)
  run.close()
  assert json.loads(store.objects[f'{PLACE}/lock.json']) == theirs


def _away(*_):
  raise OSError('the network is down')


def test_another_configuration_is_refused(store, run):
  run.close()
  with pytest.raises(UserError, match='--seed is 0 there, 1 here'):
    open_run(dataclasses.replace(CONFIG, seed=1))
  assert f'{PLACE}/lock.json' not in store.objects


def test_a_foreign_directory_is_left_alone(store):
  store.objects[f'{PLACE}/thesis.tex'] = b'mine'
  with pytest.raises(UserError, match='not empty'):
    open_run()
  assert list(store.objects) == [f'{PLACE}/thesis.tex']


@pytest.mark.parametrize('cut', ['run.json', 'tokenizer.json', 'config.json'])
def test_a_run_killed_at_birth_begins_again(store, cut):
  store.failing.append(cut)
  with pytest.raises(UserError, match='network is down'):
    open_run()
  store.failing.clear()
  open_run().close()


def test_a_report_of_nothing_is_refused(store):
  with pytest.raises(
    UserError, match=r'cannot read gs://.*config\.json: there'
  ):
    read_run('one', PLACE)


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('s3://bucket/run', r's3://bucket/run: .* local disk, or gs://BUCKET/PATH'),
    ('http://host/run', 'http://host/run: '),
    ('gs://', 'names no directory in a bucket'),
    ('gs:///run', 'names no directory in a bucket'),
    ('gs://bucket', 'names no directory in a bucket'),
    ('gs://bucket//', 'names no directory in a bucket'),
  ],
)
def test_other_addresses_are_refused(text, message):
  with pytest.raises(UserError, match=message):
    storage.directory(text)


def test_the_missing_client_is_named(monkeypatch):
  storage._prepare.cache_clear()
  monkeypatch.setattr(importlib.util, 'find_spec', lambda _: None)
  with pytest.raises(UserError, match=r'gcsfs.*train,gcs'):
    storage.directory('gs://bucket/run')
  assert storage.directory('~').is_dir()


@pytest.fixture
def server():
  pytest.importorskip('gcsfs')
  with FakeGcs('bucket') as server:
    yield server


@pytest.fixture
def command(start, finish, server):
  """Runs `python -m train` against the server; returns stdout and stderr."""

  def command(*argv, status=0):
    found, out, err = finish(start(*argv, **server.environment))
    assert found == status, err
    return out, err

  return command


@pytest.mark.slow
def test_a_killed_run_goes_on_from_an_object_store(
  server, start, finish, command, tiny, numbers, tmp_path
):
  argv = 'run', 'demo', *tiny, '--steps=200', '--save_every=40', '--run-dir'
  status, _, err = finish(start(*argv, tmp_path / 'whole'))
  assert status == 0, err
  process = start(*argv, 'gs://bucket/run', **server.environment)
  while 'run/checkpoints/80/manifest.json' not in server.names('bucket'):
    assert process.poll() is None, process.stderr.read()
    time.sleep(0.005)
  process.kill()
  finish(process)
  assert 'run/lock.json' in server.names('bucket')

  command(*argv, 'gs://bucket/run')
  assert server.refused == []  # Nothing but whole objects.
  assert 'run/lock.json' not in server.names('bucket')
  copy = tmp_path / 'copy'
  copy.mkdir()
  for name in ('config.json', 'metrics.jsonl', 'events.jsonl'):
    (copy / name).write_bytes(server.read('bucket', f'run/{name}'))
  assert numbers(copy) == numbers(tmp_path / 'whole')
  events = [event.kind for event in read_run('copy', copy).events]
  assert (events[0], events[-1]) == ('began', 'done')
  assert 'resumed' in events
  assert not any('failed' in kind for kind in events)

  out, _ = command('sample', 'gs://bucket/run', '--tokens', 5)
  assert out
  command('report', 'gs://bucket/run', '--out', tmp_path / 'report.html')
  page = (tmp_path / 'report.html').read_text()
  assert page.rstrip().endswith('</html>')
  out, err = command(*argv, 'gs://bucket/run')
  assert 'already done, at step 200' in err


@pytest.mark.parametrize(
  ('place', 'message'),
  [
    ('gs://none/run', 'cannot write gs://none/run: there is no such bucket'),
    ('gs://bucket/closed', 'cannot write gs://bucket/closed: Forbidden'),
    ('gs://bucket/anonymous', 'gcloud auth application-default login'),
  ],
)
@pytest.mark.slow
def test_what_is_wrong_is_told_in_one_line(
  server, command, tiny, place, message
):
  server.broken |= {'closed': 403, 'anonymous': 401}
  _, err = command('run', 'demo', *tiny, '--run-dir', place, status=2)
  assert 'Traceback' not in err
  assert message in err.splitlines()[-1]
