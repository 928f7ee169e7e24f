"""What the tests of sources share."""

import gzip
import lzma

import zstandard

from train.data import source

COMPRESS = {
  '': bytes,
  # Without the time of day, which would change the names of tests.
  '.gz': lambda content: gzip.compress(content, mtime=0),
  # As the program does it, with a checksum.
  '.zst': zstandard.ZstdCompressor(write_checksum=True).compress,
  '.xz': lzma.compress,
}


def read(texts, problems=None):
  """Returns all documents of a source, in order."""
  problems = problems or source.Problems(skip=False)
  return [text for part in texts.parts() for text in part.read(problems)]


def read_bad(texts):
  """Returns the documents that are left, and the problems."""
  problems = source.Problems(skip=True)
  return read(texts, problems), problems


def digests(texts):
  return [part.digest() for part in texts.parts()]
