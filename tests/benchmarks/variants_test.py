import json

import pytest

from benchmarks import variants

TINY = ['--model.vocab_size', '64', '--model.d_model', '16', '--model.d_ff',
        '32', '--model.n_layers', '1', '--model.n_heads', '2', '--batch', '8',
        '--length', '8', '--rounds', '2']  # fmt: skip


@pytest.mark.slow
def test_each_option_has_its_row(capsys, tmp_path):
  path = tmp_path / 'result.json'
  variants.main([*TINY, '--json', str(path)])
  result = json.loads(path.read_text())
  names = ['step', 'deterministic', 'guard.spike', 'layer statistics']
  assert list(result['variants']) == names
  assert result['variants']['step']['ratio'] == 1
  for row in result['variants'].values():
    low, high = row['ratio_quartiles']
    assert 0 < low <= row['ratio'] <= high
    assert row['ms'] > 0
  out = capsys.readouterr().out
  for name in names:
    assert any(line.startswith(name) for line in out.splitlines())


@pytest.mark.parametrize(
  ('argv', 'words'),
  [
    (['--batch', '3'], '--batch (3) must be a multiple of the 8 devices'),
    (['--rounds', '0'], '--rounds'),
    (['--json', '/proc/result.json'], '/proc/result.json'),
  ],
)
def test_a_mistake_is_one_line(argv, words, capsys):
  with pytest.raises(SystemExit):
    variants.main([*TINY, *argv])
  err = capsys.readouterr().err
  assert words in err
  assert err.count('\n') == 1
