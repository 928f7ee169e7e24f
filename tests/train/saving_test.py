import pytest

from train import saving
from train.checkpoint import Outcome
from train.errors import UserError
from train.saving import Saver


class Checkpoints:
  """Saves that end when told to, as told."""

  def __init__(self):
    self.begun, self.ended, self.under_way = [], [], False
    self.error = ''  # Of those that are waited for.

  def save(self, step, state, validation_loss):
    self.begun.append((step, state, validation_loss))
    self.under_way = True

  def end(self, error=''):
    self.ended.append(Outcome(self.begun[-1][0], 0.5, 10, error))
    self.under_way = False

  def finished(self):
    ended, self.ended = self.ended, []
    return ended

  def wait(self):
    if self.under_way:
      self.end(self.error)
    return self.finished()


class Directory:
  error = ''

  def sync(self):
    if self.error:
      raise UserError(self.error)


@pytest.fixture
def now(monkeypatch):
  clock = [1000.0]
  monkeypatch.setattr(saving.time, 'monotonic', lambda: clock[0])
  monkeypatch.setattr(
    saving.time, 'sleep', lambda seconds: clock.append(clock.pop() + seconds)
  )
  return clock


@pytest.fixture
def told():
  return []


@pytest.fixture
def saver(told):
  def tell(kind, step, **facts):
    told.append((kind, step, facts.get('error', '')))

  return Saver(Checkpoints(), Directory(), tell, every=10, step=0)


def due(saver, steps):
  return [step for step in steps if saver.due(step)]


def test_it_saves_as_often_as_asked(saver, now, told):
  assert due(saver, range(1, 31)) == [10, 20, 30]
  saver.save(30, 'state', 2.5)
  assert saver._checkpoints.begun == [(30, 'state', 2.5)]
  assert (saver.step, saver.complete, told) == (30, 0, [])
  saver._checkpoints.end()
  assert not saver.due(31)
  assert (saver.complete, told) == (30, [('saved', 30, '')])
  saver.save(30, 'state')  # It is there.
  assert len(saver._checkpoints.begun) == 1


def test_a_save_that_failed_is_said_at_once_and_tried_again(saver, now, told):
  saver.save(10, 'state')
  saver._checkpoints.end('no space left')
  assert not saver.due(11)
  assert told == [('save_failed', 10, 'no space left')]
  now[0] += 1.9
  assert not saver.due(12)
  now[0] += 0.2
  assert saver.due(13)
  saver.save(13, 'state')
  saver._checkpoints.end('no space left')
  assert not saver.due(14)
  now[0] += 3.9  # Twice as long as before.
  assert not saver.due(15)
  now[0] += 0.2
  assert saver.due(16)
  saver.save(16, 'state')
  saver._checkpoints.end()
  now[0] += 1000
  assert due(saver, range(17, 22)) == [20]
  assert saver.complete == 16


def test_failures_without_end_are_borne(saver, now):
  for step in range(1, 3000):
    saver.save(step, 'state')
    saver._checkpoints.end('no space left')
    assert not saver.due(100_001)
  now[0] += 255
  assert not saver.due(100_001)
  assert not saver.due(100_010)  # It would fail, too.
  now[0] += 2
  assert saver.due(100_011)


def test_lines_that_are_not_durable_hold_a_save_back(saver, now, told):
  saver._directory.error = 'no space left to write metrics.jsonl'
  saver.save(10, 'state')
  assert saver._checkpoints.begun == []
  assert told == [('save_failed', 10, 'no space left to write metrics.jsonl')]
  saver._directory.error = ''
  now[0] += 3
  assert saver.due(11)


def test_the_last_state_is_tried_for_half_a_minute(saver, now, told):
  saver._checkpoints.error = 'no space left'
  with pytest.raises(UserError, match=r'step 30 is not saved\. Mend .* begin'):
    saver.finish(30, 'state')
  assert [kind for kind, *_ in told] == ['save_failed'] * 5
  assert now[0] == 1000 + 2 + 4 + 8 + 16
  with pytest.raises(UserError):
    saver.finish(31, 'state', hurry=True)
  assert len(told) == 6
  saver._checkpoints.error = ''
  saver.finish(31, 'state', 2.0)
  assert saver.complete == 31
  assert saver._checkpoints.begun[-1] == (31, 'state', 2.0)


def test_an_end_tells_of_the_save_under_way(saver, told):
  saver.save(10, 'state')
  saver.close()
  assert told == [('saved', 10, '')]
