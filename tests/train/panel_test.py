import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train import panel
from train.curve import Curve

_NUMBERS = st.floats(width=32) | st.none()


@st.composite
def _views(draw):
  steps = draw(st.integers(1, 10**9))
  losses = Curve()
  for loss in draw(st.lists(st.floats(width=32), max_size=40)):
    losses.add(loss)
  line = {
    'loss': draw(st.floats()),
    'memory': draw(st.integers(0, 10**15)),
    'skipped': draw(st.integers(0, 10**9)),
    'expert_load_max': [draw(st.floats())],
    **{name: draw(st.floats()) for name in ('learning_rate', 'grad_norm')},
  }
  times = st.floats(0, 1e9)
  return panel.View(
    name=draw(st.text(st.characters(exclude_categories=['C']), min_size=1)),
    steps=steps,
    step=draw(st.integers(0, steps)),
    line=draw(st.sampled_from([{}, line])),
    losses=losses,
    validation=draw(st.none() | st.tuples(st.integers(0, steps), st.floats())),
    tokens_per_second=draw(_NUMBERS),
    mfu=draw(_NUMBERS),
    data_share=draw(_NUMBERS),
    memory_limit=draw(st.none() | st.integers(1, 2**50)),
    elapsed=draw(times),
    left=draw(st.none() | times),
    saved=draw(st.none() | st.tuples(st.integers(0, steps), times)),
    status=draw(st.sampled_from(['', 'saving'])),
    alert=draw(st.sampled_from(['', 'no space left on device ' * 9])),
  )


@given(_views(), st.integers(1, 260), st.integers(1, 60), st.booleans())
def test_it_fits(view, width, height, unicode):
  lines = panel.draw(view, width, height, unicode).split('\n', allow_blank=True)
  assert 1 <= len(lines) <= max(1, height - 1)
  assert all(line.cell_len <= width for line in lines)


@given(_views(), st.integers(1, 200))
def test_an_old_terminal_gets_ascii(view, width):
  view = dataclasses.replace(view, name='arm')
  assert str(panel.draw(view, width, 40, False)).isascii()


@pytest.mark.parametrize('seconds, text', [
  (0, '0:00'), (59.6, '1:00'), (61, '1:01'), (3599, '59:59'),
  (3600, '1:00:00'), (86399, '23:59:59'), (86400, '1 d 0:00 h'),
  (2 * 86400 + 3 * 3600 + 240, '2 d 3:04 h'),
])  # fmt: skip
def test_a_clock(seconds, text):
  assert panel.clock(seconds) == text


@pytest.mark.parametrize('number, text', [
  (12, '12'), (999, '999'), (1000, '1.0k'), (12345, '12.3k'),
  (4.56e6, '4.6M'), (7.8e9, '7.8G'),
])  # fmt: skip
def test_thousands(number, text):
  assert panel.thousands(number) == text


@pytest.mark.parametrize('number, text', [
  (700 * 2**20, '0.7 GiB'), (50 * 2**20, '50 MiB'), (80 * 2**30, '80.0 GiB'),
])  # fmt: skip
def test_gibibytes(number, text):
  assert panel.gibibytes(number) == text


def test_a_value_that_is_too_long_loses_its_last_part():
  view = panel.View('arm', 100, 50, validation=(40, 1.5), saved=(40, 3.0))

  def text(width):
    return str(panel.draw(view, width, 40, True))

  assert '1.5000  step 40' in text(80) and 'step 40  0:03 ago' in text(80)
  assert '1.5000\n' not in text(80)
  assert '1.5000  ' in text(56) and '1.5000  s' not in text(56)
  assert text(56).count('step 40') == 1


def test_nan_is_shown_as_such():
  view = panel.View('arm', 9, 5, line={'loss': math.nan, 'grad_norm': math.inf})
  text = str(panel.draw(view, 80, 40, True))
  assert 'loss            nan' in text and 'gradient norm   inf' in text


def test_memory_is_compared_with_what_there_is():
  view = panel.View('arm', 9, 5, line={'memory': 30 * 2**30})
  assert 'peak memory     30.0 GiB\n' in str(panel.draw(view, 80, 40, True))
  view.memory_limit = 40 * 2**30
  assert 'peak memory     30.0 GiB  75%\n' in str(
    panel.draw(view, 80, 40, True)
  )


@pytest.mark.parametrize('norm, text', [
  (2.5, '2.500'), (1.0, '1.000'), (0.0123456, '0.01235'), (1234.4, '1234'),
  (0, '0.000'),
])  # fmt: skip
def test_norms_have_four_digits(norm, text):
  view = panel.View('arm', 9, 5, line={'powered_norm': norm})
  assert f'after power   {text}\n' in str(panel.draw(view, 40, 40, True))


@pytest.mark.parametrize('width', [30, 50, 80, 120])
@pytest.mark.parametrize('height', [9, 12, 16, 20, 40])
def test_a_small_terminal_shows_the_loss_first(width, height):
  losses = Curve()
  for loss in range(40):
    losses.add(loss)
  view = panel.View('arm', 9, 5, line={'loss': 1.5}, losses=losses)
  assert ' loss            1.5000' in str(panel.draw(view, width, height, True))


def test_how_long_it_takes():
  view = panel.View('arm', 9, 5, elapsed=5, left=7)
  assert '0:05 elapsed     0:07 left' in str(panel.draw(view, 80, 40, True))
