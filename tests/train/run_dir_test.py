import dataclasses
import errno
import json
import math
import os
import socket
import time
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.train.syncs import watch_syncs
from train import metrics_file
from train.config import (
  Config,
  DataConfig,
  KeepConfig,
  MeshConfig,
  OptimizerConfig,
  to_dict,
)
from train.errors import UserError
from train.run_dir import RunDir
from train.storage import make_directory, sync_directory, write_atomically

CONFIG = Config()
VOCABULARY = types.SimpleNamespace(
  file_name='tokenizer.json', content='{"über": 1}'.encode()
)
POWER = dataclasses.replace(
  CONFIG, optimizer=OptimizerConfig(power=1.25), steps=2000
)


def train_line(step, loss=2.5):
  return {'step': step, 'split': 'train', 'loss': loss}


@pytest.fixture
def run(tmp_path):
  run = RunDir(tmp_path / 'deep' / 'run', CONFIG, 'hash', VOCABULARY)
  yield run
  run.close()


def again(run, config=CONFIG, source_hash='hash'):
  """Opens a run's directory once more, as its next process would."""
  run.close()
  opened = RunDir(run.path, config, source_hash, VOCABULARY)
  opened.close()
  return opened


def lines(run):
  """What was logged, without the times."""
  return [
    {key: value for key, value in line.items() if key != 'time'}
    for line in run.lines()
  ]


def contents(run):
  return {p.name: p.read_bytes() for p in run.path.iterdir()}


def test_it_holds_the_configuration_and_the_facts(run):
  config = json.loads((run.path / 'config.json').read_text())
  assert config == to_dict(CONFIG)
  facts = json.loads((run.path / 'run.json').read_text())
  assert facts['source_hash'] == 'hash'
  assert {'python', 'jax', 'optax', 'flax'} <= set(facts['versions'])
  assert facts['devices'].startswith('8 ')
  assert {entry.name for entry in run.path.iterdir()} == {
    'config.json', 'lock', 'run.json', 'tokenizer.json',
  }  # fmt: skip


def test_it_opens_again_and_changes_nothing(run):
  run.log(train_line(1))
  run.event('began', 0)
  run.close()
  before = contents(run)
  again(run)
  after = contents(run)
  assert before.pop('lock') != after.pop('lock')
  assert after == before


def test_another_configuration_is_refused_by_its_options(run):
  with pytest.raises(UserError) as error:
    again(run, POWER)
  message = str(error.value)
  assert '--optimizer.power is 1.0 there, 1.25 here' in message
  assert '--steps is 10000 there, 2000 here' in message
  assert '--seed' not in message
  assert '\n' not in message


def test_it_goes_on_in_another_layout_and_says_so(run):
  assert again(run).moved == {}
  before = (run.path / 'config.json').read_bytes()
  mesh = MeshConfig(fsdp=4)
  moved = dataclasses.replace(CONFIG, mesh=mesh, accumulate=2)
  assert again(run, moved).moved == {
    'mesh': {'data': 0, 'fsdp': 4, 'tensor': 1, 'expert': 1},
    'accumulate': 2,
  }
  facts = json.loads((run.path / 'run.json').read_text())
  (run.path / 'run.json').write_text(
    json.dumps(facts | {'devices': '64 TPU v5p'})
  )
  assert again(run).moved == {'devices': '8 cpu'}
  assert (run.path / 'config.json').read_bytes() == before
  with pytest.raises(UserError) as error:
    again(run, dataclasses.replace(POWER, mesh=mesh))
  assert '--optimizer.power' in str(error.value)
  assert 'mesh' not in str(error.value)


def test_other_versions_are_told(run):
  facts = json.loads((run.path / 'run.json').read_text())
  jax_now = facts['versions']['jax']
  older = facts['versions'] | {'jax': '0.1.2', 'gone': '1.0'}
  del older['numpy']  # It was not asked for then.
  for before, moved in (
    (older, {'versions': {'jax': f'0.1.2 -> {jax_now}'}}),
    (None, {}),
  ):
    (run.path / 'run.json').write_text(json.dumps(facts | {'versions': before}))
    assert again(run).moved == moved


def test_which_checkpoints_are_kept_may_change(run):
  kept = dataclasses.replace(CONFIG, keep=KeepConfig(last=9))
  assert again(run, kept).moved == {}


def test_a_run_from_before_there_were_meshes_goes_on(run):
  path = run.path / 'config.json'
  found = json.loads(path.read_text())
  del found['mesh'], found['accumulate'], found['keep']
  path.write_text(json.dumps(found))
  assert again(run).moved == {}


def test_a_process_that_does_not_write(run, tmp_path):
  def reader(path=run.path, config=CONFIG, source_hash='hash'):
    return RunDir(path, config, source_hash, VOCABULARY, writes=False)

  run.log(train_line(1))
  before = contents(run)
  other = reader()
  assert other.lines() == run.lines()
  other.log(train_line(2))
  other.event('began', 0)
  other.rewind(0)
  other.sync()
  other.upload()
  other.close()
  assert other.behind == ''
  assert contents(run) == before
  with pytest.raises(UserError, match='another configuration'):
    reader(config=POWER)
  with pytest.raises(UserError, match='text or vocabulary has changed'):
    reader(source_hash='other')
  with pytest.raises(UserError, match='on a disk that all processes share'):
    reader(tmp_path / 'none')
  assert not (tmp_path / 'none').exists()


def test_another_text_is_refused(run):
  with pytest.raises(UserError, match='text or vocabulary has changed'):
    again(run, source_hash='other')


def test_an_option_of_another_version_is_named(run):
  path = run.path / 'config.json'
  config = json.loads(path.read_text())
  config['model']['dropout'] = 0.1
  config['seed'] = None
  path.write_text(json.dumps(config))
  with pytest.raises(UserError) as error:
    again(run)
  assert '--model.dropout is 0.1 there, None here' in str(error.value)
  assert '--seed is None there, 0 here' in str(error.value)


@pytest.mark.parametrize('name', ['config.json', 'run.json'])
@pytest.mark.parametrize(
  'content', [b'', b'{"steps": 10', b'[]', b'null', b'\xff\xfe', b'\0' * 9]
)
def test_a_damaged_file_is_named_in_one_line(run, name, content):
  (run.path / name).write_bytes(content)
  with pytest.raises(UserError, match=r'damaged.*name another') as error:
    again(run)
  assert '\n' not in str(error.value)


def test_a_lost_file_is_named_in_one_line(run):
  (run.path / 'run.json').unlink()
  with pytest.raises(UserError, match=r'damaged.*run\.json'):
    again(run)


@pytest.mark.parametrize('name', ['thesis.tex', 'metrics.jsonl', '.hidden'])
def test_a_foreign_directory_is_left_alone(tmp_path, name):
  (tmp_path / name).write_text('mine')
  with pytest.raises(UserError, match='not empty'):
    RunDir(tmp_path, CONFIG, 'hash', VOCABULARY)
  assert [p.name for p in tmp_path.iterdir()] == [name]


def test_it_holds_the_vocabulary(run):
  path = run.path / 'tokenizer.json'
  assert path.read_bytes() == VOCABULARY.content
  path.unlink()  # As an older version made it.
  again(run)
  assert path.read_bytes() == VOCABULARY.content


def test_the_vocabulary_of_another_is_left_alone(tmp_path):
  (tmp_path / 'tokenizer.json').write_text('mine')
  with pytest.raises(UserError, match='not empty'):
    RunDir(tmp_path, CONFIG, 'hash', VOCABULARY)
  assert (tmp_path / 'tokenizer.json').read_text() == 'mine'


@pytest.mark.parametrize('killed', ['tokenizer.json', 'config.json'])
def test_a_run_killed_at_birth_begins_again(tmp_path, monkeypatch, killed):
  def write(path, content):
    if path.name == killed:
      raise KeyboardInterrupt
    write_atomically(path, content)

  with monkeypatch.context() as patch:
    patch.setattr('train.run_dir.write_atomically', write)
    with pytest.raises(KeyboardInterrupt):
      RunDir(tmp_path, CONFIG, 'hash', VOCABULARY)
  assert not (tmp_path / 'config.json').exists()
  run = RunDir(tmp_path, CONFIG, 'hash', VOCABULARY)
  run.close()
  assert {'config.json', 'run.json', 'tokenizer.json'} <= set(contents(run))


def test_it_is_the_same_run_wherever_its_data_lie(run):
  def moved(**data):
    return dataclasses.replace(CONFIG, data=DataConfig(**data))

  again(run, moved(prepared='elsewhere'))
  again(run, moved(tokenizer='elsewhere.json'))
  # What is made of text is asked of text alone.
  again(run, moved(prepared='elsewhere', validation_fraction=0.3))
  with pytest.raises(UserError, match=r'fraction is 0\.05 there'):
    again(run, moved(validation_fraction=0.3))
  with pytest.raises(UserError, match=r"--data\.prepared is '' there, 'else"):
    again(run, moved(prepared='elsewhere'), source_hash='another')
  with pytest.raises(UserError, match='the text or vocabulary has changed'):
    again(run, source_hash='another')
  with pytest.raises(UserError, match=r"--data\.layout is '' there, 'packed'"):
    again(run, moved(layout='packed'))


def test_a_vocabulary_of_another_kind_keeps_its_name(tmp_path):
  vocabulary = types.SimpleNamespace(
    file_name='tokenizer.model', content=b'\x00\xff'
  )
  RunDir(tmp_path, CONFIG, 'hash', vocabulary).close()
  assert (tmp_path / 'tokenizer.model').read_bytes() == b'\x00\xff'
  assert not (tmp_path / 'tokenizer.json').exists()


def test_an_empty_directory_and_one_cut_off_at_birth_are_taken(tmp_path):
  (tmp_path / 'run.json').write_text('{"sour')  # Killed before config.json.
  run = RunDir(tmp_path, CONFIG, 'hash', VOCABULARY)
  assert json.loads((run.path / 'run.json').read_text())['versions']
  run.close()


def test_what_a_killed_process_left_is_removed(run):
  ours = ['config.json.12.tmp', 'metrics.jsonl.3.tmp', 'run.json.4.tmp']
  others = ['report.html.5.tmp', 'config.json.tmp', 'config.json.x.tmp']
  for name in ours + others:
    (run.path / name).write_text('half')
  with pytest.raises(UserError, match='in use'):
    RunDir(run.path, CONFIG, 'hash', VOCABULARY)
  assert set(ours) <= set(contents(run))
  again(run)
  assert set(contents(run)) & {*ours, *others} == set(others)


def test_one_that_is_closed_before_it_has_begun_is_free(tmp_path):
  run = RunDir(tmp_path, CONFIG, 'hash', VOCABULARY)
  run.close()
  run.close()
  assert again(run).done() is None


def test_a_run_on_a_disk_is_not_lost(run):
  run.confirm()
  reader = RunDir(run.path, CONFIG, 'hash', VOCABULARY, writes=False)
  reader.confirm()


def test_what_makes_a_run_survives_a_power_cut(tmp_path, monkeypatch):
  synced = watch_syncs(monkeypatch)
  path = tmp_path / 'deep' / 'run'
  RunDir(path, CONFIG, 'hash', VOCABULARY).close()
  assert {tmp_path, tmp_path / 'deep', path} <= set(synced)
  last = f'config.json.{os.getpid()}.tmp'
  assert path in synced[synced.index(path / last) :]


def test_a_file_in_the_way_is_named(tmp_path):
  (tmp_path / 'run').write_text('')
  for path in (tmp_path / 'run', tmp_path / 'run' / 'below'):
    with pytest.raises(UserError, match='cannot write'):
      RunDir(path, CONFIG, 'hash', VOCABULARY)


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write anywhere')
def test_no_permission_is_said(tmp_path):
  tmp_path.chmod(0o500)
  with pytest.raises(UserError, match=r'cannot write.*Permission denied'):
    RunDir(tmp_path / 'run', CONFIG, 'hash', VOCABULARY)


def test_lines_keep_every_bit_of_a_float(run):
  losses = [0.1 + 0.2, 1e-310, 5.696184635162354, 1 / 3]
  run.log(*[train_line(i, loss) for i, loss in enumerate(losses)])
  assert [line['loss'] for line in run.lines()] == losses


def test_what_is_not_finite_is_a_string(run):
  run.log(*[train_line(1, x) for x in (math.nan, math.inf, -math.inf)])
  text = (run.path / 'metrics.jsonl').read_text()

  def refuse(word):
    raise AssertionError(word)

  found = [
    json.loads(line, parse_constant=refuse) for line in text.splitlines()
  ]
  assert [line['loss'] for line in found] == ['nan', 'inf', '-inf']
  run.rewind(1)
  assert (run.path / 'metrics.jsonl').read_text() == text


def test_rewinding_drops_what_will_be_done_again(run):
  run.log(*map(train_line, range(1, 6)))
  run.log({'event': 'resumed', 'step': 2}, {'event': 'stopped', 'step': 3})
  run.log({'step': 4, 'split': 'validation', 'loss': 1.0})
  run.rewind(3)
  assert lines(run) == [
    *map(train_line, range(1, 4)),
    {'event': 'resumed', 'step': 2},
  ]
  run.rewind(0)
  assert run.lines() == []


def test_what_is_evaluated_once_more_is_dropped(run):
  def validation(step):
    return {'step': step, 'split': 'validation', 'loss': 1.0}

  for step in (2, 3):
    run.log(train_line(step), validation(step))
  run.rewind(3)
  assert len(run.lines()) == 4
  run.rewind(3, again=True)
  assert lines(run) == [train_line(2), validation(2), train_line(3)]


def test_lines_and_events_say_when(run):
  before = round(time.time(), 3)
  run.log(train_line(1))
  run.event('saved', 1, seconds=0.5, bytes=7, loss=math.inf)
  run.close()
  events = [
    json.loads(line)
    for line in (run.path / 'events.jsonl').read_text().splitlines()
  ]
  assert before <= run.lines()[0]['time'] <= events[0]['time']
  assert events[0].pop('time') <= time.time() + 0.001
  assert events == [
    {'event': 'saved', 'step': 1, 'seconds': 0.5, 'bytes': 7, 'loss': 'inf'}
  ]


def test_the_history_is_not_rewound(run):
  run.log(train_line(3))
  run.event('saved', 3)
  run.rewind(0)
  run.event('resumed', 0)
  assert run.lines() == []
  run.close()
  history = (run.path / 'events.jsonl').read_text().splitlines()
  assert [json.loads(line)['event'] for line in history] == ['saved', 'resumed']


@pytest.mark.parametrize('junk', [b'\0' * 40, b'\xff\xfe{', b'3\n', b'[]\n'])
def test_other_damage_is_survived(run, junk):
  run.log(train_line(1))
  with (run.path / 'metrics.jsonl').open('ab') as file:
    file.write(junk)
  run.close()
  run = RunDir(run.path, CONFIG, 'hash', VOCABULARY)
  assert run.done() is None
  run.rewind(1)
  assert lines(run) == [train_line(1)]
  run.close()


def test_a_run_is_done_once_it_says_so(run):
  assert run.done() is None
  run.log(train_line(1))
  assert run.done() is None
  end = {'event': 'done', 'step': 1, 'validation_loss': 2.0}
  run.log(end)
  assert run.done().items() >= end.items()


@pytest.mark.parametrize('name', ['metrics.jsonl', 'events.jsonl'])
def test_a_full_disk_does_not_stop_a_run(run, name):
  path = run.local / name
  path.symlink_to('/dev/full')
  assert run.behind == ''
  run.log(train_line(1))
  run.event('saved', 1)
  assert f'no space left to write {path}; 1 line' in run.behind
  assert '\n' not in run.behind
  with pytest.raises(UserError, match='no space left'):
    run.sync()
  with pytest.raises(UserError, match='no space left'):
    run.close()
  path.unlink()
  again(run)  # It has let go of it all the same.
  run.sync()
  assert run.behind == ''
  assert lines(run) == [train_line(1)]
  assert json.loads((run.path / 'events.jsonl').read_text())['step'] == 1


def test_a_disk_that_is_really_full(small_disk, monkeypatch):
  monkeypatch.setattr(metrics_file, '_PATIENCE', 0.0)
  disk = small_disk(200)
  run = RunDir(disk / 'run', CONFIG, 'hash', VOCABULARY)
  step = 0
  while not run.behind:
    step += 1
    run.log(train_line(step))
    assert step < 10_000
  for _ in range(100):
    step += 1
    run.log(train_line(step))
    run.event('skipped', step)
  content = (run.local / 'metrics.jsonl').read_bytes()
  assert content.endswith(b'}\n')
  assert content.count(b'\n') <= step - 100
  assert '101 lines of it wait in memory' in run.behind
  with pytest.raises(UserError, match='no space left'):
    run.sync()
  small_disk(20_000)
  run.sync()
  assert run.behind == ''
  assert lines(run) == [train_line(i) for i in range(1, step + 1)]
  run.close()


def test_a_full_disk_is_said_at_birth(tmp_path, monkeypatch):
  def write(path, text):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr('train.run_dir.write_atomically', write)
  with pytest.raises(UserError, match=r'no space left.*same command'):
    RunDir(tmp_path, CONFIG, 'hash', VOCABULARY)


def test_another_run_is_refused_until_this_one_ends(run):
  def second():
    return RunDir(run.path, POWER, 'hash', VOCABULARY)

  with pytest.raises(UserError) as error:
    second()
  message = str(error.value)
  assert f'process {os.getpid()} on {socket.gethostname()}' in message
  assert '\n' not in message
  run.close()
  for _ in range(2):  # A refusal lets go of it.
    with pytest.raises(UserError, match='another configuration'):
      second()


def test_writing_leaves_the_old_file_or_the_new(tmp_path):
  path = tmp_path / 'file'
  write_atomically(path, 'old')

  with pytest.raises(TypeError):
    write_atomically(path, None)
  assert path.read_text() == 'old'
  assert [p.name for p in tmp_path.iterdir()] == ['file']
  write_atomically(path, 'new')
  assert path.read_text() == 'new'


def test_a_name_is_as_durable_as_its_file(tmp_path, monkeypatch):
  synced = watch_syncs(monkeypatch)
  write_atomically(tmp_path / 'file', 'new')
  assert synced[-1] == tmp_path
  make_directory(tmp_path / 'a' / 'b')
  assert set(synced[-2:]) == {tmp_path / 'a', tmp_path}
  del synced[:]
  make_directory(tmp_path / 'a' / 'b')
  assert synced == []


@pytest.mark.parametrize('number', [errno.EINVAL, errno.EIO])
def test_a_file_system_whose_directories_cannot_be_synced(
  tmp_path, monkeypatch, number
):
  def fsync(_):
    raise OSError(number, os.strerror(number))

  monkeypatch.setattr(os, 'fsync', fsync)
  if number == errno.EINVAL:
    sync_directory(tmp_path)
  else:
    with pytest.raises(OSError, match='Input/output error'):
      sync_directory(tmp_path)


@given(st.lists(st.integers(0, 9), max_size=12), st.integers(0, 9))
def test_rewinding_is_a_filter_by_step(tmp_path_factory, steps, to):
  run = RunDir(tmp_path_factory.mktemp('run'), CONFIG, 'hash', VOCABULARY)
  run.log(*map(train_line, steps))
  run.rewind(to)
  assert lines(run) == [train_line(s) for s in steps if s <= to]
  run.close()
