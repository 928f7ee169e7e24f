"""Text to tokens: any of several kinds of vocabulary, behind one interface."""

import importlib
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from train import errors
from train.data import vocabulary
from train.data.tokenizers_json import END_OF_TEXT, TokenizersJson

FILES = ('tokenizer.json', 'tokenizer.model', 'tokenizer.tiktoken')
"""What the kinds are called in run directories and prepared ones."""
_KINDS = {
  'tokenizer.json': ('tokenizers_json', 'TokenizersJson', 'tokenizers'),
  'tokenizer.model': (
    'sentencepiece_model',
    'SentencePieceModel',
    'sentencepiece',
  ),
  'tokenizer.tiktoken': ('tiktoken_ranks', 'TiktokenRanks', 'tiktoken'),
}
# T5's folders on the hub hold a spiece.model and a tokenizer.json; the first
# is the model's own. LLaMA's tokenizer.model may be ranks.
FOLDER_FILES = ('spiece.model', *FILES)
"""Which of the files of a folder is taken: the first that is there."""
_LARGEST_SAMPLE = 2**30
_HUB_ID = re.compile(r'[\w-][\w.-]*/[\w-][\w.-]*')
_SUFFIXES = ('.json', '.model', '.tiktoken')


class Tokenizer(Protocol):
  """A vocabulary and how text is cut into it. It can be pickled."""

  @property
  def file_name(self) -> str:
    """One of `FILES`: what `content` is to be called, which tells its kind."""

  @property
  def content(self) -> bytes:
    """The file that it was made of, verbatim; see `from_content`."""

  @property
  def vocab_size(self) -> int:
    """Number of tokens; token ids are in [0, vocab_size)."""

  @property
  def padded_vocab_size(self) -> int:
    """Rows of an embedding for it, at least vocab_size."""

  @property
  def end_of_text(self) -> int:
    """Id of the token that stands between documents, never within one."""

  def digest(self) -> str:
    """Returns a hash of kind and content."""

  def known(self) -> np.ndarray:
    """Marks ids that texts are made of, and their end; bool (vocab_size,)."""

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Returns the ids of each text: uint32 (tokens,).

    No special tokens are added, and text that spells one is ordinary text.
    """

  def decode(self, tokens: Iterable[int]) -> str:
    """Returns the text of ids; a cut character becomes U+FFFD.

    Special tokens and ids of padding have no text.
    """


def open_tokenizer(name: str, option: str = '--tokenizer') -> Tokenizer:
  """Opens what a user names.

  Args:
    name: A file; a directory that holds one, as a run's, a prepared one or a
      Hugging Face folder; or the id of a repository on the Hugging Face hub,
      'org/name'. The content of a file tells its kind, not its name.
    option: The option that gave it, for the errors.

  Raises:
    UserError: there is no such thing, or it is no tokenizer.
  """
  path = pathlib.Path(name).expanduser()
  if path.is_dir():
    path = find_file(path, option)
  elif not path.is_file():
    if path.exists():
      raise errors.UserError(f'{option}: {name} is not a file')
    if not _HUB_ID.fullmatch(name) or path.suffix in _SUFFIXES:
      raise errors.UserError(
        f'{option}: there is no {name}: name a file, a folder that holds one, '
        'or a repository on the Hugging Face hub as org/name'
      )
    from train.data import hub

    path = hub.download(name, FOLDER_FILES, option)
  return read(path, option)


def find_file(folder: pathlib.Path, option: str) -> pathlib.Path:
  """Returns the tokenizer's file in a folder.

  Raises:
    UserError: there is none.
  """
  for name in FOLDER_FILES:
    if (folder / name).is_file():
      return folder / name
  # Qwen calls its ranks qwen.tiktoken.
  ranks = sorted(folder.glob('*.tiktoken'))
  if len(ranks) == 1:
    return ranks[0]
  raise errors.UserError(
    f'{option}: {folder} holds no tokenizer: none of {", ".join(FOLDER_FILES)}'
  )


def read(path: pathlib.Path, option: str = '') -> Tokenizer:
  """Reads a file, whatever its name.

  Raises:
    UserError: it cannot be read, or is no tokenizer.
  """
  prefix = f'{option}: ' if option else ''
  try:
    content = path.read_bytes()
  except OSError as error:
    raise errors.UserError(
      f'{prefix}cannot read {path}: {error.strerror}'
    ) from error
  try:
    return from_content(kind(content), content)
  except vocabulary.NotATokenizerError as error:
    raise errors.UserError(
      f'{prefix}{path} cannot be used as a tokenizer: {error}'
    ) from error


def kind(content: bytes) -> str:
  """Tells what a file is by its beginning.

  Returns:
    One of `FILES`.

  Raises:
    NotATokenizerError: it is none of them.
  """
  beginning = content[:64]
  if beginning.startswith(b'version https://git-lfs'):
    raise vocabulary.NotATokenizerError(
      'it is a pointer of git-lfs: `git lfs pull` brings the file'
    )
  if beginning.lstrip().startswith(b'{'):
    return 'tokenizer.json'
  if re.match(rb'[A-Za-z0-9+/]+=* \d+\r?\n', beginning):
    return 'tokenizer.tiktoken'
  if beginning.startswith(b'\n'):  # The tag of the first piece.
    return 'tokenizer.model'
  raise vocabulary.NotATokenizerError(
    'it is neither a tokenizer.json nor a sentencepiece model nor ranks of '
    'tiktoken'
  )


def from_content(file_name: str, content: bytes) -> Tokenizer:
  """Restores a tokenizer.

  Args:
    file_name: Its `file_name`.
    content: Its `content`.

  Raises:
    NotATokenizerError: name or content are of something else.
    UserError: the library of this kind is not installed.
  """
  if file_name not in _KINDS:
    raise vocabulary.NotATokenizerError(f'no tokenizer is called {file_name}')
  module, name, library = _KINDS[file_name]
  try:
    made = importlib.import_module(f'train.data.{module}')
  except ModuleNotFoundError as error:
    if error.name != library:
      raise
    raise errors.UserError(
      f"this kind of tokenizer needs {library}: pip install -e '.[train]'"
    ) from error
  return getattr(made, name)(content)


class ByteLevelBPE(TokenizersJson):
  """A lossless vocabulary: any text is encoded, and decodes to itself."""

  @classmethod
  def train(cls, texts: Iterable[str], vocab_size: int) -> 'ByteLevelBPE':
    """Learns the merges of `texts`, of their first 2**30 characters.

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
    tokenizer.train_from_iterator(_first(texts, _LARGEST_SAMPLE), trainer)
    return cls(tokenizer.to_str().encode())


def _first(texts: Iterable[str], characters: int) -> Iterator[str]:
  """So many characters of the texts, the last one cut."""
  for text in texts:
    yield text[:characters]
    characters -= len(text)
    if characters <= 0:
      return
