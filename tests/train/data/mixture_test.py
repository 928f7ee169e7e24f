import os
import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train import errors
from train.data import mixture

NAMES = st.text('abc/.=x', min_size=1, max_size=6).map(lambda s: f'd{s}z')
STAGE = st.dictionaries(NAMES, st.integers(1, 99), min_size=1, max_size=3)


def read(text):
  spec = mixture.parse(text)
  return spec.directories, [(s.first_step, s.weights) for s in spec.stages]


def test_one_directory():
  assert read('some/dir') == (('some/dir',), [(0, (1.0,))])
  assert read(' dir/ ') == (('dir',), [(0, (1.0,))])
  home = str(pathlib.Path.home() / 'dir')
  assert read('~/dir') == ((home,), [(0, (1.0,))])


def test_weights():
  assert read('a=3,b=1') == (('a', 'b'), [(0, (3.0, 1.0))])
  assert read('a=.5, b=1.5e-1') == (('a', 'b'), [(0, (0.5, 0.15))])
  assert read('a,b') == (('a', 'b'), [(0, (1.0, 1.0))])


def test_stages():
  assert read('a=3,b=1;1000:a=1,b=1') == (
    ('a', 'b'),
    [(0, (3.0, 1.0)), (1000, (1.0, 1.0))],
  )
  # The same directory, however it is typed; a new one; one no more.
  assert read('0:a;5:b=2,./a=1;7:c') == (
    ('a', 'b', 'c'),
    [(0, (1.0, 0.0, 0.0)), (5, (1.0, 2.0, 0.0)), (7, (0.0, 0.0, 1.0))],
  )


def test_names_with_equals_signs_and_colons():
  assert read('lang=en') == (('lang=en',), [(0, (1.0,))])
  assert read('year=2020=2,x:y') == (('year=2020', 'x:y'), [(0, (2.0, 1.0))])


@given(st.text('ab ,;:=.1~/'))
def test_a_name_is_read_as_itself(name):
  if mixture.is_name(f'd{name}'):
    assert read(f'd{name}')[0] == (os.path.normpath(f'd{name}'),)


@pytest.mark.parametrize('name', ['a,b', 'a=3', 'a;b', 'a ', '1:a', '~'])
def test_a_directory_that_reads_as_others_is_refused(
  tmp_path, monkeypatch, name
):
  monkeypatch.chdir(tmp_path)
  for each in (name, 'a'):
    pathlib.Path(each).mkdir()
  with pytest.raises(errors.UserError, match=r'name another$'):
    mixture.parse(name)
  assert read(f'./{name[:1]}') == ((name[:1],), [(0, (1.0,))])


@given(st.lists(STAGE, min_size=1, max_size=3))
def test_what_is_typed_is_what_is_read(stages):
  stages = [
    {name: w for name, w in stage.items() if str(pathlib.Path(name)) == name}
    or {'d': 1}
    for stage in stages
  ]
  text = ';'.join(
    f'{100 * i}:' + ','.join(f'{n}={w}' for n, w in stage.items())
    for i, stage in enumerate(stages)
  )
  spec = mixture.parse(text)
  found = [
    {n: w for n, w in zip(spec.directories, s.weights, strict=True) if w}
    for s in spec.stages
  ]
  assert found == stages
  assert [s.first_step for s in spec.stages] == [
    100 * i for i in range(len(stages))
  ]


@pytest.mark.parametrize(
  ('text', 'words'),
  [
    ('', 'lacks the name'),
    ('a,', 'lacks the name'),
    ('a=1,gs://bucket/b=2', 'gs://bucket/b is not on a disk'),
    ('=3', 'lacks the name'),
    ('a=1;10:', 'lacks the name'),
    ('a=1,a=2', 'names a twice'),
    ('a=0', 'leaves out a directory'),
    ('a=1e999', 'above 0, not inf'),
    ('a=20000,b=1', '1 example in 10,000'),
    ('a;b', 'from which step'),
    ('5:a', 'must begin at step 0, not 5'),
    ('a;9:b;9:c', 'from step 9 on must come after that from step 9'),
    ('a;0:b', 'must come after'),
  ],
)
def test_mistakes_are_told_in_a_line(text, words):
  with pytest.raises(errors.UserError, match=words) as caught:
    mixture.parse(text, '--data.prepared')
  message = str(caught.value)
  assert message.startswith('--data.prepared: ')
  assert '\n' not in message


def test_a_weight_that_is_no_number(tmp_path):
  notes = tmp_path / 'notes'
  notes.mkdir()
  for weight in ('x', '-1', '', '3/4'):
    with pytest.raises(
      errors.UserError,
      match=f'^--data.prepared: the weight of {notes} must be a number, not'
      f" '{weight}'$",
    ):
      mixture.parse(f'{notes}={weight}')
  (tmp_path / 'notes=en').mkdir()
  assert read(f'{notes}=en') == ((f'{notes}=en',), [(0, (1.0,))])


@given(st.text('ab=,;:.-0123456789e ', max_size=20))
def test_any_text_is_read_or_refused(text):
  try:
    spec = mixture.parse(text)
  except errors.UserError:
    return
  for stage in spec.stages:
    assert len(stage.weights) == len(spec.directories)
    assert any(stage.weights)
