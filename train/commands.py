"""The commands of `python -m train`: each parses its options and calls on."""

import argparse
import dataclasses
import pathlib
import sys

from train import cli, demo, loop, recipes, sample
from train.report import write_report

_DONE = 0
_INTERRUPTED = 130


def run(prog: str, argv: list[str] | None) -> int:
  """Parses a command line and runs its command.

  Args:
    prog: The program's name, for messages.
    argv: The arguments; None takes the process's own.

  Returns:
    The exit status.

  Raises:
    UserError: a mistake in the input.
  """
  parser = cli.Parser(
    prog=prog, description='Trains language models; see docs/cli.md.'
  )
  commands = parser.add_subparsers(
    dest='command', required=True, parser_class=cli.Parser
  )
  _add_demo(commands)
  _add_run(commands)
  _add_report(commands)
  _add_sample(commands)
  _add_recipes(commands)
  options = parser.parse_args(argv)
  return options.call(options)


def _add_demo(commands) -> None:
  parser = commands.add_parser(
    'demo',
    help='AdamW against AdamW behind the gradient power, and a page',
    description='Trains the demo recipe twice, without and with the power.',
  )
  parser.add_argument(
    '--run-dir', type=cli.path, default=pathlib.Path('runs/demo')
  )
  cli.add_config_options(parser)
  parser.set_defaults(call=_demo)


def _demo(options: argparse.Namespace) -> int:
  config = cli.with_options(recipes.get('demo'), options)
  if demo.run(config, options.run_dir) == 'interrupted':
    return _interrupted(options.run_dir)
  return _DONE


def _add_run(commands) -> None:
  parser = commands.add_parser(
    'run',
    help='trains a recipe, or goes on with it',
    description='Trains a recipe; the same command again continues it.',
  )
  parser.add_argument('recipe', metavar='RECIPE')
  parser.add_argument('--run-dir', type=cli.path, required=True)
  parser.add_argument(
    '--stop-at', type=cli.positive, help='save and end after this many steps'
  )
  cli.add_config_options(parser)
  parser.set_defaults(call=_run)


def _run(options: argparse.Namespace) -> int:
  config = cli.with_options(recipes.get(options.recipe), options)
  result = loop.run(
    config, options.run_dir, name=options.recipe, stop_at=options.stop_at
  )
  if result.status == 'done':
    print(
      f'done: {result.step} steps, held-out loss '
      f'{result.validation_loss:.4f} nats a token, in {options.run_dir}'
    )
  if result.status == 'interrupted':
    return _interrupted(options.run_dir)
  if result.status == 'stopped':
    print(
      f'stopped: {result.step} of {config.steps} steps, saved in '
      f'{options.run_dir}; without --stop-at, or with a larger one, the same '
      'command goes on'
    )
  return _DONE


def _add_report(commands) -> None:
  parser = commands.add_parser(
    'report',
    help='draws run directories as one HTML page',
    description='Writes one self-contained page; the first run is the '
    'baseline of differences.',
  )
  parser.add_argument('runs', nargs='+', metavar='RUN_DIR', type=cli.path)
  parser.add_argument(
    '--out', type=cli.path, help='default: report.html in the first'
  )
  parser.set_defaults(call=_report)


def _report(options: argparse.Namespace) -> int:
  runs = {run.name: run for run in options.runs}
  if len(runs) < len(options.runs):
    runs = {str(run): run for run in options.runs}
  out = options.out or options.runs[0] / 'report.html'
  write_report(
    out, runs, title=' against '.join(runs), baseline=next(iter(runs))
  )
  print(f'report: {out}')
  return _DONE


def _add_sample(commands) -> None:
  parser = commands.add_parser(
    'sample',
    help='continues a prompt with what a model has learned',
    description='Writes the prompt and its continuation, as it is generated.',
  )
  parser.add_argument(
    'source',
    metavar='RUN',
    type=cli.path,
    help='a run directory, or a Hugging Face folder with a tokenizer.json',
  )
  parser.add_argument(
    '--step', type=cli.positive, help="of the run's checkpoint; default: latest"
  )
  default = sample.Options()
  for field, kind, meaning in (
    ('prompt', str, 'what the text begins with; default: nothing'),
    ('tokens', cli.positive, f'at most; default: {default.tokens}'),
    ('temperature', float, f'0: the likeliest; default: {default.temperature}'),
    ('top_p', float, f'mass to draw from; default: {default.top_p}'),
    ('seed', int, f'of the draws; default: {default.seed}'),
  ):
    parser.add_argument(
      f'--{field.replace("_", "-")}',
      type=kind,
      default=getattr(default, field),
      help=meaning,
    )
  parser.set_defaults(call=_sample)


def _sample(options: argparse.Namespace) -> int:
  names = [field.name for field in dataclasses.fields(sample.Options)]
  wanted = sample.Options(**{name: getattr(options, name) for name in names})
  status = sample.run(options.source, wanted, options.step)
  return _INTERRUPTED if status == 'interrupted' else _DONE


def _add_recipes(commands) -> None:
  parser = commands.add_parser('recipes', help='lists the recipes')
  parser.set_defaults(call=_recipes)


def _recipes(options: argparse.Namespace) -> int:
  del options
  for name, recipe in recipes.RECIPES.items():
    print(f'{name:<12} {(recipe.__doc__ or "").splitlines()[0]}')
  return _DONE


def _interrupted(run_dir: pathlib.Path) -> int:
  print(
    f'interrupted, saved in {run_dir}; the same command goes on from there',
    file=sys.stderr,
  )
  return _INTERRUPTED
