"""`python -m train compare`: its options, and the request that they make."""

import argparse
import shlex
import sys
import typing
from collections.abc import Sequence

from train import cli
from train.errors import UserError

if typing.TYPE_CHECKING:
  from train.experiments.experiment import Engine

_DONE = 0
_MOST_SEEDS = 1000


def add(commands) -> None:
  """Adds the command."""
  parser = commands.add_parser(
    'compare',
    help='arms against a baseline on paired seeds, with statistics',
    usage='%(prog)s RECIPE --arm A --arm B:p=1.2 --out DIR [options]',
    description='Trains each arm on each seed and compares in pairs. The same '
    'command goes on where it was; finished cells are never run again. See '
    'docs/experiments.md.',
  )
  parser.add_argument('recipe', metavar='RECIPE')
  parser.add_argument(
    '--arm',
    action='append',
    metavar='NAME[:field=value,...]',
    help='give at least two; the first is the baseline, the second against it '
    'the headline. Short for fields: power or p, lr, eps, wd, optimizer',
  )
  parser.add_argument(
    '--control',
    action='append',
    metavar='NAME',
    help='adds arms that take away what else the power changes: lr-matched, '
    'lr-measured, lr-tuned, eps-matched, norm-matched',
  )
  parser.add_argument(
    '--headline', default='', metavar='ARM', help='default: the second arm'
  )
  parser.add_argument(
    '--lr-grid',
    type=_rates,
    default=(),
    metavar='X,Y',
    help="of lr-tuned; default: the paper's",
  )
  parser.add_argument(
    '--noise-run',
    type=cli.path,
    metavar='RUN_DIR',
    help='whose moments lr-measured takes',
  )
  add_common(parser)
  parser.set_defaults(call=_call)


def add_common(parser: argparse.ArgumentParser) -> None:
  """Adds what all experiments have: seeds, places, engine, configuration."""
  parser.add_argument(
    '--seeds',
    type=seeds,
    default=range(3),
    metavar='N|A:B|A,B',
    help='so many from 0, or these; default: 3',
  )
  parser.add_argument('--out', type=cli.path, required=True, metavar='DIR')
  parser.add_argument(
    '--store',
    type=cli.path,
    metavar='DIR',
    help='of finished cells, to share and to commit; default: OUT/cells',
  )
  parser.add_argument(
    '--jobs',
    type=cli.positive,
    metavar='N',
    help='cells at once; default: on a CPU one a core, else 1',
  )
  parser.add_argument(
    '--engine',
    choices=('local', 'ray'),
    default='local',
    help="ray: on the cluster that RAY_ADDRESS names; needs the 'ray' extra; "
    'default: local',
  )
  parser.add_argument(
    '--dry-run', action='store_true', help='prints plan and cost, and ends'
  )
  group = parser.add_argument_group(
    'configuration', 'Of every cell, as of `run`; docs/cli.md has them.'
  )
  cli.add_config_options(group)


def _call(options: argparse.Namespace) -> int:
  from train.experiments import arms, compare, controls, experiment, outputs

  outputs.check(options.out, outputs.COMPARISON)
  for name in options.control or ():
    if name not in controls.NAMES:
      raise UserError(
        f'--control {name}: there are {", ".join(controls.NAMES)}'
      )
  request = compare.Request(
    recipe=options.recipe,
    config=experiment.base_config(options.recipe, options),
    arms=arms.parse_all(options.arm or []),
    seeds=options.seeds,
    out=options.out,
    store=options.store,
    controls=tuple(dict.fromkeys(options.control or ())),
    headline=options.headline,
    rates=options.lr_grid,
    noise_run=options.noise_run,
    command=command(),
  )
  return compare.run(request, engine(options), dry=options.dry_run)


def engine(options: argparse.Namespace) -> 'Engine':
  """Where the cells are run, as the options of `add_common` say.

  Raises:
    UserError: the engine is not installed, or cannot be reached.
  """
  from train.experiments import experiment, workers

  if options.engine == 'local':
    return workers.Local(experiment.jobs(options.jobs))
  if options.jobs is not None:
    raise UserError(
      '--jobs is of --engine local: Ray runs as many cells at once as the '
      'cluster has room for'
    )
  from train.experiments import ray_engine

  return ray_engine.Ray()


def command() -> str:
  """The command line, as it was typed."""
  return shlex.join(['python', '-m', 'train', *sys.argv[1:]])


def seeds(text: str) -> tuple[int, ...]:
  """'3' are 0, 1, 2; '3:6' are 3, 4, 5; '4,7' are those, and '4,' one."""
  try:
    if ':' in text:
      first, last = map(int, text.split(':'))
      asked: Sequence[int] = range(first, last)
    elif ',' in text:
      asked = [int(part) for part in text.split(',') if part]
    else:
      asked = range(int(text))
  except ValueError:
    raise argparse.ArgumentTypeError(
      f'{text!r} is neither a number of seeds, nor A:B, nor A,B'
    ) from None
  found = tuple(asked[: _MOST_SEEDS + 1])  # A range may be too long for a list.
  if not found:
    raise argparse.ArgumentTypeError(
      f'{text!r} is no seed at all: 3 is seeds 0, 1 and 2'
    )
  if min(found) < 0 or len(found) > _MOST_SEEDS:
    raise argparse.ArgumentTypeError(
      f'{text!r} is not at most {_MOST_SEEDS} seeds from 0 on'
    )
  if len(set(found)) < len(found):
    raise argparse.ArgumentTypeError(f'{text!r} has a seed twice')
  return found


def _rates(text: str) -> tuple[float, ...]:
  try:
    found = tuple(float(part) for part in text.split(','))
  except ValueError:
    found = ()
  if not found or not all(0 < rate < 1e3 for rate in found):
    raise argparse.ArgumentTypeError(
      f'{text!r} is not learning rates joined by commas'
    )
  return found
