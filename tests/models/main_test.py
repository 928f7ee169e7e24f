import json
import os
import subprocess
import sys

import pytest

from models import __main__ as command
from models import accounting, presets

_BLOCKED = """
import sys
for name in ('jax', 'flax', 'numpy', 'grain', 'tokamax'):
  sys.modules[name] = None
from models.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def run(capsys, *argv):
  status = command.main(list(argv))
  out, err = capsys.readouterr()
  return status, out, err


def test_the_table_has_every_model_and_fits_80_columns(capsys):
  for argv in ((), ('--vocab', 'gpt2'), ('--length', '100000')):
    status, out, err = run(capsys, *argv)
    assert (status, err) == (0, '')
    table, footer = out.split('\n\n')
    assert max(map(len, out.splitlines())) <= 80
    rows = [line.split(maxsplit=10) for line in table.splitlines()]
    assert [row[0] for row in rows] == ['model', *presets.PRESETS]
    for row in rows[1:]:
      assert row[10] == presets.PRESETS[row[0]].mark
    for word in ('12 x layers x d_model x length', '16 a parameter', 'I,', '?,',
                 'Activations are not in it', "C, read in the authors' code",
                 'Masked scores count'):  # fmt: skip
      assert word in ' '.join(footer.split())


def test_a_row(capsys):
  _, out, _ = run(capsys, 'llama_0.2b')
  assert out.splitlines()[1].split() == [
    'llama_0.2b', '16', '768', '12', '-', '200M', '200M', '151M', '1.09G',
    '3.21G', 'C,', 'I',
  ]  # fmt: skip
  assert 'llama_0.2b: a shape in' in out
  assert 'not known' not in out  # Of the marks, those that are there.


def test_rows_are_aligned(capsys):
  _, out, _ = run(capsys)
  header, *rows = out.split('\n\n')[0].splitlines()
  for column in ('depth', 'heads', 'experts', 'total', 'FLOPs', 'bytes'):
    end = header.index(column) + len(column)
    assert {row[end] for row in rows} == {' '}
    assert all(row[end - 1] != ' ' for row in rows)


def test_json_is_exact(capsys):
  status, out, _ = run(
    capsys, 'qwen2_moe_2b', 'llama_66m', '--vocab', 'gpt2', '--json'
  )
  assert status == 0
  result = json.loads(out)
  assert list(result) == ['qwen2_moe_2b', 'llama_66m']
  for name, entry in result.items():
    config = presets.get(name, 'gpt2')
    counts = accounting.parameters(config)
    assert entry['length'] == 1024
    assert entry['parameters']['total'] == counts.total
    assert entry['parameters']['active'] == counts.active
    assert entry['parameters']['non_embedding'] == counts.non_embedding
    assert entry['training_flops_per_token'] == accounting.flops_per_token(
      config, 1024
    )
    assert (
      entry['training_flops_per_token_causal']
      < (entry['training_flops_per_token'])
    )
    assert (
      entry['forward_flops_per_token'] * 3
      == (entry['training_flops_per_token'])
    )
    assert entry['training_bytes'] == 16 * counts.total
    assert entry['config']['d_model'] == config.d_model
    assert tuple(entry['marks']) == presets.PRESETS[name].marks


def test_length(capsys):
  _, out, _ = run(capsys, 'llama_66m', '--length', '7', '--json')
  flops = json.loads(out)['llama_66m']['training_flops_per_token']
  config = presets.get('llama_66m')
  assert flops == accounting.flops_per_token(config, 7)


@pytest.mark.parametrize('argv, message', [
  (['llama_7b'], "there is no model 'llama_7b'; the models are llama_66m, "),
  (['llama_66m', ''], "there is no model ''"),
  (['--vocab', 'bert'], "argument --vocab: invalid choice: 'bert'"),
  (['--voc', 't5'], 'unrecognized arguments: --voc'),
  (['--vocab'], 'argument --vocab: expected one argument'),
  (['--length', '0'], "'0' is not a whole number of at least 1"),
  (['--length', '1.5'], "'1.5' is not a whole number of at least 1"),
  (['--json=3'], 'argument --json: ignored explicit argument'),
])  # fmt: skip
def test_a_mistake_is_one_line_and_status_2(argv, message, capsys):
  status, out, err = run(capsys, *argv)
  assert (status, out) == (2, '')
  assert message in err
  assert err.startswith('python -m models: error: ')
  assert err.count('\n') == 1


@pytest.mark.parametrize('option', ['--vocab=--', '--length=--'])
def test_an_option_of_two_dashes_is_refused(option, capsys):
  """Before 3.13 argparse drops them and leaves a list."""
  status, out, err = run(capsys, option)
  assert (status, out) == (2, '')
  assert err.count('\n') == 1


def test_it_needs_no_library():
  result = subprocess.run(
    [sys.executable, '-c', _BLOCKED, 'llama_66m'],
    capture_output=True,
    text=True,
    check=True,
  )
  assert '66.4M' in result.stdout
  assert result.stderr == ''


def test_a_reader_that_leaves_and_a_full_disk():
  def start(**options):
    return subprocess.run(
      [sys.executable, '-m', 'models'],
      stderr=subprocess.PIPE,
      check=False,
      **options,
    )

  reader, writer = os.pipe()
  os.close(reader)
  left = start(stdout=writer)
  os.close(writer)
  assert (left.returncode, left.stderr) == (0, b'')
  if not os.path.exists('/dev/full'):
    pytest.skip('no /dev/full here')
  with open('/dev/full', 'wb') as full:
    result = start(stdout=full)
  assert result.returncode == 2
  assert result.stderr.count(b'\n') == 1


@pytest.mark.parametrize('number, text', [
  (66_433_536, '66.4M'), (9_572_480, '9.57M'), (9_996_000, '10.0M'),
  (99_960_000, '100M'), (999_400_000, '999M'), (999_600_000, '1.00G'),
  (11_844_894_720, '11.8G'), (12_345_000_000_000, '12.3T'), (12_000, '0.01M'),
])  # fmt: skip
def test_short_numbers(number, text):
  assert command._short(number, 'G') == text
