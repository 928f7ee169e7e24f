"""The options of `python -m train sample`; nothing heavy is imported."""

import dataclasses
import math

from train.errors import UserError

_MAX_TOKENS = 10**6


@dataclasses.dataclass(frozen=True)
class Options:
  """What to generate."""

  prompt: str = ''
  """What the text begins with."""
  tokens: int = 100
  """At most this many are generated."""
  temperature: float = 0.8
  """0 takes the likeliest token; 1 draws from the model's distribution."""
  top_p: float = 0.95
  """Draws from the likeliest tokens that together have this probability."""
  seed: int = 0
  """Of the draws."""

  def __post_init__(self):
    """Checks the range of each field.

    Raises:
      UserError: naming the option that is out of range.
    """
    # The cache has room for all of them.
    if not 1 <= self.tokens <= _MAX_TOKENS:
      raise UserError(
        f'--tokens must be in [1, {_MAX_TOKENS}], not {self.tokens}'
      )
    if not 0 <= self.temperature < math.inf:
      raise UserError(
        f'--temperature must be 0 or more and finite, not {self.temperature}'
      )
    if not 0 < self.top_p <= 1:
      raise UserError(f'--top-p must be in (0, 1], not {self.top_p}')
    if not 0 <= self.seed < 2**32:
      raise UserError(f'--seed must be in [0, 2**32), not {self.seed}')
