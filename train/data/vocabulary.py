"""What the kinds of tokenizers share."""

import hashlib

MULTIPLE = 128
"""Embeddings of a size that this divides fill the tiles of accelerators."""


class NotATokenizerError(ValueError):
  """The content of a file that no tokenizer can be made of, in one line."""


def padded(size: int) -> int:
  """Rounds a vocabulary's size up, as 50257 to the usual 50304."""
  return -(-size // MULTIPLE) * MULTIPLE


def digest(file_name: str, content: bytes) -> str:
  """Returns a hash of a tokenizer's kind and its file."""
  return hashlib.sha256(file_name.encode() + b'\0' + content).hexdigest()
