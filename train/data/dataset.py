"""The data of a run: from a `DataConfig` to batches of tokens."""

import dataclasses
import functools
import hashlib
import json
import logging
import os
import pathlib
import shutil
from collections.abc import Sequence

from train import config as config_lib
from train import errors, storage
from train.data import (
  cache,
  corpora,
  layouts,
  loader,
  local_file,
  mixture,
  prepare,
  prepared,
  source,
  stats,
  text_files,
  tokenizer,
)

_logger = logging.getLogger('train.data')

# Text of more bytes is tokenized by a process a core: they take a second to
# start.
_SMALL = 2**25


@dataclasses.dataclass(frozen=True)
class Dataset:
  """Prepared windows of both splits, ready to be batched."""

  config: config_lib.DataConfig
  """Its layout is set, and the share held out is that of the data."""
  sources: Sequence[prepared.Prepared]
  """One, or those of a mixture, of one vocabulary, length and layout."""
  stages: Sequence[mixture.Stage]
  """What share of the rows is whose, and from which step on."""

  @property
  def tokenizer(self) -> tokenizer.Tokenizer:
    """The vocabulary."""
    return self.sources[0].tokenizer

  @property
  def documents(self) -> dict[str, int]:
    """Number of documents by split, 'train' and 'validation'."""
    return self._sums('documents')

  @property
  def tokens(self) -> dict[str, int]:
    """Number of tokens by split, with an end-of-text after each document."""
    return self._sums('tokens')

  @property
  def targets(self) -> dict[str, int]:
    """Number of tokens by split that a model is to predict."""
    return self._sums('targets')

  @property
  def source_hash(self) -> str:
    """Identifies text, vocabulary, split and mixture; a resume compares it."""
    digests = [place.stats.digest() for place in self.sources]
    if len(digests) == 1:
      return digests[0]
    stages = [dataclasses.astuple(stage) for stage in self.stages]
    return hashlib.sha256(json.dumps([digests, stages]).encode()).hexdigest()

  def train(self, seed: int) -> loader.Batches:
    """Returns batches without end; batch i depends on (seed, i) alone.

    Args:
      seed: any integer from 0.
    """
    return loader.Batches(
      self._train_windows,
      self.config.batch_size,
      seed,
      [(stage.first_step, stage.weights) for stage in self.stages],
    )

  def check_steps(self, steps: int) -> None:
    """Checks that so many steps are allowed to have their batches.

    Raises:
      UserError: they need more than the text, which may not be repeated.
    """
    if self.config.repeat:
      return
    taken = self.train(seed=0).taken(steps)
    for place, rows in zip(self.sources, taken, strict=True):
      windows = place.stats.windows['train']
      if rows > windows:
        raise errors.UserError(
          f'--steps ({steps:,}) x --data.batch_size'
          f' ({self.config.batch_size:,}) needs {rows:,} windows, the training'
          f' split has {windows:,}: lower --steps to'
          f' {steps * windows // rows:,}, give more text, or let it be read'
          ' again with --data.repeat true'
        )

  def validation(self) -> list[dict]:
    """Returns the fixed batches that every evaluation scores.

    They have 'weights' always: a target of weight 0 is padding.
    """
    return loader.validation_batches(
      self._windows('validation'),
      self.config.batch_size,
      self.config.validation_tokens,
    )

  @functools.cached_property
  def _train_windows(self) -> list[prepared.Windows]:
    """Opened once: of a large corpus that takes a look at every file."""
    return self._windows('train')

  def _windows(self, split: str) -> list[prepared.Windows]:
    windows = [place.windows(split) for place in self.sources]
    for each in windows:  # A stream's can be read in two ways.
      each.layout = self.config.layout
    return windows

  def _sums(self, name: str) -> dict[str, int]:
    return {
      split: sum(getattr(place.stats, name)[split] for place in self.sources)
      for split in stats.SPLITS
    }


def load(
  config: config_lib.DataConfig,
  cache_dir: str | os.PathLike | None = None,
) -> Dataset:
  """Opens prepared data, or prepares text, or finds that done in the cache.

  The user's files are hashed whole every time, so the cache is never stale.

  Args:
    config: what to read.
    cache_dir: where to keep the results; by default
      `cache.default_directory()`.

  Raises:
    UserError: the text cannot be had or read, it is too short for one batch
      or one held-out window, or the cache cannot be written.
  """
  if config.prepared:
    spec = mixture.parse(config.prepared)
    sources, stages = prepared.open_all(spec.directories), spec.stages
    ways = sorted({place.stats.layout for place in sources})
    if not config.layout and len(ways) > 1:
      raise errors.UserError(
        f'--data.prepared mixes {" and ".join(ways)}: say which with'
        ' --data.layout'
      )
  else:
    if cache_dir is None:
      cache_dir = cache.default_directory()
    directory = pathlib.Path(cache_dir).expanduser().absolute()
    local_file.check_name(directory, 'the data cache')
    sources = [_from_text(config, directory)]
    stages = (mixture.Stage(0, (1.0,)),)
  dataset = Dataset(_resolved(config, sources[0]), sources, stages)
  _check_length(dataset)
  for name in stats.SPLITS:
    _logger.info(
      '%s: %s documents, %s tokens, %s targets',
      name,
      f'{dataset.documents[name]:,}',
      f'{dataset.tokens[name]:,}',
      f'{dataset.targets[name]:,}',
    )
  return dataset


def _from_text(
  config: config_lib.DataConfig, directory: pathlib.Path
) -> prepared.Prepared:
  """Prepares a config's text in the cache."""
  text = (
    text_files.TextFiles(
      config.files, config.text_field, ('--data.files', '--data.text_field')
    )
    if config.files
    else corpora.open_corpus(config.corpus, directory, '--data.corpus')
  )
  vocabulary: tokenizer.Tokenizer | int = config.vocab_size
  if config.tokenizer:
    vocabulary = tokenizer.open_tokenizer(config.tokenizer, '--data.tokenizer')
  request = source.Request(
    layout=layouts.stored(config.layout or 'stream'),
    sequence_length=config.sequence_length,
    validation_fraction=config.validation_fraction,
    skip_bad=config.skip_bad,
  )
  parts = text.parts()
  key = [
    stats.FORMAT,
    'one byte order mark',  # Older versions kept it in JSON lines.
    [part.digest() for part in parts],
    vocabulary if isinstance(vocabulary, int) else vocabulary.digest(),
    dataclasses.astuple(request),
  ]
  name = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]
  small = sum(part.size for part in parts) < _SMALL

  def build(temporary: pathlib.Path) -> None:
    try:
      prepare.prepare(
        text,
        vocabulary,
        request,
        temporary,
        workers=1 if small else os.cpu_count() or 1,
      )
    except errors.UserError as error:
      cause = error.__cause__
      if cause and storage.is_full(cause):
        raise cause from None  # The cache says what helps there.
      raise

  target = directory / 'prepared' / name
  try:
    return prepared.Prepared(cache.build_once(target, build))
  except prepared.DamagedError as damage:
    _logger.warning('building %s anew: %s', target, damage)
    with cache.one_line_errors(target):
      shutil.rmtree(target)
    return prepared.Prepared(cache.build_once(target, build))


def _resolved(
  config: config_lib.DataConfig, found: prepared.Prepared
) -> config_lib.DataConfig:
  """Sets the layout and the held-out share of the data; checks the windows."""
  there = found.stats
  layout = config.layout or (there.layout if config.prepared else 'stream')
  give, prepare_with = [], []
  if there.sequence_length != config.sequence_length:
    give.append(f'--data.sequence_length {there.sequence_length}')
    prepare_with.append(f'--seq {config.sequence_length}')
  if layouts.stored(layout) != layouts.stored(there.layout):
    give.append(f'--data.layout {there.layout}')
    prepare_with.append(f'--layout {layout}')
  if give:
    raise errors.UserError(
      f'{config.prepared} holds windows of {there.sequence_length} tokens in'
      f' the layout {there.layout}: give {" ".join(give)}, or prepare with'
      f' {" ".join(prepare_with)}'
    )
  return dataclasses.replace(
    config, layout=layout, validation_fraction=there.validation_fraction
  )


def _check_length(dataset: Dataset) -> None:
  config = dataset.config
  if len(dataset.sources) == 1:  # Of several each gives what it has.
    stats_of = dataset.sources[0].stats
    windows = stats_of.windows['train']
    if windows < config.batch_size:
      raise errors.UserError(
        f'the training split has {windows:,} windows of'
        f' {config.sequence_length} tokens'
        f' ({stats_of.documents["train"]:,} documents), one batch needs'
        f' {config.batch_size:,}: give more text, or lower --data.batch_size'
        ' or --data.sequence_length'
      )
