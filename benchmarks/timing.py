"""What the benchmarks share: timings in turn, the machine's facts, options.

Machines drift: clocks change, other programs come and go. Programs that are
compared are therefore timed in turn, one directly after the other and every
other round in the opposite order, and what is reported is the median of the
rounds' ratios.
"""

import argparse
import dataclasses
import datetime
import json
import math
import os
import pathlib
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any, NoReturn

import jax

# A sample shorter than this repeats the call and waits once at the end, so that
# on an accelerator the time of a dispatch and of a wait hide behind the work.
_SAMPLE_SECONDS = 0.02


@dataclasses.dataclass(frozen=True)
class Pairs:
  """Seconds a call of two programs; equal indices were taken together."""

  first: tuple[float, ...]
  second: tuple[float, ...]
  calls_per_sample: int

  @property
  def ratios(self) -> tuple[float, ...]:
    """Time of the second over that of the first, pair by pair."""
    return tuple(b / a for a, b in zip(self.first, self.second, strict=True))


def time_pairs(
  first: Callable[[], Any], second: Callable[[], Any], pairs: int
) -> Pairs:
  """Times two programs in turn.

  Args:
    first: Starts one run and returns its output arrays, ready or not.
    second: The same of the other program.
    pairs: How many samples of each to take, after a warm-up.

  Returns:
    The seconds of one call of each, in the order in which they were taken.
  """
  for call in (first, second):
    _sample(call, 1)
  calls = max(1, math.ceil(_SAMPLE_SECONDS / _sample(first, 2)))
  for call in (first, second):
    _sample(call, calls)
  seconds: tuple[list[float], list[float]] = ([], [])
  for pair in range(pairs):
    for i in (0, 1) if pair % 2 == 0 else (1, 0):
      seconds[i].append(_sample((first, second)[i], calls))
  return Pairs(tuple(seconds[0]), tuple(seconds[1]), calls)


def time_rounds(
  programs: dict[str, Callable[[], Any]], rounds: int
) -> dict[str, tuple[float, ...]]:
  """Times any number of programs in turn, each with a sample of its own length.

  Args:
    programs: Each starts one run and returns its output arrays, ready or not.
    rounds: How many samples of each to take, after a warm-up.

  Returns:
    The seconds of one call; equal indices were taken in the same round.
  """
  calls = {}
  for name, run in programs.items():
    _sample(run, 1)
    calls[name] = max(1, math.ceil(_SAMPLE_SECONDS / _sample(run, 2)))
  seconds: dict[str, list[float]] = {name: [] for name in programs}
  for number in range(rounds):
    for name in programs if number % 2 == 0 else reversed(programs):
      seconds[name].append(_sample(programs[name], calls[name]))
  return {name: tuple(taken) for name, taken in seconds.items()}


def _sample(call: Callable[[], Any], calls: int) -> float:
  """Returns the seconds a call, from the first dispatch to the last result."""
  start = time.perf_counter()
  for _ in range(calls):
    out = call()
  jax.block_until_ready(out)
  return (time.perf_counter() - start) / calls


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
  """Returns lower quartile, median and upper quartile; of one value, itself."""
  if len(values) == 1:
    return (values[0],) * 3
  low, middle, high = statistics.quantiles(values, n=4, method='inclusive')
  return low, middle, high


def machine_facts() -> dict[str, Any]:
  """Returns what a reader needs to place a timing: hardware, versions, load."""
  device = jax.devices()[0]
  versions = {
    name: metadata.version(name) for name in ('jax', 'jaxlib', 'optax')
  }
  return {
    'platform': device.platform,
    'device': device.device_kind,
    'cpu': _cpu_model(),
    'cores': cores(),
    'load': round(os.getloadavg()[0], 2),
    'python': platform.python_version(),
    **versions,
    'date': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
  }


def _cpu_model() -> str:
  cpuinfo = pathlib.Path('/proc/cpuinfo')
  if cpuinfo.exists():
    for line in cpuinfo.read_text().splitlines():
      if line.startswith('model name'):
        return line.partition(':')[2].strip()
  return platform.processor() or platform.machine()


def cores() -> int:
  """How many this process may use."""
  if hasattr(os, 'sched_getaffinity'):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def format_facts(facts: dict[str, Any]) -> str:
  """Returns the machine's facts in two lines."""
  versions = ('python', 'jax', 'jaxlib', 'optax')
  return (
    f'{facts["device"]} ({facts["platform"]}); {facts["cpu"]}, '
    f'{facts["cores"]} cores, load {facts["load"]}\n'
    + ', '.join(f'{name} {facts[name]}' for name in versions)
  )


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Returns an aligned table: the first column to the left, others right."""
  lines = [header, *rows]
  widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
  return '\n'.join(
    '  '.join(
      cell.ljust(width) if i == 0 else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(line, widths, strict=True))
    ).rstrip()
    for line in lines
  )


def write_json(path: str | os.PathLike[str], result: Any) -> None:
  """Writes a result whole or not at all; makes the directory if needed."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(path.name + '.part')
  part.write_text(json.dumps(result, indent=2, allow_nan=False) + '\n')
  part.replace(path)


class Parser(argparse.ArgumentParser):
  """Refuses bad options in one line, without the usage."""

  def parse_args(self, *args: Any, **kwargs: Any) -> Any:
    options = super().parse_args(*args, **kwargs)
    if any(value == [] for value in vars(options).values()):
      self.error("'--' is no value")  # Dropped by Python before 3.13.
    return options

  def error(self, message: str) -> NoReturn:
    self.exit(2, f'{self.prog}: error: {message}\n')


def positive(text: str) -> int:
  """Parses an option that must be at least 1."""
  value = int(text)
  if value < 1:
    raise argparse.ArgumentTypeError(f'{text} is not at least 1')
  return value


positive.__name__ = 'int'  # argparse names it where int fails.


def check_writable(parser: argparse.ArgumentParser, path: str) -> None:
  """Refuses a --json that cannot be written, before minutes are spent."""
  target = pathlib.Path(path)
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    # Permissions alone do not tell: root has them where nothing can be made.
    is_new = not target.exists()
    target.open('a').close()
    if is_new:
      target.unlink()
  except OSError as error:
    parser.error(f'cannot write --json {target}: {error.strerror}')
