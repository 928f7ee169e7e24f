"""Byte-pair ranks in tiktoken's format, as of GPT-2, LLaMA 3 or Qwen."""

import base64
import dataclasses
import re
from collections.abc import Iterable, Sequence

import numpy as np
import tiktoken

from train.data import vocabulary

FILE = 'tokenizer.tiktoken'
# In a run of a million blanks the library's regular expressions give up, and
# the program with them. So long a run is cut: LLaMA 3 does so at 400,000.
_LONGEST_BLANK = 2**18
_LONG_BLANKS = re.compile(rf'(?<!\s)(\s{{{_LONGEST_BLANK},}})')


@dataclasses.dataclass(frozen=True)
class Encoding:
  """What a file of ranks leaves out."""

  name: str
  """Of the encoding."""
  end_of_text: int
  """Its id."""
  vocab_size: int
  """Ranks and special tokens."""
  pattern: str
  """Finds the words that are encoded each on its own."""


_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_UPPER = r'\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}'
_LOWER = r'\p{Ll}\p{Lm}\p{Lo}\p{M}'


def _pattern(digits: str) -> str:
  """Of Qwen and LLaMA 3, which take digits in runs of their own."""
  return (
    rf'{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}|'
    r' ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
  )


# The first three are of `tiktoken_ext/openai_public.py` of the library, Qwen's
# of `tokenization_qwen.py` in Qwen/Qwen-7B, LLaMA 3's of `llama/tokenizer.py`
# in meta-llama/llama3.
ENCODINGS = {
  50256: Encoding(
    'gpt2',
    50256,
    50257,
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|"
    r'\s++$|\s+(?!\S)|\s',
  ),
  100256: Encoding(
    'cl100k',
    100257,
    100277,
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+|"
    r' ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s',
  ),
  128000: Encoding('llama3', 128001, 128256, _pattern(r'\p{N}{1,3}')),
  151643: Encoding('qwen', 151643, 151851, _pattern(r'\p{N}')),
  199998: Encoding(
    'o200k',
    199999,
    200019,
    rf'[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+{_CONTRACTION}?|'
    rf'[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*{_CONTRACTION}?|'
    r'\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+',
  ),
}
"""By the number of ranks, which is all that tells them apart."""


class TiktokenRanks:
  """The library's own encoding; the number of ranks tells which it is.

  Args:
    content: Lines of a token in base64 and its rank.

  Raises:
    NotATokenizerError: it is something else, or of another encoding.
  """

  file_name = FILE

  def __init__(self, content: bytes):
    ranks = _ranks(content)
    if len(ranks) not in ENCODINGS:
      known = ', '.join(f'{n} ({e.name})' for n, e in ENCODINGS.items())
      raise vocabulary.NotATokenizerError(
        f'it has {len(ranks)} ranks, which is none of the encodings known: '
        f'{known}'
      )
    self._encoding = ENCODINGS[len(ranks)]
    self._ranks = len(ranks)
    self._tiktoken = tiktoken.Encoding(
      self._encoding.name,
      pat_str=self._encoding.pattern,
      mergeable_ranks=ranks,
      special_tokens={},
    )
    self.content = content
    """The file, verbatim."""

  def __reduce__(self):
    """Pickles the file."""
    return type(self), (self.content,)

  @property
  def vocab_size(self) -> int:
    """Number of tokens, special ones included."""
    return self._encoding.vocab_size

  @property
  def padded_vocab_size(self) -> int:
    """Rounded up: 50304 for GPT-2's."""
    return vocabulary.padded(self.vocab_size)

  @property
  def end_of_text(self) -> int:
    """Id of the token that stands between documents, never within one."""
    return self._encoding.end_of_text

  def digest(self) -> str:
    """Returns a hash of kind and content."""
    return vocabulary.digest(self.file_name, self.content)

  def known(self) -> np.ndarray:
    """Marks the ids that texts are made of, and end-of-text; bool."""
    known = np.arange(self.vocab_size) < self._ranks
    known[self.end_of_text] = True
    return known

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Returns the ids of each text: uint32 (tokens,)."""
    return [self._encode(text) for text in texts]

  def decode(self, tokens: Iterable[int]) -> str:
    """Returns the text of ids; special and unknown ones have none."""
    ids = [int(token) for token in tokens if 0 <= token < self._ranks]
    return self._tiktoken.decode(ids)

  def _encode(self, text: str) -> np.ndarray:
    # Lists of `encode_ordinary` are faster than `encode_to_numpy`.
    encode = self._tiktoken.encode_ordinary
    if len(text) < _LONGEST_BLANK:
      return np.array(encode(text), np.uint32)
    ids: list[int] = []
    for at, piece in enumerate(_LONG_BLANKS.split(text)):
      step = _LONGEST_BLANK if at % 2 else len(piece) + 1
      for start in range(0, len(piece), step):
        ids += encode(piece[start : start + step])
    return np.array(ids, np.uint32)


def _ranks(content: bytes) -> dict[bytes, int]:
  ranks = {}
  try:
    for line in content.splitlines():
      token, rank = line.split()
      ranks[base64.b64decode(token, validate=True)] = int(rank)
  except ValueError as error:
    raise vocabulary.NotATokenizerError(
      f'line {len(ranks) + 1} is not a token in base64 and its rank'
    ) from error
  if sorted(ranks.values()) != list(range(len(ranks))):
    raise vocabulary.NotATokenizerError('its ranks are not 0, 1, 2 and so on')
  if not all(bytes([byte]) in ranks for byte in range(256)):
    raise vocabulary.NotATokenizerError('it lacks some of the 256 bytes')
  return ranks
