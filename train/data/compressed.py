"""Bytes of .gz, .zst and .xz files, as far as they are whole.

The libraries' own file objects lose some of what lies before the damage in a
file; how much depends on their buffers. Here it is the same every time.
"""

import lzma
import os
import zlib
from collections.abc import Iterator
from typing import BinaryIO, Protocol

from train import errors

_INPUT = 2**16
_OUTPUT = 2**20
# zstandard has no bound on its output, which is at most 2**17 for 4 bytes.
_ZSTD_INPUT = 2**11
# Bytes that a decoder may take: for the largest window of `zstd --long`.
_MEMORY = 2**31


class DamagedError(Exception):
  """A file ends too early, or is not what it should be; says which."""


def too_much_memory(path: str | os.PathLike | None) -> str:
  """Returns one line on a file for which the memory was not enough.

  Whether it is damaged is not known: with more memory it may be whole.
  """
  return (
    f'not enough memory to read {path or "the file"}: free some, or mend the'
    ' file, which asks for too much where it is damaged'
  )


class _Decoder(Protocol):
  """For one stream; a file may have several, one after another."""

  @property
  def eof(self) -> bool:
    """Whether the stream has ended."""

  @property
  def hungry(self) -> bool:
    """Whether nothing more comes without more input."""

  def decode(self, data: bytes) -> tuple[bytes, bytes]:
    """Returns some of the content, and what is left of `data`."""


class _Gzip:
  def __init__(self):
    self._decoder = zlib.decompressobj(wbits=31)
    self.hungry = True

  @property
  def eof(self) -> bool:
    return self._decoder.eof

  def decode(self, data: bytes) -> tuple[bytes, bytes]:
    try:
      content = self._decoder.decompress(data, _OUTPUT)
    except zlib.error as error:
      if str(error).startswith('Error -4 '):  # Z_MEM_ERROR
        raise MemoryError from error
      raise DamagedError(f'is damaged ({error})') from error
    left = self._decoder.unconsumed_tail or self._decoder.unused_data
    return content, left


class _Xz:
  def __init__(self):
    self._decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_MEMORY)

  @property
  def eof(self) -> bool:
    return self._decoder.eof

  @property
  def hungry(self) -> bool:
    return self.eof or self._decoder.needs_input

  def decode(self, data: bytes) -> tuple[bytes, bytes]:
    try:
      content = self._decoder.decompress(data, _OUTPUT)
    except lzma.LZMAError as error:
      raise DamagedError(f'is damaged ({error})') from error
    return content, self._decoder.unused_data


class _Zstd:
  def __init__(self):
    try:
      import zstandard
    except ImportError as error:
      raise errors.UserError(
        "a .zst file is read with zstandard: pip install -e '.[train]'"
      ) from error
    self._error = zstandard.ZstdError
    self._decoder = zstandard.ZstdDecompressor(
      max_window_size=_MEMORY
    ).decompressobj()
    self.hungry = True

  @property
  def eof(self) -> bool:
    return self._decoder.eof

  def decode(self, data: bytes) -> tuple[bytes, bytes]:
    try:
      content = self._decoder.decompress(data[:_ZSTD_INPUT])
    except self._error as error:
      if 'not enough memory' in str(error):
        raise MemoryError from error
      raise DamagedError(f'is damaged ({error})') from error
    return content, self._decoder.unused_data + data[_ZSTD_INPUT:]


_DECODERS: dict[str, type[_Decoder]] = {
  '.gz': _Gzip,
  '.zst': _Zstd,
  '.xz': _Xz,
}
SUFFIXES = tuple(_DECODERS)
# How their files begin; of .zst also a frame that is to be skipped.
_MAGIC = {
  '.gz': (b'\x1f\x8b',),
  '.zst': (
    b'\x28\xb5\x2f\xfd',
    *(bytes([first, 0x2A, 0x4D, 0x18]) for first in range(0x50, 0x60)),
  ),
  '.xz': (b'\xfd7zXZ\0',),
}


def blocks(file: BinaryIO, suffix: str) -> Iterator[bytes]:
  """Reads what a compressed file holds, some of it at a time.

  Args:
    file: open at its beginning.
    suffix: one of `SUFFIXES`.

  Raises:
    DamagedError: after all that could be read.
    UserError: the library for it is not installed, or there is not enough
      memory.
  """
  try:
    yield from _blocks(file, suffix)
  except MemoryError as error:
    path = getattr(file, 'name', None)
    raise errors.UserError(too_much_memory(path)) from error


def _blocks(file: BinaryIO, suffix: str) -> Iterator[bytes]:
  decoder = _DECODERS[suffix]()
  begun = False  # The first stream; padding may come after it, not before.
  data = b''
  while True:
    if not data and decoder.hungry:
      data = file.read(_INPUT)
      if not data:
        break
    if decoder.eof:
      data = data.lstrip(b'\0')
      if not data:
        continue
      decoder = _DECODERS[suffix]()
    if not begun and not _begins(data, suffix):
      raise DamagedError(f'is not a {suffix} file')
    begun = True
    content, data = decoder.decode(data)
    if content:
      yield content
  if not begun:
    raise DamagedError('is empty')
  if not decoder.eof:
    raise DamagedError('ends in the middle')


def _begins(data: bytes, suffix: str) -> bool:
  """Whether a file of these first bytes, or few, may be what it is named."""
  return any(magic.startswith(data[: len(magic)]) for magic in _MAGIC[suffix])
