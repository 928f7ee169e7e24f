"""Facts in a Hugging Face folder beside weights and shapes.

They say where a text begins and ends, how long it may be and how it is sampled.
The models here compute nothing with them, but other software needs them.
"""

import dataclasses
import json
import operator
import pathlib
from collections.abc import Sequence
from typing import Any

from models.huggingface_config import HARMLESS
from models.huggingface_files import read_json

GENERATION = 'generation_config.json'

# `save` writes its own: these say what the loaded files were.
_OURS = {'_name_or_path', 'architectures', 'dtype', 'torch_dtype'}


@dataclasses.dataclass(frozen=True)
class Facts:
  """Facts of a folder that no computed number depends on; see `of`.

  They can be hashed, so that a model carries them through `nnx.split` and jit.
  """

  options: str = '{"bos_token_id": null, "eos_token_id": null}'
  """Options of config.json, as a JSON object. For those left out, transformers
  assumes the published models' values: end of text 2, length 2048."""
  generation: str | None = None
  """The text of generation_config.json; None for no such file."""

  @classmethod
  def of(
    cls,
    *,
    eos_token_id: int | Sequence[int] | None = None,
    bos_token_id: int | None = None,
    pad_token_id: int | None = None,
    max_position_embeddings: int | None = None,
  ) -> 'Facts':
    """Returns the facts of a model that was trained here.

    Args:
      eos_token_id: The token, or tokens, that end a text. Without one,
        generation goes on to its limit.
      bos_token_id: The token that begins a text without a prompt.
      pad_token_id: The token that fills a batch.
      max_position_embeddings: The sequence length of training; where None,
        transformers assumes a published model's.

    Returns:
      Facts for `models.huggingface.save`.

    Raises:
      ValueError: max_position_embeddings is below 1.
    """
    options: dict[str, Any] = {
      'bos_token_id': _id(bos_token_id),
      'eos_token_id': [operator.index(x) for x in eos_token_id]
      if isinstance(eos_token_id, Sequence)
      else _id(eos_token_id),
      'pad_token_id': _id(pad_token_id),
    }
    if max_position_embeddings is not None:
      if max_position_embeddings < 1:
        raise ValueError(
          'max_position_embeddings must be at least 1, not '
          f'{max_position_embeddings}'
        )
      options['max_position_embeddings'] = _id(max_position_embeddings)
    return cls(json.dumps(options))

  def check(self, vocab_size: int) -> None:
    """Checks that special tokens are in the vocabulary.

    Raises:
      ValueError: one is not.
    """
    options = json.loads(self.options)
    for name in ('eos_token_id', 'bos_token_id', 'pad_token_id'):
      ids = options.get(name)
      for token in ids if isinstance(ids, list) else [ids]:
        if token is not None and token not in range(vocab_size):
          raise ValueError(
            f'{name} {token!r} is not among the {vocab_size} tokens of the'
            ' model'
          )


def read(folder: pathlib.Path) -> Facts:
  """Reads the facts that `huggingface.load` keeps.

  Raises:
    ValueError: a file is broken; the message names it.
    OSError: a file cannot be read; the message names it.
  """
  path = folder / 'config.json'
  given = read_json(path)
  if not isinstance(given, dict) or 'model_type' not in given:
    raise ValueError(f'{path} holds no JSON object with a model_type')
  kept = {k: v for k, v in given.items() if k in HARMLESS - _OURS}
  generation, path = None, folder / GENERATION
  if path.exists():
    read_json(path)  # It names what is wrong.
    generation = path.read_bytes().decode()
  return Facts(json.dumps(kept), generation)


def _id(value: int | None) -> int | None:
  """Makes any integer, as numpy's, one that JSON takes."""
  return None if value is None else operator.index(value)
