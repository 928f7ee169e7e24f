"""Corpora known by name, and the one way to the documents of a config."""

import pathlib
from collections.abc import Callable, Iterator
from typing import Protocol

from train import config as config_lib
from train import errors
from train.data import text_files, wikipedia


class Documents(Protocol):
  """A corpus: texts that can be read again and again, in a fixed order."""

  def digest(self) -> str:
    """Returns a string that changes when the texts do."""

  def __iter__(self) -> Iterator[str]:
    """Reads the texts; none is blank."""


CORPORA: dict[str, Callable[[pathlib.Path], Documents]] = {
  'wikipedia_leads': wikipedia.Documents,
}


# Known to recipes, but not fetched: where a copy might lie.
_OWN_COPY = {'c4': 'c4/*.json', 'openwebtext': 'openwebtext/*.jsonl'}


def open_documents(
  config: config_lib.DataConfig, cache_dir: pathlib.Path
) -> Documents:
  """Returns the documents that `config` asks for.

  Raises:
    UserError: no such corpus, or as `text_files.find`.
  """
  if config.files:
    return text_files.TextFiles(config.files, config.text_field)
  if config.corpus in _OWN_COPY:
    raise errors.UserError(
      f'--data.corpus {config.corpus} cannot be fetched yet: name your own'
      f" copy, decompressed, as --data.files '{_OWN_COPY[config.corpus]}' (an"
      f' object a line, its text under {config.text_field!r}); a vocabulary of'
      f' {config.vocab_size} tokens is then trained on it'
    )
  if config.corpus not in CORPORA:
    raise errors.UserError(
      f'--data.corpus: there is no {config.corpus!r}, only'
      f' {", ".join(sorted(CORPORA))}'
    )
  return CORPORA[config.corpus](cache_dir)
