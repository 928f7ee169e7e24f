"""The first step: a part of the text becomes tokens of both splits."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from train import errors
from train.data import layouts, near_duplicates, source, split
from train.data import tokenizer as tokenizer_lib
from train.data.prepare import files, piece

Count = Callable[[int, int], None]
"""Takes tokens and bytes that were just dealt with, for the progress."""

HASHES, LENGTHS, HELD_OUT = 'hashes', 'lengths', 'held_out'
"""Of the held-out documents: sha256, tokens of each, tokens."""

SKETCHES, COUNTS = 'sketches', 'sketch_counts'
"""Of each split's documents, after its name: for near-duplicates."""

# A batch is what the tokenizer is given at once. A group is what is laid out,
# and written, at once: of documents, or of fewer with very many tokens.
_BATCH_DOCUMENTS = 256
_BATCH_CHARACTERS = 2**20
GROUP_TOKENS = 2**23


@dataclasses.dataclass(frozen=True)
class Task:
  """A part, and what is known of it."""

  number: int
  part: source.Part
  digest: str = ''
  """What it must have; empty where that is not known."""

  @property
  def size(self) -> int:
    """Bytes, more or less."""
    return self.part.size

  @property
  def name(self) -> str:
    """Of its piece."""
    return f'part-{self.number:05d}'


@dataclasses.dataclass(frozen=True)
class TokenizePart:
  """Writes the piece of a part, unless that is there."""

  tokenizer: tokenizer_lib.Tokenizer
  request: source.Request
  dtype: np.dtype
  work: pathlib.Path

  def __call__(self, task: Task, count: Count) -> None:
    """Raises: UserError: the part cannot be read, or the disk written."""
    digest = task.part.digest()
    if task.digest not in ('', digest):
      raise changed(task.part)
    path = self.work / task.name
    if path.is_dir():
      summary = piece.summary(path)
      if summary.digest != digest:
        raise changed(task.part)
      if self.request.skip_bad or not summary.skipped:
        count(0, task.size)
        return
    with files.writing(self.work.parent), files.new_directory(path) as new:
      self._write(task, digest, new, count)

  def _write(
    self, task: Task, digest: str, path: pathlib.Path, count: Count
  ) -> None:
    problems = source.Problems(self.request.skip_bad)
    summary = piece.Summary(
      digest=digest,
      documents=dict.fromkeys(('train', 'validation'), 0),
      tokens=dict.fromkeys(('train', 'validation'), 0),
    )
    left = task.size
    with piece.Columns(path) as columns:
      out = Group(self, columns, summary, leading_end=task.number == 0)
      for texts in batches(task.part.read(problems)):
        encoded = self.tokenizer.encode_batch(texts)
        tokens = 0
        for text, ids in zip(texts, encoded, strict=True):
          out.add(split.text_hash(text), np.asarray(ids, self.dtype))
          tokens += len(ids) + 1
        # Of a compressed file it is the text that is counted: too early.
        read = min(left, sum(map(len, texts)))
        left -= read
        count(tokens, read)
      out.flush()
    count(0, left)
    summary.skipped = problems.counts
    summary.problems = problems.first
    summary.write(path)


class Group:
  """Documents on their way to a piece, some thousands at a time."""

  def __init__(
    self,
    job: TokenizePart,
    columns: piece.Columns,
    summary: piece.Summary,
    leading_end: bool,
  ):
    self._request = job.request
    self._end = job.tokenizer.end_of_text
    self._dtype = job.dtype
    self._columns = columns
    self._summary = summary
    self._train: list[np.ndarray] = []
    self._held_out: list[tuple[bytes, np.ndarray]] = []
    self._tokens = 0
    if leading_end and job.request.layout in layouts.CONTIGUOUS:
      # The first document's first token has a context too.
      columns.append({'tokens': np.asarray([self._end], self._dtype)})
      summary.units += 1

  def add(self, text_sha256: bytes, tokens: np.ndarray) -> None:
    """Takes a document to its split."""
    if split.is_held_out(text_sha256, self._request.validation_fraction):
      self._held_out.append((text_sha256, tokens))
    else:
      self._train.append(tokens)
    self._tokens += len(tokens)
    if (
      self._tokens >= GROUP_TOKENS
      or len(self._train) == layouts.GROUP
      or len(self._held_out) == layouts.GROUP
    ):
      self.flush()

  def flush(self) -> None:
    """Writes what it holds."""
    tokens, lengths = joined(self._train, self._dtype)
    self._note('train', tokens, lengths)
    self._columns.append(
      lay_out(self._request, tokens, lengths, self._end, self._summary)
    )
    tokens, lengths = joined([t for _, t in self._held_out], self._dtype)
    self._note('validation', tokens, lengths)
    hashes = b''.join(text_sha256 for text_sha256, _ in self._held_out)
    self._columns.append(
      {
        HASHES: np.frombuffer(hashes, np.uint8),
        LENGTHS: lengths,
        HELD_OUT: tokens,
      }
    )
    self._train, self._held_out, self._tokens = [], [], 0

  def _note(self, name: str, tokens: np.ndarray, lengths: np.ndarray) -> None:
    self._summary.documents[name] += len(lengths)
    self._summary.tokens[name] += len(tokens) + len(lengths)
    found = near_duplicates.sketch(tokens, lengths)
    self._columns.append(
      {
        f'{name}_{SKETCHES}': found.values,
        f'{name}_{COUNTS}': found.counts,
      }
    )


def sketches(
  path: pathlib.Path, name: str, documents: int = -1
) -> near_duplicates.Sketches:
  """Returns the sketches of a split's first documents in a piece; -1: all."""
  counts = piece.column(path, f'{name}_{COUNTS}', np.int64, 0, documents)
  values = piece.column(
    path, f'{name}_{SKETCHES}', np.uint64, 0, int(counts.sum())
  )
  return near_duplicates.Sketches(values, counts)


def lay_out(
  request: source.Request,
  tokens: np.ndarray,
  lengths: np.ndarray,
  end: int,
  summary: piece.Summary,
) -> dict[str, np.ndarray]:
  """Returns the columns that documents give, and counts what is in them."""
  if request.layout in layouts.CONTIGUOUS:
    stream = layouts.contiguous(tokens, lengths, end)
    summary.units += len(stream)
    return {'tokens': stream}
  if not len(lengths):
    return {}
  rows = layouts.rows(
    request.layout, tokens, lengths, end, request.sequence_length
  )
  summary.units += len(rows['tokens'])
  summary.targets += layouts.targets(request.layout, rows)
  return rows


def joined(
  documents: Sequence[np.ndarray], dtype: np.dtype
) -> tuple[np.ndarray, np.ndarray]:
  """Returns documents' tokens (N,), one after another, and lengths (D,)."""
  lengths = np.asarray([len(tokens) for tokens in documents], np.int64)
  if not documents:
    return np.zeros(0, dtype), lengths
  return np.concatenate(documents), lengths


def batches(texts: Iterable[str]) -> Iterator[list[str]]:
  """Puts texts together for the tokenizer."""
  batch: list[str] = []
  characters = 0
  for text in texts:
    batch.append(text)
    characters += len(text)
    if len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
      yield batch
      batch, characters = [], 0
  if batch:
    yield batch


def changed(part: source.Part) -> errors.UserError:
  """What to say where a part is not what it was when this was begun."""
  return errors.UserError(
    f'{part.name} has changed since the directory was begun: remove that, and'
    ' begin anew'
  )
