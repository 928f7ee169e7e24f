"""Documents, tokenized once and kept as one array of tokens a split."""

import dataclasses
import hashlib
import json
import logging
import pathlib
import shutil
from collections.abc import Iterable, Iterator
from typing import BinaryIO

import numpy as np

from train import errors
from train.data import cache, corpora, split
from train.data import tokenizer as tokenizer_lib

_logger = logging.getLogger('train.data')

SPLITS = ('train', 'validation')
# Part of the key of every cached corpus; raise it when this file, the split,
# or the training of the vocabulary changes what is written.
_FORMAT = 1
_ENCODE_BATCH = 256


class _DamagedError(Exception):
  """A cached corpus that someone has altered."""


@dataclasses.dataclass(frozen=True)
class TokenCorpus:
  """Tokens of both splits, with the vocabulary that made them.

  A split's tokens are end-of-text, then each document with end-of-text after
  it, so that a document's first token has a context too.
  """

  tokenizer: tokenizer_lib.Tokenizer
  streams: dict[str, np.ndarray]
  """By split, unsigned integers (tokens,), memory-mapped."""
  documents: dict[str, int]
  """By split, the number of documents."""
  source_hash: str
  """sha256 of the tokens of both splits and the vocabulary."""


def prepare(
  documents: corpora.Documents,
  vocab_size: int,
  validation_fraction: float,
  cache_dir: pathlib.Path,
) -> TokenCorpus:
  """Returns the tokens of `documents`, from the cache where they are there.

  Training documents keep their order. Held-out ones are sorted by the hash of
  their text, so that the first of them are a fair sample.

  Args:
    documents: the texts.
    vocab_size: tokens wanted in a byte-level BPE vocabulary, which is trained
      on the training split alone.
    validation_fraction: share of documents held out, in (0, 1).
    cache_dir: the tokens are kept in its `tokens`, under a hash of all of the
      above.

  Raises:
    UserError: the documents cannot be read or changed meanwhile, or the cache
      cannot be written.
  """
  digest = documents.digest()
  key = hashlib.sha256(
    json.dumps([_FORMAT, digest, vocab_size, validation_fraction]).encode()
  ).hexdigest()[:32]
  directory = cache_dir / 'tokens' / key

  def build(temporary: pathlib.Path) -> None:
    _build(documents, vocab_size, validation_fraction, temporary)
    if documents.digest() != digest:
      raise errors.UserError(
        'the text changed while it was being read; run again'
      )

  if directory.is_dir():
    try:
      return _open(directory)
    except _DamagedError as damage:
      _logger.warning('building %s anew: %s', directory, damage)
      with cache.one_line_errors(directory):
        shutil.rmtree(directory)
  return _open(cache.build_once(directory, build))


def _open(directory: pathlib.Path) -> TokenCorpus:
  try:
    meta = json.loads((directory / 'meta.json').read_text())
    vocabulary = (directory / 'tokenizer.json').read_text('utf-8')
    if _sha256(vocabulary.encode()) != meta['tokenizer_sha256']:
      raise ValueError('tokenizer.json is not the one written')
    streams = {}
    for name in SPLITS:
      stream = np.load(directory / f'{name}.npy', mmap_mode='r')
      if stream.shape != (meta['tokens'][name],):
        raise ValueError(f'{name}.npy has the wrong length')
      streams[name] = stream.view(np.ndarray)
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise _DamagedError(error) from error
  return TokenCorpus(
    tokenizer=tokenizer_lib.ByteLevelBPE.from_json(vocabulary),
    streams=streams,
    documents=meta['documents'],
    source_hash=meta['source_hash'],
  )


def _sha256(content: bytes) -> str:
  return hashlib.sha256(content).hexdigest()


def _build(
  documents: corpora.Documents,
  vocab_size: int,
  fraction: float,
  directory: pathlib.Path,
) -> None:
  """Writes the vocabulary, both splits' tokens and a description of them."""
  training_texts = (
    text
    for text in documents
    if not split.is_held_out(split.text_hash(text), fraction)
  )
  _logger.info('training a byte-level BPE of %d tokens', vocab_size)
  tokenizer = tokenizer_lib.ByteLevelBPE.train(training_texts, vocab_size)
  if tokenizer.vocab_size < vocab_size:
    _logger.warning(
      'the text gives a vocabulary of %d tokens only', tokenizer.vocab_size
    )
  _logger.info('tokenizing')
  vocabulary = tokenizer.to_json()
  (directory / 'tokenizer.json').write_text(vocabulary, 'utf-8')
  dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
  boundary = np.asarray([tokenizer.end_of_text], dtype)
  held_out: list[tuple[bytes, np.ndarray]] = []
  trained_on = 0
  with open(directory / 'train.npy', 'wb') as file:
    writer = _TokenWriter(file, dtype)
    writer.write(boundary)
    for texts in _batches(documents, _ENCODE_BATCH):
      encoded = tokenizer.encode_batch(texts)
      for text, tokens in zip(texts, encoded, strict=True):
        document = np.append(np.asarray(tokens, dtype), boundary)
        text_hash = split.text_hash(text)
        if split.is_held_out(text_hash, fraction):
          held_out.append((text_hash, document))
        else:
          writer.write(document)
          trained_on += 1
    train_length, train_sha256 = writer.close()
  with open(directory / 'validation.npy', 'wb') as file:
    writer = _TokenWriter(file, dtype)
    writer.write(boundary)
    for _, document in sorted(held_out, key=lambda pair: pair[0]):
      writer.write(document)
    validation_length, validation_sha256 = writer.close()
  meta = {
    'documents': {'train': trained_on, 'validation': len(held_out)},
    'tokens': {'train': train_length, 'validation': validation_length},
    'tokenizer_sha256': _sha256(vocabulary.encode()),
    'source_hash': _sha256(
      json.dumps([tokenizer.digest(), train_sha256, validation_sha256]).encode()
    ),
  }
  (directory / 'meta.json').write_text(json.dumps(meta, indent=2))


def _batches(texts: Iterable[str], size: int) -> Iterator[list[str]]:
  batch = []
  for text in texts:
    batch.append(text)
    if len(batch) == size:
      yield batch
      batch = []
  if batch:
    yield batch


class _TokenWriter:
  """Writes an .npy file piece by piece, its length known only at the end."""

  def __init__(self, file: BinaryIO, dtype: np.dtype):
    self._file = file
    self._dtype = dtype
    self._length = 0
    self._sha256 = hashlib.sha256(str(dtype).encode())
    self._write_header()

  def _write_header(self) -> None:
    # NumPy pads the header with room for the length to grow in place.
    header = {
      'descr': np.lib.format.dtype_to_descr(self._dtype),
      'fortran_order': False,
      'shape': (self._length,),
    }
    np.lib.format.write_array_header_1_0(self._file, header)

  def write(self, tokens: np.ndarray) -> None:
    """Appends tokens (n,) of the writer's dtype."""
    self._file.write(tokens.data)
    self._sha256.update(tokens.data)
    self._length += len(tokens)

  def close(self) -> tuple[int, str]:
    """Completes the file; returns the number of tokens and their hash."""
    self._file.seek(0)
    self._write_header()
    return self._length, self._sha256.hexdigest()
