"""How long a person waits: from the command to the first step's line.

The command is `python -m train run` in a new directory, on the demo's text,
which is prepared beforehand. It is ended once its `metrics.jsonl` has a line.
"""

import dataclasses
import os
import pathlib
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from models.config import DecoderConfig, LlamaConfig

_ROOT = pathlib.Path(__file__).parents[1]
_POLL_SECONDS = 0.01
_LONGEST_SECONDS = 900.0
_RUNS = 3
_TOKENIZER = 2048  # Of the demo.


class RunError(Exception):
  """The trainer ended before its first step; the message is one line."""


def measure(config: DecoderConfig, batch: int, length: int) -> dict[str, Any]:
  """Starts the trainer again and again.

  Args:
    config: The model; its vocabulary is at least the demo's here.
    batch: Sequences.
    length: Tokens of each.

  Returns:
    'cold_seconds', each with an empty folder of compiled programs, and
    'warm_seconds', with a full one; 'cold' and 'warm', their medians.

  Raises:
    RunError: it does not get to its first step, or cannot be given the model.
  """
  command = [sys.executable, '-m', 'train', 'run']
  command += options(config, batch, length)
  with tempfile.TemporaryDirectory() as folder:
    cold = [
      time_first_line(command, pathlib.Path(folder) / str(run), fresh=True)
      for run in range(_RUNS + 1)  # The first prepares the text.
    ][1:]
    last = pathlib.Path(folder) / str(_RUNS)
    warm = [time_first_line(command, last, fresh=False) for _ in range(_RUNS)]
  return {
    'command': shlex.join(['python', *command[1:]]),
    'cold_seconds': cold,
    'warm_seconds': warm,
    'cold': statistics.median(cold),
    'warm': statistics.median(warm),
  }


def options(config: DecoderConfig, batch: int, length: int) -> list[str]:
  """The trainer's recipe and options for a model and shape of batches.

  Args:
    config: The model; every field of it is given.
    batch: Sequences.
    length: Tokens of each.

  Raises:
    RunError: the command line cannot take a field's value.
  """
  vocab = max(config.vocab_size, _TOKENIZER)
  config = dataclasses.replace(config, vocab_size=vocab)
  given = ['demo' if isinstance(config, LlamaConfig) else 'demo_moe']
  given += _field_options(config, 'model')
  given += ['--data.batch_size', str(batch)]
  return [*given, '--data.sequence_length', str(length)]


def _field_options(config: Any, path: str) -> Iterator[str]:
  for name, value in vars(config).items():
    option = f'{path}.{name}'
    if dataclasses.is_dataclass(value):
      yield from _field_options(value, option)
    elif isinstance(value, bool):
      yield from (f'--{option}', str(value).lower())
    elif isinstance(value, (int, float, str)):
      yield from (f'--{option}', str(value))
    elif isinstance(value, tuple):
      yield from (f'--{option}', ','.join(map(str, value)))
    else:
      raise RunError(f'--{option} cannot be {value!r}')


def time_first_line(
  command: list[str], folder: pathlib.Path, *, fresh: bool
) -> float:
  """Runs the trainer until it has logged a step.

  Args:
    command: The trainer's, but for the run directory.
    folder: Where the run directory and compiled programs go; they outlive it.
    fresh: Whether there are to be no compiled programs yet.

  Returns:
    Seconds from the start of the process.

  Raises:
    RunError: it ends before, or takes too long.
  """
  compiled = folder / 'compiled'
  if fresh == compiled.exists():
    raise ValueError(f'compiled programs in {folder}: {not fresh}')
  compiled.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=folder) as scratch:
    run_dir = pathlib.Path(scratch) / 'run'
    errors = pathlib.Path(scratch) / 'errors'
    environment = os.environ | {
      'JAX_COMPILATION_CACHE_DIR': str(compiled),
      # As the trainer has it in a folder of its own choice.
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.5',
    }
    with errors.open('w') as file:
      start = time.perf_counter()
      process = subprocess.Popen(
        [*command, '--run-dir', str(run_dir)],
        cwd=_ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=file,
      )
    try:
      while not _has_line(run_dir / 'metrics.jsonl'):
        if process.poll() is not None:
          last = errors.read_text().strip().splitlines()[-1:]
          raise RunError(f'the trainer has ended: {"".join(last)}')
        if time.perf_counter() - start > _LONGEST_SECONDS:
          raise RunError(f'no step in {_LONGEST_SECONDS:.0f} s')
        time.sleep(_POLL_SECONDS)
      return time.perf_counter() - start
    finally:
      process.kill()
      process.wait()


def _has_line(path: pathlib.Path) -> bool:
  return path.exists() and b'\n' in path.read_bytes()
