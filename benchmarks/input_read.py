"""Reading: prepared windows to batches, against TFDS, Grain and two limits."""

import contextlib
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np
import tensorflow_datasets as tfds

from benchmarks import input_prepare
from train.data import layouts, loader, prefetch
from train.data import prepared as prepared_lib
from train.data import tokenizer as tokenizer_lib

LAYOUTS = layouts.LAYOUTS
ROWS, PREFETCH = 'rows', 'prefetch'
RECORDS, GATHER = 'records', 'gather'
SINGLE = 'TFDS, single reads'
BY_INDEX = 'Grain, by index'
ITERATOR = 'Grain, iterator'
AHEAD = 'Grain, batches ahead'
# What each peer is to be compared with: one thread that reads, or several.
AGAINST = {
  SINGLE: ROWS,
  BY_INDEX: ROWS,
  ITERATOR: PREFETCH,
  AHEAD: PREFETCH,
  RECORDS: ROWS,
  GATHER: ROWS,
}

_SAMPLE_SECONDS = 0.3
_READ_AT_ONCE = 4096
_CHOSEN = 256
# As many as `Prefetch` has.
_AHEAD = grain.ReadOptions(num_threads=2, prefetch_buffer_size=4)

Take = Callable[[int], Any]
Program = Callable[[int], contextlib.AbstractContextManager[Take]]
"""Opens a reader, of other batches for other numbers; it gives batch i."""
Directories = Mapping[tuple[str, int], pathlib.Path]


def prepare(
  pattern: str,
  tokenizer: tokenizer_lib.Tokenizer,
  shapes: Sequence[tuple[int, int]],
  workers: int,
  scratch: pathlib.Path,
) -> dict[tuple[str, int], pathlib.Path]:
  """Prepares each layout for each T; 'random' has the records of 'stream'.

  Raises:
    UserError: the text is too little.
  """
  found: dict[tuple[str, int], pathlib.Path] = {}
  for length in dict.fromkeys(length for _, length in shapes):
    for layout in LAYOUTS:
      if layout == 'random':
        found[layout, length] = found['stream', length]
        continue
      found[layout, length] = input_prepare.prepared(
        pattern, tokenizer, layout, length, workers,
        scratch / f'{layout}-{length}',
      )  # fmt: skip
  return found


def measure(
  directories: Directories,
  layout: str,
  shape: tuple[int, int],
  rounds: int,
  scratch: pathlib.Path,
) -> dict[str, Any]:
  """Times the readers of one layout, in turn.

  Args:
    directories: What `prepare` gave.
    layout: One of `LAYOUTS`.
    shape: B rows of T tokens.
    rounds: Samples of each.
    scratch: Where the array goes that is gathered from.

  Returns:
    `layout`, `batch`, `length`, `windows`, and `tokens_per_second`, medians by
    reader: `ROWS`, the loader's in one thread, `PREFETCH`, through threads, and
    the peers, which give the arrays as they are stored; `RECORDS`, ArrayRecord
    alone, which gives bytes; `GATHER`, from an array. A batch counts as B x T
    tokens. `ratios`: by peer, the loader's speed to the peer's, with quartiles.
  """
  batch, length = shape
  directory = directories[layout, length]
  windows = prepared_lib.Prepared(directory).windows('train')
  windows.layout = layout
  made = programs(directory, windows, batch, scratch)
  taken: dict[str, list[float]] = {name: [] for name in made}
  for number in range(rounds):
    for name in made if number % 2 == 0 else reversed(made):
      speed = _batches_per_second(made[name], number)
      taken[name].append(speed * batch * length)
  return {
    'layout': layout,
    'batch': batch,
    'length': length,
    'windows': len(windows),
    'tokens_per_second': {
      name: statistics.median(speeds) for name, speeds in taken.items()
    },
    'ratios': {
      name: _ratio(taken[AGAINST[name]], taken[name])
      for name in made
      if name in AGAINST
    },
  }


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, Any]:
  ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
  low, middle, high = np.quantile(ratios, [0.25, 0.5, 0.75]).tolist()
  return {'ratio': middle, 'quartiles': [low, high]}


def _batches_per_second(program: Program, number: int) -> float:
  """Reads for a while, after a batch that is not timed."""
  with program(number) as take:
    take(0)
    count = 0
    start = time.perf_counter()
    while (taken := time.perf_counter() - start) < _SAMPLE_SECONDS:
      count += 1
      take(count)
  return count / taken


def programs(
  directory: pathlib.Path,
  windows: prepared_lib.Windows,
  batch: int,
  scratch: pathlib.Path,
) -> dict[str, Program]:
  """Returns the readers by name, the loader's first.

  Layout 'random' has the gather alone beside it: the others give records.
  """
  batches = loader.Batches([windows], batch, seed=0)
  rows = range(batch)
  read = lambda i: batches.rows(i, rows)
  far = 1000  # Batches: another sample, other batches.

  @contextlib.contextmanager
  def one_thread(number: int) -> Iterator[Take]:
    yield lambda i: read(far * number + i)

  @contextlib.contextmanager
  def ahead(number: int) -> Iterator[Take]:
    with prefetch.Prefetch(read, far * number) as reader:
      yield lambda i: reader.next(far * number + i)

  made: dict[str, Program] = {ROWS: one_thread, PREFETCH: ahead}
  made[GATHER] = gather(windows, batch, scratch / 'gathered.npy')
  if windows.layout != 'random':
    data_source = tfds.builder_from_directory(directory).as_data_source('train')
    made |= _peers(data_source, batch)
  return made


def gather(
  windows: prepared_lib.Windows, batch: int, path: pathlib.Path
) -> Program:
  """The limit: int32 rows out of one array, their places known beforehand."""
  pieces = [
    windows.__getitems__(range(i, min(i + _READ_AT_ONCE, len(windows))))
    for i in range(0, len(windows), _READ_AT_ONCE)
  ]
  tokens = np.concatenate([piece['tokens'] for piece in pieces])
  places = len(windows)
  if windows.layout == 'random':
    places = windows.starts
    tokens = np.append(tokens[:, :-1].ravel(), tokens[-1, -1])
  np.save(path, tokens)
  mapped: np.ndarray = np.load(path, mmap_mode='r')
  if windows.layout == 'random':
    mapped = np.lib.stride_tricks.sliding_window_view(
      mapped, windows.length + 1
    )

  @contextlib.contextmanager
  def program(number: int) -> Iterator[Take]:
    chosen = _chosen(places, batch, number)
    yield lambda i: mapped[chosen[i % len(chosen)]].astype(np.int32)

  return program


def _chosen(places: int, batch: int, number: int) -> np.ndarray:
  """Returns places at random, those of some batches: (`_CHOSEN`, B)."""
  rng = np.random.default_rng(number)
  return rng.integers(places, size=(_CHOSEN, batch))


def _peers(data_source: Any, batch: int) -> dict[str, Program]:
  """Those that read records."""

  def dataset(number: int) -> Any:
    source = grain.MapDataset.source(data_source)
    return source.shuffle(seed=number).repeat()

  @contextlib.contextmanager
  def records(number: int) -> Iterator[Take]:
    chosen = _chosen(len(data_source), batch, number).tolist()
    array_records = data_source.data_source
    yield lambda i: array_records.__getitems__(chosen[i % len(chosen)])

  @contextlib.contextmanager
  def single(number: int) -> Iterator[Take]:
    chosen = _chosen(len(data_source), batch, number).tolist()

    def take(i: int) -> dict[str, np.ndarray]:
      rows = [data_source[place] for place in chosen[i % len(chosen)]]
      return {name: np.stack([row[name] for row in rows]) for name in rows[0]}

    yield take

  @contextlib.contextmanager
  def by_index(number: int) -> Iterator[Take]:
    batches = dataset(number).batch(batch)
    yield lambda i: batches[i]

  @contextlib.contextmanager
  def iterator(number: int) -> Iterator[Take]:
    opened = iter(dataset(number).to_iter_dataset().batch(batch))
    with contextlib.closing(opened):
      yield lambda i: next(opened)

  @contextlib.contextmanager
  def ahead(number: int) -> Iterator[Take]:
    opened = iter(dataset(number).batch(batch).to_iter_dataset(_AHEAD))
    with contextlib.closing(opened):
      yield lambda i: next(opened)

  return {
    RECORDS: records,
    SINGLE: single,
    BY_INDEX: by_index,
    ITERATOR: iterator,
    AHEAD: ahead,
  }
