import json
import types

import pytest
from etils import epath

from tests.train.memory_store import MemoryStore
from train.config import Config
from train.errors import UserError
from train.run_dir import RunDir
from train.run_log import Event, read_run

VOCABULARY = types.SimpleNamespace(file_name='tokenizer.json', content=b'{}')


def train_line(step, **more):
  return {'step': step, 'split': 'train', 'loss': 2.5, **more}


@pytest.fixture
def directory(tmp_path):
  (tmp_path / 'config.json').write_text('{"steps": 9}')
  (tmp_path / 'metrics.jsonl').write_text(
    ''.join(json.dumps(train_line(i, time=i + 0.5)) + '\n' for i in range(1, 4))
  )
  return tmp_path


def write_events(directory, *lines):
  text = '\n'.join(
    line if isinstance(line, str) else json.dumps(line) for line in lines
  )
  (directory / 'events.jsonl').write_text(text)


def test_what_a_run_writes_is_what_is_read(tmp_path):
  run = RunDir(tmp_path, Config(), 'hash', VOCABULARY)
  run.log(
    train_line(
      1, grad_norm=2.0, clipped_norm=1.0, powered_norm=0.5, skipped=0,
      memory=1e9, mfu=0.4, data_seconds=0.01, tokens=128, load=[1, 2],
    )
  )  # fmt: skip
  run.event('began', 0)
  run.event('saved', 1, seconds=0.25, bytes=10)
  run.close()
  log = read_run('name', tmp_path)
  assert log.series('clipped_norm') == [(1, 1.0)]
  assert log.series('mfu', 'tokens') == [(128.0, 0.4)]
  assert abs(log.train[1]['time'] - log.events[0].time) < 5
  assert [(e.kind, e.step, e.facts) for e in log.events] == [
    ('began', 0, {}),
    ('saved', 1, {'seconds': 0.25, 'bytes': 10}),
  ]
  assert 'load' not in log.train[1]
  assert (log.unreadable, log.resumed, log.end) == (0, [], 'open')


def test_the_history_outlives_rewinding(directory):
  with (directory / 'metrics.jsonl').open('a') as file:
    file.write('{"event": "resumed", "step": 3}\n')
  assert read_run('a', directory).resumed == [3]
  write_events(
    directory,
    {'event': 'began', 'step': 0, 'time': 1.0},
    {'event': 'resumed', 'step': 9, 'time': 2.0},
    {'event': 'fell_back', 'step': 3, 'time': 3.0, 'refused': 9},
    {'event': 'resumed', 'step': 3, 'time': 3.5},
  )
  log = read_run('a', directory)
  assert log.resumed == [9, 3]
  assert log.events[2] == Event('fell_back', 3, 3.0, {'refused': 9})
  assert list(log.train) == [1, 2, 3]


def test_an_older_run_has_its_events_among_its_metrics(directory):
  with (directory / 'metrics.jsonl').open('a') as file:
    file.write('{"event": "resumed", "step": 2}\n')
    file.write('{"event": "stopped", "step": 2}\n')
  log = read_run('a', directory)
  assert log.events == [
    Event('resumed', 2, None, {}),
    Event('stopped', 2, None, {}),
  ]
  assert log.end == 'stopped'


@pytest.mark.parametrize(
  'line',
  [
    '{"event": "saved", "st', '[]', '3', 'null', '{}', '{"event": "saved"}',
    '{"event": "saved", "step": "x"}', '{"step": 3}', '[' * 10**5,
    '{"event": "saved", "step": 1, "time": "nan"}',
    '{"event": "saved", "step": 1, "time": [1]}',
    '{"event": "saved", "step": 1e999}',
  ],
)  # fmt: skip
def test_events_that_are_none_are_counted(directory, line):
  write_events(directory, {'event': 'began', 'step': 0}, line)
  log = read_run('a', directory)
  assert log.unreadable == 1
  assert [event.kind for event in log.events] == ['began']


def test_a_time_that_is_none_is_not_believed(directory):
  with (directory / 'metrics.jsonl').open('a') as file:
    file.write(json.dumps(train_line(4, time='inf')) + '\n')
  log = read_run('a', directory)
  assert (log.unreadable, log.last_step) == (1, 3)


def test_it_is_read_from_an_object_store(directory, monkeypatch):
  place = epath.Path('gs://bucket/run')
  with MemoryStore().entered(monkeypatch) as store:
    for name in ('config.json', 'metrics.jsonl'):
      content = (directory / name).read_bytes()
      store.objects[f'{place}/{name}'] = content
    assert read_run('a', place) == read_run('a', directory)
    del store.objects[f'{place}/metrics.jsonl']
    with pytest.raises(UserError, match=r'cannot read gs://bucket/run/metrics'):
      read_run('a', place)


def test_what_the_store_says_is_one_line(directory, monkeypatch):
  class Broken(MemoryStore):
    def open(self, path, mode):
      raise RuntimeError('401\n  no credentials')

  with Broken().entered(monkeypatch), pytest.raises(UserError) as error:
    read_run('a', 'gs://bucket/run')
  assert str(error.value).startswith('cannot read gs://bucket/run/config.json')
  assert str(error.value).endswith('401 no credentials')


@pytest.mark.parametrize('later, end, error', [
  ([], 'failed', 'it diverged'),
  ([{'event': 'saved', 'step': 3}], 'failed', 'it diverged'),
  ([{'event': 'resumed', 'step': 2}], 'open', ''),
  ([{'event': 'stopped', 'step': 3, 'status': 'at once'}], 'stopped', ''),
])  # fmt: skip
def test_how_it_ended_is_told_by_its_history(directory, later, end, error):
  failed = {'event': 'failed', 'step': 3, 'error': 'it diverged', 'status': 3}
  write_events(directory, {'event': 'began', 'step': 0}, failed, *later)
  log = read_run('a', directory)
  assert (log.end, log.error) == (end, error)
