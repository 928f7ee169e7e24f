"""`python -m train compare`, killed and interrupted as it happens to a user."""

import json
import random
import signal
import time

import pytest

pytestmark = pytest.mark.slow
SEEDS = 2
CELLS = 2 * SEEDS


@pytest.fixture
def begin(start, tiny):
  """Starts the command in a directory, two cells at once, seconds each."""
  options = '--steps', 250, '--eval_every', 125, '--save_every', 20

  def begin(out):
    return start(
      'compare', 'demo', '--arm', 'base', '--arm', 'p12:p=1.2', '--seeds',
      SEEDS, '--jobs', 2, '--out', out, *tiny, *options,
    )  # fmt: skip

  return begin


def cells(out):
  """When each finished cell was written."""
  return {path.name: path.stat().st_mtime_ns for path in out.glob('cells/*')}


def results(out):
  found = json.loads((out / 'results.json').read_text())
  assert found.pop('command')
  return found


def wait_for(condition, process):
  end = time.monotonic() + 100
  while process.poll() is None and not condition():
    assert time.monotonic() < end, 'waited in vain'
    time.sleep(0.02)


def test_killed_and_interrupted_it_comes_to_the_same(begin, finish, tmp_path):
  whole, torn = tmp_path / 'whole', tmp_path / 'torn'
  status, _, err = finish(begin(whole))
  assert status == 0, err
  draw = random.Random()  # Any moment will do.

  process = begin(torn)
  wait_for(lambda: list(torn.glob('runs/*/metrics.jsonl')), process)
  time.sleep(draw.uniform(0, 2))
  process.kill()
  status, *_ = finish(process)
  assert status == -signal.SIGKILL
  early = cells(torn)

  process = begin(torn)
  # Not while it starts: there is nothing to go on with then.
  wait_for(lambda: len(cells(torn)) > len(early), process)
  time.sleep(draw.uniform(0, 1))
  process.send_signal(signal.SIGINT)
  status, _, err = finish(process)
  before = cells(torn)
  assert early.items() <= before.items()
  if status:  # Else it was done before it was interrupted.
    assert status == 130, err
    assert 'interrupted (SIGINT)' in err
    assert 'the same command goes on' in err
    assert 'Traceback' not in err
    assert len(results(torn)['arms']['base']['seeds']) == SEEDS

  status, out, err = finish(begin(torn))
  assert status == 0, err
  assert f'{CELLS} cells, of which {len(before)} are done' in out
  after = cells(torn)
  assert len(after) == CELLS
  assert before.items() <= after.items()  # None is run or written again.
  # To the bit: the losses, and all that follows from them.
  assert results(torn) == results(whole)
  assert after.keys() == cells(whole).keys()
  assert not list(torn.glob('runs/*'))
