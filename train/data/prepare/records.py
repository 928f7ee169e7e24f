"""Rows of a layout as the bytes of records: TFDS's, `tf.train.Example`.

Written by hand: protobuf promises no order of a map's keys, and the same rows
have to give the same bytes.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from train.data import layouts


class Serializer:
  """To `Example`s of one value of bytes a feature, all of one length.

  As TFDS writes `Tensor(shape, dtype, encoding=Encoding.BYTES)`.

  Args:
    layout: One of `layouts.LAYOUTS`.
    sequence_length: T.
    dtype: Of the tokens.
  """

  def __init__(self, layout: str, sequence_length: int, dtype: np.dtype):
    self._dtypes: dict[str, np.dtype] = {}
    sizes: dict[str, int] = {}
    features = layouts.features(layout, sequence_length, dtype)
    for name, (shape, kind) in sorted(features.items()):
      self._dtypes[name] = np.dtype(kind).newbyteorder('<')
      sizes[name] = int(np.prod(shape)) * self._dtypes[name].itemsize
    entries = {name: _entry(name, size) for name, size in sizes.items()}
    self._heads = dict(entries)
    first = min(entries)
    total = sum(len(head) + sizes[name] for name, head in entries.items())
    self._heads[first] = _tag(1, total) + entries[first]
    self.size = total + len(self._heads[first]) - len(entries[first])
    """Bytes of a record."""

  def records(self, rows: Mapping[str, np.ndarray]) -> Iterator[bytes]:
    """Returns the record of each row; `rows` are arrays (R, ...)."""
    count = len(rows['tokens'])
    pieces = []
    for name, head in self._heads.items():
      values = np.ascontiguousarray(rows[name], self._dtypes[name])
      pieces.append(np.tile(np.frombuffer(head, np.uint8), (count, 1)))
      pieces.append(values.reshape(count, -1).view(np.uint8))
    content = np.concatenate(pieces, axis=1).tobytes()
    for start in range(0, len(content), self.size):
      yield content[start : start + self.size]


def _entry(name: str, size: int) -> bytes:
  """What precedes the `size` bytes of a feature in the map of features."""
  # Feature { bytes_list: BytesList { value } }, each in its own message.
  head = _tag(1, size)
  head = _tag(1, len(head) + size) + head
  key = name.encode()
  head = _tag(1, len(key)) + key + _tag(2, len(head) + size) + head
  return _tag(1, len(head) + size) + head


def _tag(field: int, length: int) -> bytes:
  """Begins a field of so many bytes: its number and wire type, and length."""
  head = bytearray([field << 3 | 2])
  while length >= 0x80:
    head.append(length & 0x7F | 0x80)
    length >>= 7
  head.append(length)
  return bytes(head)
