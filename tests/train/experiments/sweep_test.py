"""`python -m train sweep`, in this process; most runs are made up."""

import dataclasses
import json
import math
import pathlib

import pytest

from train import ladder
from train.config import to_dict
from train.errors import UserError
from train.experiments import experiment, one_cell, sweep
from train.experiments.batches import with_batch
from train.experiments.cells import DIVERGED


def made_up(cell, directory, watch):
  """The record of a run that has not been: a loss of its config and seed."""
  del directory, watch
  c = cell.config
  lr = c.optimizer.learning_rate
  loss = 3 - c.optimizer.power / 10 + math.log(lr / 0.02) ** 2
  loss += 0.01 * (cell.seed * 7 % 5)
  diverged = lr > 1
  return {
    'arm': cell.arm, 'seed': cell.seed,
    'status': DIVERGED if diverged else 'done',
    'validation_loss': None if diverged else loss, 'params_digest': 'x',
    'tokens': 100, 'parameters': 10, 'flops': 1e6, 'seconds': 1.0,
    'validation': [[c.steps, 100, loss]], 'train': [[c.steps, 100, loss]],
    'source_hash': cell.source_hash, 'config': to_dict(c),
    'device': 'a machine', 'versions': {}, 'code': '', 'time': '',
  }  # fmt: skip


@pytest.fixture
def runs(monkeypatch):
  """Nothing is trained; the cells that would have been."""
  found = []

  def train(cell, *rest):
    found.append(cell)
    return made_up(cell, *rest)

  monkeypatch.setattr(one_cell, 'train', train)
  monkeypatch.setattr(one_cell, 'seconds_a_step', lambda config: 0.01)
  return found


@pytest.fixture
def sweeps(main, tiny, tmp_path):
  """Runs the command in this process; returns its status."""

  def sweeps(*argv, recipe='demo', out=tmp_path / 'out'):
    return main('sweep', recipe, '--out', out, '--jobs', 1, *tiny, *argv)

  return sweeps


@pytest.fixture
def results(tmp_path):
  return lambda: json.loads((tmp_path / 'out' / 'results.json').read_text())


def request(points, given=(), config=ladder.config):
  return sweep.Request(
    'dense_0.1m', config, frozenset(given), points, [0], pathlib.Path('x')
  )


def test_a_grid_and_points():
  points = sweep.parse(
    ['lr=1e-3,2e-3', 'p=1,1.2'], ['size=dense_1m,optimizer.schedule=cos']
  )
  lr, p = 'optimizer.learning_rate', 'optimizer.power'
  assert points == [
    {lr: 1e-3, p: 1.0},
    {lr: 1e-3, p: 1.2},
    {lr: 2e-3, p: 1.0},
    {lr: 2e-3, p: 1.2},
    {'size': 'dense_1m', 'optimizer.schedule': 'cos'},
  ]
  assert sweep.label(points[1]) == 'lr=0.001 p=1.2'
  assert sweep.label(points[4]) == 'size=dense_1m schedule=cos'


@pytest.mark.parametrize('grid, single, message', [
  ([], [], 'nothing is swept'),
  (['lr'], [], 'write field=value,value'),
  (['lr='], [], 'write field=value,value'),
  (['lr=1e-3,'], [], 'is no change'),
  (['lr=x'], [], 'not a number'),
  (['nonsense=1'], [], 'nonsense'),
  (['lr=1e-3', 'optimizer.learning_rate=2e-3'], [], 'is swept already'),
  (['seed=0,1'], [], 'seeds are --seeds'),
  ([], ['p=1,power=2'], 'sets a field twice'),
  ([], ['p=1', 'power=1'], 'the point p=1.0 is there twice'),
  (['p=1,1'], [], 'the point p=1.0 is there twice'),
])  # fmt: skip
def test_what_cannot_be_read_is_one_line(grid, single, message):
  with pytest.raises(UserError) as caught:
    sweep.parse(grid, single)
  assert message in str(caught.value)
  assert '\n' not in str(caught.value)


def test_tokens_are_the_same_at_every_batch():
  base = ladder.config('dense_0.1m')
  steps, warmup = base.steps, base.optimizer.warmup_steps
  batch = 'data.batch_size'
  for rows in (4, 16, 64, 128):
    found = sweep.config(request([]), {batch: rows})
    share = 16 / rows
    assert found.steps * found.tokens_per_step == pytest.approx(
      steps * base.tokens_per_step, rel=rows / steps
    )
    assert found.optimizer.warmup_steps == round(share * warmup)
    assert found.eval_every == round(share * base.eval_every)
    assert found.save_every == round(share * base.save_every)
    assert found == with_batch(base, rows)  # The cells of figure 6.
  found = sweep.config(
    request([], given=['optimizer.warmup_steps']), {batch: 4}
  )
  assert found.optimizer.warmup_steps == warmup
  assert found.steps == 4 * steps
  for point, given in (({'steps': steps}, []), ({}, ['steps'])):
    found = sweep.config(request([], given=given), {batch: 4, **point})
    assert found == dataclasses.replace(
      base, data=dataclasses.replace(base.data, batch_size=4)
    )


def test_a_size_is_another_recipe_with_its_own_steps():
  found = sweep.config(
    request([]), {'size': 'dense_1m', 'optimizer.power': 1.2}
  )
  base = ladder.config('dense_1m')
  assert found == dataclasses.replace(
    base, optimizer=dataclasses.replace(base.optimizer, power=1.2)
  )


def test_a_point_that_makes_no_config_is_named():
  with pytest.raises(UserError, match=r'^point p=-1.0: --optimizer\.power'):
    sweep.config(request([]), {'optimizer.power': -1.0})


def test_a_sweep_from_start_to_page(sweeps, results, runs, tmp_path, capsys):
  over = '--over', 'lr=0.01,0.02,0.04', '--over', 'p=1,1.2', '--seeds', 2
  assert sweeps(*over) == 0
  said = capsys.readouterr()
  assert '12 cells, of which 0 are done' in said.out
  table = said.out[said.out.index('  point') :].splitlines()
  assert table[1].split()[:4] == ['lr=0.02', 'p=1.2', '2', '2.8900']
  assert table[1].split()[-1] == 'best'
  assert table[2].split()[-4:] == ['0.0200', '(+0.0200', 'to', '+0.0200)']
  found = results()
  assert found['best'] == 'lr=0.02 p=1.2'
  assert len(found['points']) == 6
  best = next(p for p in found['points'] if p['name'] == found['best'])
  assert best['overrides'] == {
    'optimizer.learning_rate': 0.02, 'optimizer.power': 1.2,
  }  # fmt: skip
  assert best['n'] == 2
  assert best['mean'] == pytest.approx(2.89)
  assert best['sd'] == pytest.approx(0.02 / math.sqrt(2))
  assert best['seeds']['1'] == {
    'validation_loss': pytest.approx(2.9), 'status': 'done',
  }  # fmt: skip
  page = (tmp_path / 'out' / 'report.html').read_text()
  for text in ('Against lr', 'Against p', 'All points', 'lr=0.02 p=1.2'):
    assert text in page

  # Nothing is run twice; what is new is.
  assert len(runs) == 12
  assert sweeps(*over, '--point', 'wd=0', '--seeds', 3) == 0
  assert len(runs) == 12 + 6 + 3
  assert {cell.seed for cell in runs[12:18:6]} == {0}
  assert len({cell.key for cell in runs}) == 21
  assert len(results()['points']) == 7


def test_it_goes_on_after_a_signal(sweeps, results, runs, monkeypatch, capsys):
  del runs
  count = []

  def train(*arguments):
    count.append(1)
    return 'SIGINT' if len(count) == 3 else made_up(*arguments)

  monkeypatch.setattr(one_cell, 'train', train)
  over = '--over', 'lr=0.01,0.02', '--seeds', 2
  assert sweeps(*over) == 130
  said = capsys.readouterr()
  assert 'interrupted (SIGINT): 2 of 4 cells are done' in said.err
  found = results()
  states = [s['status'] for p in found['points'] for s in p['seeds'].values()]
  assert sorted(states) == ['done', 'done', 'not run', 'not run']
  assert sweeps(*over) == 0
  assert len(count) == 5
  assert results()['best'] == 'lr=0.02'


def test_what_diverges_is_not_the_best(sweeps, results, runs, tmp_path, capsys):
  del runs
  assert sweeps('--over', 'lr=0.02,2', '--seeds', 2) == 0
  out = capsys.readouterr().out
  assert 'lr=2.0 (2 diverged)' in out
  found = results()
  assert found['best'] == 'lr=0.02'
  assert found['points'][1]['diverged'] == 2
  assert found['points'][1]['mean'] is None
  assert 'lr=2.0' in (tmp_path / 'out' / 'report.html').read_text()


def test_sizes_text_and_many_curves(sweeps, results, runs, tmp_path):
  grid = ('--over', 'size=demo,demo_moe', '--over',
          'p=0.8,0.9,1,1.1,1.2,1.3,1.4', '--over', 'schedule=cos,wsd',
          '--seeds', '3,')  # fmt: skip
  # Options that both families have.
  assert sweeps(*grid, '--model.n_layers', 2) == 0
  assert len(runs) == 28
  sizes = {point['parameters'] for point in results()['points']}
  assert len(sizes) == 2
  page = (tmp_path / 'out' / 'report.html').read_text()
  assert 'Against Parameters' in page
  assert 'At each size the lowest mean over p and schedule' in page
  assert 'Against schedule' not in page  # It is no number.


def test_what_does_not_compare_is_said(sweeps, results, runs, tmp_path, capsys):
  over = '--over', 'data.vocab_size=310,300', '--over', 'p=1,1.2'
  assert sweeps(*over, '--seeds', 1) == 0
  said = capsys.readouterr().out
  assert 'lowest' not in said
  assert 'do not compare' in said
  rows = said[said.index('  point') :].splitlines()[1:5]
  assert [row.split()[0] for row in rows] == [
    'data.vocab_size=310', 'data.vocab_size=310',
    'data.vocab_size=300', 'data.vocab_size=300',
  ]  # fmt: skip
  assert all(row.split()[-1] == '-' for row in rows)
  assert results()['best'] is None
  page = (tmp_path / 'out' / 'report.html').read_text()
  assert 'Against p' in page  # A curve a vocabulary, none across them.
  assert 'Against data.vocab_size' not in page
  assert any('do not compare' in note for note in results()['notes'])
  assert not any('differ in the tokens' in n for n in results()['notes'])
  # --steps is given: there are as many at every batch.
  assert sweeps('--over', 'batch=8,16', '--seeds', 1) == 0
  assert any('differ in the tokens' in note for note in results()['notes'])
  assert {cell.config.steps for cell in runs} == {24}


def test_a_dry_run_trains_nothing(sweeps, runs, tmp_path, capsys):
  assert sweeps('--over', 'lr=0.01,0.02', '--dry-run') == 0
  assert 'to run: 6 cells' in capsys.readouterr().out
  assert not runs
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('argv, message', [
  ([], 'nothing is swept'),
  (['--over', 'size=nonsense'], "no recipe 'nonsense'"),
  (['--over', 'p=-1'], 'point p=-1.0: --optimizer.power must be'),
  (['--over='], '--over : write field=value,value'),
  (['--over', 'p=1', '--seeds', '0'], 'is no seed at all'),
])  # fmt: skip
def test_a_mistake_is_one_line(sweeps, runs, argv, message, capsys):
  assert sweeps(*argv) == 2
  err = capsys.readouterr().err
  assert message in err
  assert not runs


def test_the_help_says_that_tokens_stay(main, capsys):
  with pytest.raises(SystemExit):
    main('sweep', '--help')
  out = ' '.join(capsys.readouterr().out.split())
  assert 'has as many tokens in all' in out
  assert 'unless --steps is given or steps is swept' in out


@pytest.mark.slow
def test_a_real_sweep(sweeps, results, tmp_path):
  assert sweeps('--over', 'lr=0.005,0.02', '--seeds', '1,') == 0
  found = results()
  assert found['best'] == 'lr=0.02'
  assert all(2 < point['mean'] < 6 for point in found['points'])
  assert len(list((tmp_path / 'out' / 'cells').iterdir())) == 2
  assert experiment.Store(tmp_path / 'out' / 'cells').records()
