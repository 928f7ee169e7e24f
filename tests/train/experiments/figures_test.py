"""`python -m train figure`: most runs are made up, and nothing is trained."""

import dataclasses
import json
import math
import types

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train import ladder
from train.config import to_dict
from train.experiments import one_cell
from train.experiments.batches import with_batch
from train.experiments.cells import Store
from train.experiments.figures import adagrad, example, experts, fits, measured

TRAINED = ('1', '2', '3', '4', '5', '6')
# Arms, and arms of a pair.
CASES = {'1': 4, '2': 6, '3': 8, '4': 2, '5': 8, '6': 25}
# Options of a tiny run that a figure sets by itself, or of another family.
OWN = {
  '1': ('model.',),
  '3': ('data.files',),
  '4': ('model.d_ff',),
  '6': ('data.batch_size',),
}


def made_up(cell, directory, watch):
  """The record of a run that has not been: a parabola about p = 1.15."""
  del directory, watch
  c = cell.config
  noise = np.random.default_rng([cell.seed, sum(cell.arm.encode())])
  loss = 3 + 0.3 * (c.optimizer.power - 1.15) ** 2 + 0.05 * cell.seed
  loss += 0.001 * noise.standard_normal() - 0.1 * (c.optimizer.name == 'muon')
  loss -= 0.03 * c.optimizer.blockwise
  tokens = c.tokens_per_step
  train = [[i, i * tokens, loss + 3 / i] for i in range(1, 101)]
  if c.optimizer.power == 1:
    train[59][2] += 0.5
  if cell.seed == 9 and c.optimizer.power == 1.2:
    end = {'status': 'diverged', 'validation_loss': None}
  else:
    end = {'status': 'done', 'validation_loss': loss}
  return end | {
    'arm': cell.arm, 'seed': cell.seed, 'params_digest': 'x', 'tokens': 100,
    'parameters': 10, 'flops': 1e6, 'seconds': 1.0, 'train': train,
    'validation': [
      [i, i * tokens, loss + 1 / i] for i in range(c.eval_every, c.steps, 2)
    ] + [[c.steps, c.steps * tokens, loss]],
    'source_hash': cell.source_hash, 'config': to_dict(c), 'versions': {},
    'device': 'a machine', 'code': '', 'time': '',
  }  # fmt: skip


@pytest.fixture
def quick(monkeypatch):
  """Nothing is trained, and the toys are small."""
  monkeypatch.setattr(one_cell, 'train', made_up)
  monkeypatch.setattr(one_cell, 'seconds_a_step', lambda config: 0.01)
  monkeypatch.setattr(example, '_STEPS', 20_000)
  monkeypatch.setattr(
    example, '_best', lambda noise, kind: 1 / noise if noise > 1 else None
  )
  monkeypatch.setattr(adagrad, '_STEPS', 1000)


@pytest.fixture
def figure(main, tiny, tmp_path, text_files):
  """Runs the command on one worker, this process; returns its status."""

  def figure(which, *argv, out=None):
    options = []
    if which in TRAINED:
      own = tuple(f'--{name}' for name in OWN.get(which, ()))
      options = [o for o in tiny if not o.startswith(own)]
      options += ['--jobs', 1]
    if which == '1':
      options += ['--sizes', 'dense_0.1m,dense_0.25m']
    if which == '3':
      other = text_files.replace('*', '*[0-7]')
      options += ['--scale', 'paper', '--sizes', 'demo',
                  '--text', f'c4={text_files}', '--text',
                  f'openwebtext={other}']  # fmt: skip
    out = out or tmp_path / which
    return main('figure', which, '--out', out, *options, *argv)

  return figure


@pytest.fixture
def results(tmp_path):
  return lambda which: json.loads(
    (tmp_path / which / 'results.json').read_text()
  )


def page(tmp_path, which):
  return (tmp_path / which / 'report.html').read_text()


@pytest.mark.parametrize('which', TRAINED)
def test_a_figure(quick, figure, results, tmp_path, capsys, which):
  assert figure(which, '--dry-run') == 0  # Nothing is there yet to be drawn.
  said = capsys.readouterr().out
  assert f'{3 * CASES[which]} cells, of which 0 are done' in said
  assert 'FLOPs with evaluations' in said
  text = page(tmp_path, which)
  assert 'Nothing yet: no seed is finished' in text and 'nan' not in text
  assert '<figure' not in text and '<table' not in text  # None is empty.
  assert all(pair['n'] == 0 for pair in results(which)['paired'])

  assert figure(which, '--seeds', 1) == 0  # One seed: no intervals.
  assert all(pair['ci95'] is None for pair in results(which)['paired'])
  assert 'nothing can be told from chance' in page(tmp_path, which)

  capsys.readouterr()
  assert figure(which) == 0
  said = capsys.readouterr()
  done = CASES[which]
  assert f'{3 * done} cells, of which {done} are done' in said.out
  assert f'[{2 * done}/{2 * done}]' in said.err
  found = results(which)
  assert found['figure'] == which
  assert len(found['arms']) == CASES[which]
  for pair in found['paired']:
    assert pair['n'] == 3
    a, b = (
      np.mean(
        [c['validation_loss'] for c in found['arms'][name]['seeds'].values()]
      )
      for name in (pair['arm'], pair['baseline'])
    )
    assert pair['mean'] == pytest.approx(a - b)
  text = page(tmp_path, which)
  assert '<svg role="img"' in text and 'NaN' not in text and 'nan' not in text
  assert 'Half-widths reached' in text
  assert (
    text.index('class="lead"')
    < text.index('<svg role')
    < text.index('Half-widths')
  )

  assert figure(which, '--dry-run') == 0
  said = capsys.readouterr().out
  assert f'{3 * done} cells, of which {3 * done} are done' in said
  assert results(which)['paired'] == found['paired']


@pytest.mark.parametrize('which', TRAINED)
def test_diverged_cells(quick, figure, results, tmp_path, which):
  assert figure(which, '--seeds', '8,9') == 0
  powered = [p for p in results(which)['paired'] if '1.2' in p['arm']]
  assert powered and all(p['n'] == 1 for p in powered)
  assert all(sum(p['diverged'].values()) == 1 for p in powered)
  assert 'of them diverged and in no mean' in page(tmp_path, which)


def test_an_interrupted_figure_draws_what_there_is(
  quick, figure, results, tmp_path, monkeypatch, capsys
):
  def stopped(cell, directory, watch):
    if cell.seed == 1 and cell.config.optimizer.power == 1.2:
      return 'SIGINT'
    return made_up(cell, directory, watch)

  monkeypatch.setattr(one_cell, 'train', stopped)
  assert figure('2') == 130
  assert 'interrupted (SIGINT): 10 of 18 cells' in capsys.readouterr().err
  counts = {p['arm']: p['n'] for p in results('2')['paired']}
  assert (counts['dense_0.25m/p1.1'], counts['dense_0.25m/p1.2']) == (2, 1)
  assert '10 of 18 cells are finished' in page(tmp_path, '2')
  monkeypatch.setattr(one_cell, 'train', made_up)
  assert figure('2') == 0
  assert '18 cells, of which 10 are done' in capsys.readouterr().out


def test_other_commands_cells_are_taken(quick, figure, tmp_path, capsys):
  store = tmp_path / 'store'
  shared = '--store', store, '--sizes', 'dense_0.1m'
  assert figure('2', *shared) == 0
  capsys.readouterr()
  # Its wsd is another run; with cosine p = 1 and 1.2 without blocks are known.
  assert figure('5', *shared, '--optimizer.schedule', 'cos') == 0
  assert '24 cells, of which 6 are done' in capsys.readouterr().out
  assert len(Store(store).records()) == 18 + 18


def test_best_powers_are_found(quick, figure, results):
  assert figure('2') == 0
  best = results('2')['best_power']
  assert best['low'] < 1.15 < best['high'] and best['inside']
  assert figure('6') == 0
  for best in results('6')['best_power'].values():
    assert best['best'] == pytest.approx(1.15, abs=0.03)
  assert len(results('6')['best_power']) == 5


def test_batches_have_as_many_tokens(quick, figure, tmp_path):
  assert figure('6', '--seeds', 1) == 0
  configs = [r['config'] for r in Store(tmp_path / '6' / 'cells').records()]
  tokens = {c['steps'] * c['data']['batch_size'] for c in configs}
  assert {c['data']['batch_size'] for c in configs} == {8, 16, 32, 64, 128}
  assert tokens == {24 * 16}


def test_spikes_are_counted(quick, figure, results):
  assert figure('4') == 0
  assert results('4')['spikes'] == {str(s): [1, 0] for s in range(3)}


def test_what_adds_up_has_no_interaction(quick, figure, results):
  assert figure('5') == 0
  found = results('5')
  assert abs(found['interaction']['mean']) < 0.01
  low, high = found['interaction']['ci95']
  assert low < 0 < high
  means = {(p['arm'], p['baseline']): p['mean'] for p in found['paired']}
  assert means['blockwise', 'base'] == pytest.approx(-0.03, abs=0.005)


def test_scaling_is_fitted(quick, figure, results):
  assert figure('1') == 0
  dense = results('1')['fits']['dense']
  assert not dense['floor_fitted']
  # Made-up losses do not depend on size.
  for low, high in dense['alpha_ci95']:
    assert low < 0.002 and high > -0.002
  assert 'experts' not in results('1')['fits']


def test_the_example(quick, figure, results, tmp_path, capsys):
  assert figure('7', '--dry-run') == 0
  assert 'simulates 20,000 steps' in capsys.readouterr().out
  assert not (tmp_path / '7').exists()
  assert figure('7') == 0
  found = results('7')
  for check in found['checks']:
    assert check['best'] == pytest.approx(check['check'], abs=0.01)
  assert found['drift_at_1.2'] == pytest.approx(
    {'uniform': 1.065, 'gaussian': 0.996, 'laplace': 0.902}, abs=6e-4
  )
  closed = np.asarray(found['closed_form'])
  mean, error = (np.asarray(found['simulated'][k]) for k in ('mean', 'error'))
  # The mean of a ratio is not the ratio of the means: a few percent.
  assert np.all(np.abs(mean - closed) < 0.06 * closed + 4 * error)
  assert 'p* = 1.220, check 1.22' in capsys.readouterr().out


def test_no_best_power_is_drawn_where_none_is_known():
  assert example._best(0.5, 'uniform') is None
  assert example._best(2.0, 'uniform') == pytest.approx(0.92, abs=0.005)
  assert example._best(0.3, 'laplace') == pytest.approx(0.11, abs=0.005)
  assert example._best(1000.0, 'laplace') is None


def test_measured_noise(quick, figure, results, tmp_path, monkeypatch):
  powers = (0.8, 1.0, 1.2)

  def log(*several):
    lines = {
      100 * i: {'powers': powers, 'overall': {'u': u}}
      for i, u in enumerate(several)
    }
    return types.SimpleNamespace(noise=lines)

  several = (
    [0.11, 0.10, 0.08], [0.0, 0.0, 0.0], [0.33, 0.30, 0.24], [0.1, None, 0.1],
  )  # fmt: skip
  # Read before anything is computed, and again.
  reads = [log(*several)] * 2 + [log([0.0, 0.0, 0.0])] * 2
  monkeypatch.setattr(measured, 'read_run', lambda *_: reads.pop(0))
  assert figure('7', '--noise-run', tmp_path / 'a run') == 0
  found = results('7')['measured']
  assert found['n'] == 2  # Where a signal could be told.
  assert found['ratio'] == pytest.approx([1.1, 1, 0.8])
  assert figure('7', '--noise-run', tmp_path / 'a run') == 0
  assert results('7')['measured']['ratio'] is None


def test_adagrad(quick, figure, results):
  assert figure('adagrad', '--seeds', 1) == 0
  rates = results('adagrad')['rates']
  assert set(rates) == {'low noise', 'high noise'}
  low = {p: entry['averaged'] for p, entry in rates['low noise'].items()}
  # On this problem a smaller power is faster, and above the paper's bound.
  assert low['0.5'] > low['0.75'] > low['1'] > low['1.2']
  assert all(rate > 1 / (float(p) + 1) for p, rate in low.items())
  for entry in rates['low noise'].values():
    assert (
      entry['averaged_ci95'][0] < entry['averaged'] < entry['averaged_ci95'][1]
    )


@pytest.mark.parametrize(
  'argv, message',
  [
    (('8',), 'invalid choice'),
    (('2', '--optimizer.power', '1.1'), '--optimizer.power is what figure 2'),
    (('3', '--data.files', 'x'), 'sets itself: give --text NAME=FILES'),
    (('2', '--seed', '1'), 'the seeds of a figure are --seeds'),
    (('2', '--sizes', 'dense_0.1m,dense_0.25m'), 'takes one size'),
    (('2', '--sizes', 'dense_7m'), "no recipe 'dense_7m'"),
    (('2', '--sizes', ','), '--sizes: it is empty'),
    (('1', '--sizes', 'dense_0.1m,dense_0.1m'), 'names dense_0.1m twice'),
    (('4', '--sizes', 'dense_0.1m'), 'takes a mixture of experts'),
    (('2', '--text', 'a=b'), '--text goes with figure 3'),
    (('3', '--text', 'a'), 'is not NAME=FILES'),
    (('2', '--noise-run', 'x'), '--noise-run goes with figure 7'),
    (('7', '--steps', '4'), 'trains no model: it takes no --steps'),
    (('adagrad', '--sizes', 'demo'), 'it takes no --sizes'),
    (('2', '--model.n_experts', '3'), 'not an option of a llama model'),
    (
      ('3', '--scale', 'paper', '--text', 'mine=x'),
      '--text c4=DIR --text openwebtext=DIR',
    ),
  ],
)
def test_bad_input(main, tmp_path, capsys, argv, message):
  assert main('figure', *argv, '--out', tmp_path / 'out') == 2
  said = capsys.readouterr().err
  assert message in said and said.count('\n') == 1
  assert not (tmp_path / 'out').exists()


def test_a_run_without_moments(quick, main, tmp_path, capsys):
  argv = '--noise-run', tmp_path / 'none', '--out', tmp_path / 'out'
  assert main('figure', '7', *argv) == 2
  assert capsys.readouterr().err.count('\n') == 1


def test_a_directory_holds_one_figure(quick, figure, tmp_path, capsys):
  out = tmp_path / 'out'
  assert figure('2', '--seeds', 1, out=out) == 0
  assert figure('4', '--seeds', 1, out=out) == 2
  said = capsys.readouterr().err
  assert 'holds figure 2, which figure 4 would write over' in said
  (out / 'results.json').write_text('[]')
  assert figure('2', '--seeds', 1, out=out) == 2


@pytest.mark.parametrize('which', TRAINED)
def test_the_papers_scale_on_paper(main, tmp_path, capsys, which):
  out = tmp_path / 'out'
  assert (
    main('figure', which, '--scale', 'paper', '--dry-run', '--out', out) == 0
  )
  said = capsys.readouterr().out
  assert 'hours, an estimate' in said and 'no more to be said' in said
  assert not out.exists()
  # In earnest the text that is missing is an error.
  assert main('figure', which, '--scale', 'paper', '--out', out) == 2


@pytest.mark.slow
def test_a_real_figure(figure, results, tmp_path):
  assert figure('4', '--seeds', 1) == 0
  found = results('4')
  losses = [
    arm['seeds']['0']['validation_loss'] for arm in found['arms'].values()
  ]
  assert len(losses) == 2 and losses[0] != losses[1]
  assert found['paired'][0]['mean'] == pytest.approx(losses[1] - losses[0])
  for record in Store(tmp_path / '4' / 'cells').records():
    assert record['config']['optimizer']['schedule'] == 'wsd'
    assert record['config']['model']['family'] == 'qwen2_moe'
    assert record['wall'] > record['seconds'] > 0
  assert '<svg role="img"' in page(tmp_path, '4')
  assert not list((tmp_path / '4' / 'runs').iterdir())


def test_a_minimum_is_where_it_is():
  powers = (0.9, 1.0, 1.1, 1.2, 1.3)
  p = np.asarray(powers)
  seeds = np.asarray([[0.0], [3.0], [-1.0]])  # What seeds share cancels.
  found = fits.best_power(powers, 2 * (p - 1.17) ** 2 + seeds)
  assert found.inside
  assert (found.best, found.low, found.high) == pytest.approx((1.17,) * 3)
  beyond = fits.best_power(powers, (p - 1.6) ** 2 + seeds)
  assert (beyond.best, beyond.inside) == (1.3, False)
  assert 'the edge' in beyond.words
  hill = fits.best_power(powers, -((p - 1.12) ** 2) + seeds)
  assert (hill.best, hill.low, hill.high) == (0.9, -math.inf, math.inf)
  assert hill.words == (
    '0.90, the lowest mean, as the parabola has no minimum '
    '(any power tried may be)'
  )
  alone = fits.best_power(powers, (p[None] - 1.1) ** 2)
  assert alone.best == pytest.approx(1.1) and alone.high == math.inf
  assert fits.best_power(powers, np.zeros((0, 5))) is None


def test_its_interval_holds_it():
  rng = np.random.default_rng(0)
  p = np.asarray((0.9, 1.0, 1.1, 1.2, 1.3))
  hits = []
  for _ in range(600):
    losses = 0.5 * (p - 1.14) ** 2 + 0.01 * rng.standard_normal((3, 5))
    found = fits.best_power(p, losses + rng.standard_normal((3, 1)))
    hits.append(found.low <= 1.14 <= found.high)
  assert 0.92 < np.mean(hits) < 0.98


def test_a_power_law_is_found():
  sizes = np.asarray([1e5, 2e5, 5e5, 1e6, 3e6])
  means = 1.5 + np.outer(sizes**-0.3, (60.0, 55.0))
  law = fits.power_law(sizes, means)
  assert law.floor == pytest.approx(1.5, abs=0.01)
  assert law.alpha == pytest.approx([0.3, 0.3], abs=0.005)
  assert law.at(sizes) == pytest.approx(means.T, abs=1e-4)
  line = fits.power_law(sizes[:3], np.outer(sizes[:3] ** -0.1, (9.0, 8.0)))
  assert line.floor == 0
  assert line.alpha == pytest.approx([0.1, 0.1])


def test_its_band_holds_it():
  rng = np.random.default_rng(0)
  sizes = [100_000, 260_000, 550_000]
  hits = []
  at = np.asarray([3e5])
  truth = 9.0 * at[0] ** -0.1
  for _ in range(40):
    losses = [
      9.0 * n**-0.1
      + 0.02 * rng.standard_normal((3, 1))
      + 0.002 * rng.standard_normal((3, 2))
      for n in sizes
    ]
    found = fits.scaling(sizes, losses, at)
    hits += [found.low[0, 0] <= truth <= found.high[0, 0]]
    # Paired seeds tell exponents apart that single ones do not.
    width = np.ptp(found.steeper)
    assert width < 0.5 * np.ptp(found.alpha[:, 0])
  assert np.mean(hits) >= 0.85
  alone = fits.scaling(sizes, [each[:1] for each in losses], at)
  assert alone.low is None and alone.alpha is None


def test_a_spike_is_a_stretch_far_above():
  rng = np.random.default_rng(0)
  losses = 3 + 4 / np.arange(2, 102) + 0.01 * rng.standard_normal(100)
  scale = experts.spread(losses)
  assert scale == pytest.approx(0.01, rel=0.5)
  assert experts.spikes(losses, scale) == 0
  losses[50:52] += 0.4  # One spike of two points.
  losses[80] += 0.4
  assert experts.spikes(losses, scale) == 2
  losses[90] = math.nan
  assert experts.spikes(losses, scale) == 3
  assert experts.spikes(np.asarray([]), 0.0) == 0
  assert experts.spread(np.asarray([1.0])) == 0


@given(st.integers(1, 512), st.sampled_from(ladder.NAMES))
def test_another_batch_has_as_many_tokens(batch, name):
  config = ladder.config(name)
  found = with_batch(config, batch)
  assert found.data.batch_size == batch
  more = found.steps * batch - config.steps * config.data.batch_size
  assert 0 <= more < batch
  assert found.optimizer.warmup_steps < found.steps
  share = config.optimizer.warmup_steps / config.steps
  assert found.optimizer.warmup_steps == pytest.approx(
    share * found.steps, abs=1
  )
  assert with_batch(config, config.data.batch_size) == config
  plain = dataclasses.replace(config.optimizer, warmup_steps=0)
  none = dataclasses.replace(config, optimizer=plain)
  assert with_batch(none, batch).optimizer.warmup_steps == 0
