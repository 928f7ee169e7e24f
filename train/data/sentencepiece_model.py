"""A sentencepiece model, as of T5 or LLaMA."""

import os
from collections.abc import Iterable, Sequence

import numpy as np
import sentencepiece

from train.data import vocabulary

FILE = 'tokenizer.model'
SENTINELS = 100
"""Ids after T5's pieces, <extra_id_0> and so on, which its file leaves out."""
_T5_IDS = {'pad': 0, 'eos': 1, 'unk': 2, 'bos': -1}


class SentencePieceModel:
  """The library's own encoding; what ends a text is the model's eos.

  The model's normalisation is not undone by `decode`: T5's makes one space of
  any run of them, line ends included.

  Args:
    content: A spiece.model or tokenizer.model.

  Raises:
    NotATokenizerError: it is something else, or has no eos.
  """

  file_name = FILE

  def __init__(self, content: bytes):
    processor = sentencepiece.SentencePieceProcessor()
    try:
      processor.LoadFromSerializedProto(content)
      pieces = processor.GetPieceSize()
    except (RuntimeError, ValueError) as error:
      raise vocabulary.NotATokenizerError(
        'it is not a sentencepiece model'
      ) from error
    if processor.eos_id() < 0:
      raise vocabulary.NotATokenizerError('it has no end-of-text token (eos)')
    self.content = content
    """The file, verbatim."""
    self.end_of_text: int = processor.eos_id()
    """Id of the token that stands between documents, never within one."""
    self._processor = processor
    self._pieces: int = pieces

  def __reduce__(self):
    """Pickles the file."""
    return type(self), (self.content,)

  @property
  def vocab_size(self) -> int:
    """Number of tokens, T5's sentinels included."""
    return self._pieces + (SENTINELS if self._is_t5() else 0)

  @property
  def padded_vocab_size(self) -> int:
    """The same: these models are not padded."""
    return self.vocab_size

  def digest(self) -> str:
    """Returns a hash of kind and content."""
    return vocabulary.digest(self.file_name, self.content)

  def known(self) -> np.ndarray:
    """Marks the ids that texts are made of, and eos; bool (vocab_size,)."""
    known = np.zeros(self.vocab_size, bool)
    is_control, is_unused = self._processor.IsControl, self._processor.IsUnused
    ids = range(self._pieces)
    known[: self._pieces] = [not (is_control(i) or is_unused(i)) for i in ids]
    known[self.end_of_text] = True
    return known

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Returns the ids of each text: uint32 (tokens,)."""
    # Where there is a process a core, a thread is enough for each.
    alone = os.environ.get('TOKENIZERS_PARALLELISM') != 'false'
    encoded = self._processor.Encode(
      list(texts), return_type='numpy', num_threads=-1 if alone else 1
    )
    return [ids.view(np.uint32) for ids in encoded]

  def decode(self, tokens: Iterable[int]) -> str:
    """Returns the text of ids; special and unknown ones have none."""
    ids = [int(token) for token in tokens if 0 <= token < self._pieces]
    return self._processor.Decode(ids)

  def _is_t5(self) -> bool:
    """Whether the ids are T5's, and sentinels are not among them."""
    ids = {
      'pad': self._processor.pad_id(),
      'eos': self._processor.eos_id(),
      'unk': self._processor.unk_id(),
      'bos': self._processor.bos_id(),
    }
    sentinel = self._processor.PieceToId('<extra_id_0>')
    return ids == _T5_IDS and sentinel == ids['unk']
