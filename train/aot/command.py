"""`python -m train aot`: one compilation, or a search over many."""

import dataclasses
import json
import pathlib

from train.aot import compile as compile_lib
from train.aot import report as report_lib
from train.aot import search, show, topology
from train.config import Config
from train.errors import UserError
from train.mesh import make_mesh

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
    try:
      ranking = search.walk(
        config, options.topology, options.slices, options.trials, say=_say
      )
    except search.NothingFitsError:
      _refuse(config, options)
      raise
    print('\nbest first, by predicted tokens a second:')
    for trial in ranking[:SHOWN]:
      print(f'  {search.describe(trial)}')
    best = ranking[0]
    assert best.report
    report = best.report
    print(f'\nthe best: {search.options(best, config)}\n')
  else:
    try:
      report = compile_lib.compile_step(
        config, options.topology, options.slices
      )
    except compile_lib.DoesNotFitError as error:
      _refuse(config, options, error.needed)
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


def _refuse(config: Config, options: Options, peak: int | None = None) -> None:
  """Writes what is known where no program fits.

  Args:
    config: The recipe.
    options: Say where to write.
    peak: What the one program would need; None after a search.
  """
  if not options.json:
    return
  devices = topology.devices_of(options.topology, options.slices)
  mesh = None if peak is None else make_mesh(config.mesh, devices)
  _write(
    options.json,
    report_lib.refusal(
      compile_lib.with_vocabulary(config),
      options.topology,
      options.slices,
      devices=len(devices),
      mesh=dict(mesh.shape) if mesh else None,
      memory=topology.chip_of(options.topology).hbm_bytes,
      peak=peak,
    ),
  )


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
