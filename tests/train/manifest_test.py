import errno
import hashlib
import json
import math

import pytest
from etils import epath
from hypothesis import given
from hypothesis import strategies as st

from train import manifest
from train.manifest import DamagedError

CONTENTS = {'a': b'', 'd/b': bytes(range(256)) * 40_000, 'd/e/c': b'c' * 100}
FACTS = {'config': {'steps': 9}, 'data': {'seed': 3}}


@pytest.fixture
def directory(tmp_path):
  """A checkpoint of step 7, complete."""
  directory = epath.Path(tmp_path / '7')
  for name, content in CONTENTS.items():
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
  files = manifest.digests(directory, manifest.list_files(directory))
  manifest.write(directory, 7, files, 2.5, FACTS)
  return directory


def verify(directory, step=7):
  manifest.check(directory, manifest.read(directory, step)['files'])


def test_it_tells_of_the_run_and_of_each_file(directory):
  content = json.loads((directory / 'manifest.json').read_text())
  assert content.pop('saved_at').endswith('+00:00')
  assert content == {
    'version': 1,
    'step': 7,
    'validation_loss': 2.5,
    'config': {'steps': 9},
    'data': {'seed': 3, 'next_batch': 7},
    'files': {
      name: {
        'bytes': len(content),
        'sha256': hashlib.sha256(content).hexdigest(),
      }
      for name, content in CONTENTS.items()
    },
  }
  verify(directory)
  assert manifest.list_files(directory) == sorted(CONTENTS)
  assert FACTS['data'] == {'seed': 3}


def test_a_loss_that_is_no_number_is_left_out(directory):
  manifest.write(directory, 7, {}, math.nan, {})
  assert manifest.read(directory, 7)['validation_loss'] is None


@given(data=st.data())
def test_each_bit_counts(tmp_path_factory, data):
  directory = epath.Path(tmp_path_factory.mktemp('step'))
  content = data.draw(st.binary(min_size=1, max_size=300))
  (directory / 'x').write_bytes(content)
  files = manifest.digests(directory, ['x'], flush=True)
  manifest.check(directory, files)
  damaged = bytearray(content)
  bit = data.draw(st.integers(0, 8 * len(content) - 1))
  damaged[bit // 8] ^= 1 << bit % 8
  (directory / 'x').write_bytes(damaged)
  with pytest.raises(DamagedError, match=r'^x is not what was written$'):
    manifest.check(directory, files)


@pytest.mark.parametrize(
  ('damage', 'words'),
  [
    (lambda d: (d / 'd/b').write_bytes(CONTENTS['d/b'][:-1]),
     r'^d/b has 10239999 bytes, not 10240000$'),
    (lambda d: (d / 'd/b').write_bytes(CONTENTS['d/b'] + b'x'),
     r'^d/b has 10240001 bytes, not 10240000$'),
    (lambda d: (d / 'd/e/c').unlink(), r'^d/e/c is missing$'),
    (lambda d: (d / 'd').rmtree(), r'^d/b is missing$'),
    (lambda d: (d / 'manifest.json').unlink(),
     r'^no manifest.json: its save was cut off$'),
    (lambda d: d.rmtree(), r'^no manifest.json: its save was cut off$'),
  ],
)  # fmt: skip
def test_damage_is_told(directory, damage, words):
  damage(directory)
  with pytest.raises(DamagedError, match=words):
    verify(directory)


def test_a_store_that_fails_is_no_damage(directory, monkeypatch):
  def fail(_):
    raise ValueError('the client says so')

  monkeypatch.setattr(type(directory), 'read_bytes', fail)
  with pytest.raises(ValueError, match='the client'):
    manifest.read(directory, 7)


def test_more_bytes_are_waited_for_longer():
  assert manifest.seconds(0) == 600
  assert manifest.seconds(2 * 10**10) == 1600


def test_an_extra_file_does_no_harm(directory):
  (directory / 'd' / '.nfs01').write_text('x')
  verify(directory)


def test_a_manifest_cut_off_anywhere_is_noticed(directory):
  path = directory / 'manifest.json'
  whole = path.read_bytes()
  for length in range(len(whole) - 2):  # The end is a newline.
    path.write_bytes(whole[:length])
    with pytest.raises(DamagedError, match=r'^manifest.json is damaged$'):
      verify(directory)


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    ({'step': 8}, 'is of step 8'),
    ({'version': 2}, 'is of version 2'),
    ({'files': []}, 'is damaged'),
    ({'files': {'a': {'bytes': 0}}}, 'is damaged'),
    ({'files': {'a': 3}}, 'is damaged'),
    ({'files': {'a': {'bytes': '3', 'sha256': ''}}}, 'is damaged'),
  ],
)
def test_another_manifest_is_refused(directory, change, words):
  path = directory / 'manifest.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | change))
  with pytest.raises(DamagedError, match=words):
    verify(directory)


def test_a_manifest_of_something_else_is_refused(directory):
  for text in ('[]', '3', 'null', '"x"', '{}'):
    (directory / 'manifest.json').write_text(text)
    with pytest.raises(DamagedError, match='is damaged'):
      verify(directory)


def test_a_file_that_cannot_be_read_is_an_error(directory, monkeypatch):
  def fail(*_):
    raise OSError(errno.EIO, 'x')

  monkeypatch.setattr(manifest.hashlib, 'sha256', fail)
  with pytest.raises(OSError, match='x'):
    verify(directory)


@pytest.mark.parametrize('number', [errno.EINVAL, errno.EIO])
def test_a_disk_that_cannot_flush_is_no_disk_that_fails_to(
  directory, monkeypatch, number
):
  def fail(_):
    raise OSError(number, 'x')

  monkeypatch.setattr(manifest.os, 'fsync', fail)
  if number == errno.EINVAL:
    assert manifest.digests(directory, ['a'], flush=True)
  else:
    with pytest.raises(OSError, match='x'):
      manifest.digests(directory, ['a'], flush=True)


def test_a_manifest_is_never_seen_half_written(directory, monkeypatch):
  def fail(*_):
    raise OSError(errno.ENOSPC, 'x')

  before = (directory / 'manifest.json').read_bytes()
  monkeypatch.setattr(manifest.os, 'fsync', fail)
  with pytest.raises(OSError, match='x'):
    manifest.write(directory, 7, {}, None, {})
  assert (directory / 'manifest.json').read_bytes() == before
  assert {p.name for p in directory.iterdir()} == {'a', 'd', 'manifest.json'}
