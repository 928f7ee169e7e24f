import itertools
import json

import jax.numpy as jnp
import pytest

from benchmarks import timing


def test_pairs_alternate_their_order():
  calls = []

  def program(name):
    return lambda: calls.append(name) or jnp.zeros(())

  taken = timing.time_pairs(program('a'), program('b'), 4)
  samples = []  # Runs of one name, each calls_per_sample long.
  while calls:
    samples.append(calls[-1])
    del calls[-taken.calls_per_sample :]
  assert ''.join(reversed(samples[:8])) == 'abbaabba'
  assert len(taken.first) == len(taken.second) == 4
  assert taken.ratios == tuple(
    b / a for a, b in zip(taken.first, taken.second, strict=True)
  )


def test_rounds_alternate_their_order():
  calls = []

  def program(name):
    return lambda: calls.append(name) or jnp.zeros(())

  runs = {name: program(name) for name in 'abc'}
  seconds = timing.time_rounds(runs, 4)
  order = [calls[0]]  # Runs of one name in a row count once.
  for before, name in itertools.pairwise(calls):
    if name != before:
      order.append(name)
  # The warm-up, then there and back and there and back.
  assert ''.join(order) == 'abc' + 'abcbabcba'
  assert {name: len(taken) for name, taken in seconds.items()} == {
    'a': 4, 'b': 4, 'c': 4,
  }  # fmt: skip


def test_quartiles():
  assert timing.quartiles([5, 1, 3, 2, 4]) == (2, 3, 4)
  assert timing.quartiles([7.0]) == (7, 7, 7)


def test_table_aligns():
  text = timing.format_table(('name', 'ms'), (('a', '1.5'), ('longer', '12')))
  assert text == 'name     ms\na       1.5\nlonger   12'


def test_facts_are_json_and_print():
  facts = timing.machine_facts()
  json.dumps(facts)
  text = timing.format_facts(facts)
  for name in ('platform', 'device', 'cpu', 'cores', 'jax', 'jaxlib', 'optax'):
    assert str(facts[name]) in text


def test_json_is_written_whole_or_not_at_all(tmp_path):
  path = tmp_path / 'new' / 'result.json'
  timing.write_json(path, {'a': 1.5})
  assert json.loads(path.read_text()) == {'a': 1.5}
  with pytest.raises(ValueError):
    timing.write_json(path, {'a': float('nan')})
  assert json.loads(path.read_text()) == {'a': 1.5}
  assert [entry.name for entry in path.parent.iterdir()] == ['result.json']


def test_a_check_leaves_files_as_they_are(tmp_path):
  path = tmp_path / 'new' / 'result.json'
  timing.check_writable(timing.Parser(), str(path))
  assert list(path.parent.iterdir()) == []
  path.write_text('before')
  timing.check_writable(timing.Parser(), str(path))
  assert path.read_text() == 'before'


@pytest.mark.parametrize('path', ['/proc/x', '/proc/x/y', '/dev/null/x', '.'])
def test_what_cannot_be_written_is_refused(path, capsys):
  with pytest.raises(SystemExit) as stopped:
    timing.check_writable(timing.Parser(prog='it'), path)
  assert stopped.value.code == 2
  err = capsys.readouterr().err
  assert err.startswith('it: error: cannot write --json ')
  assert err.count('\n') == 1
