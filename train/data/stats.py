"""stats.json: what a prepared directory holds; written last of all."""

import dataclasses
import hashlib
import json
from typing import Any

FILE = 'stats.json'
FORMAT = 1
"""Raised when the same input would give other bytes."""
SPLITS = ('train', 'validation')


@dataclasses.dataclass(frozen=True)
class Stats:
  """The same for the same input, whoever prepared it, and how."""

  format: int
  """`FORMAT` of the program that wrote it."""
  layout: str
  """One of `train.data.layouts.LAYOUTS`."""
  sequence_length: int
  """T: windows have T + 1 tokens."""
  documents: dict[str, int]
  """By split."""
  tokens: dict[str, int]
  """By split: of the documents, with an end-of-text after each."""
  windows: dict[str, int]
  """By split: records."""
  targets: dict[str, int]
  """By split: tokens of windows that a model is to predict."""
  skipped: dict[str, int]
  """Documents left out, by kind: see `train.data.source.Problems`."""
  near_duplicates: dict[str, Any]
  """Across the splits: see `train.data.near_duplicates`."""
  vocab_size: int
  """Of the tokenizer."""
  padded_vocab_size: int
  """What a model's embedding has: see `train.data.tokenizer`."""
  tokenizer: str
  """The file that holds it."""
  tokenizer_hash: str
  """`Tokenizer.digest`."""
  source_hash: str
  """sha256 over the parts of the source."""
  validation_fraction: float
  """As asked for."""
  request: str
  """Tells whether a command asks for this again, without reading the text."""
  files: dict[str, int]
  """Bytes of every file of records."""

  def to_json(self) -> str:
    """As it is written."""
    return json.dumps(dataclasses.asdict(self), indent=2) + '\n'

  @classmethod
  def from_json(cls, text: str) -> 'Stats':
    """What `to_json` wrote.

    Raises:
      ValueError: it is of something else, or of another version.
    """
    values = json.loads(text)
    if not isinstance(values, dict) or values.get('format') != FORMAT:
      raise ValueError('it is of another version of this program')
    try:
      return cls(**values)
    except TypeError as error:
      raise ValueError(str(error)) from error

  def digest(self) -> str:
    """Identifies the tokens and their windows, not the names of the text."""
    values = dataclasses.asdict(self)
    for name in ('request', 'near_duplicates'):
      del values[name]
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
