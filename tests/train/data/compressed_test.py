import builtins
import io
import zlib

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from tests.train.data.sources import COMPRESS, read_bad
from train import errors
from train.data import compressed, text_files


def read(content, suffix):
  """Returns what a file holds, and what is said of it at the end."""
  found = b''
  try:
    for block in compressed.blocks(io.BytesIO(content), suffix):
      found += block
  except compressed.DamagedError as error:
    return found, str(error)
  return found, None


def refused(match):
  return pytest.raises(errors.UserError, match=match)


@pytest.mark.parametrize('suffix', compressed.SUFFIXES)
@given(st.lists(st.binary(max_size=300), min_size=1, max_size=3))
def test_round_trip_of_several_streams(suffix, streams):
  content = b''.join(COMPRESS[suffix](stream) for stream in streams)
  assert read(content, suffix) == (b''.join(streams), None)


@pytest.mark.parametrize(
  ('suffix', 'size', 'most'),
  [('.gz', 2**23, 2**20), ('.xz', 2**23, 2**20), ('.zst', 2**27, 2**26)],
)
def test_blocks_are_bounded(suffix, size, most):
  """A few bytes may stand for very many."""
  content = COMPRESS[suffix](bytes(size))
  sizes = [len(b) for b in compressed.blocks(io.BytesIO(content), suffix)]
  assert sum(sizes) == size
  assert max(sizes) <= most


@pytest.mark.parametrize('suffix', compressed.SUFFIXES)
def test_padding_after_a_stream(suffix):
  content = COMPRESS[suffix](b'abc')
  assert read(content + bytes(512), suffix) == (b'abc', None)


def test_a_long_window():
  """As of `zstd --long=27`, beyond what is taken without being asked."""
  parameters = zstandard.ZstdCompressionParameters.from_level(
    1, window_log=28, enable_ldm=True
  )
  compressor = zstandard.ZstdCompressor(compression_params=parameters)
  stream = compressor.compressobj()
  content = stream.compress(b'abc') + stream.flush()
  assert zstandard.get_frame_parameters(content).window_size == 2**28
  assert read(content, '.zst') == (b'abc', None)


@pytest.mark.parametrize('suffix', compressed.SUFFIXES)
def test_any_cut_is_told(suffix):
  whole = b''.join(b'%d\n' % (i * i) for i in range(300))
  content = COMPRESS[suffix](whole)
  lengths = []
  for length in range(len(content)):
    found, what = read(content[:length], suffix)
    assert what == ('ends in the middle' if length else 'is empty')
    assert whole.startswith(found)
    lengths.append(len(found))
  assert lengths == sorted(lengths)


@pytest.mark.parametrize('suffix', compressed.SUFFIXES)
@pytest.mark.parametrize('content', [b'\0\0', b'{"text": "plain"}', b'a'])
def test_other_content(suffix, content):
  assert read(content, suffix) == (b'', f'is not a {suffix} file')


@pytest.mark.parametrize('suffix', compressed.SUFFIXES)
def test_damage_after_the_first_bytes(suffix):
  content = bytearray(COMPRESS[suffix](b'abc' * 100))
  content[6:] = b'\xff' * (len(content) - 6)
  assert read(bytes(content), suffix)[1].startswith('is damaged')


def test_a_skippable_frame():
  """As pzstd writes it first."""
  content = b'\x50\x2a\x4d\x18\x04\0\0\0skip' + COMPRESS['.zst'](b'abc')
  assert read(content, '.zst') == (b'abc', None)


@pytest.mark.parametrize('suffix', compressed.SUFFIXES)
def test_what_comes_after_a_stream(suffix):
  found, what = read(COMPRESS[suffix](b'abc') + b'more', suffix)
  assert found == b'abc'
  assert what.startswith(('is damaged', 'ends in the middle'))


def test_without_zstandard(monkeypatch):
  real = builtins.__import__

  def without(name, *args):
    if name == 'zstandard':
      raise ModuleNotFoundError(name=name)
    return real(name, *args)

  monkeypatch.setattr(builtins, '__import__', without)
  with pytest.raises(errors.UserError, match=r"pip install -e '\.\[train\]'"):
    read(b'', '.zst')


@pytest.mark.parametrize('suffix', compressed.SUFFIXES)
@pytest.mark.parametrize('when', ['at once', 'later'])
def test_too_little_memory_is_no_damage(tmp_path, monkeypatch, suffix, when):
  real = compressed._DECODERS[suffix]

  class Decoder(real):
    def __init__(self):
      if when == 'at once':
        raise MemoryError
      super().__init__()

    def decode(self, data):
      raise MemoryError

  monkeypatch.setitem(compressed._DECODERS, suffix, Decoder)
  path = tmp_path / f'a.txt{suffix}'
  path.write_bytes(COMPRESS[suffix](b'abc'))
  match = f'not enough memory to read {path}: .* damaged'
  with refused(match), open(path, 'rb') as file:
    list(compressed.blocks(file, suffix))
  with refused(match):
    read_bad(text_files.TextFiles(str(path)))


@pytest.mark.parametrize(
  ('suffix', 'error'),
  [
    ('.gz', zlib.error('Error -4 while decompressing data')),
    (
      '.zst',
      zstandard.ZstdError(
        'zstd decompressor error: Allocation error : not enough memory'
      ),
    ),
  ],
)
def test_libraries_tell_of_memory_in_their_own_errors(
  monkeypatch, suffix, error
):
  class Failing:
    eof = False

    def decompress(self, data, *args):
      raise error

  made = compressed._DECODERS[suffix]()
  made._decoder = Failing()
  monkeypatch.setitem(compressed._DECODERS, suffix, lambda: made)
  with refused('not enough memory to read the file: '):
    read(COMPRESS[suffix](b'abc'), suffix)
