import gzip
import json
import logging

import jax
import jax.numpy as jnp
import pytest

from train.profiler import Profiler


@pytest.fixture(autouse=True)
def lines(caplog, monkeypatch):
  monkeypatch.setattr(logging.getLogger('train'), 'propagate', True)
  caplog.set_level(logging.INFO, 'train')
  return caplog


@pytest.fixture
def take_steps():
  double = jax.jit(lambda x: x @ x)

  def take(profiler, numbers):
    x = jnp.ones((8, 8))
    for number in numbers:
      profiler.step(number)
      x = double(x)

  return take


def _steps_of(directory):
  """Numbers of the steps in the only trace of a directory."""
  (path,) = directory.glob('profile/plugins/profile/*/*.trace.json.gz')
  events = json.loads(gzip.decompress(path.read_bytes()))['traceEvents']
  steps = [event for event in events if event.get('name') == 'train']
  return [
    int(event['args']['step_num'])
    for event in sorted(steps, key=lambda event: event['ts'])
  ]


def test_the_steps_asked_for_are_traced(tmp_path, lines, take_steps):
  profiler = Profiler(tmp_path, (3, 2))
  take_steps(profiler, range(1, 5))
  assert not (tmp_path / 'profile').exists() and not lines.messages
  take_steps(profiler, range(5, 8))
  profiler.close()
  assert _steps_of(tmp_path) == [3, 4]
  (message,) = lines.messages
  assert message == (
    f'profile of steps 3 to 4: xprof --logdir {tmp_path}/profile --port 8791'
  )


def test_a_run_that_ends_first_ends_the_trace(tmp_path, take_steps):
  profiler = Profiler(tmp_path, (2, 100))
  take_steps(profiler, range(1, 4))
  profiler.close()
  assert _steps_of(tmp_path) == [2, 3]
  profiler.close()  # Once more does no harm.


def test_a_run_that_goes_on_inside_traces_the_rest(tmp_path, take_steps):
  profiler = Profiler(tmp_path, (2, 4))
  take_steps(profiler, range(4, 9))
  profiler.close()
  assert _steps_of(tmp_path) == [4, 5]


def test_no_step_was_to_trace(tmp_path, lines, take_steps):
  profiler = Profiler(tmp_path, (2, 3))
  take_steps(profiler, range(10, 13))
  profiler.close()
  assert lines.messages == ['no profile: steps 2 to 4 were not taken now']
  assert not list(tmp_path.iterdir())


def test_nothing_is_asked_for(tmp_path, lines, take_steps):
  profiler = Profiler(tmp_path, None)
  take_steps(profiler, range(1, 4))
  profiler.close()
  assert not lines.messages and not list(tmp_path.iterdir())


@pytest.mark.parametrize('when', ['start_trace', 'stop_trace'])
def test_a_trace_that_fails_ends_nothing(
  tmp_path, lines, take_steps, monkeypatch, when
):
  def fail(*_, **__):
    raise RuntimeError('no space left\nand a dump')

  monkeypatch.setattr(jax.profiler, 'start_trace', lambda *_, **__: None)
  monkeypatch.setattr(jax.profiler, 'stop_trace', lambda: None)
  monkeypatch.setattr(jax.profiler, when, fail)
  profiler = Profiler(tmp_path, (2, 2))
  take_steps(profiler, range(1, 8))
  profiler.close()
  assert lines.messages == [f'no profile in {tmp_path}/profile: no space left']
