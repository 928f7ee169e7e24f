import dataclasses
import errno
import logging
import os
import pathlib

import numpy as np
import pytest
import tensorflow_datasets as tfds

from tests.train.data.prepare import fakes
from train import errors
from train.data import layouts, source, split, stats, tokenizer
from train.data.prepare import (
  directory,
  files,
  find_duplicates,
  held_out,
  piece,
  plan,
  prepare,
  tokenize_part,
  vocabulary,
  wording,
  write_records,
)

T = 16
LAYOUTS = pytest.mark.parametrize('layout', layouts.LAYOUTS)


def request_for(layout='stream', **changes):
  return source.Request(layout, T, 0.2, **changes)


def make(directory, layout='stream', **options):
  return prepare(
    fakes.corpus(), fakes.bpe(), request_for(layout), directory, **options
  )


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
  """Several files and batches, of little text."""
  monkeypatch.setattr(plan, '_FILE_BYTES', 4000)
  monkeypatch.setattr(tokenize_part, '_BATCH_DOCUMENTS', 7)
  monkeypatch.setattr(write_records, '_READ_BYTES', 200)


@pytest.fixture(scope='module')
def references(tmp_path_factory):
  """All bytes of a directory made at once, by layout."""
  made = {}

  def reference(layout):
    if layout not in made:
      path = tmp_path_factory.mktemp('reference') / layout
      make(path, layout)
      made[layout] = fakes.contents(path)
    return made[layout]

  return reference


def documents(name):
  """Tokens of a split's documents as they are to be laid out."""
  texts = [text for texts in fakes.corpus().texts for text in texts]
  hashes = [split.text_hash(text) for text in texts]
  chosen = [
    (text_hash, text)
    for text_hash, text in zip(hashes, texts, strict=True)
    if split.is_held_out(text_hash, 0.2) == (name == 'validation')
  ]
  if name == 'validation':
    chosen.sort(key=lambda pair: pair[0])
  return [
    list(ids) for ids in fakes.bpe().encode_batch([text for _, text in chosen])
  ]


def read(directory, name):
  """All rows of a split, as TFDS reads them."""
  data = tfds.builder_from_directory(directory).as_data_source(name)
  examples = data.__getitems__(list(range(len(data))))
  return {
    key: np.stack([example[key] for example in examples]) for key in examples[0]
  }


@pytest.mark.parametrize('name', stats.SPLITS)
@pytest.mark.parametrize('layout', layouts.CONTIGUOUS)
def test_windows_are_those_of_the_stream(tmp_path, layout, name):
  made = make(tmp_path, layout)
  end = fakes.bpe().end_of_text
  stream = [end]
  for ids in documents(name):
    stream += [*ids, end]
  count = (len(stream) - 1) // T
  found = read(tmp_path, name)['tokens']
  want = [stream[k * T : k * T + T + 1] for k in range(count)]
  np.testing.assert_array_equal(found, want)
  assert made.windows[name] == count
  assert made.targets[name] == count * T
  assert made.tokens[name] == len(stream) - 1
  assert made.documents[name] == len(documents(name))


@pytest.mark.parametrize('name', stats.SPLITS)
def test_truncated_documents(tmp_path, name):
  made = make(tmp_path, 'truncate')
  found = read(tmp_path, name)
  end = fakes.bpe().end_of_text
  rows = [[*ids, end][: T + 1] for ids in documents(name)]
  assert found['length'].tolist() == [len(row) for row in rows]
  want = [row + [end] * (T + 1 - len(row)) for row in rows]
  np.testing.assert_array_equal(found['tokens'], want)
  assert made.targets[name] == sum(len(row) - 1 for row in rows)


@pytest.mark.parametrize('group', [1, 900, 2**23])
@pytest.mark.parametrize('name', stats.SPLITS)
def test_packed_documents_keep_every_target(tmp_path, monkeypatch, name, group):
  monkeypatch.setattr(tokenize_part, 'GROUP_TOKENS', group)
  made = make(tmp_path, 'packed')
  found = read(tmp_path, name)
  batch = layouts.to_batch('packed', found)
  targets = found['tokens'][:, 1:][batch['weights'] > 0]
  end = fakes.bpe().end_of_text
  want = [token for ids in documents(name) for token in [*ids, end]]
  assert sorted(targets.tolist()) == sorted(want)
  assert made.targets[name] == made.tokens[name] == len(want)


@LAYOUTS
def test_what_is_in_a_directory(tmp_path, layout):
  made = make(tmp_path, layout)
  found = fakes.contents(tmp_path)
  assert set(found) == {
    *made.files,
    'stats.json',
    'features.json',
    'dataset_info.json',
    'tokenizer.json',
  }
  assert stats.Stats.from_json(found['stats.json'].decode()) == made
  assert {name: len(found[name]) for name in made.files} == made.files
  assert len(made.files) > 4
  assert found['tokenizer.json'] == fakes.bpe().content
  assert made.tokenizer_hash == fakes.bpe().digest()
  assert made.skipped == {}


@pytest.mark.parametrize('layout', ['stream', 'packed'])
def test_two_workers_give_the_same_bytes(tmp_path, references, layout):
  make(tmp_path, layout, workers=2)
  assert fakes.contents(tmp_path) == references(layout)


@pytest.mark.slow
@LAYOUTS
@pytest.mark.parametrize('workers', [3, 4])
def test_any_workers_give_the_same_bytes(tmp_path, references, layout, workers):
  make(tmp_path, layout, workers=workers)
  assert fakes.contents(tmp_path) == references(layout)


@pytest.mark.parametrize('layout', ['random', 'truncate', 'packed'])
def test_cut_off_anywhere_and_gone_on(tmp_path, references, layout):
  cuts = 0
  for left in (0, 3, 9, 20, 30, 31, 33, 34, 36, 40, 45):
    try:
      make(tmp_path, layout, progress=fakes.Interrupting(left))
    except KeyboardInterrupt:
      cuts += 1
      assert not (tmp_path / stats.FILE).exists()
  assert cuts > 4
  make(tmp_path, layout)
  assert fakes.contents(tmp_path) == references(layout)


def test_finished_parts_are_kept(tmp_path, monkeypatch):
  with pytest.raises(KeyboardInterrupt):
    make(tmp_path, progress=fakes.Interrupting(30))
  done = list((tmp_path / '.work').glob('part-?????'))
  assert done
  encoded = []
  encode = tokenizer.ByteLevelBPE.encode_batch

  def watched(self, texts):
    encoded.extend(texts)
    return encode(self, texts)

  monkeypatch.setattr(tokenizer.ByteLevelBPE, 'encode_batch', watched)
  make(tmp_path)
  parts = fakes.corpus().texts
  assert len(encoded) == sum(len(texts) for texts in parts[len(done) :])


@pytest.mark.parametrize(
  'module, name',
  [
    (files, 'move'),
    (held_out._Gather, 'read'),
    (piece.Summary, 'write'),
    (stats.Stats, 'to_json'),
    (tokenize_part.Group, 'flush'),
  ],
)
def test_a_full_disk_is_one_line_and_can_be_mended(
  tmp_path, references, monkeypatch, module, name
):
  def full(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  with monkeypatch.context() as patch:
    patch.setattr(module, name, full)
    with pytest.raises(errors.UserError, match='no space left to write'):
      make(tmp_path)
  assert not (tmp_path / stats.FILE).exists()
  make(tmp_path)
  assert fakes.contents(tmp_path) == references('stream')


def test_a_full_disk_as_arrayrecord_says_it(tmp_path, monkeypatch):
  class Full:
    def __init__(self, *args):
      pass

    def write(self, record):
      raise RuntimeError('RESOURCE_EXHAUSTED: No space left on device')

    def close(self):
      self.write(b'')

  monkeypatch.setattr(
    write_records.array_record_module, 'ArrayRecordWriter', Full
  )
  with pytest.raises(errors.UserError, match='no space left to write'):
    make(tmp_path)


def test_a_name_that_array_record_cannot_write_is_refused(tmp_path):
  with pytest.raises(errors.UserError, match='name is not UTF-8: rename'):
    make(tmp_path / '\udcff')
  assert not list(tmp_path.iterdir())


def test_a_file_is_no_directory(tmp_path):
  file = tmp_path / 'file'
  file.write_text('')
  with pytest.raises(
    errors.UserError, match=f'^--out {file} is a file: name a directory$'
  ):
    make(file)
  with pytest.raises(errors.UserError, match=f'out: {file} is a file: name'):
    make(file / 'out')


def test_a_directory_that_cannot_be_written():
  with pytest.raises(errors.UserError, match=r'^cannot write /proc/out: '):
    make(pathlib.Path('/proc/out'))


def test_paths_are_said_as_typed(tmp_path, monkeypatch, references):
  (tmp_path / 'here').mkdir()
  monkeypatch.chdir(tmp_path / 'here')
  out = pathlib.Path('../out')
  make(out, workers=2)
  assert fakes.contents(tmp_path / 'out') == references('stream')
  with pytest.raises(errors.UserError, match=r'^\.\./out was prepared in the'):
    make(out, 'packed')


def test_again_says_so_and_tokenizes_nothing(tmp_path, caplog, monkeypatch):
  made = make(tmp_path)
  caplog.set_level(logging.INFO, 'train.data')
  monkeypatch.setattr(fakes.Part, 'read', None)
  assert make(tmp_path) == made
  assert 'complete already' in caplog.text


def test_what_a_kill_at_the_very_end_leaves_goes(tmp_path):
  made = make(tmp_path)
  (tmp_path / '.work').mkdir()
  assert make(tmp_path) == made
  assert not (tmp_path / '.work').exists()


@pytest.mark.parametrize('complete', [True, False])
@pytest.mark.parametrize(
  'change, words',
  [
    ({'request': {'layout': 'packed'}}, 'in the layout stream, not packed'),
    ({'request': {'sequence_length': 8}}, 'for windows of 16 tokens, not 8'),
    ({'request': {'validation_fraction': 0.3}}, 'with 0.2 of the documents'),
    ({'tokenizer': 290}, 'with another tokenizer'),
    ({'source': fakes.corpus(seed=1)}, 'from other text'),
  ],
)
def test_refuses_to_mix(tmp_path, complete, change, words):
  if complete:
    make(tmp_path)
  else:
    with pytest.raises(KeyboardInterrupt):
      make(tmp_path, progress=fakes.Interrupting(8))
  before = fakes.contents(tmp_path)
  with pytest.raises(errors.UserError, match=words):
    prepare(
      change.get('source', fakes.corpus()),
      change.get('tokenizer', fakes.bpe()),
      dataclasses.replace(request_for(), **change.get('request', {})),
      tmp_path,
    )
  assert fakes.contents(tmp_path) == before


def test_an_edit_that_keeps_the_size_is_seen(tmp_path):
  make(tmp_path)
  first, *others = fakes.corpus().texts
  edited = fakes.Source((tuple(text[::-1] for text in first), *others))
  assert edited.listing() == fakes.corpus().listing()
  with pytest.raises(errors.UserError, match='other text of the same size'):
    prepare(edited, fakes.bpe(), request_for(), tmp_path)


def test_refuses_a_directory_of_something_else(tmp_path):
  (tmp_path / 'thesis.tex').write_text('precious')
  with pytest.raises(errors.UserError, match='is not empty'):
    make(tmp_path)
  assert fakes.contents(tmp_path) == {'thesis.tex': b'precious'}


def test_refuses_a_second_process(tmp_path):
  (tmp_path / '.work').mkdir()
  with (
    directory.alone(tmp_path / '.work'),
    pytest.raises(errors.UserError, match=f'prepared by process {os.getpid()}'),
  ):
    make(tmp_path)
  make(tmp_path)


def changed(corpus):
  """Other text of the same sizes."""
  return fakes.Source(
    tuple(
      tuple(text.replace('beam', 'meab') for text in texts)
      for texts in corpus.texts
    )
  )


@pytest.mark.parametrize('wanted', [300, None])
def test_text_that_changed_meanwhile_is_refused(tmp_path, wanted):
  corpus = fakes.corpus()
  arguments = (wanted or fakes.bpe(), request_for(), tmp_path)
  with pytest.raises(KeyboardInterrupt):
    prepare(corpus, *arguments, progress=fakes.Interrupting(25))
  with pytest.raises(errors.UserError, match='part 0 has changed'):
    prepare(changed(corpus), *arguments)


def test_a_vocabulary_of_the_training_split(tmp_path, monkeypatch, caplog):
  caplog.set_level('INFO', 'train')
  arguments = (fakes.corpus(), 290, request_for())
  made = prepare(*arguments, tmp_path / 'a')
  assert made.vocab_size == 290
  train = [
    text
    for texts in fakes.corpus().texts
    for text in texts
    if not split.is_held_out(split.text_hash(text), 0.2)
  ]
  expected = tokenizer.ByteLevelBPE.train(train, 290)
  assert made.tokenizer_hash == expected.digest()
  # A small text's merges take no time.
  assert not [m for m in caplog.messages if 'Ctrl-C' in m]
  # Cut off while it is trained.
  with pytest.raises(KeyboardInterrupt):
    prepare(*arguments, tmp_path / 'b', progress=fakes.Interrupting(2))
  # It is trained once.
  with pytest.raises(KeyboardInterrupt):
    prepare(*arguments, tmp_path / 'b', progress=fakes.Interrupting(20))
  monkeypatch.setattr(tokenizer.ByteLevelBPE, 'train', None)
  prepare(*arguments, tmp_path / 'b')
  assert fakes.contents(tmp_path / 'a') == fakes.contents(tmp_path / 'b')


@pytest.mark.parametrize('enough', [False, True])
def test_merges_that_take_time_are_announced(
  tmp_path, monkeypatch, caplog, enough
):
  caplog.set_level('INFO', 'train')
  monkeypatch.setattr(vocabulary, '_MUCH', 100)
  if enough:  # The text is read up to there.
    monkeypatch.setattr(vocabulary, '_ENOUGH', 1000)
    monkeypatch.setattr(tokenizer, '_LARGEST_SAMPLE', 1000)
  prepare(fakes.corpus(), 290, request_for(), tmp_path)
  said = 'learning the merges (Ctrl-C is heard when that is done)'
  assert caplog.messages.count(said) == 1


def test_what_is_enough_to_train_a_vocabulary():
  assert vocabulary._ENOUGH == tokenizer._LARGEST_SAMPLE


def test_bad_documents(tmp_path, caplog):
  texts = fakes.corpus().texts
  spoiled = fakes.Source((*texts, ('BAD', 'good', 'BAD'), ('BAD',)))
  request = request_for()
  with pytest.raises(errors.UserError, match=r'part 5, line 1 .*--skip-bad'):
    prepare(spoiled, fakes.bpe(), request, tmp_path)
  lenient = dataclasses.replace(request, skip_bad=True)
  made = prepare(spoiled, fakes.bpe(), lenient, tmp_path)
  assert made.skipped == {'json': 3}
  assert caplog.messages == [
    'left out: part 5, line 1 is bad',
    'left out: part 5, line 3 is bad',
    'left out: part 6, line 1 is bad',
  ]
  assert sum(made.documents.values()) == 241
  assert prepare(spoiled, fakes.bpe(), lenient, tmp_path) == made
  with pytest.raises(errors.UserError, match='without 3 bad documents'):
    prepare(spoiled, fakes.bpe(), request, tmp_path)


def test_parts_that_left_something_out_are_not_kept_for_who_asks_for_all(
  tmp_path,
):
  texts = (('BAD', 'good'), *fakes.corpus().texts)
  lenient = request_for(skip_bad=True)
  with pytest.raises(KeyboardInterrupt):
    prepare(
      fakes.Source(texts),
      fakes.bpe(),
      lenient,
      tmp_path,
      progress=fakes.Interrupting(20),
    )
  with pytest.raises(errors.UserError, match='part 0, line 1'):
    prepare(fakes.Source(texts), fakes.bpe(), request_for(), tmp_path)


@pytest.mark.parametrize(
  'texts, words',
  [
    ([()], r'^there is no document in part 0$'),
    ([(), (), ()], r'^there is no document in part 0 and 2 parts more$'),
    (
      [('BAD',), ('BAD', 'BAD')],
      r'no document in part 0 and 1 part more; left out: 3 json, the first:'
      r' part 0, line 1 is bad$',
    ),
    (
      [('a', 'BAD')],
      r'^the training split has 2 tokens \(1 document\), one window needs 17:'
      r' give more text, or shorten the windows with --seq \(of a run,'
      r' --data\.sequence_length\); the text has 1 document in all; left out:'
      r' 1 json, the first: part 0, line 2 is bad$',
    ),
    (
      [('many words ' * 50,)],
      r'validation split has 0 tokens \(0 documents\), .*: hold more out with'
      r' --validation-fraction \(of a run, --data\.validation_fraction\), or',
    ),
  ],
)
def test_too_little_text(tmp_path, texts, words):
  out = tmp_path / 'out'
  with pytest.raises(errors.UserError, match=words):
    prepare(
      fakes.Source(tuple(texts)),
      fakes.bpe(),
      request_for(skip_bad=True),
      out,
    )
  assert not out.exists()


def test_of_many_documents_it_is_not_said_how_many(tmp_path):
  source_of_many = fakes.corpus(200)
  request = dataclasses.replace(request_for(), validation_fraction=1e-9)
  with pytest.raises(errors.UserError, match='hold more out') as caught:
    prepare(source_of_many, fakes.bpe(), request, tmp_path / 'out')
  assert 'in all' not in str(caught.value)


def test_what_was_left_out_in_words():
  assert wording.left_out({'truncated': 1, 'field': 1200}) == (
    '1,200 field, 1 file cut short (truncated)'
  )
  assert wording.left_out({'truncated': 2}) == '2 files cut short (truncated)'


@pytest.mark.parametrize(
  'request_changes, words',
  [
    ({'layout': 'heap'}, "no layout 'heap', only stream, random"),
    ({'validation_fraction': 1.0}, 'not between 0 and 1'),
    ({'sequence_length': 2**17}, 'windows of 131,072 tokens'),
  ],
)
def test_requests_that_cannot_be(tmp_path, request_changes, words):
  request = dataclasses.replace(request_for(), **request_changes)
  with pytest.raises(errors.UserError, match=words):
    prepare(fakes.corpus(), fakes.bpe(), request, tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


def test_near_duplicates_are_counted_and_named(tmp_path):
  words = [f'w{i * 7919 % 1000}' for i in range(80)]
  originals = fakes.corpus(30).texts
  text = ' '.join(words)
  # Some of these are held out.
  copies = tuple(f'{text} {i}' for i in range(20))
  made = prepare(
    fakes.Source((*originals, copies)), fakes.bpe(), request_for(), tmp_path
  )
  held = [
    copy for copy in copies if split.is_held_out(split.text_hash(copy), 0.2)
  ]
  assert 0 < len(held) < 20
  found = made.near_duplicates
  assert found['validation_documents'] == len(held)
  assert found['train_documents'] == 20 - len(held)
  assert found['examples'][0]['train'][0] == 5
  assert found['looked_at'] == made.documents['validation']
  # A held-out document's number is that of its place in the split.
  hashes = sorted(
    split.text_hash(text)
    for text in [text for texts in originals for text in texts] + [*copies]
    if split.is_held_out(split.text_hash(text), 0.2)
  )
  named = {hashes[pair['validation']] for pair in found['examples']}
  assert named <= {split.text_hash(text) for text in held}


def test_of_very_many_held_out_documents_some_are_looked_at(
  tmp_path, monkeypatch
):
  text = ' '.join(f'w{i * 7919 % 1000}' for i in range(80))
  twins = tuple(f'{text} {i}' for i in range(60))
  arguments = (fakes.Source((twins,)), fakes.bpe(), request_for())
  monkeypatch.setattr(find_duplicates, 'SAMPLE', 3)
  found = prepare(*arguments, tmp_path).near_duplicates
  assert found['looked_at'] == found['validation_documents'] == 3
  assert found['train_documents'] > 30
