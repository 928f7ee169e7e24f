import errno
import pathlib
import struct
import sys
import threading
import time
import types

import pytest

from train import sinks
from train.errors import UserError
from train.watch_options import WatchOptions

_LINE = {
  'step': 3, 'split': 'train', 'loss': 2.5, 'skipped': 0, 'time': 1.7e9,
  'router_entropy': [0.25, 0.5],
}  # fmt: skip
_VALUES = {
  'train/loss': 2.5,
  'train/skipped': 0.0,
  'train/router_entropy/0': 0.25,
  'train/router_entropy/1': 0.5,
}


class FakeRun:
  def __init__(self, number):
    self.id = f'id{number}'
    self.metrics, self.logged, self.finished = [], [], False
    self.error = None

  def define_metric(self, *args, **kwargs):
    self.metrics.append((args, kwargs))

  def log(self, values):
    if self.error:
      raise self.error
    self.logged.append(values)

  def finish(self):
    self.finished = True


@pytest.fixture
def wandb(monkeypatch):
  """A module of that name, which notes what it is asked for."""
  module = types.ModuleType('wandb')
  module.runs, module.asked, module.error = [], [], None

  def init(**options):
    module.asked.append(options)
    if module.error:
      raise module.error
    module.runs.append(FakeRun(len(module.runs)))
    return module.runs[-1]

  module.init = init
  monkeypatch.setitem(sys.modules, 'wandb', module)
  return module


@pytest.fixture
def open_sinks(tmp_path):
  said = []
  opened = []

  def open_sinks(step=0, directory=tmp_path, **watch):
    options = WatchOptions(**watch)
    opened.append(
      sinks.Sinks(options, directory, 'arm', {'seed': 1}, step, said.append)
    )
    return opened[-1]

  open_sinks.said = said
  return open_sinks


def test_weights_and_biases_gets_each_number(wandb, open_sinks, tmp_path):
  to = open_sinks(wandb='project')
  to.put(_LINE)
  to.put({'step': 4, 'split': 'validation', 'loss': 2.0, 'tokens': 7})
  to.close()
  (run,) = wandb.runs
  assert run.logged == [
    {'step': 3, **_VALUES},
    {'step': 4, 'validation/loss': 2.0, 'validation/tokens': 7.0},
  ]
  assert run.metrics == [(('*',), {'step_metric': 'step'})]
  assert run.finished
  (asked,) = wandb.asked
  assert asked['project'] == 'project' and asked['name'] == 'arm'
  assert asked['config'] == {'seed': 1} and asked['dir'] == str(tmp_path)
  assert asked['id'] is None


def test_a_run_that_goes_on_is_the_same_there(wandb, open_sinks):
  open_sinks(wandb='p').close()
  open_sinks(wandb='p', step=5).close()
  assert wandb.asked[1]['id'] == 'id0'


def test_statistics_by_layer_have_names_of_their_own(wandb, open_sinks):
  to = open_sinks(wandb='p')
  layers = {'layers.0.norm': {'grad_norm': 1.5, 'param_norm': 2.0}}
  to.put({'step': 9, 'split': 'layers', 'layers': layers})
  to.close()
  assert wandb.runs[0].logged == [
    {
      'step': 9,
      'layers/layers.0.norm/grad_norm': 1.5,
      'layers/layers.0.norm/param_norm': 2.0,
    }
  ]


def test_not_logged_in_is_one_line(wandb, open_sinks):
  wandb.error = RuntimeError('no API key\nand what to do about it')
  with pytest.raises(UserError, match=r'^--wandb p: no API key \(`wandb logi'):
    open_sinks(wandb='p')


def test_one_that_fails_is_left_out(wandb, open_sinks):
  to = open_sinks(wandb='p')
  wandb.runs[0].error = ConnectionError('the network\nis gone')
  for step in range(3):
    to.put({**_LINE, 'step': step})
  to.close()
  assert open_sinks.said == [
    'no longer writes to Weights & Biases: the network'
  ]


def test_a_slow_one_does_not_keep_the_run_waiting(wandb, open_sinks):
  to = open_sinks(wandb='p')
  go_on = threading.Event()
  wandb.runs[0].log = lambda values: go_on.wait(10)
  start = time.monotonic()
  for step in range(1000):
    to.put({**_LINE, 'step': step})
  assert time.monotonic() - start < 1
  go_on.set()
  to.close()


def test_one_that_hangs_is_not_waited_for(wandb, open_sinks, monkeypatch):
  monkeypatch.setattr(sinks, '_MOST_SECONDS_TO_CLOSE', 0.05)
  to = open_sinks(wandb='p')
  go_on = threading.Event()
  wandb.runs[0].finish = lambda: go_on.wait(10)
  to.close()
  assert open_sinks.said == ['does not wait any longer for Weights & Biases']
  go_on.set()


@pytest.mark.parametrize('module, watch, extra', [
  ('tensorboardX', {'tensorboard': True}, 'tensorboard'),
  ('wandb', {'wandb': 'p'}, 'wandb'),
])  # fmt: skip
def test_not_installed(monkeypatch, open_sinks, tmp_path, module, watch, extra):
  for name in [name for name in sys.modules if name.startswith(module)]:
    monkeypatch.delitem(sys.modules, name)
  monkeypatch.setitem(sys.modules, module, None)
  with pytest.raises(UserError) as error:
    open_sinks(**watch)
  message = str(error.value)
  assert f"pip install -e '.[train,{extra}]'" in message
  assert message.startswith(f'--{extra} needs {module}')
  assert '\n' not in message
  assert not list(tmp_path.iterdir())


def _events(path):
  """Of a file of TensorFlow records: length, checksum, bytes, checksum."""
  from tensorboardX.proto import event_pb2

  data, events = path.read_bytes(), []
  while data:
    (length,) = struct.unpack_from('<Q', data)
    events.append(event_pb2.Event.FromString(data[12 : 12 + length]))
    data = data[12 + length + 4 :]
  return events


@pytest.fixture
def tensorboard_x():
  return pytest.importorskip('tensorboardX.event_file_writer')


def test_tensorboard_gets_each_number(tensorboard_x, open_sinks, tmp_path):
  to = open_sinks(tensorboard=True)
  to.put(_LINE)
  to.close()
  (path,) = (tmp_path / 'tensorboard').iterdir()
  assert 'tfevents' in path.name
  version, start, event = _events(path)
  assert version.file_version == 'brain.Event:2'
  assert start.step == 1
  assert event.step == 3 and event.wall_time == 1.7e9
  assert {v.tag: v.simple_value for v in event.summary.value} == _VALUES


def test_a_relative_directory_is_none_of_a_store(
  tensorboard_x, open_sinks, tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  open_sinks(tensorboard=True, directory=pathlib.Path('s3:run')).close()
  assert open_sinks.said == []
  assert list((tmp_path / 's3:run' / 'tensorboard').iterdir())


def test_what_is_done_again_is_dropped(tensorboard_x, open_sinks, tmp_path):
  """And two starts within a second do not write to the same file."""
  open_sinks(tensorboard=True).close()
  open_sinks(tensorboard=True, step=5).close()
  _, second = sorted((tmp_path / 'tensorboard').iterdir())
  start = _events(second)[1]
  assert start.step == 6
  assert start.session_log.status == start.session_log.START


def test_tensorboard_reads_while_the_run_goes_on(
  tensorboard_x, open_sinks, tmp_path, monkeypatch
):
  monkeypatch.setattr(sinks, '_SECONDS_BETWEEN_FLUSHES', 0.0)
  to = open_sinks(tensorboard=True)
  to.put(_LINE)
  (path,) = (tmp_path / 'tensorboard').iterdir()
  deadline = time.monotonic() + 10
  while len(_events(path)) < 3:
    assert time.monotonic() < deadline
    time.sleep(0.01)
  to.close()


def test_a_full_disk_ends_tensorboard_alone(
  tensorboard_x, wandb, open_sinks, monkeypatch
):
  def full(*_):
    raise OSError(errno.ENOSPC, 'No space left on device')

  to = open_sinks(tensorboard=True, wandb='p')
  monkeypatch.setattr(tensorboard_x.EventsWriter, 'write_event', full)
  for step in (1, 2):
    to.put({**_LINE, 'step': step})
  to.close()
  assert open_sinks.said == [
    'no longer writes to TensorBoard: No space left on device'
  ]
  assert [values['step'] for values in wandb.runs[0].logged] == [1, 2]


def test_a_directory_that_cannot_be_made(tensorboard_x, open_sinks, tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match=r'^cannot write to .*: Not a directory$'):
    open_sinks(tensorboard=True, directory=tmp_path / 'file')
