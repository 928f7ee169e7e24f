"""A vocabulary of one's own, learned from the training documents."""

import json
import logging
import pathlib
from collections.abc import Iterator

from train import storage
from train.data import source as source_lib
from train.data import split
from train.data import tokenizer as tokenizer_lib
from train.data.prepare import files, progress

_logger = logging.getLogger('train.data')

_DIGESTS = 'read-for-vocabulary.json'
# Characters. Merges of less take no time that is worth a word; of more than
# `ByteLevelBPE.train` reads there are none.
_MUCH = 2**22
_ENOUGH = 2**30


def trained(
  source: source_lib.Source,
  vocab_size: int,
  request: source_lib.Request,
  work: pathlib.Path,
  shown: progress.Progress,
) -> tuple[tokenizer_lib.Tokenizer, list[str]]:
  """Returns a byte-level BPE, and hashes of the parts that it has read.

  Args:
    source: The text, of which the training split is read, in order.
    vocab_size: Tokens wanted.
    request: How it is split.
    work: Where it is kept, and found again.
    shown: The progress.

  Raises:
    UserError: the text cannot be read, or the disk written.
  """
  path, digests_path = work / tokenizer_lib.FILES[0], work / _DIGESTS
  if path.exists():
    return (
      tokenizer_lib.ByteLevelBPE(path.read_bytes()),
      json.loads(digests_path.read_text('utf-8')),
    )
  parts = source.parts()
  digests: list[str] = []

  def texts() -> Iterator[str]:
    problems = source_lib.Problems(request.skip_bad)
    characters = 0
    for part in parts:
      digests.append(part.digest())
      for text in part.read(problems):
        if not split.is_held_out(
          split.text_hash(text), request.validation_fraction
        ):
          characters += len(text)
          if characters >= _ENOUGH:  # It does not ask for more.
            _tell_read(shown)
          yield text
      shown.count(0, part.size)
    if characters >= _MUCH:
      _tell_read(shown)

  _logger.info('training a byte-level BPE of %d tokens', vocab_size)
  shown.begin('vocabulary', sum(part.size for part in parts))
  tokenizer = tokenizer_lib.ByteLevelBPE.train(texts(), vocab_size)
  if tokenizer.vocab_size < vocab_size:
    _logger.warning(
      'the text gives a vocabulary of %d tokens only', tokenizer.vocab_size
    )
  with files.writing(work.parent):
    storage.write_atomically(digests_path, json.dumps(digests))
    # Last: where it is there, all of it is.
    storage.write_atomically(path, tokenizer.content.decode())
  return tokenizer, digests


def _tell_read(shown: progress.Progress) -> None:
  """What comes then runs in the library, which leaves signals to Python."""
  shown.end()
  _logger.info('learning the merges (Ctrl-C is heard when that is done)')
