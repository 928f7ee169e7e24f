"""`python -m train aot`: one compilation, or a search over many."""

import dataclasses
import json
import pathlib

from train.aot import compile as compile_lib
from train.aot import search, show, topology
from train.config import Config
from train.errors import UserError

SHOWN = 10


@dataclasses.dataclass(frozen=True)
class Options:
  """What the command takes besides a config."""

  topology: str
  """Generation and shape of a slice: 'v5p:4x4x2'."""
  slices: int = 1
  """How many of them."""
  trials: int = 0
  """Compilations of a search; 0 compiles the config as it is."""
  json: pathlib.Path | None = None
  """Where to write the report."""
  hlo: pathlib.Path | None = None
  """Where to write the compiled program."""


def run(config: Config, options: Options) -> None:
  """Compiles, prints and writes.

  Raises:
    UserError: a mistake in the input, or the step does not fit.
  """
  topology.chip_of(options.topology)
  outputs = [path for path in (options.json, options.hlo) if path]
  for path in outputs:
    _check_writable(path)
  if options.trials:
    ranking = search.walk(
      config, options.topology, options.slices, options.trials, say=_say
    )
    print('\nbest first, by predicted tokens a second:')
    for trial in ranking[:SHOWN]:
      print(f'  {search.describe(trial)}')
    best = ranking[0]
    assert best.report
    report = best.report
    print(f'\nthe best: {search.options(best)}\n')
  else:
    try:
      report = compile_lib.compile_step(
        config, options.topology, options.slices
      )
    except compile_lib.DoesNotFitError as error:
      if options.json:
        _write(options.json, _refusal(options, error))
      raise _does_not_fit(options, str(error)) from error
  print(show.table(report))
  if options.json:
    _write(options.json, report.to_json())
  if options.hlo:
    options.hlo.write_text(report.text)
  if not report.fits:
    needed = compile_lib.DoesNotFitError(
      report.bytes.peak, report.chip.hbm_bytes
    )
    raise _does_not_fit(options, str(needed))


def _does_not_fit(options: Options, why: str) -> UserError:
  return UserError(
    f'the step does not fit on {options.topology}: it {why}; try '
    '--model.remat full, a smaller --data.batch_size, a larger --mesh.fsdp, '
    'or --search'
  )


def _refusal(options: Options, error: compile_lib.DoesNotFitError) -> dict:
  """What is known of a program that the compiler refused."""
  return {
    'topology': options.topology,
    'slices': options.slices,
    'fits': False,
    'bytes_per_device': {'peak': error.needed},
    'memory_per_device': error.available,
  }


def _write(path: pathlib.Path, content: dict) -> None:
  path.write_text(json.dumps(content, indent=2) + '\n')


def _check_writable(path: pathlib.Path) -> None:
  """Before minutes are spent on what could not be written."""
  try:
    is_new = not path.exists()
    path.open('a').close()
    if is_new:
      path.unlink()
  except OSError as error:
    raise UserError(f'{path} cannot be written: {error.strerror}') from error


def _say(line: str) -> None:
  print(line, flush=True)
