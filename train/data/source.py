"""Where text comes from: parts that are read on their own, in a fixed order.

A part is what one worker reads at a time. How a source is cut into parts
depends on the source alone, never on how many workers there are.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Protocol

from train import errors

LARGEST = 2**24
"""Characters of a document; a longer one is hardly a document."""

HINT = (
  '--skip-bad (of a run, --data.skip_bad) leaves such documents out, and'
  ' counts them'
)


class Problems:
  """What is wrong with the input: an error, or left out and counted.

  Args:
    skip: Whether to leave bad documents out.
  """

  KINDS = ('encoding', 'json', 'field', 'empty', 'giant', 'truncated')

  def __init__(self, skip: bool):
    self._skip = skip
    self.counts: dict[str, int] = {}
    """Documents left out, by kind; for 'truncated', files."""
    self.first: list[str] = []
    """What was said of the first few."""

  def found(self, kind: str, message: str) -> None:
    """Takes note of a document that cannot be used.

    Args:
      kind: One of `KINDS`.
      message: One line, which begins with file and line.

    Raises:
      UserError: bad documents are not to be left out.
    """
    if kind not in self.KINDS:
      raise ValueError(f'no such kind: {kind}')
    if not self._skip:
      raise errors.UserError(f'{message}; {HINT}')
    self.counts[kind] = self.counts.get(kind, 0) + 1
    if len(self.first) < 5:
      self.first.append(message)


class Part(Protocol):
  """Some documents of a source. It can be pickled."""

  @property
  def name(self) -> str:
    """What it is, for people: a file, and where in it."""

  @property
  def size(self) -> int:
    """Bytes to read, more or less: for the progress."""

  def digest(self) -> str:
    """Returns a hash of its content and of how it is read.

    Raises:
      UserError: it cannot be read.
    """

  def read(self, problems: Problems) -> Iterator[str]:
    """Reads the documents; none is blank.

    Raises:
      UserError: it cannot be read, or as `problems.found`.
    """


class Source(Protocol):
  """A corpus, which can be read again and again."""

  def parts(self) -> Sequence[Part]:
    """Returns the parts, in order; at least one.

    Raises:
      UserError: there are none.
    """

  def listing(self) -> list[list[str | int]]:
    """Returns what tells, without reading, that it is the same again.

    Names and sizes, without directories or dates: in JSON.
    """


@dataclasses.dataclass(frozen=True)
class Request:
  """What `train.data.prepare` is to make of a source and a tokenizer."""

  layout: str
  """One of `train.data.layouts.LAYOUTS`."""
  sequence_length: int
  """T, tokens that the model sees at once."""
  validation_fraction: float
  """Share of documents, by the hash of their text, held out; in (0, 1)."""
  skip_bad: bool = False
  """Whether bad documents are left out, instead of an error."""
