import io
import logging
import os
import pty
import re
import signal
import subprocess
import sys
import textwrap
import time
import types

import pytest

from train import live, monitor
from train.config import Config
from train.watch_options import WatchOptions

_LINE = {
  'split': 'train', 'loss': 3.14159, 'grad_norm': 2.5, 'clipped_norm': 1.0,
  'powered_norm': 0.125, 'learning_rate': 0.003, 'tokens_per_second': 12345.0,
  'data_seconds': 0.0166, 'skipped': 0, 'memory': 3 * 2**29, 'mfu': 0.412,
}  # fmt: skip


_TOKEN = re.compile(r'\x1b\[([0-9;?]*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)')


class Terminal(io.StringIO):
  """A file that is a terminal, as much as the display asks for."""

  encoding = 'utf-8'

  def isatty(self):
    return True

  def screen(self):
    """Every line there ever was, as it stands after all that was written."""
    return list(map(''.join, self._play()[0]))

  def cursor(self):
    """Row and column."""
    return self._play()[1:]

  def _play(self):
    lines, row, column = [[]], 0, 0
    text = self.getvalue()
    at = 0
    while at < len(text):
      token = _TOKEN.match(text, at)
      assert token, f'not understood: {text[at : at + 20]!r}'
      at = token.end()
      number, command, control, plain = token.groups()
      if plain:
        line = lines[row]
        line.extend(' ' * (column - len(line)))
        line[column : column + len(plain)] = plain
        column += len(plain)
      elif control == '\r':
        column = 0
      elif control == '\n':
        row, column = row + 1, 0
        if row == len(lines):
          lines.append([])
      elif command == 'A':
        assert row >= int(number), 'above the first line'
        row -= int(number)
      elif command == 'K':
        del lines[row][column:]
      elif command == 'J':
        del lines[row][column:], lines[row + 1 :]
      else:
        assert command == 'm', f'not understood: {token[0]!r}'
    return lines, row, column


@pytest.fixture
def clock(monkeypatch):
  """Time that passes only when told to."""
  clock = types.SimpleNamespace(now=1000.0, monotonic=lambda: clock.now)
  monkeypatch.setattr(monitor, 'time', clock)
  return clock


@pytest.fixture(autouse=True)
def resize(monkeypatch):
  """Sets how large the terminal is."""

  def resize(columns=80, lines=40):
    size = os.terminal_size((columns, lines))
    monkeypatch.setattr(os, 'get_terminal_size', lambda *_: size)

  for name in ('COLUMNS', 'LINES', 'NO_COLOR', 'COLORTERM'):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv('TERM', 'xterm-256color')
  resize()
  return resize


@pytest.fixture
def open_monitor(tmp_path):
  opened = []

  def open_monitor(file, steps=60, step=0, shown=True, name='arm', **watch):
    config = Config(steps=steps, optimizer=_no_warmup())
    opened.append(
      monitor.Monitor(
        name,
        config,
        step,
        shown=shown,
        local=tmp_path,
        watch=WatchOptions(**watch),
        file=file,
      )
    )
    return opened[-1]

  yield open_monitor
  for each in opened:
    each.close()


def _no_warmup():
  return type(Config().optimizer)(warmup_steps=0)


def _line(step, **others):
  return {'step': step, **_LINE, **others}


def _say_all(display):
  """Every event that there is."""
  for event in (
    {'event': 'began', 'step': 0},
    {'event': 'resumed', 'step': 40, 'mesh': {'data': 2}},
    {'event': 'saved', 'step': 50, 'seconds': 0.5, 'bytes': 7},
    {'event': 'save_failed', 'step': 60, 'error': 'no space left in x'},
    {'event': 'fell_back', 'step': 40, 'refused': 50, 'reason': 'a bad file'},
    {'event': 'skipped', 'step': 61, 'reason': 'spike', 'loss': 9.87654,
     'grad_norm': 'inf'},
    {'event': 'stopped', 'step': 62, 'status': 'SIGTERM'},
    {'event': 'failed', 'step': 62, 'status': 3, 'error': 'diverged'},
    {'event': 'done', 'step': 62},
  ):  # fmt: skip
    display.event(event)


_SAID = [
  'arm: continues from step 40',
  'arm: step 60 was not saved: no space left in x',
  'arm: the checkpoint of step 50 is not used: a bad file',
  'arm: step 61 changed nothing: spike (loss 9.877, gradient norm inf)',
]


def test_a_log_gets_a_plain_line_now_and_then(clock, open_monitor):
  file = io.StringIO()
  display = open_monitor(file)
  for step in range(1, 61):
    clock.now += 1
    display.train(_line(step))
  display.close()
  lines = file.getvalue().splitlines()
  assert lines[0] == (
    'arm: step 11/60  loss 3.1416  lr 0.003  norm 2.5  clipped 1  powered 0.125'
    '  12.3k tok/s  MFU 41.2%  data 10.0%  1.5 GiB  0:49 left'
  )
  assert [int(re.search(r'step (\d+)', line)[1]) for line in lines] == [
    11, 22, 33, 44, 55, 60,
  ]  # fmt: skip
  assert lines[-1].endswith('0:00 left')
  assert '\r' not in file.getvalue() and '\x1b' not in file.getvalue()


def test_what_is_not_known_is_not_in_the_log(clock, open_monitor):
  file = io.StringIO()
  open_monitor(file, steps=1).train({'step': 1, 'split': 'train', 'loss': 2.0})
  assert file.getvalue() == 'arm: step 1/1  loss 2.0000  0:00 left\n'


def test_skipped_steps_and_the_last_evaluation_are_in_the_log(
  clock, open_monitor
):
  file = io.StringIO()
  display = open_monitor(file, steps=2)
  display.validation({'step': 1, 'split': 'validation', 'loss': 2.5})
  display.train(_line(2, skipped=3))
  assert '  loss 3.1416  held-out 2.5000 at step 1  ' in file.getvalue()
  assert '  skipped 3  ' in file.getvalue()


@pytest.mark.parametrize('file', [io.StringIO(), Terminal()])
def test_another_process_shows_nothing(open_monitor, file, tmp_path):
  display = open_monitor(file, shown=False, wandb='p')  # Nor asks for W&B.
  display.train(_line(1))
  display.validation({'step': 1, 'loss': 2.5})
  display.layers({'step': 1, 'split': 'layers', 'layers': {}})
  display.say('hello')
  display.status('saving')
  _say_all(display)
  display.close()
  assert file.getvalue() == ''


def test_the_time_left_is_that_of_steps_like_those_of_this_session(
  clock, open_monitor
):
  file = io.StringIO()
  display = open_monitor(file, steps=5000, step=100)
  clock.now += 500  # Compiling.
  display.train(_line(101))
  clock.now += 90
  display.train(_line(110))
  assert file.getvalue().endswith('  13:35:00 left\n')


def test_events_are_lines_of_a_log(open_monitor):
  file = io.StringIO()
  _say_all(open_monitor(file))
  assert file.getvalue().splitlines() == _SAID


def test_it_writes_to_stderr_as_it_is_now(capsys, open_monitor):
  open_monitor(None).say('x')
  captured = capsys.readouterr()
  assert captured.err == 'arm: x\n'
  assert captured.out == ''


def test_a_log_on_a_full_disk_ends_nothing(clock, open_monitor):
  with open('/dev/full', 'w') as file:
    display = open_monitor(file, steps=1)
    display.train(_line(1))
    display.say('hello')
    os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())  # To close it.


@pytest.mark.parametrize('columns', [30, 60, 80, 120, 200])
def test_a_terminal_shows_all_of_it(open_monitor, resize, columns):
  resize(columns)
  file = Terminal()
  display = open_monitor(file, steps=400)
  for step in range(1, 101):
    display.train(_line(step, loss=5 - step / 50, skipped=2))
  display.validation({'step': 100, 'loss': 4.25})
  display.event({'event': 'saved', 'step': 90, 'seconds': 1, 'bytes': 1})
  display.close()
  screen = '\n'.join(file.screen())
  for text in (
    'arm', 'step 100 of 400', '25%', 'loss            3.0000', '4.2500',
    '3.000e-03', '2.5', '1', '0.125', '12.3k', '41.2%', '10.0%', '1.5 GiB',
    'skipped steps   2', 'step 90', '0:0',
  ):  # fmt: skip
    assert text in screen
  assert max(map(len, file.screen())) < columns
  # The curve falls from its first column to its last.
  dots = [line for line in file.screen() if re.search('[⠁-⣿]', line)]
  first, last = dots[0], dots[-1]
  assert re.search('[⠁-⣿]', first).start() < re.search('[⠁-⣿]', last).start()
  assert '4.9' in first and '3' in last
  assert file.cursor()[1] == 0
  assert file.screen()[-1] == ''


def test_colours_read_on_dark_and_on_light(open_monitor):
  file = Terminal()
  display = open_monitor(file)
  display.train(_line(1))
  display.event({'event': 'save_failed', 'step': 1, 'error': 'x'})
  display.close()
  codes = set(re.findall('\x1b\\[([0-9;]*)m', file.getvalue()))
  assert codes <= {'0', '1', '2', '3', '38;5;32', '1;38;5;166'}


def test_a_terminal_without_much_room_shows_how_far_it_is(open_monitor, resize):
  resize(lines=6)
  file = Terminal()
  display = open_monitor(file)
  for step in range(1, 30):
    display.train(_line(step, loss=float(step)))
  display.close()
  assert len(file.screen()) == 3  # With that of the cursor.
  assert 'step 29 of 60' in file.screen()[0]


@pytest.mark.parametrize('encoding, term', [
  ('ascii', 'xterm'), ('utf-8', 'dumb'),
])  # fmt: skip
def test_an_old_terminal(open_monitor, monkeypatch, encoding, term):
  monkeypatch.setenv('TERM', term)
  file = Terminal()
  monkeypatch.setattr(Terminal, 'encoding', encoding)
  display = open_monitor(file)
  for step in range(1, 61):
    display.train(_line(step, loss=float(step)))
  display.close()
  assert file.getvalue().isascii()
  assert ('\x1b' in file.getvalue()) == (term != 'dumb')


def test_events_and_messages_stand_above_the_display(open_monitor):
  file = Terminal()
  display = open_monitor(file)
  display.say('before it')
  display.train(_line(1))
  _say_all(display)
  display.close()
  display.say('after it')
  screen = file.screen()
  assert screen[:5] == ['arm: before it', *_SAID]
  assert 'step 1 of 60' in screen[5]
  assert screen[-2:] == ['arm: after it', '']
  assert ' step 60 was not saved: no space left in x' in screen


def test_a_save_that_works_ends_the_alert(open_monitor):
  file = Terminal()
  display = open_monitor(file)
  display.train(_line(1))
  display.event({'event': 'save_failed', 'step': 1, 'error': 'no space'})
  display.event({'event': 'saved', 'step': 2, 'seconds': 1, 'bytes': 1})
  display.close()
  assert ' step 1 was not saved: no space' not in file.screen()


def test_what_it_waits_for_is_shown(open_monitor):
  file = Terminal()
  display = open_monitor(file)
  display.status('compiles')
  deadline = time.monotonic() + 10
  while ' compiles' not in file.screen():
    assert time.monotonic() < deadline
    time.sleep(0.01)
  display.status('')
  display.close()
  assert ' compiles' not in file.screen()


def test_experts_have_a_row(open_monitor):
  file = Terminal()
  display = open_monitor(file)
  display.train(_line(1, expert_load_max=[1.25, 2.5]))
  display.close()
  assert any('busiest expert  2.50 x mean' in x for x in file.screen())


def test_a_step_is_cheap(open_monitor):
  display = open_monitor(Terminal(), steps=10**6)
  times = []
  for step in range(1, 2001):
    line = _line(step)
    start = time.perf_counter()
    display.train(line)
    times.append(time.perf_counter() - start)
  assert sorted(times)[1000] < 100e-6  # About 1 us.


def test_a_terminal_that_has_gone_away_ends_nothing(open_monitor, monkeypatch):
  class Gone(Terminal):
    def write(self, text):
      raise OSError(5, 'Input/output error')

  display = open_monitor(Gone())
  display.train(_line(1))
  display.say('hello')
  display.close()


def test_others_lines_do_not_tear_it(open_monitor, monkeypatch):
  file = Terminal()
  logger = logging.getLogger('a.test')
  handler = logging.StreamHandler(file)
  monkeypatch.setattr(sys, 'stdout', file)
  monkeypatch.setattr(sys, 'stderr', file)
  monkeypatch.setattr(logger, 'handlers', [handler])
  monkeypatch.setattr(logger, 'propagate', False)
  display = open_monitor(file)
  display.train(_line(1))
  for i in range(20):
    print(f'print {i}')
    logger.error('log %d', i)
    sys.stderr.write('std')
    sys.stderr.writelines([f'err {i}\n'])
    display.train(_line(2 + i))
  sys.stderr.write('no line break')
  display.close()
  assert sys.stdout is file and sys.stderr is file and handler.stream is file
  screen = file.screen()
  assert screen[:60] == [
    text
    for i in range(20)
    for text in (f'print {i}', f'log {i}', f'stderr {i}')
  ]
  assert screen[60] == 'no line break'
  assert 'step 21 of 60' in screen[61]
  assert sum('of 60' in line for line in screen) == 1


def test_what_is_led_to_a_file_stays_in_it(open_monitor, monkeypatch):
  output = io.StringIO()
  monkeypatch.setattr(sys, 'stdout', output)
  display = open_monitor(Terminal())
  display.train(_line(1))
  print('x')
  assert output.getvalue() == 'x\n'


def test_a_terminal_made_narrower(open_monitor, resize, monkeypatch):
  """Lines too long for it have been broken: the cursor goes up over all."""
  monkeypatch.setattr(live, '_SECONDS_BETWEEN_DRAWINGS', 1e-3)
  file = Terminal()
  display = open_monitor(file)
  display.train(_line(1))
  while len(file.screen()) < 9:
    time.sleep(0.01)
  display._live._stopped.set()
  display._live._thread.join()
  height = len(file.screen()) - 1
  too_long = sum(len(line) > 60 for line in file.screen())
  assert too_long >= 2
  resize(60)
  assert display._live._to_top() == f'\r\x1b[{height + too_long}A'


_PROGRAM = """
  import pathlib, sys, time
  from train import monitor
  from train.config import Config
  from train.watch_options import WatchOptions
  display = monitor.Monitor(
    'arm', Config(steps=10**6), 0, shown=True, local=pathlib.Path('.'),
    watch=WatchOptions())
  try:
    for step in range(1, 10**6):
      display.train({'step': step, 'split': 'train', 'loss': 1 / step})
      time.sleep(1e-3)
      if step == 200:
        print('ready!', flush=True)
  finally:
    display.close()
"""


@pytest.mark.parametrize('number', [signal.SIGINT, signal.SIGKILL])
def test_a_real_terminal_is_left_as_it_was(number):
  above, below = pty.openpty()
  environment = {**os.environ, 'TERM': 'xterm-256color'}
  program = subprocess.Popen(
    [sys.executable, '-c', textwrap.dedent(_PROGRAM)],
    stdin=below, stdout=below, stderr=below, env=environment,
  )  # fmt: skip
  os.close(below)
  text = b''
  try:
    while b'ready!' not in text:
      text += os.read(above, 65536)
    program.send_signal(number)
    while True:
      try:
        text += os.read(above, 65536)
      except OSError:  # The end.
        break
  finally:
    program.kill()
    program.wait()
    os.close(above)
  assert b'of 1,000,000' in text
  # Neither the cursor is hidden, nor another screen shown, nor keys changed.
  assert b'\x1b[?' not in text
  assert text.count(b'ready!\r\n') == 1
  assert ('KeyboardInterrupt' in text.decode()) == (number == signal.SIGINT)
