import json
import math
import random

import numpy as np
import pytest

from benchmarks import (
  input_command,
  input_prepare,
  input_read,
  input_result,
  input_start,
)
from train.data import tokenizer as tokenizer_lib

_WORDS = ['a', 'few', 'words', 'of', 'text', 'again', 'and', 'then', 'some']
_SHAPES = [(4, 8), (2, 16)]


@pytest.fixture(scope='module')
def text(tmp_path_factory):
  """A glob of two small files, and a folder with a tokenizer of 300 tokens."""
  rng = random.Random(0)
  directory = tmp_path_factory.mktemp('text')
  documents = [
    ' '.join(rng.choices(_WORDS, k=rng.randrange(3, 60))) for _ in range(4000)
  ]
  for number in range(2):
    lines = (json.dumps({'text': each}) for each in documents[number::2])
    (directory / f'{number}.jsonl').write_text('\n'.join(lines))
  made = tokenizer_lib.ByteLevelBPE.train(documents[:50], 300)
  (directory / 'tokenizer.json').write_bytes(made.content)
  return str(directory / '*.jsonl'), str(directory / 'tokenizer.json')


@pytest.fixture(scope='module')
def measured(text, tmp_path_factory):
  """The result of a whole run, and what it printed."""
  directory = tmp_path_factory.mktemp('result')
  path = directory / 'input.json'
  printed = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(input_read, '_SAMPLE_SECONDS', 1e-3)
    patch.setattr(input_read, 'LAYOUTS', ('stream', 'random'))
    patch.setattr(input_start, '_PROCESSES', 1)
    # Not in processes of their own, which take seconds to start.
    patch.setattr(input_start, '_in_process', _in_this_process)
    patch.setattr('builtins.print', lambda *a, **k: printed.append(a[0]))
    input_command.main([
      '--files', text[0], '--tokenizer', text[1], '--workers', '1',
      '--prepare-rounds', '2', '--read-rounds', '2', '--shapes', '4x8', '2x16',
      '--minutes', '0.005', '--scratch', str(directory), '--json', str(path),
    ])  # fmt: skip
  assert list(directory.iterdir()) == [path], 'no temporary file is left'
  return json.loads(path.read_text()), '\n'.join(printed)


def _in_this_process(function, *arguments):
  sent = []
  function(type('Pipe', (), {'send': staticmethod(sent.append)}), *arguments)
  return sent[0]


def test_result_names_its_settings_and_machine(measured):
  result, _ = measured
  assert result['benchmark'] == 'input'
  settings = result['settings']
  assert (settings['files'], settings['parts']) == (2, 2)
  assert (settings['prepare_rounds'], settings['read_rounds']) == (2, 2)
  assert settings['text'] == '*.jsonl', 'without a directory'
  for name in input_result.VERSIONS:
    assert result['machine'][name]


def test_preparing_has_numbers_that_can_be(measured):
  (entry,) = measured[0]['prepare']
  assert entry['tokenizer'] == 'tokenizer.json'
  assert entry['workers'] == 1
  assert entry['tokens'] > 4000
  assert 0 < entry['tokens_per_second'] < math.inf
  low, high = entry['ratio_quartiles']
  assert 0 < low <= entry['ratio'] <= high
  total = entry['tokens'] / entry['tokens_per_second']
  assert sum(entry['stages'].values()) == pytest.approx(total, rel=0.3)
  assert {'tokens', 'near-duplicates', 'records'} < set(entry['stages'])


def test_the_profile_finds_every_part(measured):
  (entry,) = measured[0]['profile']
  assert set(entry['seconds']) == set(entry['cpu_seconds']) == {
    'hashing files', 'reading', 'tokenizing', 'hashing texts', 'sketches',
    'layout', 'writing pieces', 'syncing', 'held-out documents',
    'near-duplicates', 'records', 'metadata', 'the rest',
  }  # fmt: skip
  assert all(seconds >= 0 for seconds in entry['seconds'].values())


def test_every_layout_is_read_in_every_shape(measured):
  result, _ = measured
  found = [(e['layout'], e['batch'], e['length']) for e in result['read']]
  assert found == [
    (layout, *shape) for shape in _SHAPES for layout in ('stream', 'random')
  ]
  for entry in result['read']:
    names = {input_read.ROWS, input_read.PREFETCH, *entry['ratios']}
    assert names == set(entry['tokens_per_second'])
    peers = (
      {input_read.GATHER}
      if entry['layout'] == 'random'
      else set(input_read.AGAINST)
    )
    assert set(entry['ratios']) == peers
    for taken in entry['ratios'].values():
      low, high = taken['quartiles']
      assert 0 < low <= taken['ratio'] <= high


def test_start_and_memory(measured):
  result, _ = measured
  assert [entry['step'] for entry in result['start']] == [0, 10**9 // 4]
  assert set(result['order']) == {'Shuffle', 'RandomOffsets', 'Mixture'}
  memory = result['memory']
  assert memory['batches'] > 0
  assert memory['seconds'][0] == 0
  assert len(memory['megabytes']) == len(memory['seconds']) >= 2
  assert all(
    0 < anonymous <= all_of_it
    for anonymous, all_of_it in zip(
      memory['anonymous_megabytes'], memory['megabytes'], strict=True
    )
  )


def test_the_text_shows_all_in_100_columns(measured):
  result, printed = measured
  lines = printed[printed.index('Preparing') :].splitlines()
  assert max(map(len, lines)) <= 100
  for entry in result['read']:
    place = f'{entry["batch"]} x {entry["length"]}'
    rows = [x for x in lines if x.startswith(entry['layout']) and place in x]
    assert len(rows) == 2
  assert any('step 250,000,000' in line for line in lines)


@pytest.mark.parametrize('layout', ['random', 'packed'])
def test_readers_give_batches(layout, text, tmp_path):
  opened = tokenizer_lib.open_tokenizer(text[1])
  kept = {'random': 'stream'}.get(layout, layout)
  directory = input_prepare.prepared(
    text[0], opened, kept, 8, 1, tmp_path / 'p'
  )
  windows = input_read.prepared_lib.Prepared(directory).windows('train')
  windows.layout = layout
  made = input_read.programs(directory, windows, 4, tmp_path)
  expected = {tuple(row) for row in windows.__getitems__(range(len(windows)))
              ['tokens'].tolist()}  # fmt: skip
  made.pop(input_read.RECORDS, None)  # Bytes.
  for name, program in made.items():
    with program(1) as take:
      batches = [take(i) for i in range(3)]
    for batch in batches:
      tokens = batch if name == input_read.GATHER else batch['tokens']
      assert tokens.shape == (4, 9)
      if layout != 'random':
        assert {tuple(row) for row in tokens.tolist()} <= expected, name
    first, second = (
      batch if name == input_read.GATHER else batch['tokens']
      for batch in batches[:2]
    )
    assert not np.array_equal(first, second), name


def test_the_limit_encodes_what_is_prepared(text):
  opened = tokenizer_lib.open_tokenizer(text[1])
  encode = input_prepare.bare_encode(opened.file_name, opened.content)
  some = ['a few words', 'of text']
  for bare, ours in zip(encode(some), opened.encode_batch(some), strict=True):
    assert list(bare) == ours.tolist()


def test_time_goes_to_the_innermost_part(monkeypatch):
  now = iter([0, 1, 3, 7])
  monkeypatch.setattr(input_prepare.time, 'perf_counter', lambda: next(now))
  clock = input_prepare._Clock()
  with clock.part('outer'):
    clock.timed('inner', lambda: None)()
  assert clock.seconds == {'outer': 1 + 4, 'inner': 2}


@pytest.mark.parametrize('slope, flat', [(10, False), (0.5, True)])
def test_a_leak_has_a_slope(slope, flat, monkeypatch):
  samples = [(float(s), 900.0, 100 + s * slope / 60) for s in range(121)]
  monkeypatch.setattr(input_start, '_in_process', lambda *_: (5, samples))
  found = input_start.memory('', 4, 2.0)
  assert found['slope'] == pytest.approx(slope)
  assert found['flat'] is flat
  assert found['seconds'] == [0, 60, 120]
  assert found['anonymous_megabytes'] == [100, 100 + slope, 100 + 2 * slope]


@pytest.mark.parametrize('argv, message', [
  ([], 'the following arguments are required: --tokenizer'),
  (['--tokenizer', 'none.model'], 'there is no none.model'),
  (['--tokenizer', 'TOKENIZER'], 'give --files GLOB, or set GRADPOWER_DATA'),
  (['--tokenizer', 'TOKENIZER', '--files', '/x/*.jsonl'], 'no file matches'),
  (['--tokenizer', 'x', '--shapes', '4by8'], "'4by8' is not as '512x256'"),
  (['--tokenizer', 'x', '--shapes', '0x8'], '0 is not at least 1'),
  (['--tokenizer', 'x', '--minutes', '0'], '0 is not a positive number'),
  (['--tokenizer', 'x', '--scratch', '/x/y'], 'No such file or directory: /x'),
  (['--tokenizer', 'x', '--json', '.'], 'cannot write --json .'),
])  # fmt: skip
def test_a_mistake_is_one_line(argv, message, text, capsys, monkeypatch):
  monkeypatch.delenv('GRADPOWER_DATA', raising=False)
  argv = [text[1] if word == 'TOKENIZER' else word for word in argv]
  with pytest.raises(SystemExit) as stopped:
    input_command.main(argv)
  assert stopped.value.code == 2
  err = capsys.readouterr().err
  assert message in err
  assert err.startswith('python -m benchmarks.input: error: ')
  assert err.count('\n') == 1
