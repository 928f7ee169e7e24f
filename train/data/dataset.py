"""The data of a run: from a `DataConfig` to batches of tokens."""

import dataclasses
import logging
import os
import pathlib

from train import config as config_lib
from train import errors
from train.data import cache, corpora, corpus, loader, tokenizer

_logger = logging.getLogger('train.data')


@dataclasses.dataclass(frozen=True)
class Dataset:
  """Tokens of both splits, ready to be batched."""

  config: config_lib.DataConfig
  corpus: corpus.TokenCorpus

  @property
  def tokenizer(self) -> tokenizer.Tokenizer:
    """The vocabulary."""
    return self.corpus.tokenizer

  @property
  def vocab_size(self) -> int:
    """Tokens in the vocabulary, fewer than asked where the text is small."""
    return self.tokenizer.vocab_size

  @property
  def documents(self) -> dict[str, int]:
    """Number of documents by split, 'train' and 'validation'."""
    return dict(self.corpus.documents)

  @property
  def tokens(self) -> dict[str, int]:
    """Number of tokens by split, with an end-of-text around each document."""
    return {name: len(s) for name, s in self.corpus.streams.items()}

  @property
  def source_hash(self) -> str:
    """Identifies text, vocabulary and split; a resumed run compares it."""
    return self.corpus.source_hash

  def train(self, seed: int) -> loader.Batches:
    """Returns batches without end; batch i depends on (seed, i) alone.

    Args:
      seed: any integer from 0.

    Returns:
      An object whose item i is `{'tokens': int32 (B, T + 1)}`: inputs are
      `tokens[:, :-1]`, targets `tokens[:, 1:]`.
    """
    windows = self._train_windows
    return loader.Batches(windows, self.config.batch_size, seed)

  def check_steps(self, steps: int) -> None:
    """Checks that so many steps are allowed to have their batches.

    Raises:
      UserError: they need more than the text, which may not be repeated.
    """
    windows, size = len(self._train_windows), self.config.batch_size
    if not self.config.repeat and steps * size > windows:
      raise errors.UserError(
        f'--steps ({steps:,}) x --data.batch_size ({size:,}) needs'
        f' {steps * size:,} windows, the training split has {windows:,}: lower'
        f' --steps to {windows // size:,}, give more text, or let it be read'
        ' again with --data.repeat true'
      )

  def validation(self) -> list[dict]:
    """Returns the fixed batches that every evaluation scores.

    Returns:
      A list of `{'tokens': int32 (B, T + 1), 'weights': float32 (B, T)}`; a
      target of weight 0 is padding.
    """
    return loader.validation_batches(
      self.corpus.streams['validation'],
      self.config.sequence_length,
      self.config.batch_size,
      self.config.validation_tokens,
    )

  @property
  def _train_windows(self) -> loader.Windows:
    return loader.Windows(
      self.corpus.streams['train'], self.config.sequence_length
    )


def load(
  config: config_lib.DataConfig,
  cache_dir: str | os.PathLike | None = None,
) -> Dataset:
  """Reads, splits and tokenizes the text, or finds that done in the cache.

  The user's files are hashed whole every time, so the cache is never stale.

  Args:
    config: what to read.
    cache_dir: where to keep the results; by default
      `cache.default_directory()`.

  Raises:
    UserError: the text cannot be had or read, it is too short for one batch
      or one held-out window, or the cache cannot be written.
  """
  if cache_dir is None:
    cache_dir = cache.default_directory()
  directory = pathlib.Path(cache_dir).expanduser().absolute()
  documents = corpora.open_documents(config, directory)
  dataset = Dataset(
    config,
    corpus.prepare(
      documents, config.vocab_size, config.validation_fraction, directory
    ),
  )
  _check_length(dataset)
  for name in corpus.SPLITS:
    _logger.info(
      '%s: %s documents, %s tokens',
      name,
      f'{dataset.documents[name]:,}',
      f'{dataset.tokens[name]:,}',
    )
  return dataset


def _check_length(dataset: Dataset) -> None:
  config = dataset.config
  needed = config.batch_size * config.sequence_length + 1
  if dataset.tokens['train'] < needed:
    raise errors.UserError(
      f'the training split has {dataset.tokens["train"]:,} tokens'
      f' ({dataset.documents["train"]:,} documents), one batch needs'
      f' {needed:,}: give more text with --data.files, or lower'
      ' --data.batch_size or --data.sequence_length'
    )
  needed = config.sequence_length + 1
  if dataset.tokens['validation'] < needed:
    raise errors.UserError(
      f'the validation split has {dataset.tokens["validation"]:,} tokens'
      f' ({dataset.documents["validation"]:,} documents), one window needs'
      f' {needed:,}: raise --data.validation_fraction, lower'
      ' --data.sequence_length, or give more text with --data.files'
    )
