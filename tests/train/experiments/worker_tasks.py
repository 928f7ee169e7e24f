"""Tasks of `workers_test` and `ray_engine_test`, importable by a process."""

import os
import pathlib
import signal
import sys
import time

from train.errors import UserError
from train.experiments import workers

LONGEST = 600.0
"""Seconds that a task takes which nobody stops: a machine may be busy."""


def square(x):
  return x * x


def cores(x):
  del x
  return sorted(os.sched_getaffinity(0))


def fail_at(x, bad):
  if x == bad:
    raise UserError(f'{x} will not do')
  return until_stopped(x, pathlib.Path(os.devnull))


def divide(x):
  return 1 / x


def named(x, directory):
  """The task 1 names a signal; those behind it do not end before it."""
  if x == 1:
    (directory / 'named').touch()
    return 'SIGHUP'
  if x > 1:
    while not (directory / 'named').exists():
      time.sleep(0.02)
    time.sleep(0.1)  # Until its result is under way.
  return x


def die(x, number):
  if x == 1:
    os.kill(os.getpid(), number)
  time.sleep(LONGEST)


def until_stopped(name, directory):
  """Runs until it is told to stop; then saves, and says how often it heard."""
  heard = []
  numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
  before = {n: signal.signal(n, lambda n, _: heard.append(n)) for n in numbers}
  if directory.is_dir():
    (directory / f'{name}.begun').write_text(str(os.getpid()))
  end = time.monotonic() + LONGEST
  while not heard and time.monotonic() < end:
    time.sleep(0.02)
  time.sleep(1.0 if name == 1 else 0.2)  # It saves, one longer than others.
  for number, handler in before.items():
    signal.signal(number, handler)
  if directory.is_dir():
    (directory / f'{name}.saved').write_text(
      ' '.join(map(str, map(int, heard)))
    )
  return signal.Signals(heard[0]).name


def stubborn(name, directory):
  """Does not end, as a process inside a long call; says that it was told."""
  for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, lambda *_: (directory / f'{name}.told').touch())
  (directory / f'{name}.begun').write_text(str(os.getpid()))
  end = time.monotonic() + LONGEST
  while time.monotonic() < end:
    time.sleep(0.02)


def slow(x, directory, seconds):
  with (directory / f'{x}.begun').open('a') as file:
    file.write(f'{os.getpid()}\n')
  time.sleep(seconds)
  return x


def arm(cell):
  return cell.arm.encode()


def main(function, directory, count, many):
  """A parent: prints what came of it."""
  engine = workers.Local(count)
  directory = pathlib.Path(directory)
  found = list(
    engine.run(globals()[function], [(i, directory) for i in range(many)])
  )
  print(found, engine.signal, flush=True)


if __name__ == '__main__':
  main(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
