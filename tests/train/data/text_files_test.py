import errno
import os
import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train import errors
from train.data import text_files


def refused(match):
  return pytest.raises(errors.UserError, match=rf'--data\.files: .*{match}')


def read(path, **kwargs):
  return list(text_files.TextFiles(str(path), **kwargs))


@given(
  st.text(alphabet='ab \n', max_size=300),
  st.integers(min_value=2, max_value=40),
)
def test_cut_keeps_every_character(text, limit):
  pieces = text_files.cut(text, limit)
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
  assert text_files.cut(text, 11 if '\n\n' in text else 10)[0] == first


def test_order_and_recursion(tmp_path):
  for name in ('b/z.txt', 'a.txt', 'b/a.txt'):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'text of {name}')
  (tmp_path / 'd.txt').mkdir()
  assert read(tmp_path / '**' / '*.txt') == [
    'text of a.txt', 'text of b/a.txt', 'text of b/z.txt'
  ]  # fmt: skip


def test_home_is_expanded(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  (tmp_path / 'a.txt').write_text('at home')
  assert read('~/*.txt') == ['at home']


def test_txt_is_read_as_text(tmp_path):
  path = tmp_path / 'a.TXT'
  path.write_bytes('\ufeffÄ\r\nb\rc\n'.encode())
  assert read(path) == ['Ä\nb\nc\n']


def test_long_txt_is_cut(tmp_path):
  path = tmp_path / 'book.txt'
  text = ('A paragraph of the book. ' * 40 + '\n\n') * 50
  path.write_text(text)
  pieces = read(path)
  assert len(pieces) > 4
  assert max(map(len, pieces)) <= 10_000
  assert all(piece.endswith('\n\n') for piece in pieces)
  assert ''.join(pieces) == text


@pytest.mark.parametrize('suffix', ['.jsonl', '.json'])
def test_json_lines(tmp_path, suffix):
  path = tmp_path / f'a{suffix}'
  path.write_text('{"body": "one\\ntwo", "id": 1}\n\n{"body": "  "}\n'
                  '{"body": "drei ü"}')  # fmt: skip
  assert read(path, text_field='body') == ['one\ntwo', 'drei ü']


@pytest.mark.parametrize(
  ('name', 'content', 'match'),
  [
    ('a.txt', b'caf\xe9', r'a\.txt is not UTF-8 text \(byte 3'),
    ('a.txt', b'a\0b', r'a\.txt is not text: it has NUL bytes'),
    ('a.txt', b' \n', r'no text in 1 file'),
    ('a.txt', b'', r'no text in 1 file'),
    ('a.csv', b'a,b', r'a\.csv is none of \.txt, \.jsonl, \.json'),
    ('a.jsonl', b'', r'no text in 1 file'),
    (
      'a.jsonl',
      b'{"text": "a"}\n{"text": "b"',
      r'a\.jsonl, line 2 is not JSON',
    ),
    ('a.json', b'[\n{"text": "a"}\n]', r'a\.json, line 1 is not JSON'),
    ('a.jsonl', b'["a"]', r'line 1 is not a JSON object'),
    (
      'a.jsonl',
      b'{"body": "a"}',
      r"line 1 has no field 'text' \(it has: body\)",
    ),
    ('a.jsonl', b'{}', r"no field 'text' \(it has: none\)"),
    ('a.jsonl', b'{"text": 3}', r"the field 'text' is not a string"),
    ('a.jsonl', b'{"text": null}', r"the field 'text' is not a string"),
    ('a.jsonl', b'{"text": "\\ud800"}', r'line 1: half a surrogate pair'),
    ('a.jsonl', b'{"text": "\xff"}', r'line 1 is not UTF-8 text'),
    ('a.jsonl', b'{"text": "a"}\0', r'line 1 is not text'),
    ('a.jsonl', b'[' * 200_000, r'line 1 is not JSON'),
  ],
)
def test_bad_file(tmp_path, name, content, match):
  (tmp_path / name).write_bytes(content)
  with refused(match) as caught:
    read(tmp_path / '*')
  assert '\n' not in str(caught.value)


def test_no_match(tmp_path):
  with refused('no file matches'):
    text_files.TextFiles(str(tmp_path / '*.txt'))
  with refused(r'for all below it, give .*/\*\*/\*\.txt'):
    text_files.TextFiles(str(tmp_path))


def test_file_gone(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_text('a')
  files = text_files.TextFiles(str(path))
  path.unlink()
  with refused(r'cannot read .*a\.txt: No such file'):
    list(files)
  with refused(r'cannot read .*a\.txt: No such file'):
    files.digest()


def test_no_permission(tmp_path, monkeypatch):
  def refuse(self):
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(self))

  (tmp_path / 'a.txt').write_text('a')
  monkeypatch.setattr(pathlib.Path, 'read_bytes', refuse)
  with refused(r'cannot read .*a\.txt: Permission denied'):
    read(tmp_path / 'a.txt')


def test_digest_is_of_content(tmp_path):
  def digest(**kwargs):
    return text_files.TextFiles(str(tmp_path / '*'), **kwargs).digest()

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
  path.write_text('{"text": "a"}')
  assert digest() == first
  pathlib.Path(tmp_path / 'c.txt').write_text('c')
  assert digest() != first
