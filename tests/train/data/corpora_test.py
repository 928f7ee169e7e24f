import pathlib

import pytest

from train import paper
from train.data import corpora
from train.errors import UserError


@pytest.mark.parametrize('corpus', paper.CORPORA)
def test_a_corpus_of_the_papers_asks_for_a_copy(corpus):
  with pytest.raises(UserError) as error:
    corpora.open_corpus(corpus, pathlib.Path(), '--data.corpus')
  message = str(error.value)
  assert '\n' not in message
  length = {'c4': 256, 'openwebtext': 1024}[corpus]
  for words in (
    f'--data.corpus {corpus} is not fetched',
    f"`python -m train prepare --files '{corpus}/",
    f' --layout {paper.CORPORA[corpus].layout} --seq {length} --out DIR`',
    '`--data.prepared DIR`',
  ):
    assert words in message


def test_an_unknown_corpus_lists_those_there_are():
  with pytest.raises(
    UserError, match=r"^--corpus: there is no 'novels', only c4, "
  ):
    corpora.open_corpus('novels', pathlib.Path())


def test_a_corpus_by_name(tmp_path):
  (part,) = corpora.open_corpus('wikipedia_leads', tmp_path).parts()
  assert part.name == 'wikipedia_leads'
  assert list(tmp_path.iterdir()) == []  # Nothing is fetched before a read.
