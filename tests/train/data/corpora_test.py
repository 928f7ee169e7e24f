import pathlib

import pytest

from train import paper
from train.config import DataConfig
from train.data import corpora
from train.errors import UserError


@pytest.mark.parametrize('corpus', paper.CORPORA)
def test_a_corpus_of_the_papers_asks_for_a_copy(tmp_path, corpus):
  config = DataConfig(corpus=corpus, vocab_size=32100, text_field='body')
  with pytest.raises(UserError) as error:
    corpora.open_documents(config, tmp_path)
  message = str(error.value)
  assert '\n' not in message
  for words in (f'--data.corpus {corpus}', f"--data.files '{corpus}/*.json",
                "'body'", '32100 tokens'):  # fmt: skip
    assert words in message


def test_a_copy_is_read(tmp_path):
  folder = tmp_path / 'c4'
  folder.mkdir()
  (folder / 'c4-train.00000-of-01024.json').write_text(
    '{"text": "one", "url": "a"}\n{"text": "two", "url": "b"}\n'
  )
  config = DataConfig(corpus='c4', files=str(folder / '*.json'))
  assert list(corpora.open_documents(config, tmp_path)) == ['one', 'two']


def test_an_unknown_corpus_lists_those_there_are():
  with pytest.raises(UserError, match="no 'novels', only wikipedia_leads"):
    corpora.open_documents(DataConfig(corpus='novels'), pathlib.Path())
