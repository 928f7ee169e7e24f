import gzip

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.train.data.sources import read, read_bad
from train import errors
from train.data import local_file, plain_text, text_files


def files(path):
  return text_files.TextFiles(str(path))


@given(
  st.text(alphabet='ab \n', max_size=300),
  st.integers(min_value=2, max_value=40),
)
def test_cut_keeps_every_character(text, limit):
  pieces = plain_text.cut(text, limit)
  assert ''.join(pieces) == text
  assert all(len(piece) <= limit for piece in pieces)
  assert all(2 * len(piece) >= limit - 1 for piece in pieces[:-1])
  assert len(pieces) == 1 or pieces[-1]


@pytest.mark.parametrize(
  ('text', 'first'),
  [
    ('a' * 5 + ' b\nc\n\n' + 'd' * 20, 'a' * 5 + ' b\nc\n\n'),
    ('a' * 5 + '\nb c ' + 'd' * 20, 'a' * 5 + '\n'),
    ('a' * 5 + ' b' + 'd' * 20, 'a' * 5 + ' '),
    ('a' * 20, 'a' * 10),
  ],
)
def test_cut_prefers_paragraph_then_line_then_space(text, first):
  assert plain_text.cut(text, 11 if '\n\n' in text else 10)[0] == first


@given(
  st.text(alphabet='ab \n\r\ufeffäü', min_size=1, max_size=200),
  st.integers(1, 9),
)
def test_read_in_blocks_as_in_one(tmp_path_factory, text, block):
  """A character, a line end or a byte order mark may lie on an edge."""
  path = tmp_path_factory.mktemp('blocks') / 'a.txt'
  path.write_bytes(text.encode())
  whole = text.removeprefix('\ufeff').replace('\r\n', '\n').replace('\r', '\n')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(local_file, 'BLOCK', block)
    texts, problems = read_bad(files(path))
  assert texts == ([whole] if whole.strip() else [])
  assert problems.counts == ({} if whole.strip() else {'empty': 1})


def test_it_is_read_as_text(tmp_path):
  path = tmp_path / 'a.TXT'
  path.write_bytes('\ufeffÄ\r\nb\rc\n'.encode())
  assert read(files(path)) == ['Ä\nb\nc\n']


@pytest.mark.parametrize('suffix', ['', '.gz'])
def test_a_long_one_is_cut(tmp_path, suffix, monkeypatch):
  monkeypatch.setattr(local_file, 'BLOCK', 1234)
  path = tmp_path / f'book.txt{suffix}'
  text = ('A paragraph of the book. ' * 40 + '\n\n') * 50 + ' ' * 20_000
  content = text.encode()
  path.write_bytes(gzip.compress(content) if suffix else content)
  pieces = read(files(path))
  assert len(pieces) > 4
  assert max(map(len, pieces)) <= 10_000
  assert all(piece.endswith('\n\n') for piece in pieces[:-1])
  whole = [p for p in plain_text.cut(text) if p.strip()]
  assert pieces == whole
  assert len(whole) < len(plain_text.cut(text))  # A blank piece is left out.


@pytest.mark.parametrize(
  ('content', 'kind', 'match'),
  [
    (b'caf\xe9', 'encoding', r'a\.txt is not UTF-8 text \(byte 3: unexp'),
    (b'caf\xe9 au', 'encoding', r'a\.txt is not UTF-8 text \(byte 3: inv'),
    (b'a\0b', 'encoding', r'a\.txt is not text: it has NUL bytes'),
    (b' \n', 'empty', r'a\.txt: the text is blank'),
    (b'', 'empty', r'a\.txt: the text is blank'),
    (b'\xef\xbb\xbf', 'empty', r'a\.txt: the text is blank'),
  ],
)
def test_a_bad_file(tmp_path, content, kind, match):
  (tmp_path / 'a.txt').write_bytes(content)
  (tmp_path / 'b.txt').write_text('good')
  with pytest.raises(errors.UserError, match=match) as caught:
    read(files(tmp_path / '*'))
  assert '\n' not in str(caught.value)
  texts, problems = read_bad(files(tmp_path / '*'))
  assert texts == ['good']
  assert problems.counts == {kind: 1}


@pytest.mark.parametrize(
  ('content', 'told'),
  [
    (
      'Größe'.encode('latin-1'),
      r'\(byte 2: .*\); if it is in another .*: iconv -f LATIN1 -t UTF-8;',
    ),
    (
      'Größe'.encode('utf-16'),
      r'\(byte 0: .*\); it looks like UTF-16: iconv -f UTF-16 -t UTF-8;',
    ),
    (
      'some words'.encode('utf-16-le'),
      'NUL bytes; it looks like UTF-16: iconv -f UTF-16 -t UTF-8;',
    ),
    (b'some words\0', 'NUL bytes; --skip-bad'),
  ],
)
def test_another_encoding(tmp_path, content, told):
  (tmp_path / 'a.txt').write_bytes(content)
  with pytest.raises(errors.UserError, match=told):
    read(files(tmp_path / 'a.txt'))


def test_a_bad_byte_is_found_in_any_block(tmp_path, monkeypatch):
  monkeypatch.setattr(local_file, 'BLOCK', 10)
  path = tmp_path / 'a.txt'
  path.write_bytes('ä'.encode() * 14 + b'ab' + b'\xc3(')
  with pytest.raises(errors.UserError, match=r'byte 30: invalid cont'):
    read(files(path))
  # Nothing of a bad file is a document, however late the byte comes.
  assert read_bad(files(path))[0] == []


def test_of_a_cut_file_the_beginning_is_left(tmp_path):
  path = tmp_path / 'a.txt.gz'
  text = ''.join(f'{i * i} größer\n' for i in range(9999))
  content = gzip.compress(text.encode())
  path.write_bytes(content[:-1000])
  pieces, problems = read_bad(files(path))
  assert text.startswith(''.join(pieces))
  assert len(''.join(pieces)) > 0.8 * len(text)
  assert problems.counts == {'truncated': 1}
  assert problems.first == [f'{path} ends in the middle']


def test_neighbours_are_one_part(tmp_path, monkeypatch):
  monkeypatch.setattr(plain_text, 'PART', 100)
  monkeypatch.setattr(plain_text, 'PART_FILES', 5)
  for i in range(10):
    (tmp_path / f'a{i}.txt').write_text('x' * 30)
  (tmp_path / 'b.txt').write_text('x' * 300)
  for i in range(7):
    (tmp_path / f'c{i}.txt').write_text('x')
  (tmp_path / 'c7.txt.gz').write_bytes(gzip.compress(b'x'))
  (tmp_path / 'd.jsonl').write_text('{"text": "y"}\n')
  (tmp_path / 'e.txt').write_text('x')
  parts = files(tmp_path / '*').parts()
  assert [part.size for part in parts] == [
    90, 90, 90, 30, 300, 5, 2, parts[7].size, 14, 1
  ]  # fmt: skip
  assert parts[0].name == f'{tmp_path}/a0.txt to {tmp_path}/a2.txt'
  assert parts[4].name == f'{tmp_path}/b.txt'
  assert len(read(files(tmp_path / '*'))) == 21
