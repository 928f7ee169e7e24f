import errno
import importlib.util
import json
import logging
import pickle
import random
import re
import shutil
import sys
import urllib.request

import numpy as np
import pytest
import tensorflow_datasets as tfds
import urllib3
from array_record.python import array_record_module
from tensorflow_datasets.core.download import downloader

from tests.train.data.sources import digests, read, read_bad
from train import errors
from train.data import source, tfds_source

TEXTS = [f'Example {i}: größer ' + 'word ' * (i % 30) for i in range(500)]
NO_TENSORFLOW = importlib.util.find_spec('tensorflow') is None
NO_BEAM = importlib.util.find_spec('apache_beam') is None


class _Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  VERSION = tfds.core.Version('1.0.0')

  def _info(self):
    return self.dataset_info_from_configs(
      features=tfds.features.FeaturesDict(
        {
          'text': tfds.features.Text(),
          'title': tfds.features.Text(),
          'number': tfds.features.Scalar(dtype=np.int64),
          'lines': tfds.features.Sequence(tfds.features.Text()),
        }
      )
    )

  def _split_generators(self, dl_manager):
    return {
      'train': self._generate_examples(TEXTS),
      'test': self._generate_examples(TEXTS[:7]),
    }

  def _generate_examples(self, texts):
    for i, text in enumerate(texts):
      yield i, {'text': text, 'title': f'{i}', 'number': i, 'lines': [text]}


class SmallTextsPlain(_Builder):
  """As it should be."""


class SmallTextsWithTensorflow(_Builder):
  """Imports TensorFlow when it is prepared."""

  def _generate_examples(self, texts):
    import tensorflow

    yield from super()._generate_examples(tensorflow.constant(texts))


class SmallTextsWithBeam(_Builder):
  """Is prepared on Beam."""

  def _generate_examples(self, texts):
    beam = tfds.core.lazy_imports.apache_beam
    return beam.Create(list(super()._generate_examples(texts)))


class SmallTextsWithNetwork(_Builder):
  """Fetches from where no one listens."""

  def _generate_examples(self, texts):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    opener.open('http://127.0.0.1:9', timeout=5)
    yield 0, {}


class SmallTextsWithDownload(_Builder):
  """Has TFDS download from where no one listens."""

  def _split_generators(self, dl_manager):
    dl_manager.download('http://127.0.0.1:9/a')


class SmallTextsBroken(_Builder):
  """Has an error in its code."""

  def _generate_examples(self, texts):
    yield 0, {'text': 1 // len(texts[:0])}


class SmallTextsBadTexts(_Builder):
  """Has examples that are no documents."""

  def _generate_examples(self, texts):
    texts = [b'good', b'caf\xe9', b' ', b'a\0', b'x' * 51, b'last']
    yield from super()._generate_examples(texts)


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  """The plain one, prepared."""
  return _prepare(SmallTextsPlain, tmp_path_factory.mktemp('tfds'))


def _prepare(builder, data_dir):
  tfds_source.TfdsSource(builder.name, data_dir=data_dir).parts()
  return data_dir / builder.name / '1.0.0'


def refused(match):
  return pytest.raises(errors.UserError, match=match)


def test_by_name_is_prepared_as_array_record(tmp_path, capfd):
  texts = tfds_source.TfdsSource('small_texts_plain', data_dir=tmp_path)
  found = read(texts)
  assert sorted(found) == sorted(TEXTS)
  assert list(tmp_path.rglob('*-train.array_record-*'))
  assert capfd.readouterr().out == ''
  # And not again: the second time it is there.
  file = next(tmp_path.rglob('*-train.array_record-*'))
  written = file.stat().st_mtime_ns
  again = tfds_source.TfdsSource('small_texts_plain', data_dir=tmp_path)
  assert read(again) == found
  assert file.stat().st_mtime_ns == written
  assert again.listing() == [
    ['small_texts_plain/1.0.0', 'train'],
    [file.name, file.stat().st_size],
  ]
  assert NO_TENSORFLOW or 'tensorflow' not in sys.modules


def test_parts_of_a_directory(prepared, monkeypatch):
  (whole,) = tfds_source.TfdsSource(str(prepared)).parts()
  texts = list(whole.read(source.Problems(skip=False)))
  monkeypatch.setattr(tfds_source, 'PART', 150)
  monkeypatch.setattr(tfds_source, '_READ_BATCH', 40)
  parts = tfds_source.TfdsSource(str(prepared)).parts()
  parts = pickle.loads(pickle.dumps(parts))
  assert [(p.start, p.stop) for p in parts] == [
    (0, 150), (150, 300), (300, 450), (450, 500)
  ]  # fmt: skip
  assert sum(p.size for p in parts) == pytest.approx(whole.size, abs=4)
  problems = source.Problems(skip=False)
  assert [t for part in parts for t in part.read(problems)] == texts
  assert len({part.digest() for part in parts}) == 4


@pytest.mark.parametrize(
  ('split', 'count'), [('test', 7), ('train[:10%]', 50), ('test+train', 507)]
)
def test_splits(prepared, split, count):
  texts = tfds_source.TfdsSource(str(prepared), split=split)
  assert len(read(texts)) == count
  assert texts.listing()[0] == ['small_texts_plain/1.0.0', split]


def test_digest_is_of_the_texts(prepared, tmp_path):
  shutil.copytree(prepared, tmp_path / 'moved')
  first = digests(tfds_source.TfdsSource(str(prepared)))
  assert digests(tfds_source.TfdsSource(str(tmp_path / 'moved'))) == first
  assert digests(tfds_source.TfdsSource(str(prepared), 'title')) != first
  test = tfds_source.TfdsSource(str(prepared), split='test')
  assert digests(test) != first
  assert read(tfds_source.TfdsSource(str(prepared), 'title'))[0].isdigit()


@pytest.mark.parametrize(
  ('kwargs', 'match'),
  [
    (
      {'split': 'dev'},
      r"has no split 'dev' \(it has: test, train\); .* --tfds-split",
    ),
    ({'split': 'train[oops]'}, r"Error parsing split 'train\[oops\]'"),
    ({'split': 'train[:0]'}, r"no examples in 'train\[:0\]'"),
    (
      {'text_field': 'body'},
      r"'body' is not there \(those of text: text, title\); .* --text-field",
    ),
    ({'text_field': 'number'}, r"'number' is not text \(those of text: "),
    ({'text_field': 'lines'}, r"'lines' is not text \(those of text: "),
  ],
)
def test_what_is_not_there(prepared, kwargs, match):
  with refused(match) as caught:
    tfds_source.TfdsSource(str(prepared), **kwargs).parts()
  assert '\n' not in str(caught.value)
  assert str(caught.value).startswith('--tfds: ')


@pytest.mark.parametrize(
  ('name', 'match'),
  [
    pytest.param(
      'c4/en',
      r"TFDS needs tensorflow to open c4/en: pip .*'\.\[train,tensorflow\]'",
      marks=pytest.mark.skipif(not NO_TENSORFLOW, reason='it is installed'),
    ),
    pytest.param(
      'wikipedia/20230601.simple',
      r'TFDS needs tensorflow to open wikipedia/20230601\.simple: pip install',
      marks=pytest.mark.skipif(not NO_TENSORFLOW, reason='it is installed'),
    ),
    ('no_such_set', r"TFDS has no dataset 'no_such_set'"),
    ('no such: name', r'TFDS (cannot open|has no dataset)'),
    pytest.param(
      'small_texts_with_tensorflow',
      r"TFDS needs tensorflow to prepare small.*'\.\[train,tensorflow\]'",
      marks=pytest.mark.skipif(not NO_TENSORFLOW, reason='it is installed'),
    ),
    pytest.param(
      'small_texts_with_beam',
      r"TFDS needs apache_beam to prepare small.*pip.*'\.\[train,beam\]'",
      marks=pytest.mark.skipif(not NO_BEAM, reason='it is installed'),
    ),
    pytest.param(
      'huggingface:org/name',
      r'reads huggingface:org/name with .* not installed: pip install datasets',
      marks=pytest.mark.skipif(
        importlib.util.find_spec('datasets') is not None,
        reason='it is installed',
      ),
    ),
    ('small_texts_with_network', r'no network to prepare .*refused'),
    ('small_texts_broken', r'TFDS cannot prepare .*: .*by zero'),
    ('small_texts_plain/3.1.4', r'TFDS cannot open small_texts_plain/3'),
    ('lm1bb', r"has no dataset 'lm1bb' \(it has lm1b\)"),
    ('wikpedia/a', r"has no dataset 'wikpedia/a' \(it has .*wikipedia"),
    ('./nowhere', r'no such directory: \./nowhere$'),
    ('~/nowhere', r'no such directory: ~/nowhere$'),
  ],
)
@pytest.mark.filterwarnings('ignore::DeprecationWarning')
def test_errors_name_what_helps(tmp_path, capfd, name, match):
  with refused(match) as caught:
    tfds_source.TfdsSource(name, data_dir=tmp_path).parts()
  assert '\n' not in str(caught.value)
  assert capfd.readouterr().out == ''
  assert not list(tmp_path.rglob('dataset_info.json'))


def test_a_directory_above_the_dataset(prepared, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  shutil.copytree(prepared, tmp_path / 'my/texts/1.0.0')
  # Its name is no pattern.
  for name in ('m[x]', 'm**'):
    shutil.copytree(prepared, tmp_path / name / '1')
    with refused(re.escape(f'name the directory with it, as {name}/1') + '$'):
      tfds_source.TfdsSource(f'./{name}').parts()
    shutil.rmtree(tmp_path / name)
  below = 'name the directory with it, as my/texts/1.0.0$'
  for name in ('my', 'my/texts', 'my/texts/'):
    with refused(rf'{name} has no dataset_info\.json of TFDS: {below}'):
      tfds_source.TfdsSource(name).parts()
  with refused(r'with it, as /.*/my/texts/1\.0\.0$'):
    tfds_source.TfdsSource(str(tmp_path)).parts()
  for name, match in (
    ('my/nowhere', 'no such directory: my/nowhere$'),
    (
      'my/texts/1.0.0/dataset_info.json',
      r'my/.*/dataset_info\.json is a file: name the directory of a dataset$',
    ),
    ('empty', r'empty has no dataset_info\.json of TFDS$'),
  ):
    (tmp_path / 'empty').mkdir(exist_ok=True)
    with refused(match):
      tfds_source.TfdsSource(name).parts()
  for i in range(2, 6):
    shutil.copytree(prepared, tmp_path / f'my/texts/{i}.0.0')
  with refused(r'as my/texts/1\.0\.0, .*/2\.0\.0, .*/3\.0\.0, \.\.\.$'):
    tfds_source.TfdsSource('my/texts').parts()
  # What TFDS knows comes before a directory of that name.
  (tmp_path / 'small_texts_plain').mkdir()
  texts = tfds_source.TfdsSource('small_texts_plain', data_dir=tmp_path / 'b')
  assert len(read(texts)) == len(TEXTS)


def test_a_download_without_network_fails_soon(tmp_path, monkeypatch, caplog):
  pauses = []
  monkeypatch.setattr(
    urllib3.util.Retry,
    '_sleep_backoff',
    lambda retry: pauses.append(retry.get_backoff_time()),
  )
  monkeypatch.setenv('NO_PROXY', '127.0.0.1')
  before = downloader.MAX_RETRIES
  with refused('no network to prepare small_texts_with_download'):
    tfds_source.TfdsSource(
      'small_texts_with_download', data_dir=tmp_path
    ).parts()
  assert 1 < sum(pauses) < 10
  assert not [r for r in caplog.records if r.name.startswith('urllib3')]
  assert before == downloader.MAX_RETRIES
  assert not logging.getLogger('urllib3.connectionpool').level


def test_prepared_as_tfrecord(prepared, tmp_path):
  directory = tmp_path / 'small_texts_plain' / '1.0.0'
  shutil.copytree(prepared, directory)
  info = json.loads((directory / 'dataset_info.json').read_text())
  info['fileFormat'] = 'tfrecord'
  for split in info['splits']:
    split['filepathTemplate'] = split['filepathTemplate'].replace(
      'array_record', 'tfrecord'
    )
  (directory / 'dataset_info.json').write_text(json.dumps(info))
  for name in (str(directory), 'small_texts_plain'):
    with refused(r"was prepared as tfrecord, .* file_format='array_record'"):
      tfds_source.TfdsSource(name, data_dir=tmp_path).parts()


def test_a_file_is_missing(prepared, tmp_path):
  shutil.copytree(prepared, tmp_path / 'a')
  next((tmp_path / 'a').glob('*-train.*')).unlink()
  with refused('No such file'):
    tfds_source.TfdsSource(str(tmp_path / 'a')).parts()


def test_a_name_that_is_not_utf8(prepared, tmp_path):
  copy = shutil.copytree(prepared, tmp_path / 'gr\udcf6')
  with pytest.raises(
    errors.UserError, match=r'^--tfds .*: the name is not UTF'
  ):
    tfds_source.TfdsSource(str(copy)).parts()


def test_a_broken_dataset_info(prepared, tmp_path):
  shutil.copytree(prepared, tmp_path / 'a')
  (tmp_path / 'a' / 'dataset_info.json').write_text('{"name": ')
  with refused('TFDS cannot read') as caught:
    tfds_source.TfdsSource(str(tmp_path / 'a')).parts()
  assert '\n' not in str(caught.value)


def _copied(prepared, directory):
  """Returns the source of a copy, and the copy's file."""
  shutil.copytree(prepared, directory)
  file = next(directory.glob('*-train.*'))
  return tfds_source.TfdsSource(str(directory)), file


class _Records:
  """Reads the first records; then fails, the first few times."""

  def __init__(self, records, error, failures):
    self._records, self._error, self._failures = records, error, failures

  def __getitem__(self, number):
    return self.__getitems__([number])[0]

  def __getitems__(self, numbers):
    if max(numbers) >= 200 and self._failures:
      self._failures.pop()
      raise self._error
    return self._records.__getitems__(numbers)


def _failing(monkeypatch, error, times):
  """Makes the reading of some records fail."""
  real = tfds.core.DatasetBuilder.as_data_source
  failures = [None] * times
  monkeypatch.setattr(
    tfds.core.DatasetBuilder,
    'as_data_source',
    lambda *args, **kwargs: _Records(real(*args, **kwargs), error, failures),
  )


MACHINE = [
  OSError(errno.EMFILE, 'Too many open files'),
  OSError(errno.EIO, 'Input/output error'),
  MemoryError(),
  RuntimeError('pread() failed: Input/output error; reading /a; at byte 7'),
  RuntimeError("can't start new thread"),
]


@pytest.mark.parametrize('error', MACHINE, ids=str)
def test_a_failure_of_the_machine_is_no_damage(prepared, monkeypatch, error):
  texts = tfds_source.TfdsSource(str(prepared))
  (part,) = texts.parts()
  match = f'(cannot|memory to) read {prepared}'
  with monkeypatch.context() as patch:
    _failing(patch, error, 1)
    with refused(match):
      read_bad(texts)
    _failing(patch, error, 1)
    with refused(match):
      part.digest()

  def builder_from_directory(directory):
    raise error

  monkeypatch.setattr(tfds, 'builder_from_directory', builder_from_directory)
  with refused(match):
    list(part.read(source.Problems(skip=True)))
  with refused(match):
    part.digest()


def test_what_the_reader_cannot_open_is_no_damage(prepared, tmp_path):
  """The reader's own errors, which all are RuntimeErrors."""
  texts, file = _copied(prepared, tmp_path / 'a')
  (part,) = texts.parts()
  file.unlink()
  with refused('No such file'):
    part.digest()
  file.mkdir()
  with refused('Is a directory'):
    list(part.read(source.Problems(skip=True)))


RIEGELI = RuntimeError('Corrupted Riegeli/records file: chunk data hash')


@pytest.mark.parametrize(('times', 'left'), [(1, 500), (9, 200)])
def test_a_batch_is_tried_again(prepared, monkeypatch, times, left):
  whole = read(tfds_source.TfdsSource(str(prepared)))
  _failing(monkeypatch, RIEGELI, times)
  found, problems = read_bad(tfds_source.TfdsSource(str(prepared)))
  assert found == whole[:left]
  assert problems.counts == ({} if left == 500 else {'truncated': 1})


def _record_file(path, records):
  writer = array_record_module.ArrayRecordWriter(str(path), 'group_size:1')
  for record in records:
    writer.write(record)
  writer.close()


@pytest.mark.parametrize(
  ('records', 'match'),
  [
    ([b'junk'], 'Error parsing message'),
    # One without the text, one whose text has no value: as bits may flip.
    ([b'\x0a\x0d\x0a\x0b\x0a\x05lines\x12\x02\x0a\x00'], "it has no 'text'"),
    ([b'\x0a\x0a\x0a\x08\x0a\x04text\x12\x00'], 'cannot convert'),
    ([], 'is damaged'),
  ],
)
def test_what_cannot_be_decoded_is_damage(prepared, tmp_path, records, match):
  texts, file = _copied(prepared, tmp_path / 'a')
  _record_file(file, records)
  for _ in range(2):
    found, problems = read_bad(texts)
    assert found == []
    assert problems.counts == {'truncated': 1}
    assert re.search(match, problems.first[0])
  assert digests(texts) == digests(texts)


def test_no_package_to_decode_is_no_damage(prepared, monkeypatch):
  def deserialize(self, record):
    raise ModuleNotFoundError('No module named cv2', name='cv2')

  monkeypatch.setattr(
    tfds.features.FeaturesDict, 'deserialize_example_np', deserialize
  )
  with refused('TFDS needs cv2 to decode .*pip install cv2'):
    read_bad(tfds_source.TfdsSource(str(prepared)))


def test_bad_texts(tmp_path, monkeypatch):
  monkeypatch.setattr(source, 'LARGEST', 50)
  _prepare(SmallTextsBadTexts, tmp_path)
  texts = tfds_source.TfdsSource('small_texts_bad_texts', data_dir=tmp_path)
  found, problems = read_bad(texts)
  assert sorted(found) == ['good', 'last']
  assert problems.counts == {'encoding': 2, 'empty': 1, 'giant': 1}
  assert all('train, example ' in line for line in problems.first)
  with refused('train, example '):
    read(texts)


@pytest.mark.parametrize('tries', [8, pytest.param(60, marks=pytest.mark.slow)])
def test_damaged_records(prepared, tmp_path, tries):
  shutil.copytree(prepared, tmp_path / 'a')
  file = next((tmp_path / 'a').glob('*-train.*'))
  good = file.read_bytes()
  whole = read(tfds_source.TfdsSource(str(tmp_path / 'a')))
  told = 0
  for seed in range(tries):
    generator = random.Random(seed)
    content = bytearray(good)
    if generator.random() < 0.3:
      content = content[: generator.randrange(len(content))]
    else:
      content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    file.write_bytes(content)
    results = []
    for _ in range(2):
      texts = tfds_source.TfdsSource(str(tmp_path / 'a'))
      try:
        found, problems = read_bad(texts)
        results.append((found, problems.first, digests(texts)))
        told += 'truncated' in problems.counts
        assert found == whole[: len(found)]
      except errors.UserError as error:
        assert '\n' not in str(error)
        results.append(str(error))
    assert results[0] == results[1]
  assert told
