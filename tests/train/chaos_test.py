"""Runs that are killed, damaged and starved, and end as if nothing had been.

`GRADPOWER_CHAOS_KILLS` says how many kills (5 unless told), and
`GRADPOWER_CHAOS_SEED` repeats the moments of a failure.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import socket
import time

import pytest

STEPS = 400
LONG = [f'--steps={STEPS}', '--eval_every=100', '--save_every=20']
KILLS = int(os.environ.get('GRADPOWER_CHAOS_KILLS', '5'))
SEED = int(os.environ.get('GRADPOWER_CHAOS_SEED', '0')) or time.time_ns()

# These batches, and their gradients, are no numbers; in the undisturbed run
# too. (Weights that are all one change nothing else.) A step takes a while.
POISON = """
import time
import numpy as np
from train.data import loader
read = loader.Batches.rows
def rows(self, index, rows):
  time.sleep(0.02)
  batch = read(self, index, rows)
  weights = np.ones(batch['tokens'][:, 1:].shape, np.float32)
  if index in (33, 34, 211):
    weights[0, 3] = np.nan
  return batch | {'weights': weights}
loader.Batches.rows = rows
"""
AFTER_A_FULL_DISK = 'after a full disk'

# Gives a kill the time to come in the middle of a save.
SLOW_SAVES = """
import time
from train import manifest
write = manifest.write
def slowly(*args, **kwargs):
  time.sleep(0.2)
  return write(*args, **kwargs)
manifest.write = slowly
"""


class Chaos:
  """One run directory, and what befalls it."""

  def __init__(self, launch, finish, run_dir, draw):
    self.launch, self.finish, self.run_dir = launch, finish, run_dir
    self.draw = draw
    self.history: list[str] = []

  def lines(self):
    metrics = self.run_dir / 'metrics.jsonl'
    return metrics.read_bytes().count(b'\n') if metrics.exists() else 0

  def saving(self):
    """Whether a save has begun that has no manifest yet."""
    with contextlib.suppress(OSError):  # They come and go.
      for path in (self.run_dir / 'checkpoints').iterdir():
        if not (path / 'manifest.json').exists():
          return True
    return False

  def wait(self, processes, happened):
    """Waits for something to happen; false where the run ends before."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
      if happened():
        return True
      if any(process.poll() is not None for process in processes):
        return False
      time.sleep(0.001)
    raise AssertionError(self.history)

  def kill_at_random(self):
    processes = self.launch(POISON)
    begun = self.draw.random() < 0.1  # Before the first step, at times.
    if begun:
      time.sleep(self.draw.uniform(0, 4))
    else:
      wanted = self.lines() + self.draw.randint(1, 60)
      self.wait(processes, lambda: self.lines() >= wanted)
    # What has not met yet cannot miss another: it waits, until all are killed.
    return self._kill(processes, 'at random', all_of_them=begun)

  def kill_in_a_save(self):
    processes = self.launch(POISON + SLOW_SAVES)
    if self.wait(processes, lambda: not self.saving()):
      self.wait(processes, self.saving)
      time.sleep(self.draw.uniform(0, 0.25))
    return self._kill(processes, 'in a save')

  def _kill(self, processes, when, all_of_them=False):
    victim = self.draw.choice(processes)
    for process in processes if all_of_them else [victim]:
      process.kill()
    ends = [self.finish(process) for process in processes]
    killed = victim.returncode == -signal.SIGKILL
    self.history.append(
      f'{when}, at line {self.lines()}' if killed else 'the run ended by itself'
    )
    for process, (status, _, err) in zip(processes, ends, strict=True):
      # On a full disk the end of a run cannot be saved.
      well = (0, 2) if when == AFTER_A_FULL_DISK else (0,)
      others = killed and process is not victim
      assert others or killed or status in well, (self.history, status, err)
      # JAX has its say where its coordinator is gone.
      assert others or 'Traceback' not in err, (self.history, err)
    return killed

  def damage(self):
    """Breaks a file of the newest checkpoint, if there is an older one."""
    steps = sorted(
      (int(path.parent.name), path.parent)
      for path in self.run_dir.glob('checkpoints/*/manifest.json')
    )
    if len(steps) < 2:
      return
    newest = steps[-1][1]
    files = [path for path in sorted(newest.rglob('*')) if path.is_file()]
    path = self.draw.choice([path for path in files if path.stat().st_size])
    content = bytearray(path.read_bytes())
    place = self.draw.randrange(len(content))
    how = self.draw.choice(['flipped', 'truncated', 'removed'])
    if how == 'flipped':
      content[place] ^= 1 << self.draw.randrange(8)
    else:
      content = content[:place]
    path.unlink()
    if how != 'removed':
      path.write_bytes(bytes(content))
    self.history.append(f'{how} {path.relative_to(self.run_dir)}')

  def fill_the_disk(self):
    """Until a save has failed; then there is room again."""
    disk = self.run_dir.parent
    filler = disk / 'filler'
    processes = self.launch(POISON)
    wanted = self.lines() + self.draw.randint(1, 20)
    if self.wait(processes, lambda: self.lines() >= wanted):
      before = self.failed_saves()
      with contextlib.suppress(OSError), filler.open('wb') as file:
        while True:
          file.write(bytes(4096))
          file.flush()
      # What cannot be written is not seen there: the next save is late by then.
      time.sleep(1.0)
      filler.unlink()
      self.wait(processes, lambda: self.failed_saves() > before)
    return self._kill(processes, AFTER_A_FULL_DISK)

  def failed_saves(self):
    events = self.run_dir / 'events.jsonl'
    return events.exists() and events.read_text().count('"save_failed"')

  def end(self):
    ends = [self.finish(process) for process in self.launch(POISON)]
    assert [end[0] for end in ends] == [0] * len(ends), (self.history, ends)


def alone(start, tiny, run_dir):
  argv = ['run', 'demo', '--run-dir', run_dir, *tiny, *LONG]
  return lambda prelude: [start(*argv, prelude=prelude)]


def two(start, tiny, run_dir):
  def launch(prelude):
    with socket.create_server(('127.0.0.1', 0)) as server:
      address = f'127.0.0.1:{server.getsockname()[1]}'
    argv = ['run', 'demo', '--run-dir', run_dir, *tiny, *LONG,
            '--coordinator', address, '--processes', 2]  # fmt: skip
    return [start(*argv, '--process', i, prelude=prelude) for i in range(2)]

  return launch


def outcome(run_dir):
  last = json.loads((run_dir / 'metrics.jsonl').read_text().splitlines()[-1])
  return last['params_digest'], last['validation_loss']


def checked(run_dir, undisturbed, numbers, chaos):
  told = f'GRADPOWER_CHAOS_SEED={SEED}: {chaos.history}'
  assert outcome(run_dir) == outcome(undisturbed), told
  assert numbers(run_dir) == numbers(undisturbed), told
  skipped = [line.get('skipped') for line in numbers(run_dir)]
  assert skipped.count(3) >= STEPS - 212, told
  print(f'{len(chaos.history)} blows: {"; ".join(chaos.history)}')


@pytest.mark.slow
def test_chaos_leaves_no_trace(
  start, finish, tiny, tmp_path, numbers, small_disk
):
  undisturbed = tmp_path / 'undisturbed'
  draw = random.Random(SEED)
  Chaos(alone(start, tiny, undisturbed), finish, undisturbed, draw).end()
  run_dir = small_disk(3_000) / 'run'
  chaos = Chaos(alone(start, tiny, run_dir), finish, run_dir, draw)
  kills = 0
  for _ in range(3 * KILLS):
    if kills == KILLS:
      break
    blow = (chaos.kill_at_random, chaos.kill_in_a_save, chaos.fill_the_disk)
    kills += blow[kills % 3]()
    if draw.random() < 0.4:
      chaos.damage()
    if (run_dir / 'metrics.jsonl').exists() and '"done"' in (
      run_dir / 'metrics.jsonl'
    ).read_text():  # All is trained, and there is more to befall it.
      checked(run_dir, undisturbed, numbers, chaos)
      shutil.rmtree(run_dir)
      chaos.history.clear()
  assert kills == KILLS, chaos.history
  chaos.end()
  checked(run_dir, undisturbed, numbers, chaos)


@pytest.mark.slow
def test_chaos_of_two_processes(start, finish, tiny, tmp_path, numbers):
  undisturbed, run_dir = tmp_path / 'undisturbed', tmp_path / 'run'
  draw = random.Random(SEED + 1)
  Chaos(two(start, tiny, undisturbed), finish, undisturbed, draw).end()
  chaos = Chaos(two(start, tiny, run_dir), finish, run_dir, draw)
  kills = 0
  for _ in range(max(1, KILLS // 5)):
    kills += (chaos.kill_at_random, chaos.kill_in_a_save)[kills % 2]()
  assert kills
  chaos.end()
  checked(run_dir, undisturbed, numbers, chaos)
