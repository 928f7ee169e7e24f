"""Prompts to tokens, and generated tokens to text that can be printed."""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tokenizers
from tokenizers import processors

from train.data.tokenizer import END_OF_TEXT
from train.errors import UserError

_FILE = 'tokenizer.json'
_REPLACEMENT = '\N{REPLACEMENT CHARACTER}'


class PromptTokenizer:
  """A tokenizer.json, as generating text uses it.

  Args:
    tokenizer: Its post-processor says what a prompt begins with.
    ends: Ids that end a text.
    start: The id that an empty prompt begins with, where the post-processor
      puts none; None for no empty prompts.
  """

  def __init__(
    self,
    tokenizer: tokenizers.Tokenizer,
    ends: Sequence[int],
    start: int | None,
  ):
    tokenizer.no_padding()
    tokenizer.no_truncation()
    self._tokenizer = tokenizer
    self._start = start
    self.ends = frozenset(ends)
    """Ids that end a text."""

  @classmethod
  def of_run(cls, run_dir: pathlib.Path) -> 'PromptTokenizer':
    """Of a run directory: a prompt begins a document, as in training.

    Raises:
      UserError: there is no such file, or it is broken.
    """
    path = run_dir / _FILE
    if not path.exists():
      raise UserError(
        f'{run_dir} holds no {_FILE}: an older version made it; the command '
        'that trained it, given again, adds the file'
      )
    tokenizer = _read(path)
    end = tokenizer.token_to_id(END_OF_TEXT)
    if end is None:
      raise UserError(f'{path} has no {END_OF_TEXT} token')
    # Text that spells out the end-of-text token is ordinary text.
    tokenizer.encode_special_tokens = True
    tokenizer.post_processor = processors.TemplateProcessing(
      single=f'{END_OF_TEXT} $A', special_tokens=[(END_OF_TEXT, end)]
    )
    return cls(tokenizer, [end], end)

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
    return cls(tokenizer, ends, starts[0] if starts else None)

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
    ids = self._tokenizer.encode(prompt).ids
    if ids:
      return ids
    if self._start is None:
      raise UserError(
        'the model names no token that a text begins with: give a --prompt'
      )
    return [self._start]

  def decode(self, ids: Sequence[int]) -> str:
    """Returns the text of ids, those of special tokens left out."""
    return self._tokenizer.decode(ids, skip_special_tokens=True)

  def known(self, vocab_size: int) -> np.ndarray:
    """Marks the ids below vocab_size that can be decoded; bool (vocab_size,).

    Models pad their vocabulary.
    """
    ids = np.fromiter(self._tokenizer.get_vocab().values(), np.int64)
    return np.isin(np.arange(vocab_size), ids)


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
