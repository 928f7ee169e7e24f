"""What a run is: frozen dataclasses, checked before anything is compiled.

A recipe (`train/recipes.py`) is a function that returns a `Config`; every
field is also a command-line option, `--path.to.field VALUE` (`train/cli.py`).
"""

import dataclasses

from train import errors

# 256 bytes and the end-of-text token.
_MIN_VOCAB_SIZE = 257


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where the text comes from and how it becomes batches."""

  files: str = ''
  """Glob of .txt, .jsonl or .json files ('**' recurses); empty: the corpus.
  A .json file holds one object a line, as .jsonl does."""
  corpus: str = 'wikipedia_leads'
  """A corpus known by name (`train/data/corpora.py`), where files is empty."""
  text_field: str = 'text'
  """Key of the text in a line of JSON."""
  vocab_size: int = 2048
  """Tokens in the byte-level BPE vocabulary trained on the train split: at
  least 257, the bytes and end-of-text."""
  sequence_length: int = 128
  """Tokens that the model sees at once."""
  batch_size: int = 16
  """Sequences in a global batch."""
  validation_fraction: float = 0.05
  """Share of documents, chosen by a hash of their text, held out."""
  validation_tokens: int = 65536
  """At most this many held-out tokens are scored at each evaluation."""

  def __post_init__(self):
    """Checks the range of each field.

    Raises:
      UserError: naming the option that is out of range.
    """
    for name, least in (
      ('vocab_size', _MIN_VOCAB_SIZE),
      ('sequence_length', 1),
      ('batch_size', 1),
      ('validation_tokens', 1),
    ):
      value = getattr(self, name)
      if value < least:
        raise errors.UserError(
          f'--data.{name} must be at least {least}, not {value}'
        )
    if not 0 < self.validation_fraction < 1:
      raise errors.UserError(
        '--data.validation_fraction must be between 0 and 1, both excluded,'
        f' not {self.validation_fraction}'
      )
    if not self.text_field:
      raise errors.UserError('--data.text_field must not be empty')
