"""`python -m train sweep`: its options, and the request that they make."""

import argparse
import functools

from train.experiments import compare_command


def add(commands) -> None:
  """Adds the command."""
  parser = commands.add_parser(
    'sweep',
    help='a grid or a list of settings, each on the same seeds',
    usage='%(prog)s RECIPE --over FIELD=VALUE,VALUE --out DIR [options]',
    description='Trains each point of a grid, or of a list, on each seed. The '
    'same command goes on where it was; finished cells are never run again. '
    'See docs/experiments.md.',
    epilog='A point that changes data.batch_size or data.sequence_length has '
    'as many tokens in all: steps, warm-up, evaluations and saves are scaled, '
    'unless --steps is given or steps is swept.',
  )
  parser.add_argument('recipe', metavar='RECIPE')
  parser.add_argument(
    '--over',
    action='append',
    metavar='FIELD=VALUE,VALUE',
    help='a side of the grid; give several for all combinations. Short for '
    'fields: lr, p, batch, eps, wd, optimizer, schedule; size=RECIPE,RECIPE '
    'takes other recipes, each with its own steps',
  )
  parser.add_argument(
    '--point',
    action='append',
    metavar='FIELD=VALUE,FIELD=VALUE',
    help='a single point, beside the grid or without one',
  )
  compare_command.add_common(parser)
  parser.set_defaults(call=_call)


def _call(options: argparse.Namespace) -> int:
  from train.experiments import experiment, outputs, sweep

  outputs.check(options.out, outputs.SWEEP)
  request = sweep.Request(
    recipe=options.recipe,
    config=functools.cache(
      lambda recipe: experiment.base_config(recipe, options)
    ),
    given=frozenset(vars(options)),
    points=sweep.parse(options.over or (), options.point or ()),
    seeds=options.seeds,
    out=options.out,
    store=options.store,
    command=compare_command.command(),
  )
  return sweep.run(
    request, compare_command.engine(options), dry=options.dry_run
  )
