import io
import re

import pytest

from train.data.prepare import progress


class Terminal(io.StringIO):
  def isatty(self):
    return True


@pytest.fixture
def clock(monkeypatch):
  """Seconds, which a test sets."""
  now = [100.0]
  monkeypatch.setattr(progress.time, 'monotonic', lambda: now[0])
  return now


def test_a_line_every_ten_seconds_in_a_log(clock):
  log = io.StringIO()
  shown = progress.Shown(log)
  shown.begin('tokens', 40_000_000)
  for _ in range(40):
    clock[0] += 1
    shown.count(500_000, 500_000)
  shown.end()
  lines = log.getvalue().splitlines()
  assert lines == [
    'tokens: 5 of 40 MB, 5.0M tokens, 0.50M a second, about 70 s left',
    'tokens: 10 of 40 MB, 10.0M tokens, 0.50M a second, about 60 s left',
    'tokens: 15 of 40 MB, 15.0M tokens, 0.50M a second, about 50 s left',
    'tokens: 20 of 40 MB, 20.0M tokens, 0.50M a second, about 40 s left',
  ]


def test_a_step_without_tokens_and_one_after_it(clock):
  log = io.StringIO()
  shown = progress.Shown(log)
  shown.begin('tokens', 10)
  shown.count(7, 10)
  shown.begin('records', 2_000_000)
  clock[0] += 10
  shown.count(0, 1_000_000)
  assert log.getvalue() == 'records: 1 of 2 MB, about 10 s left\n'
  assert shown.tokens == 7


def test_a_bar_on_a_terminal():
  terminal = Terminal()
  shown = progress.Shown(terminal)
  shown.begin('tokens', 2_000_000)
  shown.count(3_000_000, 1_000_000)
  shown.begin('records', 1)  # Which ends the bar before.
  shown.end()
  shown.end()
  assert re.search(r'tokens.*1\.0/2\.0 MB.*3\.0M tokens', terminal.getvalue())


@pytest.mark.parametrize('kind', [io.StringIO, Terminal])
def test_nothing_to_do_is_not_shown(clock, kind):
  file = kind()
  shown = progress.Shown(file)
  shown.begin('records', 0)
  clock[0] += 10
  shown.count(0, 0)
  shown.end()
  assert file.getvalue() == ''


@pytest.mark.parametrize('kind', [io.StringIO, Terminal])
def test_steps_are_numbered(monkeypatch, kind):
  monkeypatch.setattr(progress, '_SECONDS_BETWEEN_LINES', 0)
  file = kind()
  shown = progress.Shown(file)
  shown.steps = ('tokens', 'records')
  shown.begin('records', 2_000_000)
  shown.count(0, 2_000_000)
  shown.end()
  assert 'records (step 2 of 2)' in file.getvalue()


def test_none_looks():
  silent = progress.Progress()
  silent.begin('tokens', 1)
  silent.count(3, 1)
  silent.count(4, 1)
  silent.end()
  assert silent.tokens == 7
