"""Byte-level byte-pair encoding, trained on the text at hand."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from typing import Protocol

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

END_OF_TEXT = '<|endoftext|>'


class Tokenizer(Protocol):
  """What the trainer asks of a vocabulary."""

  @property
  def vocab_size(self) -> int:
    """Number of tokens; token ids are in [0, vocab_size)."""

  @property
  def end_of_text(self) -> int:
    """Id of the token that stands between documents, never within one."""

  def to_json(self) -> str:
    """Returns all of it in the `tokenizers` JSON format."""

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Returns the token ids of each text, no special tokens added."""

  def decode(self, tokens: Iterable[int]) -> str:
    """Returns the text of token ids; a cut character becomes U+FFFD."""


class ByteLevelBPE:
  """A lossless vocabulary: any text is encoded, and decodes to itself."""

  def __init__(self, tokenizer: tokenizers.Tokenizer):
    self._tokenizer = tokenizer
    # Text that spells out the end-of-text token is ordinary text.
    self._tokenizer.encode_special_tokens = True
    end_of_text = tokenizer.token_to_id(END_OF_TEXT)
    if end_of_text is None:
      raise ValueError(f'the vocabulary has no {END_OF_TEXT} token')
    self._end_of_text: int = end_of_text

  @classmethod
  def train(cls, texts: Iterable[str], vocab_size: int) -> 'ByteLevelBPE':
    """Learns the merges of `texts`.

    The result depends on the texts and their order alone, not on threads.

    Args:
      texts: documents, read once.
      vocab_size: tokens wanted, at least 257. A small text can give
        fewer, where no pair is left to merge.
    """
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
      vocab_size=vocab_size,
      special_tokens=[END_OF_TEXT],
      # Every byte, seen in training or not.
      initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
      show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return cls(tokenizer)

  @classmethod
  def from_json(cls, text: str) -> 'ByteLevelBPE':
    """Restores a vocabulary from `to_json`."""
    return cls(tokenizers.Tokenizer.from_str(text))

  def to_json(self) -> str:
    """Returns the vocabulary and merges in the `tokenizers` JSON format."""
    return self._tokenizer.to_str()

  def digest(self) -> str:
    """Returns a hash of the tokens and their ids."""
    vocabulary = sorted(self._tokenizer.get_vocab().items())
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()

  @property
  def vocab_size(self) -> int:
    """Number of tokens, end-of-text included."""
    return self._tokenizer.get_vocab_size()

  @property
  def end_of_text(self) -> int:
    """Id of the token that stands between documents."""
    return self._end_of_text

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """Returns the token ids of each text."""
    return [e.ids for e in self._tokenizer.encode_batch_fast(list(texts))]

  def decode(self, tokens: Iterable[int]) -> str:
    """Returns the text of token ids, end-of-text spelled out."""
    ids = [int(token) for token in tokens]
    return self._tokenizer.decode(ids, skip_special_tokens=False)
