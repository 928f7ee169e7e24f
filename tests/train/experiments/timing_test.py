import dataclasses
import json

import pytest

from train import ladder
from train.config import to_dict
from train.experiments import timing
from train.experiments.cells import Cell
from train.recipe_table import cost

HERE = 'a CPU, 1 core'


def cell(seed=0, steps=100, recipe='dense_0.1m'):
  config = dataclasses.replace(ladder.config(recipe), seed=seed, steps=steps)
  return Cell('base', seed, config, 'text')


def record(of, seconds, device=HERE, **fields):
  return {
    'config': to_dict(of.config), 'device': device, 'seconds': seconds,
    'parameters': cost(of.config).parameters.total, **fields,
  }  # fmt: skip


def never(config):
  raise AssertionError('timed')


def test_cells_like_it_tell():
  like = cell(steps=100)
  records = [
    record(cell(steps=80), 40.0, wall=50.0),
    record(cell(steps=100), 60.0, wall=70.0),
    record(cell(steps=200), 140.0, wall=150.0),
    record(cell(steps=40), 100.0, wall=101.0),  # Mostly its first steps.
    record(cell(steps=100), 999.0, wall=999.0, device='a CPU, 2 cores'),
    record(cell(recipe='dense_0.25m'), 999.0, wall=999.0),
  ]
  seconds, how = timing.seconds_each([like], records, HERE, never)
  assert seconds == [pytest.approx(70)]  # Of 60, 70 and 80.
  assert how == 'as in 3 cells before'


def test_an_older_record_has_no_start():
  like = cell()
  (seconds,), _ = timing.seconds_each([like], [record(like, 60.0)], HERE, never)
  evaluated = timing.flops(like.config) / cost(like.config).flops
  assert evaluated > 1
  assert seconds == pytest.approx(20 + 60 * evaluated)


def test_a_few_steps_tell_where_nothing_else_does():
  timed = []

  def probe(config):
    timed.append(config)
    return 0.1

  cells = [cell(), cell(1), cell(recipe='dense_0.25m')]
  seconds, how = timing.seconds_each(cells, [], HERE, probe)
  assert timed == [cells[0].config]
  assert seconds[0] == seconds[1] > 20 + 10
  assert seconds[2] > seconds[0]  # As many operations a second.
  assert how == 'from a few steps timed'
  _, how = timing.seconds_each(
    cells, [record(cells[0], 60.0)], HERE, lambda c: 1
  )
  assert how == 'as in 1 cell before and from a few steps timed'
  assert timing.seconds_each(cells, [], HERE, lambda c: None) is None


def test_workers_take_one_task_after_another():
  assert timing.makespan([3, 1, 1, 1], 2) == 3
  assert timing.makespan([1, 1, 3], 2) == 4
  assert timing.makespan([2], 8) == 2


@pytest.fixture
def now(monkeypatch):
  """The time, as a list of one."""
  found = [0.0]
  monkeypatch.setattr(timing.time, 'monotonic', lambda: found[0])
  return found


def write(runs, of, *steps):
  (runs / of.key).mkdir(exist_ok=True)
  lines = [{'split': 'train', 'step': step, 'loss': 3.0} for step in steps]
  lines.append({'split': 'validation', 'step': steps[-1], 'loss': 3.0})
  text = ''.join(json.dumps(line) + '\n' for line in lines)
  (runs / of.key / 'metrics.jsonl').write_text(text + '{"split": "tr')


def test_progress_is_read_from_the_runs(tmp_path, now):
  cells = [cell(seed) for seed in range(3)]
  shown = timing.Progress(cells, tmp_path, 2)
  assert shown.left() is None
  assert shown.line() == (
    '0 of 3 cells done; base seed 0 starts, base seed 1 starts'
  )
  now[0] = 100.0
  write(tmp_path, cells[0], 49, 50)
  write(tmp_path, cells[1], 50)
  # 100 steps in 100 s by two: a worker has another half and a whole to do.
  assert shown.left() == pytest.approx(300)
  assert shown.line() == (
    '0 of 3 cells done; base seed 0 at step 50 of 100, base seed 1 at step '
    '50 of 100; about 5 min left'
  )
  now[0] = 200.0
  shown.end(cells[0].key)
  write(tmp_path, cells[1], 100)
  assert shown.line().startswith('1 of 3 cells done; base seed 1 at step 100')
  assert shown.left() == pytest.approx(200)


def test_what_was_there_before_is_not_this_hours_work(tmp_path, now):
  cells = [cell()]
  write(tmp_path, cells[0], 60)
  shown = timing.Progress(cells, tmp_path, 2)
  now[0] = 10.0
  assert shown.left() is None
  write(tmp_path, cells[0], 80)
  assert shown.left() == pytest.approx(10)


def test_on_other_machines_only_ends_are_seen(tmp_path, now):
  cells = [cell(seed) for seed in range(40)]
  shown = timing.Progress(cells, tmp_path, 10)
  now[0] = 60.0
  shown.end(cells[0].key)  # The other nine are about to end.
  assert shown.left() == pytest.approx(240)
  assert '; base seed 1 starts, ' in shown.line()
  assert ', 6 more; about 4 min left' in shown.line()


def test_durations():
  found = [timing.duration(seconds) for seconds in (40, 720, 12240)]
  assert found == ['40 s', '12 min', '3.4 h']
