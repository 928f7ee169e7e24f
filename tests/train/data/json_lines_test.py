import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.train.data.sources import COMPRESS, digests, read, read_bad
from train import errors
from train.data import json_lines, local_file, source, text_files


def files(path, *args):
  return text_files.TextFiles(str(path), *args)


@given(
  st.lists(st.binary(max_size=8).filter(lambda b: b'\n' not in b)),
  st.lists(st.integers(0, 80), max_size=6),
  st.integers(1, 9),
)
def test_lines(wanted, cuts, longest):
  content = b'\n'.join(wanted)
  edges = sorted({0, len(content), *(c for c in cuts if c < len(content))})
  blocks = [content[a:b] for a, b in itertools.pairwise(edges)]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(json_lines, 'LONGEST', longest)
    found = list(json_lines.lines(blocks))
  if wanted and not wanted[-1]:
    wanted = wanted[:-1]  # What comes after the last end is no line.
  assert found == [None if len(w) > longest else w for w in wanted]


@given(
  st.lists(st.text(alphabet='aä', max_size=30), min_size=1, max_size=20),
  st.integers(1, 100),
  st.integers(1, 50),
)
def test_every_line_is_in_one_part(tmp_path_factory, texts, part, block):
  """And has its number in the whole file there."""
  path = tmp_path_factory.mktemp('parts') / 'a.jsonl'
  lines = [json.dumps({'text': t}, ensure_ascii=False) for t in texts]
  path.write_text('\n'.join(lines), 'utf-8')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(json_lines, 'PART', part)
    patch.setattr(local_file, 'BLOCK', block)
    found, problems = read_bad(files(path))
    parts = files(path).parts()
  assert found == [text for text in texts if text]
  assert sum(p.size for p in parts) == path.stat().st_size
  assert len(set(digests(files(path)))) <= len(parts)
  blank = [i for i, text in enumerate(texts, start=1) if not text]
  assert problems.first == [
    f'{path}, line {i}: the text is blank' for i in blank[:5]
  ]


def test_parts_are_of_their_size(tmp_path, monkeypatch):
  monkeypatch.setattr(json_lines, 'PART', 1000)
  path = tmp_path / 'a.jsonl'
  path.write_text(''.join(f'{{"text": "{i:>70}"}}\n' for i in range(200)))
  parts = files(path).parts()
  assert len(parts) == 17
  assert all(900 < part.size < 1100 for part in parts[:-1])
  assert parts[1].name == f'{path}, bytes 1,079 to 2,075'
  assert len({part.digest() for part in parts}) == 17
  (tmp_path / 'b.jsonl.gz').write_bytes(COMPRESS['.gz'](path.read_bytes()))
  (part,) = files(tmp_path / 'b.jsonl.gz').parts()
  assert part.name == str(tmp_path / 'b.jsonl.gz')


@pytest.mark.parametrize('suffix', ['.jsonl', '.json', '.ndjson'])
def test_the_field(tmp_path, suffix):
  path = tmp_path / f'a{suffix}'
  path.write_bytes(b'\xef\xbb\xbf{"body": "one\\ntwo", "id": 1}\r\n\n  \r\n'
                   b'{"body": "drei \xc3\xbc", "text": 3}')  # fmt: skip
  assert read(files(path, 'body')) == ['one\ntwo', 'drei ü']


BAD = [
  (b'{"text": "b"', 'json', r'line 2 is not JSON \(.*\); each line must be'),
  (b'[' * 200_000, 'json', r'line 2 is not JSON'),
  (b'{"text": ' + b'1' * 5000 + b'}', 'json', r'line 2 is not JSON'),
  (b'["a"]', 'json', r'line 2 is not a JSON object'),
  (b'"a"', 'json', r'line 2 is not a JSON object'),
  (
    b'{"body": "a", "a\\nb": 1}',
    'field',
    r"line 2 has no field 'text' \(it has: a\\nb, body\); .* --text-field",
  ),
  (b'{}', 'field', r"no field 'text' \(it has: none\)"),
  (b'{"text": 3}', 'field', r"line 2: the field 'text' is not a string"),
  (b'{"text": null}', 'field', r"the field 'text' is not a string"),
  (b'{"text": "\\ud800"}', 'encoding', r'line 2: half a surrogate pair'),
  (b'{"text": "\xff"}', 'encoding', r'line 2 is not UTF-8 .*\(byte 10: inv'),
  (b'{"text": "a"}\0', 'encoding', r'line 2 is not text: it has NUL'),
  (b'{"text": "\\u0000"}', 'encoding', r'line 2 is not text: it has NUL'),
  (b'{"text": " \\n"}', 'empty', r'line 2: the text is blank'),
  (b'{"text": "\\ufeff "}', 'empty', r'line 2: the text is blank'),
  (b'{"text": "' + b'a' * 99 + b'"}', 'giant', r'has 99 char.* may have 50'),
  (b' ' * 401, 'giant', r'line 2 has more than 400 bytes'),
]


@pytest.mark.parametrize('suffix', ['', '.gz'])
@pytest.mark.parametrize(('line', 'kind', 'match'), BAD)
def test_a_bad_line(tmp_path, monkeypatch, suffix, line, kind, match):
  monkeypatch.setattr(source, 'LARGEST', 50)
  monkeypatch.setattr(json_lines, 'LONGEST', 400 if kind == 'giant' else 2**20)
  path = tmp_path / f'a.jsonl{suffix}'
  content = b'{"text": "first"}\n' + line + b'\n{"text": "last"}'
  path.write_bytes(COMPRESS[suffix](content))
  with pytest.raises(errors.UserError, match=match) as caught:
    read(files(path))
  assert '\n' not in str(caught.value)
  assert str(caught.value).endswith(source.HINT)
  texts, problems = read_bad(files(path))
  assert texts == ['first', 'last']
  assert problems.counts == {kind: 1}
  assert str(path) in problems.first[0]


@pytest.mark.parametrize(
  ('content', 'match'),
  [
    (b'[\n{"text": "a"},\n{"text": "b"}\n]\n', 'is one JSON array'),
    (b'\n[{"text": "a"}, {"text": "b"}]', 'is one JSON array'),
    (b'\xef\xbb\xbf[{"text": "a"}]', 'is one JSON array'),
    (b'[ {"text": "a"},\n{"text": "b"}]', 'is one JSON array'),
    (b'{\n  "text": "a"\n}\n', 'is a JSON object over several lines'),
  ],
)
@pytest.mark.parametrize('name', ['a.json', 'a.jsonl.gz'])
def test_json_that_is_not_lines(tmp_path, name, content, match):
  """An error even where bad lines are skipped: all of them would be."""
  path = tmp_path / name
  compression = path.suffix if path.suffix in COMPRESS else ''
  path.write_bytes(COMPRESS[compression](content))
  for read_some in (read, read_bad):
    with pytest.raises(errors.UserError, match=match) as caught:
      read_some(files(path))
    assert 'jq -c' in str(caught.value)


@pytest.mark.parametrize(
  ('content', 'told'),
  [
    (b'{"text": "a"}\n', 'is not a .gz file'),
    (b'', 'is empty'),
    (COMPRESS['.gz'](b'{"text": "a"}\n')[:-30], 'ends in the middle'),
    (
      COMPRESS['.gz'](b'{"text": "a"}\n' * 3)[:-8],
      'ends in the middle, after line 3',
    ),
  ],
)
def test_how_far_a_damaged_file_is_read(tmp_path, content, told):
  path = tmp_path / 'a.json.gz'
  path.write_bytes(content)
  problems = source.Problems(skip=True)
  for part in json_lines.parts(local_file.LocalFile.find(path), '.gz', 'text',
                               '--text-field'):  # fmt: skip
    list(part.read(problems))
  assert problems.counts == {'truncated': 1}
  assert problems.first == [f'{path} {told}']


@pytest.mark.parametrize(
  ('encoding', 'told'),
  [
    ('latin-1', r'\); if it is in another .*: iconv -f LATIN1 -t UTF-8;'),
    ('utf-16', 'it looks like UTF-16: iconv -f UTF-16 -t UTF-8;'),
    ('utf-16-le', 'NUL bytes; it looks like UTF-16: iconv'),
    ('utf-16-be', 'NUL bytes; it looks like UTF-16: iconv'),
  ],
)
def test_another_encoding(tmp_path, encoding, told):
  path = tmp_path / 'a.jsonl'
  text = 'Größe' if encoding in ('latin-1', 'utf-16') else 'size'
  path.write_bytes(f'{{"text": "{text}"}}\n'.encode(encoding))
  with pytest.raises(errors.UserError, match=told):
    read(files(path))


def test_a_giant_line_is_not_kept(tmp_path):
  import tracemalloc

  path = tmp_path / 'a.jsonl'
  with path.open('wb') as file:
    for _ in range(150):
      file.write(b'a' * 2**20)
    file.write(b'\n{"text": "good"}\n')
  tracemalloc.start()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(json_lines, 'LONGEST', 2**23)
    texts, problems = read_bad(files(path))
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert texts == ['good']
  assert problems.counts == {'giant': 1}
  assert peak < 2**25
