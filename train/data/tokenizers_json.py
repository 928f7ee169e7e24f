"""A tokenizer.json, as the library `tokenizers` writes it."""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tokenizers

from train import errors
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

# A single character, or a byte of a character that the vocabulary lacks, cannot
# be spelled by other tokens.
_ONLY_SPELLING = re.compile('.|<0x[0-9A-F]{2}>', re.DOTALL)


class TokenizersJson:
  """Any vocabulary of the library.

  Text that spells a special token is ordinary text. Any other text has the
  library's own ids: what the model does not know is its unknown token, which
  may be a special one.

  Args:
    content: A tokenizer.json.

  Raises:
    NotATokenizerError: it is something else, or names no end of text.
  """

  file_name = FILE

  def __init__(self, content: bytes):
    try:
      file = json.loads(content.decode('utf-8'))
      file['model'].pop('dropout', None)  # The same text, the same ids.
      unknown = _unknown(file['model'])
      hidden = _hide_special_tokens(file)
      tokenizer = tokenizers.Tokenizer.from_str(json.dumps(file))
    except Exception as error:  # What tokenizers raises, and bytes of no text.
      raise vocabulary.NotATokenizerError(
        f'it is not a tokenizer.json ({error})'
      ) from error
    tokenizer.encode_special_tokens = True
    tokenizer.no_padding()
    tokenizer.no_truncation()
    special = {name: tokenizer.token_to_id(new) for name, new in hidden.items()}
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
    self._ids = set(tokenizer.get_vocab().values())
    self._special = set(special.values())
    self._unknown = unknown
    self._trained_here = (
      special == {END_OF_TEXT: 0} and len(file['added_tokens']) == 1
    )

  def __reduce__(self):
    """Pickles the file."""
    return type(self), (self.content,)

  @property
  def vocab_size(self) -> int:
    """Number of tokens; token ids are in [0, vocab_size)."""
    return max(self._ids) + 1

  @property
  def padded_vocab_size(self) -> int:
    """Rounded up; for one trained here, the size that was asked for."""
    size = self.vocab_size
    return size if self._trained_here else vocabulary.padded(size)

  def digest(self) -> str:
    """Returns a hash of kind and content.

    Older versions wrote another hash where the unknown token is special, since
    they gave unknown text other ids.
    """
    revision = '#2' if self._unknown in self._special else ''
    return vocabulary.digest(self.file_name + revision, self.content)

  def known(self) -> np.ndarray:
    """Marks the ids that texts are made of, and their end; bool."""
    known = self._ids - self._special | {self.end_of_text, self._unknown}
    return np.isin(np.arange(self.vocab_size), list(known))

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Returns the ids of each text: uint32 (tokens,).

    Raises:
      UserError: a text has what the vocabulary does not know, and its unknown
        token is the one that ends texts.
    """
    encodings = self._tokenizer.encode_batch_fast(
      list(texts), add_special_tokens=False
    )
    encoded = [np.array(encoding.ids, np.uint32) for encoding in encodings]
    if self._unknown == self.end_of_text:
      for text, ids in zip(texts, encoded, strict=True):
        if self.end_of_text in ids:
          raise errors.UserError(
            'the tokenizer uses its end-of-text token for unknown text, as in'
            f' {text[:40]!r}: name a tokenizer with an unknown token of its own'
          )
    return encoded

  def decode(self, tokens: Iterable[int]) -> str:
    """Returns the text of ids; special and unknown ones have none."""
    ids = [int(token) for token in tokens if token not in self._special]
    return self._tokenizer.decode(ids, skip_special_tokens=False)


def _unknown(model: dict[str, Any]) -> int:
  """Returns the id of the unknown token; -1 where there is none."""
  found = model.get('unk_id')  # Unigram; the others have a name.
  if found is None and isinstance(model['vocab'], dict):
    found = model['vocab'].get(model.get('unk_token'))
  return -1 if found is None else found


def _hide_special_tokens(file: dict[str, Any]) -> dict[str, str]:
  """Renames special tokens, so that no text spells them.

  Where special tokens are pieces of the model as well, as T5's are, the library
  would make them of text that spells them.

  Returns:
    The new names by the old ones.
  """
  names = {
    token['content']: f'\0{token["content"]}\0'  # No document has a NUL.
    for token in file.setdefault('added_tokens', [])
    if token['special'] and not _ONLY_SPELLING.fullmatch(token['content'])
  }
  for token in file['added_tokens']:
    if token['content'] in names:
      token['content'] = names[token['content']]
      token['normalized'] = False
  model = file['model']
  vocab = model['vocab']
  if isinstance(vocab, list):
    model['vocab'] = [[names.get(name, name), score] for name, score in vocab]
  else:
    model['vocab'] = {names.get(name, name): i for name, i in vocab.items()}
  if model.get('unk_token') in names:
    model['unk_token'] = names[model['unk_token']]
  prefix = len(model.get('continuing_subword_prefix') or '')

  def stays(merge: str | list[str]) -> bool:
    a, b = merge.split(' ') if isinstance(merge, str) else merge
    return names.keys().isdisjoint((a, b, a + b[prefix:]))

  if merges := model.get('merges'):
    model['merges'] = [merge for merge in merges if stays(merge)]
  return names
