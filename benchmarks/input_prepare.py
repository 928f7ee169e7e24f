"""Preparing: text to token windows, against the tokenizer's library alone.

Processes that are started import this file: nothing in it needs jax.
"""

import contextlib
import dataclasses
import functools
import multiprocessing
import os
import pathlib
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection
from typing import Any
from unittest import mock

from train import errors
from train.data import (
  near_duplicates,
  source,
  split,
  stats,
  text_files,
  tiktoken_ranks,
)
from train.data import prepare as prepare_lib
from train.data import tokenizer as tokenizer_lib
from train.data.prepare import (
  files,
  find_duplicates,
  held_out,
  metadata,
  piece,
  progress,
  tokenize_part,
  write_records,
)

HELD_OUT = 0.005
"""Share of the documents."""
LENGTH = 256
"""T, of what is timed; in layout 'stream'."""

_BEFORE = 'before'
Encode = Callable[[Sequence[str]], Any]


def amount(pattern: str) -> dict[str, int]:
  """Returns `files`, `parts` and `bytes` of the text.

  Raises:
    UserError: there is none.
  """
  parts = text_files.TextFiles(pattern).parts()
  return {
    'files': len(text_files.find(pattern)),
    'parts': len(parts),
    'bytes': sum(part.size for part in parts),
  }


class Preparing:
  """Prepares a text with one tokenizer, again and again.

  Args:
    name: Of the tokenizer, for the result.
    tokenizer: It.
    pattern: The files of the text.
    scratch: Where to; removed again each time.
  """

  def __init__(
    self,
    name: str,
    tokenizer: tokenizer_lib.Tokenizer,
    pattern: str,
    scratch: pathlib.Path,
  ):
    self._name = name
    self._tokenizer = tokenizer
    self._pattern = pattern
    self._out = scratch / 'timed'
    self._tokens = 0

  def measure(
    self, workers: Sequence[int], rounds: int
  ) -> list[dict[str, Any]]:
    """Times it with different numbers of workers, in turn with the limit.

    Returns:
      One entry for each number: `tokenizer`, `workers`, `tokens`, those of the
      documents and their ends; `tokens_per_second` of the whole preparation;
      `limit`, the same of the library alone in as many processes; `ratio`, of
      their speeds, at most 1 where the library has no threads of its own; with
      quartiles; `stages`, seconds of the steps, with those to start processes.
      Medians over rounds.
    """
    stages: dict[int, list[dict[str, float]]] = {n: [] for n in workers}
    seconds: dict[int, list[float]] = {n: [] for n in workers}
    limits: dict[int, list[float]] = {n: [] for n in workers}
    with contextlib.ExitStack() as stack:
      bare = {
        n: stack.enter_context(_Bare(self._tokenizer, self._pattern, n))
        for n in workers
      }
      for number in range(rounds):
        for n in workers if number % 2 == 0 else reversed(workers):
          ours = functools.partial(self._prepare, n)
          for run in (ours, bare[n]) if number % 2 == 0 else (bare[n], ours):
            if run is ours:
              stages[n].append(ours())
              seconds[n].append(sum(stages[n][-1].values()))
            else:
              limits[n].append(bare[n]())
    return [self._entry(n, stages[n], seconds[n], limits[n]) for n in workers]

  def _entry(
    self,
    workers: int,
    stages: Sequence[dict[str, float]],
    seconds: Sequence[float],
    limits: Sequence[float],
  ) -> dict[str, Any]:
    ratios = sorted(
      limit / taken for limit, taken in zip(limits, seconds, strict=True)
    )
    low, high = ratios[0], ratios[-1]
    if len(ratios) > 1:
      low, _, high = statistics.quantiles(ratios, n=4, method='inclusive')
    return {
      'tokenizer': self._name,
      'workers': workers,
      'tokens': self._tokens,
      'tokens_per_second': self._tokens / statistics.median(seconds),
      'limit': self._tokens / statistics.median(limits),
      'ratio': statistics.median(ratios),
      'ratio_quartiles': [low, high],
      'stages': {
        name: statistics.median(each[name] for each in stages)
        for name in stages[0]
      },
    }

  def profile(self) -> dict[str, Any]:
    """Times the parts of one preparation in this process.

    Returns:
      `tokenizer`; `seconds` by part, each without the parts within it, and
      `cpu_seconds`, which threads of a library make more of.
    """
    clock = _Clock()
    timed = _TimedSource(text_files.TextFiles(self._pattern), clock)
    with contextlib.ExitStack() as stack:
      for name, owner, attribute in (
        ('tokenizing', type(self._tokenizer), 'encode_batch'),
        ('hashing texts', split, 'text_hash'),
        ('sketches', near_duplicates, 'sketch'),
        ('layout', tokenize_part, 'lay_out'),
        ('writing pieces', piece.Columns, 'append'),
        ('writing pieces', tokenize_part, 'joined'),
        ('syncing', files, 'sync'),
        ('held-out documents', held_out.LayOut, '__call__'),
        ('near-duplicates', find_duplicates.FindDuplicates, '__call__'),
        ('records', write_records.WriteRecords, '__call__'),
        ('metadata', metadata, 'write'),
      ):
        replaced = clock.timed(name, getattr(owner, attribute))
        stack.enter_context(mock.patch.object(owner, attribute, replaced))
      with clock.part('the rest'):
        self._run(timed, 1, progress.Progress())
    return {
      'tokenizer': self._name,
      'seconds': clock.seconds,
      'cpu_seconds': clock.cpu_seconds,
    }

  def _prepare(self, workers: int) -> dict[str, float]:
    """Prepares once; returns the seconds of each step."""
    steps = _Steps()
    found = self._run(text_files.TextFiles(self._pattern), workers, steps)
    self._tokens = sum(found.tokens.values())
    return steps.seconds()

  def _run(
    self, text: source.Source, workers: int, shown: progress.Progress
  ) -> stats.Stats:
    shutil.rmtree(self._out, ignore_errors=True)
    request = source.Request('stream', LENGTH, HELD_OUT)
    return prepare_lib.prepare(
      text,
      self._tokenizer,
      request,
      self._out,
      workers=workers,
      progress=shown,
    )


class _Steps(progress.Progress):
  """Notes when each step began; made just before the first."""

  def __init__(self):
    self._begun = [(_BEFORE, time.perf_counter())]

  def begin(self, what: str, size: int) -> None:
    self._begun.append((what, time.perf_counter()))

  def seconds(self) -> dict[str, float]:
    """Returns what each took; called when all are done."""
    ends = [when for _, when in self._begun[1:]] + [time.perf_counter()]
    return {
      what: end - when
      for (what, when), end in zip(self._begun, ends, strict=True)
    }


class _Clock:
  """Time by part of a program; of parts within parts, the inner one's."""

  def __init__(self):
    self.seconds: dict[str, float] = {}
    self.cpu_seconds: dict[str, float] = {}
    self._open: list[str] = []
    self._since = (0.0, 0.0)

  @contextlib.contextmanager
  def part(self, name: str) -> Iterator[None]:
    """What is done in the context belongs to a part."""
    self._turn()
    self._open.append(name)
    try:
      yield
    finally:
      self._turn()
      self._open.pop()

  def timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function or method that belongs to a part."""

    @functools.wraps(call)
    def timed_call(*args, **kwargs):
      with self.part(name):
        return call(*args, **kwargs)

    return timed_call

  def _turn(self) -> None:
    """Gives the time since the last turn to the innermost open part."""
    now = (time.perf_counter(), time.process_time())
    if self._open:
      name = self._open[-1]
      for table, end, begin in zip(
        (self.seconds, self.cpu_seconds), now, self._since, strict=True
      ):
        table[name] = table.get(name, 0.0) + end - begin
    self._since = now


@dataclasses.dataclass(frozen=True)
class _TimedSource:
  """A source whose reading is timed."""

  inner: source.Source
  clock: _Clock

  def parts(self) -> Sequence[source.Part]:
    return [_TimedPart(part, self.clock) for part in self.inner.parts()]

  def listing(self) -> list[list[str | int]]:
    return self.inner.listing()


@dataclasses.dataclass(frozen=True)
class _TimedPart:
  """A part whose reading is timed."""

  inner: source.Part
  clock: _Clock

  @property
  def name(self) -> str:
    return self.inner.name

  @property
  def size(self) -> int:
    return self.inner.size

  def digest(self) -> str:
    with self.clock.part('hashing files'):
      return self.inner.digest()

  def read(self, problems: source.Problems) -> Iterator[str]:
    texts = self.inner.read(problems)
    while True:
      with self.clock.part('reading'):
        text = next(texts, None)
      if text is None:
        return
      yield text


class _Bare:
  """Processes that hold a text, and encode it with the library when called.

  Each has one thread, and its share of the batches that the preparation makes;
  all of the text has to fit into memory.
  """

  def __init__(
    self, tokenizer: tokenizer_lib.Tokenizer, pattern: str, processes: int
  ):
    context = multiprocessing.get_context('spawn')
    self._pipes, self._processes = [], []
    for number in range(processes):
      pipe, far = context.Pipe()
      arguments = (
        tokenizer.file_name, tokenizer.content, pattern, number, processes, far,
      )  # fmt: skip
      made = context.Process(target=_encode_when_told, args=arguments)
      made.start()
      far.close()
      self._pipes.append(pipe)
      self._processes.append(made)

  def __enter__(self) -> '_Bare':
    for pipe in self._pipes:
      pipe.recv()
    self()  # Warm.
    return self

  def __call__(self) -> float:
    """Returns the seconds until all are done."""
    start = time.perf_counter()
    for pipe in self._pipes:
      pipe.send('')
    for pipe in self._pipes:
      pipe.recv()
    return time.perf_counter() - start

  def __exit__(self, *_) -> None:
    for pipe in self._pipes:
      pipe.close()
    for made in self._processes:
      made.join()


def _encode_when_told(
  file_name: str,
  content: bytes,
  pattern: str,
  number: int,
  processes: int,
  pipe: connection.Connection,
) -> None:
  os.environ['TOKENIZERS_PARALLELISM'] = 'false'
  encode = bare_encode(file_name, content)
  problems = source.Problems(skip=False)
  texts = (
    text
    for part in text_files.TextFiles(pattern).parts()
    for text in part.read(problems)
  )
  batches = [
    batch
    for i, batch in enumerate(tokenize_part.batches(texts))
    if i % processes == number
  ]
  with contextlib.suppress(EOFError, ConnectionError):
    while True:
      pipe.send('')
      pipe.recv()
      for batch in batches:
        encode(batch)


def bare_encode(file_name: str, content: bytes) -> Encode:
  """Returns a library's fastest way to the ids of some texts, in one thread.

  Args:
    file_name: `file_name` of a tokenizer.
    content: Its `content`.
  """
  if file_name == 'tokenizer.model':
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(content)
    return functools.partial(
      processor.Encode, return_type='numpy', num_threads=1
    )
  if file_name == 'tokenizer.tiktoken':
    import base64

    import tiktoken

    pairs = [line.split() for line in content.splitlines()]
    ranks = {base64.b64decode(token): int(rank) for token, rank in pairs}
    encoding = tiktoken.Encoding(
      'bare',
      pat_str=tiktoken_ranks.ENCODINGS[len(ranks)].pattern,
      mergeable_ranks=ranks,
      special_tokens={},
    )
    return lambda texts: [encoding.encode_ordinary(text) for text in texts]
  if file_name == 'tokenizer.json':
    import tokenizers

    made = tokenizers.Tokenizer.from_str(content.decode())
    return lambda texts: [
      encoded.ids
      for encoded in made.encode_batch_fast(texts, add_special_tokens=False)
    ]
  raise errors.UserError(f'no library is known for {file_name}')


def prepared(
  pattern: str,
  tokenizer: tokenizer_lib.Tokenizer,
  layout: str,
  length: int,
  workers: int,
  out: pathlib.Path,
) -> pathlib.Path:
  """Prepares the text once, untimed; returns `out`.

  Raises:
    UserError: as `prepare`.
  """
  prepare_lib.prepare(
    text_files.TextFiles(pattern),
    tokenizer,
    source.Request(layout, length, HELD_OUT),
    out,
    workers=workers,
  )
  return out
