"""What each command answers to a mistake: one whole line that says what to do.

RUN is a finished run, NEW a directory that is not there, OTHER one that holds
something else, BROKEN a run whose config.json is cut off; the table's columns
are the command line and its answer.
"""

import json
import shutil

import pytest

DAMAGED_LINE = 'Unterminated string starting at: line 2 column 3 (char 4)'
TOPOLOGIES = (
  'it is one of v4, v5e, v5p, v6e, tpu7x and the shape of a slice, as v5e:2x4, '
  'v6e:4x4, v4:2x2x4, v5p:4x4x2, tpu7x:2x2x2'
)
ANOTHER = (
  'name another --run-dir, or give the options of that run to continue it'
)
MISREAD = 'cannot hold checkpoints: name it, and what is above it, without'

TABLE = [
  # No command, or none that there is.
  ('', 'the following arguments are required: command (see python -m train '
       '--help)'),
  ('run', 'the following arguments are required: RECIPE, --run-dir (see python '
          '-m train run --help)'),
  ('run dem --run-dir NEW', "no recipe 'dem'; there are: demo, demo_moe, "
   'dense_0.1m, dense_0.25m, dense_0.5m, dense_1m, moe_0.2m, moe_0.35m, '
   'moe_0.8m, '
   'llama_66m, llama_0.2b, llama_0.4b, llama_1b, llama_2b, qwen2_moe_0.2b, '
   'qwen2_moe_0.5b, qwen2_moe_1b, qwen2_moe_2b'),
  # Directories.
  ('run demo --run-dir OTHER TINY',
   'OTHER is not empty and holds no config.json: name another --run-dir'),
  ('run demo --run-dir OTHER/stray TINY',
   'cannot write OTHER/stray: File exists'),
  ('run demo --run-dir OTHER/stray/below TINY',
   'cannot write OTHER/stray/below: Not a directory'),
  ('run demo --run-dir /proc/run TINY',
   'cannot write /proc/run: No such file or directory'),
  ('run demo --run-dir s3://bucket/run', 'argument --run-dir: '
   's3://bucket/run: a run directory is on a local disk, or gs://BUCKET/PATH '
   '(see python -m train run --help)'),
  ('run demo --run-dir /a\\b --data.files NEW', rf"'/a\\b' {MISREAD} '\\'"),
  ('demo --run-dir /a.__lock/b --data.files NEW',
   f"'/a.__lock/b/adamw' {MISREAD} '.__lock'"),
  ('compare demo --arm a:lr=1 --arm b:lr=2 --out /a\\b --data.files NEW',
   rf"'/a\\b' {MISREAD} '\\'"),
  ('sweep demo --over lr=1,2 --out /a\\b --data.files NEW',
   rf"'/a\\b' {MISREAD} '\\'"),
  ('figure 3 --out /gs/b', f"'/gs/b' {MISREAD} '/gs'"),
  ('run demo --run-dir /gs/b/run', "argument --run-dir: '/gs/b/run' would be "
   'read as gs://b/run (see python -m train run --help)'),
  ('run demo --run-dir gs://bucket', 'argument --run-dir: gs://bucket names no '
   'directory in a bucket: gs://BUCKET/PATH (see python -m train run --help)'),
  ('run demo --run-dir RUN TINY --steps 8', 'RUN holds a run of another '
   f'configuration (--steps is 4 there, 8 here): {ANOTHER}'),
  ('run demo --run-dir RUN TINY --guard.spike 5', 'RUN holds a run of another '
   f'configuration (--guard.spike is 0.0 there, 5.0 here): {ANOTHER}'),
  ('run demo --run-dir RUN TINY --deterministic', 'RUN holds a run of another '
   f'configuration (--deterministic is False there, True here): {ANOTHER}'),
  ('run demo --run-dir BROKEN TINY',
   f'BROKEN holds a damaged run ({DAMAGED_LINE}): name another --run-dir'),
  ('demo --run-dir RUN TINY',
   'RUN is the directory of a single run: name another --run-dir'),
  # Fields of the configuration.
  ('run demo --run-dir NEW --guard.bad_steps 0',
   '--guard.bad_steps must be at least 1, not 0'),
  ('run demo --run-dir NEW --guard.spike -1',
   '--guard.spike must be zero or more, not -1.0'),
  ('run demo --run-dir NEW --guard.spike inf',
   '--guard.spike must be zero or more, not inf'),
  ('run demo --run-dir NEW --keep.last 0',
   '--keep.last must be at least 1, not 0'),
  ('run demo --run-dir NEW --keep.every -1',
   '--keep.every must be at least 0, not -1'),
  ('run demo --run-dir NEW --keep.best 1', "argument --keep.best: '1' is "
   'neither true nor false (see python -m train run --help)'),
  ('run --deterministic demo --run-dir NEW', "argument --deterministic: 'demo' "
   'is neither true nor false (see python -m train run --help)'),
  ('run demo --run-dir NEW --save_every 0',
   '--save_every must be at least 1, not 0'),
  ('run demo --run-dir NEW --steps 1e3', "argument --steps: '1e3' is not a "
   'whole number (see python -m train run --help)'),
  ('run demo --run-dir NEW --optimizer.power nan',
   '--optimizer.power must be positive and below 1e6, not nan'),
  ('run demo --run-dir NEW TINY --optimizer.warmup_steps 4',
   '--optimizer.warmup_steps (4) must be below --steps (4)'),
  ('run demo --run-dir NEW TINY --accumulate 3',
   '--accumulate (3) must divide --data.batch_size (8)'),
  ('run demo --run-dir NEW TINY --mesh.fsdp 3', '--mesh.fsdp x --mesh.tensor x '
   '--mesh.expert (3) must divide the number of devices (8)'),
  ('run demo --run-dir NEW TINY --model.n_heads 3',
   '--model.n_heads (3) must divide model.d_model (16)'),
  # Text.
  ('run demo --run-dir NEW TINY --data.files NEW/*.txt',
   "--data.files: no file matches 'NEW/*.txt'"),
  ('run demo --run-dir NEW TINY --data.files OTHER/stray',
   '--data.files: OTHER/stray is none of .txt, .jsonl, .json, .ndjson (also '
   'with .gz, .zst, .xz after it) and .parquet; let the glob name one'),
  ('run demo --run-dir NEW --data.corpus novels',
   "--data.corpus: there is no 'novels', only c4, openwebtext, "
   'wikipedia_leads'),
  # How a run is watched.
  ('run demo --run-dir NEW --stop-at 0', 'argument --stop-at: 0 is not at '
   'least 1 (see python -m train run --help)'),
  ('run demo --run-dir NEW --profile x', "argument --profile: 'x' is not a "
   'whole number (see python -m train run --help)'),
  ('run demo --run-dir NEW --profile 3:0', 'argument --profile: 0 is not at '
   'least 1 (see python -m train run --help)'),
  ('run demo --run-dir NEW TINY --profile 90',
   '--profile (90) is past the last step, --steps (4)'),
  ('run demo --run-dir NEW --layer-statistics -1', 'argument '
   '--layer-statistics: -1 is not at least 0 (see python -m train run --help)'),
  ('run demo --run-dir NEW --wandb', 'argument --wandb: expected one argument '
   '(see python -m train run --help)'),
  # Several processes.
  ('run demo --run-dir NEW --processes 2', '--processes without --coordinator '
   'and --process: give all three, or none to have the cluster found'),
  ('demo --run-dir NEW --coordinator x:1 --processes 2 --process 2',
   '--process (2) must be below --processes (2): it counts from 0'),
  # The demo.
  ('demo --run-dir NEW --optimizer.power 1', '--optimizer.power 1.0 makes both '
   'arms the same: the demo compares power 1 with another'),
  ('demo --run-dir NEW --stop-at 3',
   'unrecognized arguments: --stop-at 3 (see python -m train --help)'),
  # The report.
  ('report', 'the following arguments are required: RUN_DIR (see python -m '
             'train report --help)'),
  ('report NEW',
   'cannot read NEW/config.json: No such file or directory'),
  ('report BROKEN', f'BROKEN/config.json is not JSON: {DAMAGED_LINE}'),
  ('report RUN --out NEW/report.html',
   'cannot write NEW/report.html: No such file or directory'),
  ('report RUN --out OTHER', 'cannot write OTHER: Is a directory'),
  # Samples.
  ('sample NEW', 'no directory NEW'),
  ('sample OTHER', 'OTHER is neither a run directory nor a Hugging Face '
   'folder: its config.json is missing or of something else'),
  ('sample RUN --step 3', 'there is no step 3 in RUN/checkpoints, only 2, 4'),
  ('sample RUN --tokens 0', 'argument --tokens: 0 is not at least 1 (see '
   'python -m train sample --help)'),
  ('sample RUN --temperature -1',
   '--temperature must be 0 or more and finite, not -1.0'),
  ('sample RUN --top-p 2', '--top-p must be in (0, 1], not 2.0'),
  # The listings.
  ('recipes --mfu 2', 'argument --mfu: 2 is not above 0 and at most 1 (see '
   'python -m train recipes --help)'),
  ('recipes demo',
   'unrecognized arguments: demo (see python -m train --help)'),
  ('aot demo', 'the following arguments are required: --topology (see python '
   '-m train aot --help)'),
  ('aot demo --topology v9:2x2',
   f"--topology 'v9:2x2' is not known: {TOPOLOGIES}"),
  ('aot demo --topology v5e:2x2 --slices 1000',
   'argument --slices: 1000 is above 256 (see python -m train aot --help)'),
  ('aot demo --topology v5e:2x2 --json NEW/x.json',
   'NEW/x.json cannot be written: No such file or directory'),
]  # fmt: skip


@pytest.fixture(scope='module')
def places(tmp_path_factory):
  """Names of the table and the directories that they stand for."""
  root = tmp_path_factory.mktemp('places')
  other = root / 'other'
  other.mkdir()
  (other / 'stray').write_text('x')
  return {name: root / name.lower() for name in
          ('RUN', 'NEW', 'OTHER', 'BROKEN')}  # fmt: skip


@pytest.fixture
def tiny_run(tiny):
  return [*tiny, '--steps=4', '--eval_every=2', '--save_every=2']


@pytest.fixture
def told(main, places, tiny_run, capsys):
  """Runs a line of the table; returns its status, stdout and stderr."""

  def told(line):
    argv = []
    for word in line.split():
      if word == 'TINY':
        argv += tiny_run
        continue
      for name, path in places.items():
        if word.startswith(name):
          argv.append(str(path) + word.removeprefix(name))
          break
      else:
        argv.append(word)
    capsys.readouterr()
    status = main(*argv)
    out, err = capsys.readouterr()
    for name, path in places.items():
      out, err = (text.replace(str(path), name) for text in (out, err))
    return status, out, err

  if not places['RUN'].exists():
    assert told('run demo --run-dir RUN TINY')[0] == 0
    shutil.copytree(places['RUN'], places['BROKEN'])
    config = places['BROKEN'] / 'config.json'
    config.write_text(json.dumps(json.loads(config.read_text()), indent=2)[:7])
  return told


@pytest.mark.parametrize(('line', 'answer'), TABLE)
def test_the_answer_is_one_line(told, places, line, answer):
  status, out, err = told(line)
  *progress, last = err.splitlines()
  assert last == f'python -m train: error: {answer}'
  assert status == 2
  assert out == ''
  assert err.endswith('\n')
  # What the data had to say comes before; nothing else does.
  assert all(line.startswith(('train: ', 'validation: ')) for line in progress)
  assert not places['NEW'].exists()


def test_there_are_enough_of_every_command():
  commands = [line.split()[0] for line, _ in TABLE if line]
  assert len(TABLE) >= 40
  assert {*commands} == {
    'run', 'demo', 'compare', 'sweep', 'figure', 'report', 'sample', 'recipes',
    'aot',
  }  # fmt: skip
