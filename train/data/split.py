"""Which documents are held out: a fixed rule, the same for every source."""

import hashlib


def text_hash(text: str) -> bytes:
  """Returns the sha256 of a document's text in UTF-8 (32 bytes)."""
  return hashlib.sha256(text.encode('utf-8')).digest()


def is_held_out(text_sha256: bytes, fraction: float) -> bool:
  """Whether the document with this hash belongs to the validation split.

  The first 8 bytes of the hash, read as a number in [0, 1), are compared with
  `fraction`. So copies of one text land on one side, a document's side does
  not depend on its neighbours, and a larger fraction only adds documents.
  """
  return int.from_bytes(text_sha256[:8], 'big') < fraction * 2**64
