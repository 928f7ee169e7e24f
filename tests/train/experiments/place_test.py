"""Where an experiment writes."""

import pytest

from train.errors import UserError
from train.experiments import place


def test_it_is_made_and_let_go_again(tmp_path):
  out, store = tmp_path / 'a' / 'out', tmp_path / 'b' / 'store'
  for _ in range(2):
    with place.held(out, store):
      pass
  assert [path.name for path in out.iterdir()] == ['lock']
  assert not list(store.iterdir())


def test_a_store_is_for_many_and_a_directory_for_one(tmp_path):
  out, store = tmp_path / 'out', tmp_path / 'store'
  with (
    place.held(out, store),
    place.held(tmp_path / 'other', store),
    pytest.raises(UserError, match=r'in use by .* name another --out$'),
    place.held(out, store),
  ):
    raise AssertionError


@pytest.mark.parametrize('which', ['out', 'store'])
def test_what_cannot_be_written_is_one_line(tmp_path, which):
  (tmp_path / 'file').touch()
  names = {'out': 'out', 'store': 'store'} | {which: 'file/x'}
  with (
    pytest.raises(UserError, match=r'^cannot write .*file/x: [^\n]*$'),
    place.held(*(tmp_path / name for name in names.values())),
  ):
    raise AssertionError
