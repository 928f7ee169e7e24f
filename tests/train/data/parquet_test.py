import errno

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.train.data.sources import digests, read, read_bad
from train import errors
from train.data import parquet, source, text_files

TEXTS = [f'Text {i}, größer' for i in range(1000)]


def files(path, *args):
  return text_files.TextFiles(str(path), *args)


def write(path, column, name='text', **kwargs):
  numbers = list(range(len(column)))
  pq.write_table(pa.table({'id': numbers, name: column}), path, **kwargs)
  return path


@pytest.mark.parametrize(
  'kind',
  [
    pa.string(),
    pa.large_string(),
    pa.string_view(),
    pa.binary(),
    pa.dictionary(pa.int32(), pa.string()),
  ],
  ids=str,
)
def test_kinds_of_text(tmp_path, kind):
  column = pa.array(TEXTS).cast(kind)
  path = write(tmp_path / 'a.parquet', column, row_group_size=300)
  assert read(files(path)) == TEXTS


def test_parts_are_row_groups(tmp_path, monkeypatch):
  path = write(tmp_path / 'a.parquet', TEXTS, 'body', row_group_size=100)
  (whole,) = files(path, 'body').parts()
  assert whole.groups == tuple(range(10))
  monkeypatch.setattr(parquet, 'PART', whole.size // 4)
  found = files(path, 'body')
  parts = found.parts()
  assert 4 <= len(parts) <= 6
  assert [g for part in parts for g in part.groups] == list(range(10))
  assert sum(part.size for part in parts) == whole.size
  assert parts[1].name == f'{path}, row groups 2 to 3'
  assert [p.first_row for p in parts] == [p.groups[0] * 100 for p in parts]
  assert read(found) == TEXTS
  assert len(set(digests(found))) == len(parts)


def test_digest_is_of_content(tmp_path):
  first = digests(files(write(tmp_path / 'a.parquet', TEXTS)))
  assert digests(files(write(tmp_path / 'b.parquet', TEXTS))) == first
  assert digests(files(write(tmp_path / 'a.parquet', TEXTS[:-1]))) != first


def test_no_rows(tmp_path):
  path = tmp_path / 'a.parquet'
  pq.ParquetWriter(path, pa.schema({'text': pa.string()})).close()
  with pytest.raises(errors.UserError, match=r'no document in .*a\.parquet$'):
    files(path).parts()


@pytest.mark.parametrize(
  ('column', 'match'),
  [
    ('title', r"no column 'title' \(it has: id, text\); .* --text-field"),
    ('id', r"the column 'id' is not text, but int64; .* --text-field"),
  ],
)
def test_the_wrong_column(tmp_path, column, match):
  path = write(tmp_path / 'a.parquet', TEXTS)
  with pytest.raises(errors.UserError, match=match):
    files(path, column).parts()


def test_bad_rows(tmp_path, monkeypatch):
  monkeypatch.setattr(source, 'LARGEST', 50)
  monkeypatch.setattr(parquet, 'PART', 1)
  column = pa.array(
    [b'good', b'caf\xe9', None, b' ', b'a\0', b'x' * 51, b'last']
  )
  # As other writers may leave it: said to be text, which no one has checked.
  path = write(
    tmp_path / 'a.parquet',
    pa.StringArray.from_buffers(len(column), *column.buffers()[1:],
                                column.buffers()[0], column.null_count),
    row_group_size=2,
  )  # fmt: skip
  texts, problems = read_bad(files(path))
  assert texts == ['good', 'last']
  assert problems.counts == {'encoding': 2, 'field': 1, 'empty': 1, 'giant': 1}
  assert problems.first == [
    f'{path}, row 2 is not UTF-8 text (byte 3: unexpected end of data)',
    f"{path}, row 3: 'text' is null",
    f'{path}, row 4: the text is blank',
    f'{path}, row 5 is not text: it has NUL bytes',
    f'{path}, row 6: the text has 51 characters, a document may have 50',
  ]
  with pytest.raises(errors.UserError, match='row 2 is not UTF-8'):
    read(files(path))


def test_not_parquet(tmp_path):
  path = tmp_path / 'a.parquet'
  for content, told in (
    (b'{"text": "a"}', 'is not a Parquet file'),
    (b'PAR1' * 10, 'is damaged, or ends in the middle'),
  ):
    path.write_bytes(content)
    with pytest.raises(errors.UserError, match=rf'a\.parquet {told};'):
      read(files(path))
    texts, problems = read_bad(files(path))
    assert texts == []
    assert problems.counts == {'truncated': 1}
    assert problems.first == [f'{path} {told}']
    assert len(digests(files(path))) == 1


def test_a_damaged_row_group(tmp_path):
  path = write(
    tmp_path / 'a.parquet', TEXTS, row_group_size=100, compression='zstd'
  )
  content = bytearray(path.read_bytes())
  middle = len(content) // 2
  content[middle : middle + 1000] = bytes(1000)
  path.write_bytes(content)
  texts, problems = read_bad(files(path))
  assert 200 <= len(texts) <= 700
  assert texts == TEXTS[: len(texts)]
  assert problems.counts == {'truncated': 1}
  assert f'after row {len(texts)}' in problems.first[0]


@pytest.mark.parametrize(
  ('error', 'match'),
  [
    (MemoryError(), 'not enough memory to read {}: .* damaged'),
    (
      pa.ArrowMemoryError('malloc of size 1 failed'),
      'not enough memory to read {}: .* damaged',
    ),
    (OSError(errno.EIO, 'Input/output error'), 'cannot read {}: Input/output'),
  ],
)
def test_a_failure_of_the_machine_is_no_damage(
  tmp_path, monkeypatch, error, match
):
  path = write(tmp_path / 'a.parquet', TEXTS)
  match = match.format(path)
  found = files(path)
  parts = found.parts()
  real = pq.ParquetFile.iter_batches

  def iter_batches(self, *args, **kwargs):
    yield next(real(self, *args, **kwargs))
    raise error

  with monkeypatch.context() as patch:
    patch.setattr(pq.ParquetFile, 'iter_batches', iter_batches)
    with pytest.raises(errors.UserError, match=match):
      read_bad(found)

  def parquet_file(*args, **kwargs):
    raise error

  monkeypatch.setattr(pq, 'ParquetFile', parquet_file)
  with pytest.raises(errors.UserError, match=match):
    list(parts[0].read(source.Problems(skip=True)))
  with pytest.raises(errors.UserError, match=match):
    files(path).parts()
