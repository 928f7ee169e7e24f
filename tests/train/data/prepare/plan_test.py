import dataclasses
import itertools

import hypothesis
import pytest
from hypothesis import strategies as st

from tests.train.data.prepare import fakes
from train import errors
from train.data import source
from train.data.prepare import plan

REQUEST = source.Request('stream', 8, 0.2)
PLAN = plan.plan(fakes.Source((('a',),)), 300, REQUEST)


@hypothesis.given(rows=st.integers(1, 1000), record_size=st.integers(1, 2**29))
def test_files_hold_every_row_once(rows, record_size):
  shards = plan.shards('train', rows, record_size)
  assert shards[0].start == 0
  assert shards[-1].stop == rows
  for left, right in itertools.pairwise(shards):
    assert left.stop == right.start
  for shard in shards:
    assert shard.start < shard.stop
    assert shard.size <= max(2**28, record_size)
    assert shard.name.endswith(f'-of-{len(shards):05d}')
  # But for the last they are as large as they may be.
  assert all(shard.size + record_size > 2**28 for shard in shards[:-1])


def test_names_are_those_of_tfds():
  [shard] = plan.shards('validation', 1, 1)
  assert shard.name == 'prepared-validation.array_record-00000-of-00001'


@pytest.mark.parametrize(
  'field, value, words',
  [
    ('format', 9, 'another version'),
    ('layout', 'packed', 'layout packed, not stream'),
    ('sequence_length', 16, 'windows of 16 tokens, not 8'),
    ('validation_fraction', 0.3, '0.3 of the documents held out, not 0.2'),
    ('tokenizer', 'x', 'another tokenizer'),
    ('text', 'x', 'other text'),
  ],
)
def test_says_what_differs(tmp_path, field, value, words):
  work = tmp_path / '.work'
  work.mkdir()
  plan.begin(work, dataclasses.replace(PLAN, **{field: value}))
  with pytest.raises(errors.UserError, match=words):
    plan.begun(work, PLAN)


def test_goes_on_with_the_same(tmp_path):
  assert not plan.begun(tmp_path, PLAN)
  plan.begin(tmp_path, PLAN)
  assert plan.begun(tmp_path, PLAN)


def test_bad_documents_are_no_part_of_it():
  lenient = dataclasses.replace(REQUEST, skip_bad=True)
  assert plan.plan(fakes.Source((('a',),)), 300, lenient) == PLAN


@pytest.mark.parametrize('content', ['', '[]', '{"layout": 1}'])
def test_a_plan_that_is_none(tmp_path, content):
  (tmp_path / 'plan.json').write_text(content)
  with pytest.raises(errors.UserError, match='begin anew'):
    plan.begun(tmp_path, PLAN)
