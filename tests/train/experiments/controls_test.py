"""The controls: what they change, and what they hold fixed."""

import dataclasses
import math

import numpy as np
import pytest
from scipy import integrate

from train import paper, recipes
from train.errors import UserError
from train.experiments import arms, controls

CONFIG = dataclasses.replace(
  recipes.demo(),
  optimizer=dataclasses.replace(recipes.demo().optimizer, power=1.0),
)
ARMS = arms.parse_all(['base', 'p12:p=1.2', 'muon:optimizer=muon'])


def moment(p):
  value, _ = integrate.quad(
    lambda x: 2 * x**p * math.exp(-(x**2) / 2) / math.sqrt(2 * math.pi), 0, 40
  )
  return value


@pytest.mark.parametrize('p', [0.5, 0.8, 1.1, 1.2, 1.5, 3.0])
def test_the_effective_step_of_gaussian_gradients(p):
  expected = moment(p) / math.sqrt(moment(2 * p))
  expected /= moment(1) / math.sqrt(moment(2))
  assert controls.effective_step(p) == pytest.approx(expected, rel=1e-6)


def test_the_effective_step_at_the_papers_power():
  assert controls.effective_step(1.2) == pytest.approx(0.94, abs=0.001)
  assert controls.effective_step(1.0) == 1.0
  draws = np.abs(np.random.default_rng(0).normal(size=10**6))
  sampled = (draws**1.2).mean() / math.sqrt((draws**2.4).mean())
  sampled /= draws.mean() / math.sqrt((draws**2).mean())
  assert controls.effective_step(1.2) == pytest.approx(sampled, abs=0.002)


def by_name(name, **kwargs):
  added = controls.expand(name, ARMS, CONFIG, **kwargs)
  return {arm.name: arm.config(CONFIG).optimizer for arm in added.arms}, added


def test_lr_matched():
  made, added = by_name('lr-matched')
  slow, fast = made['base-lr-of-p12'], made['p12-lr']
  base = CONFIG.optimizer
  r = controls.effective_step(1.2)
  assert slow.learning_rate == pytest.approx(base.learning_rate * r)
  assert fast.learning_rate == pytest.approx(base.learning_rate / r)
  assert (slow.power, fast.power) == (1.0, 1.2)
  for c in (slow, fast):
    assert c.learning_rate * c.weight_decay == pytest.approx(
      base.learning_rate * base.weight_decay
    )
  assert added.pairs == [('p12', 'base-lr-of-p12'), ('p12-lr', 'base')]
  # An arm of the baseline's power has nothing to be controlled.
  assert list(made) == ['base-lr-of-p12', 'p12-lr']


def test_lr_matched_meets_the_rate_of_the_other_side():
  """Of an arm with its own: its pair has one step, and one decay."""
  own = arms.parse_all(['base', 'p12:power=1.2,lr=2e-3'])
  found = controls.expand('lr-matched', own, CONFIG)
  by_name = {arm.name: arm for arm in (*own, *found.arms)}
  for one, other in found.pairs:
    steps, decays = zip(
      *(
        (
          c.learning_rate * controls.effective_step(c.power),
          c.learning_rate * c.weight_decay,
        )
        for c in (by_name[n].config(CONFIG).optimizer for n in (one, other))
      ),
      strict=True,
    )
    assert steps[0] == pytest.approx(steps[1])
    assert decays[0] == pytest.approx(decays[1])
  slow = by_name['base-lr-of-p12'].config(CONFIG).optimizer
  assert slow.learning_rate == 2e-3 * controls.effective_step(1.2)


@pytest.mark.parametrize('texts', [
  ('base', 'm12:optimizer=muon,p=1.2'), ('m:optimizer=muon', 'p12:p=1.2'),
])  # fmt: skip
@pytest.mark.parametrize('name', ['lr-matched', 'lr-measured'])
def test_muon_has_no_step_to_match(name, texts):
  shrinks = {1.0: 1.0, 1.2: 0.9} if name == 'lr-measured' else None
  with pytest.raises(UserError, match=f'--control {name} .* has Muon') as found:
    controls.expand(name, arms.parse_all(list(texts)), CONFIG, shrinks)
  assert '\n' not in str(found.value)


def test_eps_is_matched_to_the_baselines():
  """Also of Muon's arm, whose other group is AdamW's."""
  own = arms.parse_all(['base', 'm12:optimizer=muon,p=1.2,eps=1e-3'])
  (arm,) = controls.expand('eps-matched', own, CONFIG).arms
  assert arm.config(CONFIG).optimizer.eps == 1e-8**1.2


def test_the_baseline_may_be_behind_a_power_itself():
  """What is matched is the step and eps of the two arms, not of p = 1."""
  optimizer = dataclasses.replace(CONFIG.optimizer, power=1.2)
  config = dataclasses.replace(CONFIG, optimizer=optimizer)
  both = arms.parse_all(['base', 'plain:p=1'])
  lr = optimizer.learning_rate
  for name, shrinks, r in (
    ('lr-matched', None, controls.effective_step(1.2)),
    ('lr-measured', {1.0: 1.0, 1.2: 0.9}, 0.9),
  ):
    found = controls.expand(name, both, config, shrinks)
    slow, fast = (arm.config(config).optimizer for arm in found.arms)
    assert slow.learning_rate == pytest.approx(lr / r)
    assert fast.learning_rate == pytest.approx(lr * r)
  (eps,) = controls.expand('eps-matched', both, config).arms
  assert eps.config(config).optimizer.eps == pytest.approx(1e-8 ** (1 / 1.2))


def test_lr_measured_takes_what_was_measured():
  made, _ = by_name('lr-measured', shrinks={1.0: 1.0, 1.2: 0.9})
  lr = CONFIG.optimizer.learning_rate
  assert made['p12-measured-lr'].learning_rate == pytest.approx(lr / 0.9)
  assert made['base-measured-lr-of-p12'].learning_rate == pytest.approx(
    lr * 0.9
  )
  with pytest.raises(
    UserError, match=r'no moments of p = 1\.2, only of 1, 1\.5'
  ):
    by_name('lr-measured', shrinks={1.0: 1.0, 1.5: 0.9})


def test_eps_matched_and_norm_matched():
  made, added = by_name('eps-matched')
  plain = ARMS[1].config(CONFIG).optimizer
  assert made == {'p12-eps': dataclasses.replace(plain, eps=1e-8**1.2)}
  assert added.pairs == [('p12-eps', 'base')]
  made, added = by_name('norm-matched')
  assert made == {'p12-norm': dataclasses.replace(plain, match_norm=True)}
  assert added.pairs == [('p12-norm', 'base')]


def test_tuned_arms_hold_the_decay_and_keep_what_is_there():
  made = controls.tuned(ARMS[:2], CONFIG, (1e-3, 3e-3))
  assert [arm.name for arm in made['base']] == ['base-lr0.001', 'base']
  assert made['base'][1] is ARMS[0]
  for of, members in made.items():
    for arm in members:
      c = arm.config(CONFIG).optimizer
      assert c.power == (1.2 if of == 'p12' else 1.0)
      assert c.learning_rate * c.weight_decay == pytest.approx(
        CONFIG.optimizer.learning_rate * CONFIG.optimizer.weight_decay
      )


@pytest.mark.parametrize('texts, grid, message', [
  (('base', 'p12:p=1.2'), (1e-3, 2e-3, 0.001), '--lr-grid has 0.001 twice'),
  (('base', 'p12:p=1.2,lr=2e-3'), (1e-3,), 'leave lr to the grid'),
])  # fmt: skip
def test_what_cannot_be_tuned(texts, grid, message):
  with pytest.raises(UserError, match=message):
    controls.tuned(arms.parse_all(list(texts)), CONFIG, grid)


def test_the_grid_is_the_papers_or_lies_likewise():
  assert controls.rates(CONFIG, 'llama_0.2b') == paper.LEARNING_RATES
  ours = controls.rates(CONFIG, 'demo')
  assert ours == pytest.approx([3 * rate for rate in paper.LEARNING_RATES])


def test_a_control_without_a_powered_arm():
  same = arms.parse_all(['base', 'other:lr=1e-3'])
  for name in controls.NAMES[:-1]:
    with pytest.raises(UserError, match='whose power is not the baseline'):
      controls.expand(name, same, CONFIG, {1.2: 0.9})
