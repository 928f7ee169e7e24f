"""Prepared directories of given rows, and splits that are held in memory."""

import hashlib
import pathlib

import numpy as np
from array_record.python import array_record_module

from train.data import layouts, source, stats
from train.data import tokenizer as tokenizer_lib
from train.data.prepare import metadata, plan, records

OPTIONS = 'group_size:1,uncompressed'


def stream_rows(tokens, length):
  """Windows of a stream, as the contiguous layouts store them."""
  count = (len(tokens) - 1) // length
  index = np.arange(count)[:, None] * length + np.arange(length + 1)
  return {'tokens': np.asarray(tokens)[index]}


def document_rows(layout, lengths, length, dtype=np.uint16):
  """Rows of documents of so many tokens; token i of the text is i + 1."""
  lengths = np.asarray(lengths, np.int64)
  tokens = np.arange(1, lengths.sum() + 1).astype(dtype)
  return layouts.rows(layout, tokens, lengths, 0, length)


def make(
  directory,
  rows,
  *,
  layout,
  length,
  per_file=1000,
  tokenizer=None,
  vocab_size=300,
):
  """Writes what `prepare` would of `rows`, arrays by split."""
  directory = pathlib.Path(directory)
  directory.mkdir(parents=True)
  request = source.Request(layout, length, 0.1)
  dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)
  serializer = records.Serializer(layout, length, dtype)
  shards, sizes = {}, {}
  for split, arrays in rows.items():
    count = len(arrays['tokens'])
    files = -(-count // per_file)
    shards[split] = [
      plan.Shard(split, i, files, start, min(start + per_file, count), 0)
      for i, start in enumerate(range(0, count, per_file))
    ]
    for shard in shards[split]:
      path = directory / shard.name
      writer = array_record_module.ArrayRecordWriter(str(path), OPTIONS)
      some = {n: a[shard.start : shard.stop] for n, a in arrays.items()}
      for record in serializer.records(some):
        writer.write(record)
      writer.close()
      sizes[shard.name] = path.stat().st_size
  metadata.write(directory, request, dtype, shards)
  content = tokenizer.content if tokenizer else b'none'
  name = tokenizer.file_name if tokenizer else 'tokenizer.json'
  (directory / name).write_bytes(content)
  made = stats.Stats(
    format=stats.FORMAT,
    layout=layout,
    sequence_length=length,
    documents=dict.fromkeys(rows, 1),
    tokens={split: arrays['tokens'].size for split, arrays in rows.items()},
    windows={split: len(arrays['tokens']) for split, arrays in rows.items()},
    targets={split: layouts.targets(layout, a) for split, a in rows.items()},
    skipped={},
    near_duplicates={},
    vocab_size=vocab_size,
    padded_vocab_size=vocab_size,
    tokenizer=name,
    tokenizer_hash=(
      tokenizer.digest() if tokenizer else hashlib.sha256(content).hexdigest()
    ),
    source_hash='0' * 64,
    validation_fraction=0.1,
    request='',
    files=sizes,
  )
  (directory / stats.FILE).write_text(made.to_json())
  return directory


def bpe():
  """A small tokenizer."""
  return tokenizer_lib.ByteLevelBPE.train(['some text, some more text'], 300)


class MemoryWindows:
  """Rows as `prepared.Windows` gives them, which notes its reads."""

  def __init__(self, layout, length, arrays):
    self.layout = layout
    self.length = length
    self.arrays = arrays
    self.reads = []

  def __len__(self):
    return len(self.arrays['tokens'])

  @property
  def starts(self):
    return max(0, (len(self) - 1) * self.length + 1)

  def __getitems__(self, indices):
    self.reads.append(len(indices))
    return {name: array[indices] for name, array in self.arrays.items()}

  def at(self, starts):
    self.reads.append(len(starts))
    tokens = self.arrays['tokens']
    stream = np.append(tokens[:, :-1].reshape(-1), tokens[-1, -1])
    return {'tokens': stream[starts[:, None] + np.arange(self.length + 1)]}


class CountedWindows:
  """A split of any size, whose window i begins with token i mod 2**31."""

  layout = 'stream'

  def __init__(self, count, length):
    self.count = count
    self.length = length
    self.starts = (count - 1) * length + 1

  def __len__(self):
    return self.count

  def __getitems__(self, indices):
    first = np.asarray(indices, np.int64) % 2**31
    return {'tokens': np.repeat(first[:, None], self.length + 1, axis=1)}

  def at(self, starts):
    return self.__getitems__(starts)
