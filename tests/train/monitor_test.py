import io
import re

import pytest

from train import monitor


class Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.fixture
def clock(monkeypatch):
  """Time that passes only when told to."""

  class Clock:
    now = 1000.0

    def monotonic(self):
      return self.now

  clock = Clock()
  monkeypatch.setattr(monitor, 'time', clock)
  return clock


def test_a_log_gets_a_plain_line_now_and_then(clock):
  file = io.StringIO()
  display = monitor.Display('arm', steps=60, step=0, file=file)
  for step in range(1, 61):
    clock.now += 1
    display.train(step, loss=3.14159, tokens_per_second=12345.0)
  display.close()
  lines = file.getvalue().splitlines()
  assert lines[0] == 'arm: step 11/60  loss 3.142 12.3k tok/s  0:49 left'
  assert [int(re.search(r'step (\d+)', line)[1]) for line in lines] == [
    11, 22, 33, 44, 55, 60,
  ]  # fmt: skip
  assert lines[-1].endswith('0:00 left')
  assert '\r' not in file.getvalue() and '\x1b' not in file.getvalue()


@pytest.mark.parametrize('file', [io.StringIO(), Terminal()])
def test_another_process_shows_nothing(file):
  display = monitor.Display('arm', steps=2, step=0, shown=False, file=file)
  display.train(1, loss=2.0, tokens_per_second=100.0)
  display.validation(2.5)
  display.train(2, loss=2.0, tokens_per_second=100.0)
  display.say('hello')
  display.close()
  assert file.getvalue() == ''


def test_the_time_left_is_of_this_session(clock):
  file = io.StringIO()
  display = monitor.Display('arm', steps=5000, step=100, file=file)
  clock.now += 100
  display.train(110, 1.0, 5.0)
  assert (
    file.getvalue() == 'arm: step 110/5000  loss 1.000 5 tok/s  13:35:00 left\n'
  )


def test_the_last_evaluation_stands_beside_the_loss(clock):
  file = io.StringIO()
  display = monitor.Display('arm', steps=2, step=0, file=file)
  display.validation(2.5)
  display.train(2, 2.25, 100.0)
  assert 'loss 2.250 (held-out 2.500) 100 tok/s' in file.getvalue()


def test_a_terminal_gets_a_bar():
  file = Terminal()
  display = monitor.Display('arm', steps=4, step=1, file=file)
  for step in range(2, 5):
    display.train(step, loss=2.0, tokens_per_second=1500.0)
  display.say('hello')
  display.close()
  text = file.getvalue()
  assert '\r' in text
  assert '4/4' in text
  assert 'loss 2.000' in text and '1.5k tok/s' in text
  assert 'arm: hello\n' in text
  assert re.search(r'\[\d\d:\d\d<', text)  # Time gone and left.


def test_messages_to_a_log_are_lines():
  file = io.StringIO()
  display = monitor.Display('arm', steps=4, step=2, file=file)
  display.say('continues from step 2')
  display.close()
  assert file.getvalue() == 'arm: continues from step 2\n'


def test_it_writes_to_stderr_as_it_is_now(capsys):
  monitor.Display('arm', steps=1, step=0).say('x')
  captured = capsys.readouterr()
  assert captured.err == 'arm: x\n'
  assert captured.out == ''
