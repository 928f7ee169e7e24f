import dataclasses
import gc
import json
import math
import os
import pathlib
import random
import shutil
import signal
import time
import types

import pytest

from train import loop
from train.config import Config, DataConfig
from train.errors import UserError

STEPS = 200
LONG = [f'--steps={STEPS}', '--eval_every=40', '--save_every=15']


def command(tiny, run_dir, *extra):
  return ['run', 'demo', '--run-dir', run_dir, *tiny, *LONG, *extra]


@pytest.fixture(scope='module')
def straight(tmp_path_factory, start, finish, tiny):
  """A run on one device that nothing disturbed."""
  run_dir = tmp_path_factory.mktemp('straight') / 'run'
  status, out, err = finish(start(*command(tiny, run_dir)))
  assert status == 0, err
  assert out.startswith(f'done: {STEPS} steps, held-out loss ')
  return run_dir


def test_the_metrics_are_as_the_contract_says(straight, read_metrics):
  lines = read_metrics(straight)
  config = json.loads((straight / 'config.json').read_text())
  per_step = config['data']['batch_size'] * config['data']['sequence_length']
  train = [line for line in lines if line.get('split') == 'train']
  validation = [line for line in lines if line.get('split') == 'validation']
  [done] = [line for line in lines if 'event' in line]
  assert lines[-1] == done
  assert len(lines) == len(train) + len(validation) + 1

  assert [line['step'] for line in train] == list(range(1, STEPS + 1))
  keys = {
    'step', 'split', 'loss', 'tokens', 'learning_rate', 'grad_norm',
    'clipped_norm', 'powered_norm', 'skipped', 'data_seconds', 'memory', 'time',
  }  # fmt: skip
  assert train[0].keys() == keys
  for line in train[1:]:
    assert line.keys() == keys | {'tokens_per_second'}
  for line in train:
    assert line['tokens'] == line['step'] * per_step
    assert all(math.isfinite(v) for k, v in line.items() if k != 'split')
    assert line['grad_norm'] > 0
    assert line['skipped'] == 0
    assert line['memory'] > 2**20
    assert line['data_seconds'] >= 0

  assert [line['step'] for line in validation] == [40, 80, 120, 160, 200]
  for line in validation:
    assert line.keys() == {'step', 'split', 'loss', 'tokens', 'time'}
    assert line['tokens'] == line['step'] * per_step
  steps = [line['step'] for line in lines]
  assert steps == sorted(steps)

  assert done.keys() == {
    'event', 'step', 'validation_loss', 'params_digest', 'time',
  }  # fmt: skip
  assert done['event'] == 'done'
  assert done['step'] == STEPS
  assert done['validation_loss'] == validation[-1]['loss']
  assert len(bytes.fromhex(done['params_digest'])) == 32


def test_the_schedule_is_logged(straight, read_metrics):
  rates = [
    line['learning_rate']
    for line in read_metrics(straight)
    if line.get('split') == 'train'
  ]
  assert rates[0] == 0
  assert rates[3] == max(rates) == pytest.approx(0.02)
  assert rates[133] == rates[3] > rates[135]
  assert rates[-1] == min(rates[3:])


def test_the_loss_falls(straight, read_metrics):
  lines = read_metrics(straight)
  losses = [line['loss'] for line in lines if line.get('split') == 'train']
  # At first every token of the vocabulary is about as likely.
  assert losses[0] == pytest.approx(math.log(300), abs=0.05)
  assert losses[-1] < losses[0] - 1.5
  assert lines[-1]['validation_loss'] < losses[0] - 1.5


def test_the_directory_holds_what_the_contract_says(straight):
  names = {path.name for path in straight.iterdir()}
  assert names == {
    'config.json', 'run.json', 'tokenizer.json', 'metrics.jsonl',
    'events.jsonl', 'checkpoints', 'lock',
  }  # fmt: skip
  checkpoints = {path.name for path in (straight / 'checkpoints').iterdir()}
  assert checkpoints == {'195', '200'}  # The last is the best.
  config = json.loads((straight / 'config.json').read_text())
  assert config['steps'] == STEPS
  assert config['model']['vocab_size'] == 300  # The tokenizer's.
  facts = json.loads((straight / 'run.json').read_text())
  assert facts.keys() == {'source_hash', 'versions', 'devices'}


def snapshot(directory):
  return {
    path: (path.stat().st_mtime_ns, path.read_bytes())
    for path in sorted(directory.rglob('*'))
    if path.is_file() and path.name != 'lock'
  }


def test_a_run_that_is_done_says_so(straight, main, capsys, tiny):
  before = snapshot(straight)
  for extra in ([], ['--stop-at', '50']):
    assert main(*command(tiny, straight, *extra)) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith(f'done: {STEPS} steps, held-out loss ')
    assert str(straight) in captured.out
  assert snapshot(straight) == before


@pytest.mark.parametrize(
  ('option', 'words'),
  [
    ('--steps=300', '--steps is 200 there, 300 here'),
    ('--seed=9', '--seed is 0 there, 9 here'),
    ('--optimizer.power=1.5', '--optimizer.power is 1.2 there, 1.5 here'),
    ('--model.d_ff=64', '--model.d_ff is 32 there, 64 here'),
  ],
)
def test_another_configuration_is_refused(
  straight, main, capsys, tiny, option, words
):
  before = snapshot(straight)
  assert main(*command(tiny, straight, option)) == 2
  *progress, line = capsys.readouterr().err.splitlines()
  assert line.startswith('python -m train: error: ')
  assert words in line
  assert not any('error' in other for other in progress)
  assert snapshot(straight) == before


def test_another_text_is_refused(straight, main, capsys, tiny, tmp_path):
  source = next(option for option in tiny if option.startswith('--data.files='))
  pattern = pathlib.Path(source.removeprefix('--data.files='))
  saved = sorted(pattern.parent.glob('*.txt'))[0]
  text = saved.read_text()
  saved.write_text('Other words. ' + text)
  try:
    assert main(*command(tiny, straight)) == 2
  finally:
    saved.write_text(text)
  assert 'text or vocabulary has changed' in capsys.readouterr().err


def wait_for_lines(process, run_dir, count):
  """Waits until a run has logged so many lines."""
  metrics = run_dir / 'metrics.jsonl'
  deadline = time.monotonic() + 90
  while process.poll() is None and time.monotonic() < deadline:
    if metrics.exists() and metrics.read_bytes().count(b'\n') >= count:
      return
    time.sleep(0.002)
  raise AssertionError(process.communicate())


def test_stopping_leaves_no_trace(main, tiny, tmp_path, read_metrics, numbers,
                                  capsys):  # fmt: skip
  """In this process, on eight devices; evaluations at 8, 16, 24."""
  run_dir = tmp_path / 'lr[1]' / '%2F*'
  command = ['run', 'demo', '--run-dir', run_dir, *tiny]

  def events():
    return [
      (line['event'], line['step'])
      for line in read_metrics(run_dir)
      if 'event' in line
    ]

  assert main(*command, '--stop-at', 7) == 0
  assert events() == [('stopped', 7)]
  assert len(numbers(run_dir)) == 7
  assert (run_dir / 'checkpoints' / '7').is_dir()
  out = capsys.readouterr().out
  assert f'stopped: 7 of 24 steps, saved in {run_dir}; without --stop-at' in out
  assert main(*command, '--stop-at', 8) == 0
  assert events() == [('resumed', 7), ('stopped', 8)]
  assert 'demo: continues from step 7\n' in capsys.readouterr().err
  # Already past it: nothing is done.
  before = read_metrics(run_dir)
  for _ in range(2):
    assert main(*command, '--stop-at', 3) == 0
    assert read_metrics(run_dir) == before
  assert 'stopped: 8 of 24 steps' in capsys.readouterr().out
  assert main(*command) == 0
  assert events()[-2:] == [('resumed', 8), ('done', 24)]

  whole = tmp_path / 'whole'
  assert main('run', 'demo', '--run-dir', whole, *tiny) == 0
  assert numbers(whole) == numbers(run_dir)
  assert len(numbers(whole)) == 24 + 3 + 1
  capsys.readouterr()


@pytest.mark.slow
def test_eight_devices_train_as_one(main, start, finish, tiny, tmp_path,
                                    numbers):  # fmt: skip
  for name in ('one', 'eight'):
    argv = ['run', 'demo', '--run-dir', tmp_path / name, *tiny,
            '--optimizer.learning_rate=0.001']  # fmt: skip
    status = main(*argv) if name == 'eight' else finish(start(*argv))[0]
    assert status == 0
  for one, eight in zip(
    numbers(tmp_path / 'one'), numbers(tmp_path / 'eight'), strict=True
  ):
    if 'loss' in one:
      assert one.keys() == eight.keys()
      for key, value in one.items():
        if key.endswith(('loss', '_norm')):
          tolerance = 1e-5 if key == 'loss' else 1e-4
          assert value == pytest.approx(eight[key], rel=tolerance), key
        else:
          assert value == eight[key]


@pytest.mark.slow
def test_a_run_goes_on_in_another_layout(
  main, tiny, tmp_path, read_metrics, numbers, capsys
):
  options = [*tiny, '--optimizer.learning_rate=0.001', '--data.batch_size=16']
  whole, moved = (
    ['run', 'demo', '--run-dir', tmp_path / name, *options]
    for name in ('whole', 'moved')
  )
  layouts = (
    (9, []),
    (17, ['--mesh.fsdp=4']),
    (24, ['--mesh.tensor=2', '--mesh.fsdp=2', '--accumulate=4']),
  )
  assert main(*whole) == 0
  for step, layout in layouts:
    capsys.readouterr()
    assert main(*moved, *layout, '--stop-at', step) == 0
    err = capsys.readouterr().err
    assert ('goes on in another way than it began (mesh' in err) == (step > 9)
  resumed = [
    {key: value for key, value in line.items() if key != 'time'}
    for line in read_metrics(tmp_path / 'moved')
    if 'mesh' in line
  ]
  assert resumed == [
    {
      'event': 'resumed',
      'step': 9,
      'mesh': {'data': 0, 'fsdp': 4, 'tensor': 1, 'expert': 1},
    },
    {
      'event': 'resumed',
      'step': 17,
      'mesh': {'data': 0, 'fsdp': 2, 'tensor': 2, 'expert': 1},
      'accumulate': 4,
    },
  ]
  for line, other in zip(
    numbers(tmp_path / 'whole'), numbers(tmp_path / 'moved'), strict=True
  ):
    assert line.keys() == other.keys()
    if 'loss' in line:
      assert line['loss'] == pytest.approx(other['loss'], rel=1e-5)


def test_more_steps_than_text_are_refused(main, tiny, tmp_path, capsys):
  argv = ['run', 'demo', '--run-dir', tmp_path / 'run', *tiny,
          '--data.repeat=false', '--steps=1000']  # fmt: skip
  assert main(*argv) == 2
  last = capsys.readouterr().err.splitlines()[-1]
  assert '--steps (1,000) x --data.batch_size (8) needs 8,000 windows' in last
  assert not (tmp_path / 'run').exists()


def test_a_vocabulary_that_the_mesh_does_not_split_is_refused(
  main, tiny, tmp_path, capsys
):
  argv = ['run', 'demo', '--run-dir', tmp_path / 'run', *tiny,
          '--data.vocab_size=301', '--mesh.tensor=2']  # fmt: skip
  assert main(*argv) == 2
  last = capsys.readouterr().err.splitlines()[-1]
  assert last.startswith('python -m train: error: --model.vocab_size (301)')
  assert not (tmp_path / 'run').exists()


def test_garbage_waits_for_saves_and_evaluations(
  main, tiny, tmp_path, monkeypatch
):
  collected, during = [], []
  collect, log = gc.collect, loop._Run._log

  def noting(self, pending):
    log(self, pending)
    during.append((gc.isenabled(), gc.get_freeze_count() > 0))

  monkeypatch.setattr(loop.gc, 'collect', lambda: collected.append(collect()))
  monkeypatch.setattr(loop._Run, '_log', noting)
  assert gc.isenabled()
  frozen = gc.get_freeze_count()
  assert main('run', 'demo', '--run-dir', tmp_path / 'run', *tiny) == 0
  # At first, at 8 and 16, and at 5, 10, 15 and 20.
  assert len(collected) == 7
  assert set(during) == {(False, True)}
  assert gc.isenabled()
  assert gc.get_freeze_count() <= frozen


def test_an_interrupted_run_goes_on(
  straight, start, finish, tiny, tmp_path, numbers, read_metrics
):
  run_dir = tmp_path / 'run'
  process = start(*command(tiny, run_dir))
  wait_for_lines(process, run_dir, 20)
  process.send_signal(signal.SIGINT)
  status, _, err = finish(process)
  assert status == 130
  assert err.endswith(
    f'interrupted (SIGINT), saved in {run_dir}; the same command goes on from '
    'there\n'
  )
  assert 'Traceback' not in err
  last = read_metrics(run_dir)[-1]
  assert last['event'] == 'stopped'
  assert (run_dir / 'checkpoints' / str(last['step'])).is_dir()
  assert 20 <= last['step'] < STEPS
  status, _, err = finish(start(*command(tiny, run_dir)))
  assert status == 0
  assert f'continues from step {last["step"]}' in err
  assert numbers(run_dir) == numbers(straight)


@pytest.mark.slow
def test_a_killed_run_goes_on(straight, start, finish, tiny, tmp_path, numbers):
  run_dir = tmp_path / 'run'
  draw = random.Random(os.getpid())
  moments = sorted(draw.randint(1, 150) for _ in range(2))
  for count in moments:
    process = start(*command(tiny, run_dir))
    wait_for_lines(process, run_dir, count)
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL, moments
  assert finish(start(*command(tiny, run_dir)))[0] == 0, moments
  assert numbers(run_dir) == numbers(straight), moments


def test_a_second_signal_ends_at_once(
  straight, start, finish, tiny, tmp_path, numbers
):
  run_dir = tmp_path / 'run'
  endless = (
    'import pathlib, time\n'
    'from train.saving import Saver\n'
    'def endless(self, *args, **kwargs):\n'
    f'  pathlib.Path({str(tmp_path / "saving")!r}).touch()\n'
    '  time.sleep(600)\n'
    'Saver.finish = endless\n'
  )
  process = start(*command(tiny, run_dir), prelude=endless)
  while not (run_dir / 'checkpoints' / '15' / 'manifest.json').exists():
    assert process.poll() is None
    time.sleep(0.002)
  process.send_signal(signal.SIGINT)
  while not (tmp_path / 'saving').exists():
    assert process.poll() is None
    time.sleep(0.01)
  sent = time.monotonic()
  process.send_signal(signal.SIGINT)
  status, _, err = finish(process)
  assert time.monotonic() - sent < 20
  assert status == 130
  assert err.endswith('\npython -m train: interrupted\n')
  assert 'Traceback' not in err
  # It falls back to its last checkpoint.
  status, _, err = finish(start(*command(tiny, run_dir)))
  assert status == 0
  assert 'continues from step ' in err
  assert numbers(run_dir) == numbers(straight)


def test_the_first_signal_is_noted_and_the_second_raises():
  before = signal.getsignal(signal.SIGINT)
  with loop.interrupt.Interrupt() as interrupt:
    assert interrupt.received is None
    os.kill(os.getpid(), signal.SIGTERM)
    assert interrupt.received == 'SIGTERM'
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)
  assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
  ('kilobytes', 'save_every'),
  [
    (500, 15),
    pytest.param(24, 1000, marks=pytest.mark.slow),
  ],
  ids=['checkpoint', 'metrics'],
)
def test_on_a_full_disk_training_goes_on_and_nothing_is_lost(
  straight, start, finish, tiny, small_disk, numbers, kilobytes, save_every
):
  disk = small_disk(kilobytes)
  argv = command(tiny, disk / 'run', f'--save_every={save_every}')
  hurry = 'from train import saving\nsaving._FIRST_PAUSE = 0.1'
  status, _, err = finish(start(*argv, prelude=hurry))
  assert status == 2
  assert 'Traceback' not in err
  *lines, last = err.splitlines()
  assert last.startswith('python -m train: error: no space left to write ')
  assert f'step {STEPS} is not saved. Mend that and give the same' in last
  assert any(' was not saved: no space left' in line for line in lines)
  assert all('error' not in line for line in lines)

  small_disk(20_000)
  status, _, err = finish(start(*argv))
  assert status == 0, err
  assert numbers(disk / 'run') == numbers(straight)


def test_waiting_for_data_is_part_of_the_time(straight, read_metrics):
  lines = [
    line
    for line in read_metrics(straight)
    if line.get('split') == 'train' and 'tokens_per_second' in line
  ]
  per_step = lines[1]['tokens'] - lines[0]['tokens']
  for line in lines:
    assert (
      0 <= line['data_seconds'] <= 1.01 * (per_step / line['tokens_per_second'])
    )


def test_the_vocabulary_follows_the_tokenizer():
  class Dataset:
    config = DataConfig(layout='random')
    tokenizer = types.SimpleNamespace(vocab_size=290, padded_vocab_size=300)

  open_config = Config()
  config = loop.resolve(open_config, Dataset())
  assert config.model.vocab_size == 300
  assert config.data.layout == 'random'
  assert loop.resolve(config, Dataset()) == config
  model = dataclasses.replace(open_config.model, vocab_size=4096)
  larger = dataclasses.replace(open_config, model=model)
  assert loop.resolve(larger, Dataset()).model.vocab_size == 4096
  Dataset.tokenizer.vocab_size = 301
  with pytest.raises(UserError, match=r'--model.vocab_size \(300\).*301'):
    loop.resolve(config, Dataset())


def test_a_small_text_with_a_small_vocabulary_trains(main, tiny, tmp_path,
                                                     capsys):  # fmt: skip
  command = ['run', 'demo', '--run-dir', tmp_path / 'run', *tiny,
             '--data.vocab_size=20000', '--stop-at', 1]  # fmt: skip
  assert main(*command) == 0
  assert 'tokens only' in capsys.readouterr().err
  config = json.loads((tmp_path / 'run' / 'config.json').read_text())
  assert 257 < config['model']['vocab_size'] < 20000
  assert main(*command[:-4], '--data.vocab_size=20000', '--stop-at', 1,
              '--model.vocab_size=257') == 2  # fmt: skip
  assert '--model.vocab_size (257) must be' in capsys.readouterr().err


@pytest.mark.parametrize('lost', ['manifests', 'checkpoints'])
def test_a_run_that_was_saved_never_begins_anew_by_itself(
  main, tiny, tmp_path, capsys, read_metrics, lost
):
  run_dir = tmp_path / 'run'
  argv = ['run', 'demo', '--run-dir', run_dir, *tiny]
  assert main(*argv, '--stop-at', 7) == 0
  before = read_metrics(run_dir)
  if lost == 'checkpoints':
    shutil.rmtree(run_dir / 'checkpoints')
  for path in run_dir.glob('checkpoints/*/manifest.json'):
    path.unlink()
  capsys.readouterr()
  assert main(*argv) == 2
  assert capsys.readouterr().err.endswith(
    f'error: {run_dir} was saved at step 7, but no whole checkpoint is there '
    'any more: bring one back, or name another --run-dir\n'
  )
  assert read_metrics(run_dir) == before


def test_a_run_that_diverges_stops_and_names_the_last_good_state(
  start, finish, tiny, tmp_path, read_metrics
):
  poison = (
    'import numpy as np\n'
    'from train.data import loader\n'
    'read = loader.Batches.rows\n'
    'def rows(self, index, rows):\n'
    '  batch = read(self, index, rows)\n'
    "  weights = np.ones(batch['tokens'][:, 1:].shape, np.float32)\n"
    '  weights *= np.nan if index >= 12 or index == 3 else 1\n'
    "  return batch | {'weights': weights}\n"
    'loader.Batches.rows = rows\n'
  )
  run_dir = tmp_path / 'run'
  argv = command(tiny, run_dir, '--guard.bad_steps=4', '--save_every=5')
  status, out, err = finish(start(*argv, prelude=poison))
  assert (status, out) == (3, '')
  assert 'step 4 changed nothing: not finite (loss nan, gradient' in err
  assert err.splitlines()[-1] == (
    'python -m train: error: the loss or a gradient was not finite 4 steps in '
    'a row, 13 to 16: the last good state is that after step 12, the last '
    'checkpoint that of step 10 (docs/cli.md, "Steps that change nothing")'
  )
  lines = {line['step']: line for line in read_metrics(run_dir)}
  assert [lines[step]['skipped'] for step in (3, 4, 12, 13, 16)] == [
    0, 1, 1, 2, 5,
  ]  # fmt: skip
  # A step that changed nothing has not moved the schedule.
  rates = [lines[step]['learning_rate'] for step in (1, 2, 3, 4, 5)]
  assert rates[3] == rates[4] == max(rates)
  assert lines[4]['loss'] == 'nan'
  history = (run_dir / 'events.jsonl').read_text().splitlines()
  last = json.loads(history[-1])
  assert (last['event'], last['status']) == ('failed', 3)
