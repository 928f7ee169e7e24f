"""From records to pairs."""

import math

import pytest

from train.experiments import comparison, paired

CURVE = [(100, 5.0), (200, 4.0), (300, 3.0)]


def record(loss, shift=0.0, **fields):
  curve = [[t // 10, t, v + shift] for t, v in CURVE[:-1]]
  return {
    'status': 'done', 'validation_loss': loss, 'device': 'a', 'versions': {},
    'validation': [*curve, [30, 300, loss]], 'train': [],
  } | fields  # fmt: skip


def arm(name, records):
  return comparison.ArmResult(name, {}, dict(enumerate(records)))


DIVERGED = {
  'status': 'diverged', 'validation_loss': None, 'validation': [], 'train': [],
  'device': 'a', 'versions': {},
}  # fmt: skip


def compare(ours, theirs):
  arms = {'a': arm('a', ours), 'b': arm('b', theirs)}
  (pair,) = comparison.pairs(arms, [('a', 'b')])
  return pair


def test_a_pair_is_of_the_seeds_that_both_have():
  pair = compare(
    [record(2.9), None, record(2.8), DIVERGED, record(2.0)],
    [record(3.0), record(3.0), record(3.1), record(3.0), None],
  )
  assert pair.seeds == [0, 2]
  assert pair.paired == paired.difference([2.9, 2.8], [3.0, 3.1])
  assert pair.diverged == {'a': 1, 'b': 0}
  assert pair.p_holm == pair.paired.p_value
  assert not pair.mixed


def test_tokens_to_the_baselines_final_loss():
  # The arm's curve is 5, 4, 2.5: 3 is met two thirds from 200 to 300.
  pair = compare([record(2.5)], [record(3.0)])
  assert pair.tokens_to_baseline == pytest.approx(200 + 100 * 1.0 / 1.5)
  assert pair.baseline_tokens == 300
  assert compare([record(3.5)], [record(3.0)]).tokens_to_baseline is None
  early = compare([record(1.0, shift=-4)], [record(3.0)])
  assert early.tokens_to_baseline == 100
  # Of the mean curve, not the mean of the seeds'.
  both = compare([record(2.0), record(3.0)], [record(3.0), record(3.0)])
  assert both.tokens_to_baseline == pytest.approx(200 + 100 / 1.5)


def test_what_is_not_there_yet():
  pair = compare([None], [record(3.0)])
  assert (pair.paired, pair.p_holm, pair.tokens_to_baseline) == (None,) * 3
  pair = compare([DIVERGED], [DIVERGED])
  assert pair.diverged == {'a': 1, 'b': 1}


def test_mixed_machines_are_told():
  assert compare([record(2, device='b')], [record(3)]).mixed == 'device'
  other = record(2, versions={'jax': '2'}, device='b')
  assert compare([other], [record(3)]).mixed == 'device and versions'
  assert compare([record(2, code='b')], [record(3)]).mixed == 'code'


def test_p_values_are_adjusted_for_the_table():
  ours = [record(3 + 0.1 * i) for i in range(3)]
  arms = {
    'a': arm('a', ours),
    'b': arm('b', [record(2.0), record(2.2), record(2.1)]),
    'c': arm('c', [record(1.0), record(1.1), record(1.3)]),
  }
  first, second = comparison.pairs(arms, [('b', 'a'), ('c', 'a')])
  ps = [first.paired.p_value, second.paired.p_value]
  assert [first.p_holm, second.p_holm] == pytest.approx(paired.holm(ps))
  assert [first.p_holm, second.p_holm] != ps


def test_the_best_of_tuned_arms():
  low, high = arm('low', [record(2), record(3)]), arm('high', [record(4)] * 2)
  assert comparison.lowest([high, low]) is low
  gone = arm('gone', [record(1), DIVERGED])
  assert math.isnan(gone.mean)
  assert comparison.lowest([high, low, gone]) is low
  # Not before all have been run.
  assert comparison.lowest([high, low, arm('new', [record(1), None])]) is None


def test_seeds_that_were_added_after_a_look_are_told():
  added = comparison.Added([3, 4, 5, 7], 3)
  assert added.words.startswith(
    'Seeds 3-5, 7 were added when 3 pairs of the headline had been seen'
  )
  one = comparison.Added([9], 1).words
  assert one.startswith('Seed 9 was added when 1 pair of')
  result = comparison.Comparison('t', {}, [], None, added=[added])
  assert comparison.to_json(result)['seeds_added'] == [
    {'seeds': [3, 4, 5, 7], 'seen': 3}
  ]


def test_the_table_and_the_file_hold_the_pairs():
  arms = {
    'p12': arm('p12', [record(2.9), record(2.8)]),
    'base': arm('base', [record(3.0), record(3.1)]),
    'new': arm('new', [None, None]),
  }
  both = comparison.pairs(arms, [('p12', 'base'), ('new', 'base')])
  result = comparison.Comparison('t', arms, both, ('p12', 'base'))
  rows = comparison.table(result).splitlines()
  assert rows[1].split()[:4] == ['p12', 'base', '2', '-0.2000']
  assert rows[2].split() == ['new', 'base', '0', *['-'] * 6]
  values = comparison.to_json(result)
  assert values['headline'] == ['p12', 'base']
  assert values['arms']['p12']['seeds']['1'] == {
    'validation_loss': 2.8, 'status': 'done', 'cell': None,
  }  # fmt: skip
  assert values['arms']['new']['seeds']['0']['status'] == 'not run'
  line = values['paired'][0]
  assert line['n'] == 2
  assert line['mean'] == pytest.approx(-0.2)
  assert line['ci95'] == list(both[0].paired.ci95)
  assert values['paired'][1]['mean'] is None


@pytest.mark.parametrize(
  ('p', 'text'),
  [(None, '-'), (0.5, '0.500'), (0.0004, '<0.001'), (1.0, '1.000')],
)
def test_p_values_for_people(p, text):
  assert comparison.number(p) == text


def test_a_table_of_nothing_says_so():
  arms = {'a': arm('a', [None]), 'b': arm('b', [record(3.0)])}
  found = comparison.Comparison(
    't', arms, comparison.pairs(arms, [('a', 'b')]), ('a', 'b')
  )
  assert comparison.table(found) == (
    '  no seed is finished on both sides of a pair yet'
  )
