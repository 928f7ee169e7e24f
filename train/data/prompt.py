"""Prompts to tokens, and generated tokens to text that can be printed."""

import json
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import tokenizers

from train.data.tokenizer import FILES, read
from train.data.tokenizers_json import END_OF_TEXT
from train.errors import UserError

_FILE = 'tokenizer.json'
_REPLACEMENT = '\N{REPLACEMENT CHARACTER}'


class PromptTokenizer:
  """A tokenizer as generating text uses it.

  Args:
    encode: From a prompt to ids, with those that it begins with.
    decode: From ids to text, none for special tokens.
    ids: Those of all tokens.
    ends: Ids that end a text.
    start: The id that an empty prompt begins with, where `encode` gives none;
      None for no empty prompts.
  """

  def __init__(
    self,
    encode: Callable[[str], list[int]],
    decode: Callable[[Sequence[int]], str],
    ids: Iterable[int],
    ends: Sequence[int],
    start: int | None,
  ):
    self._encode = encode
    self._ids = np.fromiter(ids, np.int64)
    self._start = start
    self.decode = decode
    """Returns the text of ids, those of special tokens left out."""
    self.ends = frozenset(ends)
    """Ids that end a text."""

  @classmethod
  def of_run(
    cls, run_dir: pathlib.Path, layout: str = 'stream'
  ) -> 'PromptTokenizer':
    """Of a run directory: a prompt begins a document, as in training.

    Args:
      run_dir: Holds the tokenizer, of whatever kind.
      layout: The run's: with 'truncate', no end-of-text precedes a document.

    Raises:
      UserError: there is no such file, or it is broken.
    """
    found = [run_dir / name for name in FILES if (run_dir / name).exists()]
    if not found:
      raise UserError(
        f'{run_dir} holds no {_FILE}: an older version made it; the command '
        'that trained it, given again, adds the file'
      )
    tokenizer = read(found[0])
    end = tokenizer.end_of_text
    before = [] if layout == 'truncate' else [end]

    def encode(prompt: str) -> list[int]:
      [ids] = tokenizer.encode_batch([prompt])
      return [*before, *ids.tolist()]

    ids = np.flatnonzero(tokenizer.known())
    return cls(encode, tokenizer.decode, ids, [end], end)

  @classmethod
  def of_hugging_face(cls, folder: pathlib.Path) -> 'PromptTokenizer':
    """Of a Hugging Face folder, which says how a prompt begins.

    The ends of a text are those of config.json and generation_config.json, or
    else the token <|endoftext|>, if there is one.

    Raises:
      UserError: a file is missing or broken.
    """
    path = folder / _FILE
    if not path.exists():
      raise UserError(
        f'{folder} holds no {_FILE}, which text needs; transformers writes it: '
        'AutoTokenizer.from_pretrained(folder).save_pretrained(folder)'
      )
    tokenizer = _read(path)
    configs = [
      read_json(folder / name)
      for name in ('config.json', 'generation_config.json')
      if (folder / name).exists()
    ]
    ends = _special(configs, 'eos_token_id', folder)
    if not ends and (end := tokenizer.token_to_id(END_OF_TEXT)) is not None:
      ends = [end]
    starts = _special(configs, 'bos_token_id', folder) + ends
    return cls.of_json(tokenizer, ends, starts[0] if starts else None)

  @classmethod
  def of_json(
    cls,
    tokenizer: tokenizers.Tokenizer,
    ends: Sequence[int],
    start: int | None,
  ) -> 'PromptTokenizer':
    """Of a tokenizer whose post-processor says what a prompt begins with."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return cls(
      lambda prompt: tokenizer.encode(prompt).ids,
      lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
      tokenizer.get_vocab().values(),
      ends,
      start,
    )

  def encode(self, prompt: str) -> list[int]:
    """Returns the ids of a prompt, at least one.

    Raises:
      UserError: it is empty and nothing says what a text begins with, or it is
        not Unicode.
    """
    try:
      prompt.encode()
    except UnicodeEncodeError as error:  # Bytes of the shell that are no text.
      raise UserError('--prompt is not UTF-8 text') from error
    ids = self._encode(prompt)
    if ids:
      return ids
    if self._start is None:
      raise UserError(
        'the model names no token that a text begins with: give a --prompt'
      )
    return [self._start]

  def known(self, vocab_size: int) -> np.ndarray:
    """Marks the ids below vocab_size that can be decoded; bool (vocab_size,).

    Models pad their vocabulary.
    """
    return np.isin(np.arange(vocab_size), self._ids)


class TextStream:
  """Text from tokens as they come, whole characters only.

  A character can take several tokens, and the text of a token depends on what
  is before it, so a little of that is decoded again with each one.

  Args:
    decode: From ids to text, U+FFFD for what is no character, or not yet.
    prompt: What comes before, and is not returned again.
  """

  def __init__(
    self, decode: Callable[[Sequence[int]], str], prompt: Sequence[int]
  ):
    self._decode = decode
    self._ids = list(prompt)
    self._returned = len(self._ids)  # So many ids' text is out.

  def add(self, token: int) -> str:
    """Returns the text that a token completes; '' if it is in a character."""
    self._ids.append(token)
    text = self._new()
    if text.endswith(_REPLACEMENT):
      return ''
    if text:
      del self._ids[: self._returned]
      self._returned = len(self._ids)
    return text

  def rest(self) -> str:
    """Returns what was held back: no token follows that could complete it."""
    return self._new()

  def _new(self) -> str:
    before = self._decode(self._ids[: self._returned])
    return self._decode(self._ids)[len(before) :]


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a file that holds an object.

  Raises:
    UserError: it cannot be read, or holds something else.
  """
  try:
    value = json.loads(path.read_text('utf-8'))
  except OSError as error:
    raise UserError(f'cannot read {path}: {error.strerror}') from error
  except (ValueError, RecursionError) as error:
    raise UserError(f'{path} is not JSON: {error}') from error
  if not isinstance(value, dict):
    raise UserError(f'{path} is not a JSON object')
  return value


def _read(path: pathlib.Path) -> tokenizers.Tokenizer:
  try:
    return tokenizers.Tokenizer.from_str(path.read_text('utf-8'))
  except OSError as error:
    raise UserError(f'cannot read {path}: {error.strerror}') from error
  except Exception as error:  # What tokenizers raises, and bytes of no text.
    raise UserError(f'{path} is not a tokenizer: {error}') from error


def _special(
  configs: list[dict[str, Any]], name: str, folder: pathlib.Path
) -> list[int]:
  """The ids that any of the files gives, one or a list, in order."""
  ids: list[int] = []
  for config in configs:
    value = config.get(name)
    if value is None:
      continue
    for token in value if isinstance(value, list) else [value]:
      if isinstance(token, bool) or not isinstance(token, int):
        raise UserError(f'{folder}: {name} must be token ids, not {value!r}')
      ids.append(token)
  return ids
