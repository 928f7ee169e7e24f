"""A tokenizer.json, as the library `tokenizers` writes it."""

from collections.abc import Iterable, Sequence

import numpy as np
import tokenizers

from train.data import vocabulary

FILE = 'tokenizer.json'
END_OF_TEXT = '<|endoftext|>'
ENDS = (
  END_OF_TEXT,  # GPT-2, GPT-NeoX, Qwen, Phi.
  '<|end_of_text|>',  # LLaMA 3.
  '</s>',  # T5, LLaMA 1 and 2, Mistral.
  '<eos>',  # Gemma.
  '<｜end▁of▁sentence｜>',  # noqa: RUF001  DeepSeek.
)
"""Names of end-of-text tokens; the first that a vocabulary has is its own."""


class TokenizersJson:
  """Any vocabulary of the library.

  Args:
    content: A tokenizer.json.

  Raises:
    NotATokenizerError: it is something else, or names no end of text.
  """

  file_name = FILE

  def __init__(self, content: bytes):
    try:
      tokenizer = tokenizers.Tokenizer.from_str(content.decode('utf-8'))
    except Exception as error:  # What tokenizers raises, and bytes of no text.
      raise vocabulary.NotATokenizerError(
        f'it is not a tokenizer.json ({error})'
      ) from error
    # Text that spells out a special token is ordinary text.
    tokenizer.encode_special_tokens = True
    tokenizer.no_padding()
    tokenizer.no_truncation()
    added = tokenizer.get_added_tokens_decoder()
    special = {token.content: i for i, token in added.items() if token.special}
    end = next((special[name] for name in ENDS if name in special), None)
    if end is None:
      raise vocabulary.NotATokenizerError(
        'it is a tokenizer.json, but it has no end-of-text token: none of'
        f' {", ".join(ENDS)} is special; add {END_OF_TEXT} as a special token'
        ' and save it again'
      )
    self.content = content
    """The file, verbatim."""
    self.end_of_text: int = end
    """Id of the token that stands between documents, never within one."""
    self._tokenizer = tokenizer
    self._ids = np.fromiter(tokenizer.get_vocab().values(), np.int64)
    self._special = np.isin(np.arange(self.vocab_size), list(special.values()))
    self._spellings = {i: name for name, i in special.items()}
    self._trained_here = special == {END_OF_TEXT: 0} and len(added) == 1

  def __reduce__(self):
    """Pickles the file."""
    return type(self), (self.content,)

  @property
  def vocab_size(self) -> int:
    """Number of tokens; token ids are in [0, vocab_size)."""
    return int(self._ids.max()) + 1

  @property
  def padded_vocab_size(self) -> int:
    """Rounded up; for one trained here, the size that was asked for."""
    size = self.vocab_size
    return size if self._trained_here else vocabulary.padded(size)

  def digest(self) -> str:
    """Returns a hash of kind and content."""
    return vocabulary.digest(self.file_name, self.content)

  def known(self) -> np.ndarray:
    """Marks the ids that have a token; bool (vocab_size,)."""
    return np.isin(np.arange(self.vocab_size), self._ids)

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Returns the ids of each text: uint32 (tokens,)."""
    encodings = self._tokenizer.encode_batch_fast(
      list(texts), add_special_tokens=False
    )
    return [
      self._spelled_out(np.array(encoding.ids, np.uint32))
      for encoding in encodings
    ]

  def decode(self, tokens: Iterable[int]) -> str:
    """Returns the text of ids; special and unknown ones have none."""
    ids = [int(token) for token in tokens]
    return self._tokenizer.decode(ids, skip_special_tokens=True)

  def _spelled_out(self, ids: np.ndarray) -> np.ndarray:
    """The ids, special tokens as the text that they were.

    Where they are pieces of the model as well, as T5's, the library makes them
    of text that spells them.
    """
    is_special = self._special[ids]
    if not is_special.any():
      return ids
    pieces = []
    for token, special in zip(ids.tolist(), is_special, strict=True):
      pieces.append(self._spelling(token) if special else [token])
    return np.array([i for piece in pieces for i in piece], np.uint32)

  def _spelling(self, token: int) -> list[int]:
    name = self._spellings[token]
    parts = self._tokenizer.encode_batch_fast(
      [name[:1], name[1:]], add_special_tokens=False
    )
    return [i for part in parts for i in part.ids if not self._special[i]]
