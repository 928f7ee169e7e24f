import errno
import glob
import json
import os
import pickle
import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.train.data.sources import COMPRESS, digests, read, read_bad
from train import errors
from train.data import json_lines, local_file, plain_text, text_files


def refused(match):
  return pytest.raises(errors.UserError, match=match)


def files(path, *args, **kwargs):
  return text_files.TextFiles(str(path), *args, **kwargs)


def test_order_and_recursion(tmp_path):
  for name in ('b/z.txt', 'a.txt', 'b/a.txt'):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'text of {name}')
  (tmp_path / 'd.txt').mkdir()
  found = files(tmp_path / '**' / '*.txt')
  assert read(found) == [
    'text of a.txt', 'text of b/a.txt', 'text of b/z.txt'
  ]  # fmt: skip
  assert found.listing() == [['a.txt', 13], ['a.txt', 15], ['z.txt', 15]]


@given(
  st.lists(
    st.sampled_from(['**', '*', 'a', 'b', '.h', '.*', '*.txt', 'a*', '**b']),
    min_size=1,
    max_size=4,
  )
)
def test_without_links_it_is_a_glob(tree, names):
  pattern = str(tree / '/'.join(names))
  wanted = {m for m in glob.glob(pattern, recursive=True) if os.path.isfile(m)}
  if wanted:
    assert {str(path) for path in text_files.find(pattern)} == wanted
  else:
    with refused('no file matches'):
      text_files.find(pattern)


@pytest.fixture(scope='module')
def tree(tmp_path_factory):
  tree = tmp_path_factory.mktemp('tree')
  for folder in ('', 'a', 'a/b', 'a/.h', '.h', '.h/a', 'b', 'b/a/b', 'a/**'):
    (tree / folder).mkdir(parents=True, exist_ok=True)
    for name in ('a.txt', '.b.txt'):
      (tree / folder / name).write_text(folder + name)
  return tree


def names(pattern, folder):
  return [str(p.relative_to(folder)) for p in text_files.find(str(pattern))]


def test_a_file_of_several_names_is_read_once(tmp_path, caplog):
  """By that with the fewest links, or the first of them."""
  for name in ('v1/a.txt', 'v1/b/c.txt', 'v3/a.txt'):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(name)
  wanted = names(tmp_path / '**/*.txt', tmp_path)
  assert wanted == ['v1/a.txt', 'v1/b/c.txt', 'v3/a.txt']
  assert not caplog.records
  (tmp_path / 'latest').symlink_to('v3')
  (tmp_path / 'a.txt').symlink_to('v1/b/c.txt')
  assert names(tmp_path / '**/*.txt', tmp_path) == wanted
  assert caplog.messages == [
    '--files: left out, as other names of what is read already:'
    f' {tmp_path}/a.txt and 1 more'
  ]
  assert names(tmp_path / '*/*.txt', tmp_path) == ['v1/a.txt', 'v3/a.txt']
  assert names(tmp_path / '[l-z]*/**/*.txt', tmp_path) == wanted
  assert names(tmp_path / 'latest/*.txt', tmp_path) == ['latest/a.txt']
  assert names(tmp_path / '**/latest/*.txt', tmp_path) == ['latest/a.txt']


@pytest.mark.parametrize('targets', [['.'], ['..', '..'], ['.', '..', 'l1']])
def test_loops_of_links_end(tmp_path, targets):
  (tmp_path / 'a/b').mkdir(parents=True)
  for i in range(10):
    (tmp_path / f'a/b/{i}.txt').write_text(f'text {i}')
  wanted = names(tmp_path / '**' / '*.txt', tmp_path)
  for i, target in enumerate(targets):
    (tmp_path / f'a/b/l{i}').symlink_to(target)
    (tmp_path / f'a/l{i}').symlink_to(target)
  (tmp_path / 'a/self').symlink_to('self')
  assert names(tmp_path / '**' / '*.txt', tmp_path) == wanted
  assert names(tmp_path / '**/b/**' / '*.txt', tmp_path) == wanted
  assert len(names(tmp_path / 'a/l*/**/*.txt', tmp_path)) == 10


def test_a_link_to_a_folder_above_leads_no_further(tmp_path):
  (tmp_path / 'in/below').mkdir(parents=True)
  (tmp_path / 'in/below/a.txt').write_text('a')
  (tmp_path / 'out.txt').write_text('elsewhere')
  for target in ('..', '../..', str(tmp_path)):
    link = tmp_path / 'in/below/up'
    link.symlink_to(target)
    assert names(tmp_path / 'in/**/*.txt', tmp_path) == ['in/below/a.txt']
    link.unlink()


def test_a_name_with_a_suffix_that_is_read_comes_first(tmp_path):
  (tmp_path / 'blob').write_text('a')
  (tmp_path / 'b').mkdir()
  (tmp_path / 'b/a.txt').symlink_to('../blob')
  assert names(tmp_path / '**/*', tmp_path) == ['b/a.txt']


def test_a_hub_cache_is_read_by_the_names_of_its_links(tmp_path):
  """Its files have no suffix; a folder may be elsewhere."""
  (tmp_path / 'blobs').mkdir()
  (tmp_path / 'hub/snapshots/x').mkdir(parents=True)
  for i in range(2):
    (tmp_path / f'blobs/abc{i}').write_text(f'text {i}')
    link = tmp_path / f'hub/snapshots/x/train{i}.txt'
    link.symlink_to(tmp_path / f'blobs/abc{i}')
  (tmp_path / 'data').mkdir()
  (tmp_path / 'data/corpus').symlink_to(tmp_path / 'hub')
  (tmp_path / 'hub/snapshots/y').symlink_to('x')
  found = files(tmp_path / 'data/**/*.txt')
  assert read(found) == ['text 0', 'text 1']
  assert found.listing() == [['train0.txt', 6], ['train1.txt', 6]]


def test_a_link_that_leads_nowhere_is_told(tmp_path):
  (tmp_path / 'a.txt').write_text('a')
  (tmp_path / 'b.txt').symlink_to('gone')
  with refused(r'cannot read .*/b\.txt: No such file'):
    files(tmp_path / '**' / '*.txt')


def test_what_is_no_file_is_passed_over(tmp_path, caplog):
  """Opening a pipe would wait for ever."""
  (tmp_path / 'a.txt').write_text('a')
  os.mkfifo(tmp_path / 'b.txt')
  (tmp_path / 'c.txt').symlink_to('b.txt')
  (tmp_path / 'd.txt').symlink_to('/dev/zero')
  assert read(files(tmp_path / '*.txt')) == ['a']
  assert caplog.messages == [
    '--files: left out, as pipes, sockets or devices:'
    f' {tmp_path}/b.txt and 2 more'
  ]
  with refused(r"no file matches '.*/b\.txt'$"):
    files(tmp_path / 'b.txt')


def test_brackets_in_a_name(tmp_path):
  (tmp_path / 'b[1]').mkdir()
  (tmp_path / 'b[1]/a.txt').write_text('a')
  for pattern in ('b[1]/a.txt', 'b[1]/**/*.txt'):
    with refused(r"; a name with brackets is written '.*/b\[\[\]1\]/.*\.txt'$"):
      files(tmp_path / pattern)
    assert read(files(tmp_path / pattern.replace('[', '[[]'))) == ['a']
  with refused(r"no file matches '.*c\[1\]'$"):
    files(tmp_path / 'c[1]')


def test_home_is_expanded(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  (tmp_path / 'a.txt').write_text('at home')
  assert read(files('~/*.txt')) == ['at home']


def test_all_forms_keep_the_order_of_their_paths(tmp_path):
  wanted = []
  for i, form in enumerate(['.txt', '.jsonl', '.json', '.ndjson', '.TXT']):
    for compression, compress in sorted(COMPRESS.items()):
      text = f'text in {form}{compression}'
      content = text if form.lower() == '.txt' else json.dumps({'text': text})
      path = tmp_path / f'{i}{form}{compression}'
      path.write_bytes(compress(content.encode()))
      wanted.append(text)
  pq.write_table(pa.table({'text': ['a row']}), tmp_path / '2.jsonl.parquet')
  wanted.insert(8 + 3, 'a row')  # After .jsonl.gz and before .xz, .zst.
  found = files(tmp_path / '*')
  paths = [path.name for path in text_files.find(str(tmp_path / '*'))]
  wanted = [wanted[i] for i in _order(paths)]
  assert read(found) == wanted
  assert all(part.size > 0 for part in found.parts())


def _order(paths):
  forms = ['.txt', '.jsonl', '.json', '.ndjson', '.TXT']
  names = [f'{i}{f}{c}' for i, f in enumerate(forms) for c in sorted(COMPRESS)]
  names.insert(11, '2.jsonl.parquet')
  return [names.index(path) for path in paths]


@pytest.mark.parametrize('marks', range(3))
def test_one_leading_byte_order_mark_is_dropped(tmp_path, marks):
  """In every form alike, and none within a text."""
  text = '\ufeff' * marks + 'Größe \ufeff'
  (tmp_path / 'a.txt').write_text(text, 'utf-8')
  line = json.dumps({'text': text}, ensure_ascii=False)
  (tmp_path / 'b.jsonl').write_text(line, 'utf-8-sig')
  pq.write_table(pa.table({'text': [text]}), tmp_path / 'c.parquet')
  assert read(files(tmp_path / '*')) == [text.removeprefix('\ufeff')] * 3


def test_no_match(tmp_path):
  with refused('^--files: no file matches'):
    files(tmp_path / '*.txt')
  with refused(r'for all below it, give .*/\*\*/\*\.txt'):
    files(tmp_path)
  with refused('^--data.files: no file matches'):
    files(tmp_path / '*.txt', options=('--data.files', '--data.text_field'))


@pytest.mark.parametrize('suffix', ['.txt', '.jsonl', '.parquet'])
def test_nothing_in_any_file(tmp_path, suffix):
  (tmp_path / f'a{suffix}').write_text('')
  with refused(rf'^there is no document in .*/a{suffix}$'):
    files(tmp_path / 'a*').parts()
  (tmp_path / f'b{suffix}').write_text('')
  (tmp_path / f'c{suffix}').write_text('')
  with refused(rf'^there is no document in .*/a{suffix} and 2 more files$'):
    files(tmp_path / '*').parts()
  (tmp_path / 'd.jsonl').write_text('{"text": "a"}\n')
  assert read_bad(files(tmp_path / '*'))[0] == ['a']


@pytest.mark.parametrize('name', ['a.csv', 'a.csv.gz', 'gz', 'a.parquet.gz'])
def test_other_kinds_are_named(tmp_path, name):
  (tmp_path / name).write_text('a')
  with refused(f'{name} is none of .txt, .jsonl, .json, .ndjson .* .parquet'):
    files(tmp_path / '*')


def test_file_gone(tmp_path):
  for name in ('a.txt', 'a.jsonl'):
    path = tmp_path / name
    path.write_text('{"text": "a"}')
    found = files(path)
    path.unlink()
    with refused(rf'cannot read .*{name}: No such file'):
      read(found)
    with refused(rf'cannot read .*{name}: No such file'):
      digests(found)


def test_no_permission(tmp_path, monkeypatch):
  def refuse(path, mode):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

  (tmp_path / 'a.txt').write_text('a')
  found = files(tmp_path / 'a.txt')
  monkeypatch.setattr(local_file, 'open', refuse, raising=False)
  with refused(r'cannot read .*a\.txt: Permission denied'):
    read(found)


@pytest.mark.parametrize('name', ['a.txt', 'a.jsonl', 'a.jsonl.gz'])
def test_a_file_that_changes_while_it_is_read(tmp_path, name):
  path = tmp_path / name
  line = b'{"text": "' + b'word ' * 3000 + b'"}\n'
  path.write_bytes(COMPRESS[path.suffix if name.endswith('gz') else ''](
    line * 20
  ))  # fmt: skip
  (part,) = files(path).parts()
  texts = part.read(text_files.source.Problems(skip=True))
  next(texts)
  os.utime(path, ns=(0, 0))
  with refused(f'{name} changed while it was being read; run again'):
    list(texts)
  with refused('changed'):
    part.digest()


def test_digest_is_of_content(tmp_path):
  def digest(**kwargs):
    return digests(files(tmp_path / '*', **kwargs))

  path = tmp_path / 'a.jsonl'
  path.write_text('{"text": "a"}')
  first = digest()
  os.utime(path, (0, 0))
  assert digest() == first
  assert digest(text_field='b') != first
  path = path.rename(tmp_path / 'b.jsonl')
  assert digest() == first
  path.write_text('{"text": "b"}')
  assert digest() != first
  path = path.rename(tmp_path / 'b.txt')
  path.write_text('{"text": "a"}')
  assert digest() != first
  path = path.rename(tmp_path / 'a.jsonl')
  assert digest() == first
  (tmp_path / 'c.txt').write_text('c')
  assert digest() != first


def test_parts_can_be_pickled(tmp_path):
  (tmp_path / 'a.jsonl').write_text('{"text": "a"}\n')
  (tmp_path / 'b.txt').write_text('b')
  pq.write_table(pa.table({'text': ['c']}), tmp_path / 'c.parquet')
  parts = files(tmp_path / '*').parts()
  copies = pickle.loads(pickle.dumps(parts))
  assert copies == parts
  assert [p.digest() for p in copies] == [p.digest() for p in parts]


def _corpus(form):
  texts = [f'Document {i}: ' + f'größe {i * i} ' * (i % 40) for i in range(400)]
  lines = ''.join(json.dumps({'text': text}) + '\n' for text in texts)
  return ('\n\n'.join(texts) if form == '.txt' else lines).encode()


def _parquet():
  texts = [f'Document {i}: ' + f'größe {i * i} ' * (i % 40) for i in range(400)]
  sink = pa.BufferOutputStream()
  pq.write_table(
    pa.table({'text': texts}), sink, row_group_size=50, compression='zstd'
  )
  return sink.getvalue().to_pybytes()


def _damage(content, seed):
  """Cuts a file, flips some of its bits, or does both."""
  generator = random.Random(seed)
  content = bytearray(content)
  if generator.random() < 0.5:
    content = content[: generator.randrange(len(content))]
  if content and generator.random() < 0.7:
    for _ in range(generator.choice([1, 2, 30])):
      # The last bytes of a file, often an index, are as likely as the others.
      length = generator.choice([len(content), min(len(content), 600)])
      content[-1 - generator.randrange(length)] ^= 1 << generator.randrange(8)
  return bytes(content)


@pytest.mark.parametrize(
  'suffix',
  ['.parquet', *(f + c for f in ('.jsonl', '.txt') for c in COMPRESS)],
)
@pytest.mark.parametrize(
  'tries', [20, pytest.param(200, marks=pytest.mark.slow)]
)
def test_damaged_files(tmp_path, suffix, tries, monkeypatch):
  """What is left of them is the same each time, or the error is one line."""
  monkeypatch.setattr(json_lines, 'PART', 5000)
  path = tmp_path / f'a{suffix}'
  form, _, compression = suffix.removeprefix('.').partition('.')
  if suffix == '.parquet':
    good = _parquet()
  else:
    good = COMPRESS[compression and f'.{compression}'](_corpus(f'.{form}'))
  path.write_bytes(good)
  wanted = set(read(files(path)))
  kinds = set()
  for seed in range(tries):
    content = _damage(good, seed)
    path.write_bytes(content)
    results = []
    for _ in range(2):
      try:
        texts, problems = read_bad(files(path))
      except errors.UserError as error:
        results.append(str(error))
        assert '\n' not in str(error)
      else:
        results.append((texts, problems.counts, problems.first))
        kinds |= set(problems.counts)
        if not problems.counts and compression:
          assert set(texts) <= wanted  # Its checksum is right.
    assert results[0] == results[1]
  if suffix == '.parquet' or compression:
    assert 'truncated' in kinds
  else:
    assert kinds


def test_a_cut_file_gives_what_lies_before(tmp_path):
  generator = random.Random(0)
  texts = [f'{i} ' + generator.randbytes(500).hex() for i in range(999)]
  lines = ''.join(json.dumps({'text': text}) + '\n' for text in texts)
  for suffix, compress in COMPRESS.items():
    content = compress(lines.encode())
    path = tmp_path / f'a.jsonl{suffix}'
    path.write_bytes(content[: len(content) // 2])
    left, problems = read_bad(files(path))
    assert 350 < len(left) < 600
    assert left == texts[: len(left)]
    kind = 'truncated' if suffix else 'json'
    assert problems.counts == {kind: 1}
    line = len(left) + (0 if suffix else 1)
    assert f'{path}' in problems.first[0]
    assert f'line {line}' in problems.first[0]
    with refused(r'--skip-bad'):
      read(files(path))


def test_nothing_heavy_is_imported():
  """A worker that reads text starts fast."""
  import subprocess
  import sys

  code = (
    'import sys; from train.data import text_files;'
    ' print(sorted({m.split(".")[0] for m in sys.modules} &'
    ' {"jax", "flax", "numpy", "pyarrow", "tensorflow_datasets"}))'
  )
  out = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert out.stdout.strip() == '[]'


def test_plain_text_and_json_cut_alike():
  assert plain_text.PART == json_lines.PART == 2**26
