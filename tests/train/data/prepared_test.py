import dataclasses
import json
import pathlib
import resource
import shutil
import sys
import threading

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.train.data import prepared_maker
from train import errors
from train.data import layouts, loader, prepared, stats

LENGTH = 7
COUNTS = {'train': 100, 'validation': 5}


def rows_of(layout, split):
  count = COUNTS[split]
  if layout in layouts.CONTIGUOUS:
    tokens = np.arange(count * LENGTH + 1, dtype=np.uint16)
    return prepared_maker.stream_rows(tokens, LENGTH)
  return prepared_maker.document_rows(layout, np.arange(1, count + 1), LENGTH)


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """A directory of each layout, of several files; not to be changed."""
  parent = tmp_path_factory.mktemp('made')
  tokenizer = prepared_maker.bpe()
  for layout in layouts.LAYOUTS:
    prepared_maker.make(
      parent / layout,
      {split: rows_of(layout, split) for split in COUNTS},
      layout=layout,
      length=LENGTH,
      per_file=30,
      tokenizer=tokenizer,
    )
  return parent


@pytest.fixture
def copy(made, tmp_path):
  """A directory that a test may damage."""
  return shutil.copytree(made / 'stream', tmp_path / 'copy[1]@2*c')


def record_file(directory, number=1):
  return sorted(directory.glob('prepared-train.array_record-*'))[number]


@pytest.mark.parametrize('layout', layouts.LAYOUTS)
def test_rows_come_as_they_were_written(made, layout):
  opened = prepared.Prepared(made / layout)
  for split in COUNTS:
    windows = opened.windows(split)
    wanted = rows_of(layout, split)
    assert len(windows) == len(wanted['tokens']) == opened.stats.windows[split]
    order = np.random.default_rng(0).permutation(len(windows))
    order = np.append(order, order[:3])
    found = windows.__getitems__(order)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
      assert found[name].dtype == array.dtype
      np.testing.assert_array_equal(found[name], array[order])


def test_wide_tokens(tmp_path):
  rows = {'tokens': np.arange(12, dtype=np.uint32).reshape(3, 4) + 2**16}
  directory = prepared_maker.make(
    tmp_path / 'made',
    {'train': rows},
    layout='stream',
    length=3,
    vocab_size=100_000,
  )
  found = prepared.Prepared(directory).windows('train').__getitems__([2, 0])
  assert found['tokens'].dtype == np.uint32
  np.testing.assert_array_equal(found['tokens'], rows['tokens'][[2, 0]])


@given(
  st.lists(
    st.integers(0, (COUNTS['train'] - 1) * LENGTH), min_size=1, max_size=40
  )
)
@settings(max_examples=50)
def test_windows_from_any_token_on(starts):
  arrays = rows_of('random', 'train')
  files = FakeFiles(arrays)
  windows = prepared.Windows('random', LENGTH, files, np.asarray([100]), [])
  found = windows.at(starts)
  np.testing.assert_array_equal(
    found['tokens'], np.asarray(starts)[:, None] + np.arange(LENGTH + 1)
  )
  # Each record once, and none that is not needed.
  touched = {(s + i) // LENGTH for s in starts for i in range(LENGTH)}
  assert files.reads == [sorted(touched)]


class FakeFiles:
  def __init__(self, arrays):
    self.arrays = arrays
    self.reads = []

  def __len__(self):
    return len(self.arrays['tokens'])

  def __getitems__(self, numbers):
    self.reads.append(numbers)
    return [{n: a[i] for n, a in self.arrays.items()} for i in numbers]


def test_every_start_that_fits(made):
  windows = prepared.Prepared(made / 'random').windows('train')
  assert windows.starts == (COUNTS['train'] - 1) * LENGTH + 1
  starts = np.arange(windows.starts)
  found = windows.at(starts)['tokens']
  np.testing.assert_array_equal(found, starts[:, None] + np.arange(LENGTH + 1))
  for outside in (-1, windows.starts):
    with pytest.raises(IndexError):
      windows.at([outside])
  for outside in (-1, len(windows)):
    with pytest.raises(IndexError):
      windows.__getitems__([outside])


def test_it_is_a_dataset_of_tfds(made):
  source = tfds.builder_from_directory(made / 'packed').as_data_source('train')
  wanted = rows_of('packed', 'train')
  for name, array in source[11].items():
    np.testing.assert_array_equal(array, wanted[name][11])


def test_threads_read_at_a_time(made):
  windows = prepared.Prepared(made / 'stream').windows('train')
  failures = []

  def read(seed):
    rng = np.random.default_rng(seed)
    for _ in range(20):
      numbers = rng.integers(0, len(windows), 16)
      tokens = windows.__getitems__(numbers)['tokens']
      if (tokens[:, 0] != numbers * LENGTH).any():
        failures.append(numbers)

  threads = [threading.Thread(target=read, args=[i]) for i in range(4)]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert not failures


def test_batches_of_files_are_those_of_memory(made):
  for layout in layouts.LAYOUTS:
    windows = prepared.Prepared(made / layout).windows('train')
    arrays = rows_of(layout, 'train')
    memory = prepared_maker.MemoryWindows(layout, LENGTH, arrays)
    for i in (0, 5, 10**6):
      found = loader.Batches([windows, windows], 9, 1)[i]
      wanted = loader.Batches([memory, memory], 9, 1)[i]
      for name, array in wanted.items():
        np.testing.assert_array_equal(found[name], array)


def test_the_tokenizer_comes_back(made, copy):
  tokenizer = prepared.Prepared(made / 'stream').tokenizer
  assert tokenizer.decode(tokenizer.encode_batch(['some'])[0]) == 'some'
  content = (copy / 'tokenizer.json').read_text()
  for damaged in ('', content[:100], content + ' '):
    (copy / 'tokenizer.json').write_text(damaged)
    with pytest.raises(errors.UserError, match=r'tokenizer\.json is damaged'):
      _ = prepared.Prepared(copy).tokenizer
  (copy / 'tokenizer.json').unlink()
  with pytest.raises(
    prepared.DamagedError, match=r'tokenizer\.json is missing'
  ):
    _ = prepared.Prepared(copy).tokenizer


def refused(directory, words):
  with pytest.raises(errors.UserError, match=words) as caught:
    prepared.Prepared(directory, '--some.option')
  message = str(caught.value)
  assert '\n' not in message
  assert message.startswith(f'--some.option {directory}: ')


def test_what_is_not_prepared_is_refused(copy, tmp_path):
  refused(tmp_path / 'nothing', 'no such directory: make it with')
  (tmp_path / 'empty').mkdir()
  refused(tmp_path / 'empty', 'not what "python -m train prepare" writes')
  refused(copy / 'stats.json', 'not a directory')
  (copy / 'stats.json').unlink()
  refused(copy, 'was cut off there: run .* again')
  (tmp_path / 'empty' / '.work').mkdir()
  refused(tmp_path / 'empty', 'was cut off there: run .* again')


def test_a_name_that_libraries_cannot_read_is_no_damage(copy, monkeypatch):
  other = copy.rename(copy.with_name('gr\udcf6'))
  refused(other, 'the name is not UTF-8: rename it$')
  monkeypatch.setattr(sys, 'getfilesystemencoding', lambda: 'ascii')
  refused(other, 'names are read as ascii here: set PYTHONUTF8=1')


def test_damaged_stats_are_refused(copy):
  path = copy / 'stats.json'
  good = json.loads(path.read_text())
  for text in ('', '{', path.read_text()[:200]):
    path.write_text(text)
    refused(copy, r'stats\.json is damaged')
  path.write_bytes(b'\xff\xfe')
  refused(copy, r'stats\.json is damaged')
  for values in (
    good | {'format': stats.FORMAT + 1},
    {'format': stats.FORMAT},
    {},
    [],
  ):
    path.write_text(json.dumps(values))
    refused(copy, 'prepare the text again')


@pytest.mark.parametrize(
  'change',
  [
    lambda b: b'',
    lambda b: b[: len(b) // 2],
    lambda b: b[:-1],
    lambda b: b + b'\0',
  ],
)
def test_files_of_another_size_are_refused(copy, change):
  path = record_file(copy)
  path.write_bytes(change(path.read_bytes()))
  refused(copy, f'{path.name} is damaged .* bytes instead of')


def test_missing_files_are_refused(copy):
  path = record_file(copy)
  path.unlink()
  refused(copy, f'{path.name} is missing')


@pytest.mark.parametrize('name', ['features.json', 'dataset_info.json'])
def test_missing_metadata_are_named(copy, name):
  (copy / name).unlink()
  refused(copy, f'[/a-z0-9]: {name} is missing: bring it back')


@pytest.mark.parametrize('name', ['features.json', 'dataset_info.json'])
@pytest.mark.parametrize('damage', ['empty', 'cut', 'none', 'other'])
def test_damaged_metadata_are_refused(made, copy, name, damage):
  path = copy / name
  if damage == 'other' and name == 'features.json':
    path.write_bytes((made / 'packed' / name).read_bytes())
  elif damage == 'other':
    path.write_text(path.read_text().replace('"30"', '"29"'))
  else:
    text = path.read_text()
    path.write_text({'empty': '', 'cut': text[:40], 'none': '{}'}[damage])
  refused(copy, r'json is damaged|other than stats')


def test_metadata_of_other_files_are_refused(copy):
  path = copy / 'dataset_info.json'
  info = json.loads(path.read_text())
  lengths = next(s for s in info['splits'] if s['name'] == 'train')
  assert lengths['shardLengths'] == ['30', '30', '30', '10']
  lengths['shardLengths'] = ['60', '30', '10']
  path.write_text(json.dumps(info))
  refused(copy, 'it says other than stats')


def test_more_files_than_a_shell_allows_to_be_open(tmp_path):
  tokens = np.arange(41 * 3 + 1, dtype=np.uint16)
  directory = prepared_maker.make(
    tmp_path / 'made',
    {'train': prepared_maker.stream_rows(tokens, 3)},
    layout='stream',
    length=3,
    per_file=1,
  )
  before = resource.getrlimit(resource.RLIMIT_NOFILE)
  taken = len(list(pathlib.Path('/dev/fd').iterdir()))
  try:
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken + 20, before[1]))
    windows = prepared.Prepared(directory).windows('train')
    found = windows.__getitems__(np.arange(41))['tokens']
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, before)
  np.testing.assert_array_equal(found[:, 0], np.arange(41) * 3)


def test_damaged_records_are_told_with_the_file(copy):
  rng = np.random.default_rng(0)
  wanted = rows_of('stream', 'train')['tokens']
  path = record_file(copy)
  content = path.read_bytes()
  # Where the records are: the rest of the file is zeros, checked as well.
  end = content.index(bytes(4096))
  told = 0
  for place in (
    rng.integers(0, len(content), 20).tolist()
    + rng.integers(0, end, 30).tolist()
  ):
    damaged = bytearray(content)
    damaged[place] ^= 1 << int(rng.integers(8))
    path.write_bytes(bytes(damaged))
    windows = prepared.Prepared(copy).windows('train')
    try:
      found = windows.__getitems__(np.arange(len(wanted)))['tokens']
    except errors.UserError as error:
      assert str(path) in str(error)
      assert '\n' not in str(error)
      told += 1
    else:  # It is padding.
      np.testing.assert_array_equal(found, wanted)
  assert told >= 25


def test_one_failure_of_the_disk_is_no_damage(made):
  windows = prepared.Prepared(made / 'stream').windows('train')
  read = windows._data_source.__getitems__
  failures = [OSError('Input/output error')]

  class Flaky:
    def __len__(self):
      return COUNTS['train']

    def __getitems__(self, numbers):
      if failures:
        raise failures.pop()
      return read(numbers)

  windows._data_source = Flaky()
  with pytest.raises(errors.UserError, match='cannot be read') as caught:
    windows.__getitems__([1, 2])
  assert 'damaged' not in str(caught.value)
  assert windows.__getitems__([1, 2])['tokens'].shape == (2, LENGTH + 1)


def test_only_what_fits_together_is_mixed(made, copy, tmp_path):
  first = made / 'stream'
  assert [
    p.directory for p in prepared.open_all([str(first), pathlib.Path(copy)])
  ] == [first, copy]

  def refused_with(other, words):
    with pytest.raises(errors.UserError, match=words) as caught:
      prepared.open_all([first, other])
    assert f'{first} and {other} cannot be mixed' in str(caught.value)

  refused_with(made / 'packed', 'layout stream and packed')
  values = prepared.Prepared(copy).stats
  changed = dataclasses.replace(values, tokenizer_hash='1' * 64)
  (copy / 'stats.json').write_text(changed.to_json())
  refused_with(copy, 'tokenizer [0-9a-f]{12} and 1{12}')
  changed = dataclasses.replace(values, validation_fraction=0.3)
  (copy / 'stats.json').write_text(changed.to_json())
  refused_with(
    copy,
    'the same text could be trained on and held out, with'
    ' --validation-fraction 0.1 and 0.3; prepare one of them again',
  )
  longer = prepared_maker.make(
    tmp_path / 'longer',
    {'train': prepared_maker.stream_rows(np.arange(100, dtype=np.uint16), 9)},
    layout='stream',
    length=9,
  )
  refused_with(longer, 'sequence length 7 and 9')
