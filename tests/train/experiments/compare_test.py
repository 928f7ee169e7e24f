"""`python -m train compare`, in this process; most runs are made up."""

import json

import pytest

from train.config import from_dict, to_dict
from train.errors import UserError
from train.experiments import one_cell
from train.experiments.cells import Store


def made_up(cell, directory, watch):
  """The record of a run that has not been: a loss of its arm and seed."""
  del directory, watch
  c = cell.config
  loss = 3 - (c.optimizer.power - 1) / 10 + c.optimizer.learning_rate
  loss += 0.01 * ((cell.seed * 7 + len(cell.arm)) % 5)
  return {
    'arm': cell.arm, 'seed': cell.seed, 'status': 'done',
    'validation_loss': loss, 'params_digest': 'x', 'tokens': 100,
    'parameters': 10, 'flops': 1e6, 'seconds': 1.0,
    'validation': [[8, 50, loss + 1], [c.steps, 100, loss]],
    'train': [[c.steps, 100, loss]], 'source_hash': cell.source_hash,
    'config': to_dict(c), 'device': 'a machine', 'versions': {}, 'code': '',
    'time': '',
  }  # fmt: skip


@pytest.fixture
def quick(monkeypatch):
  """Nothing is trained."""
  monkeypatch.setattr(one_cell, 'train', made_up)
  monkeypatch.setattr(one_cell, 'seconds_a_step', lambda config: 0.01)


@pytest.fixture
def compare(main, tiny, tmp_path):
  """Runs the command, on one worker: this process; returns its status."""

  def compare(*argv, out=tmp_path / 'out'):
    return main(
      'compare', 'demo', '--out', out, '--jobs', 1, *tiny, *argv,
    )  # fmt: skip

  return compare


@pytest.fixture
def results(tmp_path):
  return lambda: json.loads((tmp_path / 'out' / 'results.json').read_text())


ARMS = '--arm', 'base', '--arm', 'p12:power=1.2'


@pytest.mark.slow
def test_a_real_comparison(compare, results, tmp_path, capsys):
  out = tmp_path / 'out'
  assert compare(*ARMS, '--seeds', 2) == 0
  said = capsys.readouterr()
  assert 'headline: p12 against base, named before it is run' in said.out
  assert '4 cells, of which 0 are done' in said.out
  assert 'FLOPs with evaluations' in said.out
  assert '[4/4]' in said.err
  first = results()
  losses = {
    name: [cell['validation_loss'] for cell in arm['seeds'].values()]
    for name, arm in first['arms'].items()
  }
  (pair,) = first['paired']
  assert (pair['arm'], pair['baseline'], pair['n']) == ('p12', 'base', 2)
  difference = sum(losses['p12']) / 2 - sum(losses['base']) / 2
  assert pair['mean'] == pytest.approx(difference)
  assert difference != 0
  assert '<html' in (out / 'report.html').read_text()
  assert not list((out / 'runs').iterdir())  # Nothing is left over.

  # A cell is what `run` trains: same config, same loss, to the bit.
  records = Store(out / 'cells').records()
  assert len(records) == 4
  key = first['arms']['p12']['seeds']['1']['cell']
  record = Store(out / 'cells').get(key)
  config = from_dict(record['config'])
  assert (config.optimizer.power, config.seed) == (1.2, 1)
  assert record['validation_loss'] == losses['p12'][1]
  assert [step for step, _, _ in record['validation']] == [8, 16, 24]
  assert record['train'][-1][0] == 24

  # Arms of a seed begin with the same parameters on the same text.
  begins = {(r['arm'], r['seed']): r['train'][0][2] for r in records}
  for seed in range(2):
    base = pytest.approx(begins['base', seed], rel=1e-5)
    assert begins['p12', seed] == base
  assert begins['base', 0] != pytest.approx(begins['base', 1], rel=1e-4)

  # Finished cells are not run again; what is asked for more is added.
  before = {p: p.stat().st_mtime_ns for p in (out / 'cells').iterdir()}
  assert compare(*ARMS, '--seeds', 2) == 0
  assert '4 cells, of which 4 are done' in capsys.readouterr().out
  assert results()['paired'] == first['paired']
  assert compare(*ARMS, '--arm', 'p08:p=0.8', '--seeds', '2,') == 0
  assert '3 cells, of which 0 are done' in capsys.readouterr().out
  assert {p: p.stat().st_mtime_ns for p in before} == before
  both = {pair['arm']: pair['n'] for pair in results()['paired']}
  assert both == {'p12': 3, 'p08': 1}
  assert results()['arms']['p08']['seeds']['0']['status'] == 'not run'


def test_a_store_is_shared(quick, compare, results, tmp_path, capsys):
  store = tmp_path / 'store'
  assert compare(*ARMS, '--seeds', 1, '--store', store) == 0
  other = tmp_path / 'other'
  argv = '--arm', 'mine:p=1.2', '--arm', 'plain'
  assert compare(*argv, '--seeds', 1, '--store', store, out=other) == 0
  assert '2 cells, of which 2 are done' in capsys.readouterr().out
  mine = json.loads((other / 'results.json').read_text())
  assert mine['paired'][0]['mean'] == -results()['paired'][0]['mean']


def test_the_baseline_is_without_the_power(quick, compare, tmp_path):
  """Whatever the recipe's own is; the option is for all arms."""
  for options, plain in (([], 1.0), (['--optimizer.power=1.1'], 1.1)):
    out = tmp_path / str(plain)
    assert compare(*ARMS, '--seeds', 1, *options, out=out) == 0
    powers = {
      record['arm']: record['config']['optimizer']['power']
      for record in Store(out / 'cells').records()
    }
    assert powers == {'base': plain, 'p12': 1.2}


@pytest.mark.slow
def test_a_diverged_cell_is_shown_and_counted(compare, results, capsys):
  argv = '--arm', 'base', '--arm', 'mad:lr=1e30', '--guard.bad_steps', 2
  assert compare(*argv, '--seeds', 2) == 0
  assert 'mad seed 0: diverged' in capsys.readouterr().err
  (pair,) = results()['paired']
  assert pair['diverged'] == {'mad': 2, 'base': 0}
  assert (pair['n'], pair['mean']) == (0, None)
  cell = results()['arms']['mad']['seeds']['1']
  assert (cell['validation_loss'], cell['status']) == (None, 'diverged')


def test_tuned_rates(quick, compare, results):
  argv = '--lr-grid', '0.02,0.001', '--seeds', 1
  several = '--control', 'lr-matched', '--control', 'lr-tuned'
  assert compare(*ARMS, *several, *argv) == 0
  found = results()
  assert found['arms'].keys() == {
    'base', 'p12', 'base-lr-of-p12', 'p12-lr', 'base-lr0.001', 'p12-lr0.001',
  }  # fmt: skip
  assert found['tuned'].keys() == {'base', 'p12'}
  for name in ('base', 'p12'):
    losses = {
      arm: found['arms'][arm]['seeds']['0']['validation_loss']
      for arm in (name, f'{name}-lr0.001')
    }
    assert found['tuned'][name] == min(losses, key=losses.get)
  assert 'lowest mean loss' in found['notes'][0]


def test_a_plan_costs_nothing(quick, compare, tmp_path, capsys):
  argv = '--dry-run', '--control', 'lr-matched', '--control', 'eps-matched'
  assert compare(*ARMS, *argv) == 0
  assert '15 cells, of which 0 are done' in capsys.readouterr().out
  assert not (tmp_path / 'out').exists()


def refused(compare, capsys, *argv, **kwargs):
  assert compare(*argv, **kwargs) == 2
  err = capsys.readouterr().err.strip().splitlines()
  return err[-1]


def test_a_headline_named_afterwards_is_told(
  quick, compare, results, tmp_path, capsys
):
  """A full store and a new directory do not make a choice a plan."""
  shared = '--store', tmp_path / 'store', '--arm', 'p11:p=1.1'
  assert compare(*ARMS, *shared) == 0
  assert results()['headline_seen'] == 0
  capsys.readouterr()
  out = tmp_path / 'chosen'
  argv = *ARMS, *shared, '--headline', 'p11', '--seeds', 5
  for _ in range(2):  # It stays so when more seeds are there.
    assert compare(*argv, out=out) == 0
    said = capsys.readouterr().out
    assert (
      'p11 against base, named when 3 of its pairs had been finished' in said
    )
    assert 'before it is run' not in said
    found = json.loads((out / 'results.json').read_text())
    assert found['headline_seen'] == 3
  page = (out / 'report.html').read_text()
  assert 'it may have been chosen for them' in page
  assert 'Named before it was run' not in page
  # An arm that was not there is named before it is run.
  fresh = '--arm', 'base', '--arm', 'p13:p=1.3', *shared[:2]
  assert compare(*fresh, out=tmp_path / 'new') == 0
  assert 'headline: p13 against base, named before' in capsys.readouterr().out


def test_seeds_added_after_a_look_are_told(
  quick, compare, results, tmp_path, monkeypatch, capsys
):
  with monkeypatch.context() as stopped:
    stopped.setattr(one_cell, 'train', lambda *_: 'SIGINT')
    assert compare(*ARMS, '--seeds', 1) == 130
  assert compare(*ARMS) == 0  # Nothing had been seen.
  assert 'seen' not in capsys.readouterr().out
  assert results()['seeds_added'] == []
  # Also where the headline's arm is not asked for again.
  more = '--arm', 'base', '--arm', 'p11:p=1.1', '--seeds', '3:5'
  assert compare(*more) == 0
  words = 'Seeds 3-4 were added when 3 pairs of the headline had been seen'
  assert words in capsys.readouterr().out
  found = results()
  assert found['seeds_added'] == [{'seeds': [3, 4], 'seen': 3}]
  assert found['notes'][0].startswith(words)
  assert words in (tmp_path / 'out' / 'report.html').read_text()


def test_a_directory_is_one_calls_at_a_time(
  quick, compare, results, monkeypatch, capsys
):
  refusals = []

  def slowly(cell, directory, watch):
    if not refusals:
      refusals.append(refused(compare, capsys, *ARMS, '--seeds', 5))
    return made_up(cell, directory, watch)

  monkeypatch.setattr(one_cell, 'train', slowly)
  assert compare(*ARMS) == 0
  assert 'in use by process' in refusals[0]
  assert refusals[0].endswith('name another --out')
  assert results()['paired'][0]['n'] == 3


@pytest.mark.slow
def test_a_cell_whose_record_is_lost_is_not_run_again(
  compare, results, tmp_path, monkeypatch, capsys
):
  def full(self, key, record):
    raise UserError('the disk is full')

  with monkeypatch.context() as patched:
    patched.setattr(Store, 'put', full)
    assert refused(compare, capsys, *ARMS, '--seeds', 1).endswith('is full')
  (left,) = (tmp_path / 'out' / 'runs').iterdir()
  assert (left / 'metrics.jsonl').exists()
  trained = (left / 'metrics.jsonl').read_text().count('"split": "train"')
  found = []
  read = one_cell.read_run

  def reading(name, directory):
    text = (directory / 'metrics.jsonl').read_text()
    found.append(text.count('"split": "train"'))
    return read(name, directory)

  monkeypatch.setattr(one_cell, 'read_run', reading)
  assert compare(*ARMS, '--seeds', 1) == 0
  assert found[0] == trained  # No step was taken again.
  assert results()['paired'][0]['n'] == 1
  assert not list((tmp_path / 'out' / 'runs').iterdir())


def test_the_headline_stays(quick, compare, tmp_path, capsys):
  argv = *ARMS, '--arm', 'p11:p=1.1', '--seeds', '1'
  assert compare(*argv, '--headline', 'p11', '--steps=8') == 0
  again = refused(compare, capsys, *argv, '--headline', 'p12', '--steps=8')
  assert 'named before it was run, p11 against base' in again
  assert compare(*argv, '--steps=8') == 0
  assert 'headline: p11' in capsys.readouterr().out
  other = refused(compare, capsys, *argv, '--steps=9')
  assert 'holds a comparison of another configuration' in other
  other = refused(compare, capsys, '--arm', 'base', '--arm', 'p12:p=1.25',
                  '--steps=8')  # fmt: skip
  assert 'has another arm p12' in other
  (tmp_path / 'out' / 'plan.json').write_text('{')
  assert 'damaged' in refused(compare, capsys, *argv, '--steps=8')


@pytest.mark.parametrize(
  ('argv', 'message'),
  [
    (['--arm', 'base'], 'two arms at least'),
    ([*ARMS, '--control', 'luck'], '--control luck: there are lr-matched'),
    ([*ARMS, '--control', 'lr-measured'], 'needs --noise-run'),
    (['--arm', 'a', '--arm', 'b:lr=1', '--control', 'eps-matched'],
     'needs an arm whose power is not the baseline'),
    ([*ARMS, '--headline', 'best'], 'there is no such arm'),
    ([*ARMS, '--headline', 'base'], 'is the baseline itself'),
    ([*ARMS, '--seeds', '0'], "'0' is no seed at all: 3 is seeds 0, 1 and 2"),
    ([*ARMS, '--seeds', 'x'], 'neither a number of seeds'),
    ([*ARMS, '--seeds', '1,1'], 'has a seed twice'),
    ([*ARMS, '--seeds', '0:99999999999'], 'at most 1000 seeds'),
    ([*ARMS, '--seeds', '99999999999'], 'at most 1000 seeds'),
    ([*ARMS, '--seeds', '9' * 30], 'at most 1000 seeds'),
    (['--arm', 'a', '--arm', 'b:power=1'], 'arms a and b are the same run'),
    ([*ARMS, '--arm', 'q:p=1.2,wd=0.1'], 'arms p12 and q are the same run'),
    ([*ARMS, '--lr-grid', '0'], 'not learning rates'),
    ([*ARMS, '--jobs', '0'], 'not at least 1'),
    ([*ARMS, '--control', 'lr-measured', '--noise-run', '/nowhere'],
     'nowhere'),
  ],
)  # fmt: skip
def test_bad_input(quick, compare, capsys, argv, message):
  assert message in refused(compare, capsys, *argv)
