"""`python -m train figure`: its options, and the request that they make."""

import argparse
import dataclasses
from typing import Any

from train import cli
from train.config import Config
from train.experiments import compare_command
from train.experiments.figures.design import LAPTOP, SCALES, Request

_FIGURES = ('1', '2', '3', '4', '5', '6', '7', 'adagrad')


def add(commands) -> None:
  """Adds the command."""
  parser = commands.add_parser(
    'figure',
    help="runs and draws one of the paper's figures",
    usage='%(prog)s FIGURE --out DIR [options]',
    description='Trains what a figure needs and is not in the store yet, and '
    'draws it. The same command goes on where it was. See docs/experiments.md.',
  )
  parser.add_argument(
    'figure',
    choices=_FIGURES,
    help='1 scaling, 2 powers, 3 schedules and data, 4 experts, 5 blockwise '
    'learning rates and Muon, 6 batch sizes, 7 the example, adagrad its rate',
  )
  parser.add_argument(
    '--scale',
    choices=SCALES,
    default=LAPTOP,
    help="recipes that a laptop can train, or the paper's; default: laptop",
  )
  parser.add_argument(
    '--sizes',
    type=_names,
    default=(),
    metavar='RECIPE,...',
    help='other recipes: several of figure 1, one of figures 2 to 6',
  )
  parser.add_argument(
    '--text',
    type=_text,
    action='append',
    metavar='NAME=FILES',
    help='of figure 3: another text, a glob or a prepared directory',
  )
  parser.add_argument(
    '--noise-run',
    type=cli.path,
    metavar='RUN_DIR',
    help='of figure 7: a run with --noise, whose u(p) is drawn too',
  )
  compare_command.add_common(parser)
  parser.set_defaults(call=_call)


def _call(options: argparse.Namespace) -> int:
  from train.experiments.figures import make

  request = Request(
    figure=options.figure,
    out=options.out,
    scale=options.scale,
    sizes=options.sizes,
    seeds=options.seeds,
    store=options.store,
    texts=dict(options.text or ()),
    noise_run=options.noise_run,
    fields=_fields(options),
    command=compare_command.command(),
    dry=options.dry_run,
  )
  return make.run(request, compare_command.engine(options))


def _fields(options: argparse.Namespace) -> dict[str, Any]:
  """The config's options that were given: others are not in the namespace."""
  own = {field.name for field in dataclasses.fields(Config)}
  return {
    path: value
    for path, value in vars(options).items()
    if '.' in path or path in own
  }


def _names(text: str) -> tuple[str, ...]:
  names = tuple(name for name in text.split(',') if name)
  if not names:
    raise argparse.ArgumentTypeError('it is empty')
  return names


def _text(text: str) -> tuple[str, str]:
  name, _, place = text.partition('=')
  if not (name and place):
    raise argparse.ArgumentTypeError(f'{text!r} is not NAME=FILES')
  return name, place
