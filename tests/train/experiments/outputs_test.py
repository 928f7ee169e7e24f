import json

import pytest

from train.errors import UserError
from train.experiments import outputs
from train.experiments.outputs import COMPARISON, SWEEP

KINDS = COMPARISON, SWEEP, outputs.figure('2'), outputs.figure('7')
WRITTEN = (
  {'plan.json': {}, 'results.json': {'paired': []}},
  {'results.json': {'points': []}},
  {'results.json': {'figure': '2', 'paired': []}},
  {'results.json': {'figure': '7', 'paired': []}},
)


def write(directory, files):
  directory.mkdir()
  for name, value in files.items():
    (directory / name).write_text(json.dumps(value))
  return directory


@pytest.mark.parametrize(
  'held, files', list(zip(KINDS, WRITTEN, strict=True)), ids=KINDS
)
def test_a_directory_holds_one_kind(tmp_path, held, files):
  out = write(tmp_path / 'out', files)
  for kind in KINDS:
    if kind == held:
      outputs.check(out, kind)
      continue
    with pytest.raises(UserError) as caught:
      outputs.check(out, kind)
    assert str(caught.value) == (
      f'{out} holds {held}, which {kind} would write over: name another --out'
    )


def test_what_is_not_known_stays(tmp_path):
  for i, files in enumerate(
    [{'results.json': []}, {'results.json': {}}, {'report.html': 'a run'}]
  ):
    out = write(tmp_path / str(i), files)
    for kind in KINDS:
      with pytest.raises(UserError, match='something else'):
        outputs.check(out, kind)


def test_a_new_one_is_free(tmp_path):
  for kind in KINDS:
    outputs.check(tmp_path / 'none', kind)
    outputs.check(write(tmp_path / kind, {'cells': []}), kind)


@pytest.mark.parametrize(
  'command, held',
  [
    (['compare', 'demo', '--arm', 'a', '--arm', 'b:p=1.2'], WRITTEN[1]),
    (['sweep', 'demo', '--over', 'p=1,1.2'], WRITTEN[0]),
    (['figure', '2'], WRITTEN[1]),
    (['sweep', 'demo', '--over', 'p=1,1.2'], WRITTEN[2]),
  ],
)
def test_commands_refuse_in_one_line(main, tmp_path, capsys, command, held):
  out = write(tmp_path / 'out', held)
  before = {path: path.read_bytes() for path in out.iterdir()}
  assert main(*command, '--out', out) == 2
  said = capsys.readouterr().err
  assert 'name another --out' in said and said.count('\n') == 1
  assert {path: path.read_bytes() for path in out.iterdir()} == before
