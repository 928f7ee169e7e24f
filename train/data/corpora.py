"""Corpora known by name."""

import pathlib
from collections.abc import Callable

from train import errors
from train.data import source

OPTION = '--corpus'


def _wikipedia_leads(cache_dir: pathlib.Path) -> source.Source:
  from train.data import wikipedia  # TFDS takes half a second.

  return wikipedia.Wikipedia(cache_dir)


CORPORA: dict[str, Callable[[pathlib.Path], source.Source]] = {
  'wikipedia_leads': _wikipedia_leads,
}

# The paper's, which are not fetched: how to prepare one's own copy.
_OWN_COPY = {
  'c4': (
    "--files 'c4/en/*.json.gz' --tokenizer t5.spiece.model --layout truncate"
    ' --seq 256'
  ),
  'openwebtext': (
    "--files 'openwebtext/*.parquet' --tokenizer gpt2.tiktoken --layout random"
    ' --seq 1024'
  ),
}

NAMES = tuple(sorted({*CORPORA, *_OWN_COPY}))
"""Known to recipes, fetched or not."""


def open_corpus(
  name: str, cache_dir: pathlib.Path, option: str = OPTION
) -> source.Source:
  """Returns a corpus, of which nothing is read yet.

  Args:
    name: One of `CORPORA`.
    cache_dir: Where a corpus that is fetched is kept.
    option: The name of the option that gave the name.

  Raises:
    UserError: there is none of that name, or it is not fetched.
  """
  if name in _OWN_COPY:
    raise errors.UserError(
      f'{option} {name} is not fetched: prepare your own copy once, as in'
      f' `python -m train prepare {_OWN_COPY[name]} --out DIR`, and train on it'
      ' with `--data.prepared DIR`'
    )
  if name not in CORPORA:
    raise errors.UserError(
      f'{option}: there is no {name!r}, only {", ".join(NAMES)}'
    )
  return CORPORA[name](cache_dir)
