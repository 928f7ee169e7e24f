import json
import pathlib
import signal
import subprocess
import sys
import time
import types

import pytest

from tests.train.data.prepare import fakes
from train import cli, errors, prepare_command
from train.data import prepare, stats

ROOT = pathlib.Path(__file__).parents[2]


def parse(*arguments):
  parser = cli.Parser(prog='train')
  prepare_command.add(
    parser.add_subparsers(dest='command', parser_class=cli.Parser)
  )
  return parser.parse_args(['prepare', *map(str, arguments)])


@pytest.fixture
def corpus(tmp_path):
  """Files of text, one a part, with two bad lines; returns a glob."""
  for i, texts in enumerate(fakes.corpus().texts):
    lines = [json.dumps({'text': text}) for text in texts]
    if i == 3:
      lines[1:1] = ['{"text": 7}', 'not JSON']
    (tmp_path / f'{i}.jsonl').write_text('\n'.join(lines))
  return tmp_path / '*.jsonl'


def command(corpus, out, *more):
  return (
    '--files', corpus, '--vocab-size', 290, '--layout', 'stream', '--seq', 16,
    '--out', out, '--validation-fraction', '0.2', *more,
  )  # fmt: skip


def run(*arguments):
  options = parse(*arguments)
  return options.call(options)


def test_prepares_and_says_what_there_is(corpus, tmp_path, capsys, caplog):
  out = tmp_path / "ada's[1]@2*"
  assert run(*command(corpus, out, '--skip-bad', '--workers', 1)) == 0
  made = stats.Stats.from_json((out / stats.FILE).read_text())
  assert made.skipped == {'field': 1, 'json': 1}
  said = capsys.readouterr().out.splitlines()
  assert said[0] == (
    f'train: {made.documents["train"]} documents,'
    f' {made.tokens["train"]:,} tokens, {made.windows["train"]} windows of 16'
  )
  assert said[1].startswith(f'validation: {made.documents["validation"]} doc')
  assert said[2] == 'left out: 1 field, 1 json'
  assert said[3].startswith('near-duplicates: ')
  assert said[-3].endswith('M tokens a second')
  assert '\n'.join(said[-2:]) == (
    'train on it: python -m train run RECIPE --run-dir runs/NAME'
    f" --data.prepared '{tmp_path}/ada'\"'\"'s[1]@2*' \\\n"
    '  --data.layout stream --data.sequence_length 16 --model.vocab_size 0'
  )
  assert [m for m in caplog.messages if '3.jsonl, line 2' in m]
  # The tokenizer that came of it serves again.
  again = tmp_path / 'again'
  other = (
    '--files', corpus, '--tokenizer', out, '--layout', 'truncate', '--seq', 8,
    '--out', again, '--skip-bad', '--workers', 1, '--validation-fraction', 0.2,
  )  # fmt: skip
  assert run(*other) == 0
  same = stats.Stats.from_json((again / stats.FILE).read_text())
  assert same.tokenizer_hash == made.tokenizer_hash
  # And what is complete is not done again.
  capsys.readouterr()
  assert run(*command(corpus, out, '--skip-bad', '--workers', 1)) == 0
  assert 'a second' not in capsys.readouterr().out


@pytest.mark.parametrize(
  'name', ['a,b', 'a=3', 'a;b', 'a ', '\n', 'lang=en,', 'x=1e-3']
)
def test_a_name_to_train_on_is_one_that_is_read(corpus, tmp_path, name):
  out = tmp_path / name
  with pytest.raises(
    errors.UserError, match=r'--out .*: name another$'
  ) as error:
    run(*command(corpus, out))
  assert '\n' not in str(error.value)
  assert not out.exists()


def summary_of(**values):
  made = {
    'layout': 'stream',
    'sequence_length': 256,
    'documents': {'train': 5082},
    'tokens': {'train': 9_015_580},
    'windows': {'train': 5082},
    'targets': {'train': 1_290_098},
    'skipped': {},
    'near_duplicates': {
      'looked_at': 1034,
      'validation_documents': 0,
      'train_documents': 0,
      'examples': [],
    },
  } | values
  said = prepare_command._summary(types.SimpleNamespace(**made))
  return said.splitlines()


def test_what_truncate_drops_is_said():
  assert summary_of(layout='truncate')[0] == (
    'train: 5,082 documents, 9,015,580 tokens, 5,082 windows of 256'
    ' (1,290,098 targets: 86 % of the tokens are cut off)'
  )
  few = {'layout': 'truncate', 'documents': {'train': 1},
         'windows': {'train': 1}, 'tokens': {'train': 1000}}  # fmt: skip
  # A document of 999 tokens and its end: the first of them is no target.
  assert summary_of(**few, targets={'train': 999})[0] == (
    'train: 1 document, 1,000 tokens, 1 window of 256 (999 targets)'
  )
  assert '(998 targets: under 1 %' in summary_of(
    **few, targets={'train': 998}
  )[0]  # fmt: skip
  assert 'targets' not in summary_of()[0]


def test_a_file_cut_short_is_no_document():
  said = summary_of(skipped={'truncated': 1, 'json': 2})
  assert said[1] == 'left out: 2 json, 1 file cut short (truncated)'


def test_near_duplicates_are_said_in_short_lines():
  assert summary_of()[1:] == [
    'near-duplicates: no held-out document has one in training'
  ]
  found = {'looked_at': 12_345, 'validation_documents': 1234,
           'train_documents': 5678, 'examples': [{}]}  # fmt: skip
  said = summary_of(near_duplicates=found)[1:]
  assert said == [
    'near-duplicates: 1,234 of 12,345 held-out documents have one in training,',
    '  and 5,678 training documents one held out (examples: see stats.json)',
  ]
  assert max(map(len, said)) < 80


def test_bad_input_is_one_line(corpus, tmp_path):
  with pytest.raises(errors.UserError, match=r'3\.jsonl, line 2.*--skip-bad'):
    run(*command(corpus, tmp_path / 'out', '--workers', 1))


def test_an_interrupt_says_how_to_go_on(corpus, tmp_path, capsys, monkeypatch):
  def interrupted(*args, **options):
    raise KeyboardInterrupt

  monkeypatch.setattr(prepare, 'prepare', interrupted)
  assert run(*command(corpus, tmp_path / 'out')) == 130
  assert 'the same command goes on' in capsys.readouterr().err


REST = '--layout stream --seq 8 --out x'


@pytest.mark.parametrize(
  'line, words',
  [
    (REST, '--files --tfds --corpus is required'),
    (f'--files x --tfds y {REST}', 'not allowed with'),
    (f'--files x {REST}', '--tokenizer --vocab-size is required'),
    (f'--files x --vocab-size 0 {REST}', 'not at least 1'),
    ('--files x --vocab-size 300', 'required: --layout, --seq, --out'),
    (f'--files x --vocab-size 300 {REST} --out gs://x', 'not on a disk'),
    (f'--files x --vocab-size 300 {REST} --engine spark', 'invalid choice'),
    (f'{REST} --validation-fraction 1', '1 is not between 0 and 1'),
    (f'{REST} --validation-fraction 1.5', '1.5 is not between 0 and 1'),
    (f'{REST} --validation-fraction 0', '0 is not between 0 and 1'),
  ],
)
def test_mistakes_in_the_options(line, words):
  with pytest.raises(errors.UserError, match=words):
    parse(*line.split())


@pytest.mark.parametrize(
  'more, words',
  [
    (('--beam-option=--runner=X',), 'needs --engine beam'),
    (('--tfds-split', 'test'), 'needs --tfds'),
    (('--files', '/no/such.txt'), 'no file matches'),
    (('--layout', 'heap'), "no layout 'heap'"),
    (('--vocab-size', 200), 'at least 257'),
  ],
)
def test_mistakes_in_the_values(corpus, tmp_path, more, words):
  with pytest.raises(errors.UserError, match=words):
    run(*command(corpus, tmp_path / 'out', *more))
  assert not (tmp_path / 'out').exists()


def test_a_corpus_that_is_not_there(tmp_path):
  arguments = command('', tmp_path / 'out')[2:]
  with pytest.raises(errors.UserError, match='atlantis'):
    run('--corpus', 'atlantis', *arguments)
  with pytest.raises(errors.UserError, match='does not go with --corpus'):
    run('--corpus', 'wikipedia_leads', *arguments, '--text-field', 'body')


@pytest.mark.slow
def test_killed_again_and_again(corpus, tmp_path):
  """With SIGKILL, at moments of its own choosing, by real processes."""
  whole, out = tmp_path / 'whole', tmp_path / 'out'
  arguments = ('--skip-bad', '--workers', 2)
  assert run(*command(corpus, whole, *arguments)) == 0
  line = [sys.executable, '-m', 'train', 'prepare']
  line += map(str, command(corpus, out, *arguments))
  kills = 0
  for entries in (3, 5, 8, 11, 14, 40):
    process = subprocess.Popen(line, cwd=ROOT, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(out.rglob('*'))) < entries:
      time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    kills += process.wait() != 0
    assert process.returncode == 0 or not (out / stats.FILE).exists()
  assert kills > 3
  subprocess.run(line, cwd=ROOT, check=True)
  assert fakes.contents(out) == fakes.contents(whole)
