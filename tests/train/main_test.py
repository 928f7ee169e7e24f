import ast
import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

from train import __main__ as entry
from train import commands, recipes

ROOT = pathlib.Path(__file__).parents[2]

# What the trainer says of its progress; an error may come after it.
PROGRESS = ('training a byte-level BPE', 'the text gives', 'tokenizing')


def last_line(err):
  """The one error, after nothing but progress."""
  *before, line = err.splitlines()
  assert line.startswith('python -m train: error: ')
  assert all(other.startswith(PROGRESS) for other in before)
  return line


def write(directory, **files):
  for name, content in files.items():
    path = directory / name.replace('__', '.')
    path.write_bytes(content)
  return directory


@pytest.mark.parametrize('command', ['run', 'demo'])
@pytest.mark.parametrize(
  ('files', 'pattern', 'words'),
  [
    ({}, '*.txt', 'no file matches'),
    ({}, '', 'no file matches'),
    ({'a__txt': b'\x89PNG\r\n\x1a\n\0\0'}, '*.txt', 'is not UTF-8 text'),
    ({'a__txt': b'one\0two'}, '*.txt', 'is not text: it has NUL bytes'),
    ({'a__pdf': b'%PDF'}, '*', 'is none of .txt, .jsonl, .json'),
    ({'a__txt': b'', 'b__txt': b' \n\n'}, '*.txt', 'a.txt: the text is blank'),
    ({'a__jsonl': b'{"body": "x"}\n'}, '*.jsonl', "no field 'text'"),
    ({'a__jsonl': b'{"text": "x"}\n{"te'}, '*.jsonl', 'line 2 is not JSON'),
    ({'a__txt': b'A few words are too few.'}, '*.txt', 'one window needs'),
  ],
)
def test_text_that_cannot_be_used(
  main, capsys, tiny, tmp_path, command, files, pattern, words
):
  text = tmp_path / 'text'
  text.mkdir()
  write(text, **files)
  run_dir = tmp_path / 'parent' / 'run'
  recipe = ['demo'] if command == 'run' else []
  status = main(
    command, *recipe, '--run-dir', run_dir, *tiny,
    '--data.files', f'{text}/{pattern}' if pattern else f'{tmp_path}/no/*',
  )  # fmt: skip
  captured = capsys.readouterr()
  assert status == 2
  assert words in last_line(captured.err)
  assert captured.out == ''
  assert not run_dir.parent.exists()


@pytest.mark.parametrize(
  ('argv', 'words'),
  [
    ([], 'required: command'),
    (['walk'], "invalid choice: 'walk'"),
    (['run'], 'required: RECIPE, --run-dir'),
    (['run', 'demo'], 'required: --run-dir'),
    (['run', 'demo', '--run-dir', ''], '--run-dir: it is empty'),
    (['run', 'dem', '--run-dir', 'RUN'], "no recipe 'dem'; there are: demo"),
    (['run', 'demo', '--run-dir', 'RUN', '--bogus', '1'],
     'unrecognized arguments: --bogus 1'),
    (['run', 'demo', '--run-dir', 'RUN', '--stop-at', '0'],
     '0 is not at least 1'),
    (['run', 'demo', '--run-dir', 'RUN', '--stop-at', 'soon'], '--stop-at'),
    (['run', 'demo', '--run-dir', 'RUN', '--steps', '1.5'],
     "--steps: '1.5' is not a whole number"),
    (['run', 'demo', '--run-dir', 'RUN', '--optimizer.power', 'nan'],
     '--optimizer.power must be positive and below 1e6, not nan'),
    (['run', 'demo', '--run-dir', 'RUN', '--data.batch_size', '12'],
     'must be a multiple of the 8 devices'),
    (['run', 'demo', '--run-dir', 'RUN', '--data.corpus', 'novels'],
     "no 'novels', only c4, openwebtext, wikipedia_leads"),
    (['run', 'llama_66m', '--run-dir', 'RUN'],
     '--data.corpus c4 is not fetched: prepare your own copy once'),
    (['recipes', '--mfu', '40'], '--mfu: 40 is not above 0 and at most 1'),
    (['recipes', '--device', 'abacus'], "invalid choice: 'abacus'"),
    (['recipes', '--data.corpus', 'novels'], "invalid choice: 'novels'"),
    (['run', 'demo', '--run-dir', 'RUN', '--mesh.fsdp', '3'],
     '--mesh.fsdp x --mesh.tensor x --mesh.expert (3) must divide'),
    (['run', 'demo', '--run-dir', 'RUN', '--process', '0'],
     '--process without --coordinator and --processes: give all three'),
    (['run', 'demo', '--run-dir', 'RUN', '--processes', '2'],
     '--processes without --coordinator and --process: give all three'),
    (['demo', '--run-dir', 'RUN', '--coordinator', 'here:1', '--processes',
      '2'], '--coordinator, --processes without --process: give all three'),
    (['run', 'demo', '--run-dir', 'RUN', '--coordinator', 'here:1',
      '--processes', '2', '--process', '2'],
     '--process (2) must be below --processes (2): it counts from 0'),
    (['run', 'demo', '--run-dir', 'RUN', '--process', '-1'],
     '--process: -1 is not at least 0'),
    (['run', 'demo', '--run-dir', 'RUN', '--processes', '0'],
     '--processes: 0 is not at least 1'),
    (['run', 'demo', '--run-dir', 'RUN', '--coordinator', 'here',
      '--processes', '2', '--process', '1'],
     "--coordinator must be HOST:PORT, not 'here'"),
    (['run', 'demo', '--run-dir', 'RUN', '--coordinator', '[::1]:70000',
      '--processes', '2', '--process', '0'],
     "--coordinator must be HOST:PORT, not '[::1]:70000'"),
    (['demo', '--run-dir', 'RUN', '--optimizer.power', '1'],
     'makes both arms the same'),
    (['demo', '--run-dir', 'RUN', '--recipe', 'demo'], 'unrecognized'),
    (['report'], 'required: RUN_DIR'),
    (['report', 'RUN'], 'cannot read'),
    (['recipes', 'demo'], 'unrecognized arguments: demo'),
  ],
)  # fmt: skip
def test_a_mistake_on_the_command_line(
  main, capsys, one_error, tmp_path, argv, words
):
  run_dir = tmp_path / 'run'
  argv = [str(run_dir) if word == 'RUN' else word for word in argv]
  assert main(*argv) == 2
  captured = capsys.readouterr()
  assert words in one_error(captured.err)
  assert captured.out == ''
  assert not run_dir.exists()


@pytest.mark.parametrize('command', ['run', 'demo'])
def test_help_lists_every_option(main, capsys, command):
  with pytest.raises(SystemExit) as end:
    main(command, '--help')
  assert end.value.code == 0
  text = capsys.readouterr().out
  for option in ('--run-dir', '--steps', '--seed', '--model.d_model',
                 '--data.files', '--optimizer.power'):  # fmt: skip
    assert option in text


def test_help_lists_the_commands(main, capsys):
  with pytest.raises(SystemExit) as end:
    main('--help')
  assert end.value.code == 0
  text = capsys.readouterr().out
  assert {'demo', 'run', 'report', 'recipes'} <= set(text.split())


def test_recipes_are_listed(main, capsys):
  assert main('recipes') == 0
  table, meaning = capsys.readouterr().out.split('\n\n')
  names = [line.split()[0] for line in table.splitlines()]
  assert names == ['recipe', *recipes.RECIPES]
  assert 'estimate' in meaning


@pytest.mark.parametrize('name', ['grain', 'orbax.checkpoint', 'tokenizers'])
def test_a_missing_package_is_named(main, capsys, one_error, monkeypatch, name):
  find = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, 'find_spec', lambda n: None if n == name else find(n)
  )
  monkeypatch.setattr(commands, 'run', None)
  assert main('demo') == 2
  message = one_error(capsys.readouterr().err)
  assert message.startswith(f'not installed: {name};')
  assert '.[train]' in message


def test_a_bare_python_names_the_extra(one_error):
  # -S: no site-packages, so nothing at all is installed.
  done = subprocess.run(
    [sys.executable, '-S', '-m', 'train', 'demo'],
    check=False, cwd=ROOT, env={}, capture_output=True,
    text=True, timeout=60,
  )  # fmt: skip
  assert done.returncode == 2
  message = one_error(done.stderr)
  assert 'jax' in message and "'train' extra" in message
  assert done.stdout == ''


@pytest.mark.parametrize('argv', [['recipes'], ['report', 'RUN'], ['--help']])
def test_what_needs_no_data_runs_without_its_packages(
  tmp_path, one_error, argv
):
  """Nor does anything but training and sampling read data."""
  without = {*sum(entry._NEEDED_BY.values(), ())}
  code = (
    'import sys\n'
    f'for name in {without!r}: sys.modules[name] = None\n'
    'from train.__main__ import main\n'
    'sys.exit(main(sys.argv[1:]))'
  )
  argv = [str(tmp_path / 'none') if word == 'RUN' else word for word in argv]
  done = subprocess.run(
    [sys.executable, '-c', code, *argv],
    check=False, cwd=ROOT, capture_output=True, text=True, timeout=60,
  )  # fmt: skip
  if argv[0] == 'report':
    assert done.returncode == 2
    assert one_error(done.stderr).startswith('cannot read ')
  else:
    assert (done.returncode, done.stderr) == (0, '')
    assert 'demo' in done.stdout


# Of 'gcs' and 'tensorboard'; imported where they are asked for.
OF_EXTRAS = {
  'aiohttp',
  'apache_beam',
  'fsspec',
  'gcsfs',
  'ray',
  'tensorboardX',
  'wandb',
}


def test_every_package_that_is_imported_is_looked_for():
  imported = set()
  for package in ('models', 'train'):
    for path in (ROOT / package).rglob('*.py'):
      for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
          imported |= {alias.name.split('.')[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
          imported.add(node.module.split('.')[0])
  own = {'models', 'train', 'gradpower_optax'}
  names = {*entry._NEEDED, *sum(entry._NEEDED_BY.values(), ())}
  needed = {name.split('.')[0] for name in names}
  # They come with jax, flax, tokenizers, TFDS and Orbax; of extras.
  others = {
    'google', 'huggingface_hub', 'numpy', 'rich', 'tensorstore', *OF_EXTRAS
  }  # fmt: skip
  assert imported - own - sys.stdlib_module_names - others == needed
  assert not OF_EXTRAS & needed


def test_an_interruption_before_the_run_is_one_line(
  main, capsys, monkeypatch, tmp_path
):
  def interrupt(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr('train.data.dataset.load', interrupt)
  assert main('run', 'demo', '--run-dir', tmp_path / 'run') == 130
  assert capsys.readouterr().err == '\npython -m train: interrupted\n'
  assert not (tmp_path / 'run').exists()


def test_a_report_of_a_run(main, capsys, tmp_path):
  run_dir = tmp_path / 'run'
  run_dir.mkdir()
  (run_dir / 'config.json').write_text('{"steps": 2}')
  lines = [
    {'step': step, 'split': 'train', 'loss': 2.0, 'tokens': 8 * step}
    for step in (1, 2)
  ]
  (run_dir / 'metrics.jsonl').write_text(
    ''.join(json.dumps(line) + '\n' for line in lines)
  )
  assert main('report', run_dir) == 0
  assert capsys.readouterr().out == f'report: {run_dir / "report.html"}\n'
  assert main('report', run_dir, '--out', tmp_path / 'page.html') == 0
  assert (tmp_path / 'page.html').read_text() == (
    run_dir / 'report.html'
  ).read_text()
