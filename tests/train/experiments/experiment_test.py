"""What is said of cells before they are run, and meanwhile."""

import dataclasses
import time

import pytest

from train import ladder
from train.experiments import experiment, one_cell, workers
from train.experiments.cells import Cell, Store


class Far:
  """An engine elsewhere."""

  workers = 100
  signal = ''


@pytest.fixture
def say(tmp_path, monkeypatch, capsys):
  """What is said of three cells, none of which is done."""
  monkeypatch.setattr(one_cell, 'seconds_a_step', lambda config: 0.1)
  monkeypatch.setattr(experiment, 'jobs', lambda wanted: 1)
  base = dataclasses.replace(ladder.config('dense_0.1m'), steps=400)
  cells = [
    Cell('base', seed, dataclasses.replace(base, seed=seed), 'text')
    for seed in range(3)
  ]

  def say(engine):
    experiment.say_budget(cells, cells, Store(tmp_path), engine)
    return capsys.readouterr().out

  return say


def test_time_is_that_of_this_machine(say):
  said = say(workers.Local(1))
  assert '3 cells, of which 0 are done\nto run: 3 cells' in said
  # 40 s of steps, 20 of starting, and evaluations.
  assert 'on this machine about 4 min: 1 at once, about 7' in said
  assert said.endswith(' s a cell (from a few steps timed)\n')


def test_elsewhere_it_is_said_to_be_a_guess(say):
  assert 'on this machine, were it run here, about 4 min: 1 at' in say(Far())


def test_several_processes_cannot_time_a_step(say, monkeypatch):
  monkeypatch.setattr(experiment.distributed, 'several', lambda: True)
  said = say(workers.Local(1))
  assert 'FLOPs' in said and 'on this machine' not in said


def test_cells_side_by_side_say_how_far_they_are(monkeypatch, capsys):
  class Progress:
    def line(self):
      return 'base at step 3'

  monkeypatch.setattr(experiment, '_FIRST_LINE', 0.01)
  monkeypatch.setattr(experiment, '_BETWEEN_LINES', 600.0)
  said = ''
  with experiment._told(Progress()):
    end = time.monotonic() + 60
    while not said and time.monotonic() < end:
      time.sleep(0.01)
      said += capsys.readouterr().err
  assert said + capsys.readouterr().err == 'base at step 3\n'
