"""The commands of `python -m train`: each parses its options and calls on.

What a command needs is imported when it is called: most need no data.
"""

import argparse
import dataclasses
import sys
from typing import Any

from etils import epath

from train import (
  cli,
  paper,
  prepare_command,
  recipe_table,
  recipes,
  sample_options,
)
from train.errors import UserError
from train.experiments import compare_command, figure_command, sweep_command
from train.watch_options import WatchOptions

_DONE = 0
_INTERRUPTED = 130
# Saved, and not by a person's wish: a scheduler may start it again.
_PREEMPTED = 75


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
  compare_command.add(commands)
  figure_command.add(commands)
  sweep_command.add(commands)
  prepare_command.add(commands)
  _add_report(commands)
  _add_sample(commands)
  _add_recipes(commands)
  _add_aot(commands)
  options = parser.parse_args(argv)
  return options.call(options)


def _add_demo(commands) -> None:
  parser = commands.add_parser(
    'demo',
    help='an optimizer against the same behind the power, and a page',
    description='Trains the demo recipe twice, without and with the power.',
  )
  parser.add_argument(
    '--run-dir', type=cli.place, default=epath.Path('runs/demo')
  )
  _add_processes(parser)
  cli.add_config_options(parser)
  parser.set_defaults(call=_demo)


def _demo(options: argparse.Namespace) -> int:
  from train import demo, distributed

  config = cli.config('demo', options)
  with distributed.cluster(*_processes(options)):
    if result := demo.run(config, options.run_dir):
      return _interrupted(options.run_dir, result)
  return _DONE


def _add_run(commands) -> None:
  parser = commands.add_parser(
    'run',
    help='trains a recipe, or goes on with it',
    description='Trains a recipe; the same command again continues it.',
  )
  parser.add_argument('recipe', metavar='RECIPE')
  parser.add_argument('--run-dir', type=cli.place, required=True)
  parser.add_argument(
    '--stop-at', type=cli.positive, help='save and end after this many steps'
  )
  group = parser.add_argument_group('what to write down, or to show')
  group.add_argument(
    '--tensorboard', action='store_true', help="also TensorBoard's files"
  )
  group.add_argument(
    '--wandb', default='', metavar='PROJECT', help='also to Weights & Biases'
  )
  group.add_argument(
    '--layer-statistics',
    type=cli.count,
    default=0,
    metavar='N',
    help='norms of every parameter, gradient and update each N steps',
  )
  group.add_argument(
    '--noise',
    type=cli.count,
    default=0,
    metavar='N',
    help='noise of gradients, and which power it advises, each N steps',
  )
  group.add_argument(
    '--profile',
    type=cli.span,
    metavar='FIRST[:COUNT]',
    help='trace steps from FIRST on, 3 unless told, for xprof',
  )
  _add_processes(parser)
  cli.add_config_options(parser)
  parser.set_defaults(call=_run)


def _run(options: argparse.Namespace) -> int:
  from train import distributed, loop

  config = cli.config(options.recipe, options)
  if options.profile and options.profile[0] > config.steps:
    raise UserError(
      f'--profile ({options.profile[0]}) is past the last step, --steps '
      f'({config.steps})'
    )
  with distributed.cluster(*_processes(options)):
    result = loop.run(
      config,
      options.run_dir,
      name=options.recipe,
      stop_at=options.stop_at,
      watch=WatchOptions(
        tensorboard=options.tensorboard,
        wandb=options.wandb,
        layer_statistics=options.layer_statistics,
        noise=options.noise,
        profile=options.profile,
      ),
    )
    if result.status == 'interrupted':
      return _interrupted(options.run_dir, result)
    if not distributed.is_main():
      return _DONE
  if result.status == 'done':
    cli.say(
      f'done: {result.step} steps, held-out loss '
      f'{result.validation_loss:.4f} nats a token, in {options.run_dir}'
    )
    if options.noise:
      _say_advice(options.run_dir)
  if result.status == 'stopped':
    cli.say(
      f'stopped: {result.step} of {config.steps} steps, saved in '
      f'{options.run_dir}; without --stop-at, or with a larger one, the same '
      'command goes on'
    )
  return _DONE


def _say_advice(run_dir: epath.Path) -> None:
  """What a run's measurements of noise come to, those of earlier starts too."""
  from train import noise_words
  from train.run_log import read_run

  log = read_run(run_dir.name, run_dir)
  if words := noise_words.advice(log.noise.values()):
    cli.say(words)


def _add_processes(parser: argparse.ArgumentParser) -> None:
  group = parser.add_argument_group(
    'several processes',
    'found where SLURM, Open MPI, GKE or a TPU VM has started them; else tell '
    'each of them (docs/launch.md)',
  )
  group.add_argument(
    '--coordinator', metavar='HOST:PORT', help='where process 0 listens'
  )
  group.add_argument(
    '--processes', type=cli.positive, metavar='N', help='how many there are'
  )
  group.add_argument(
    '--process', type=cli.count, metavar='I', help='this one, from 0'
  )


def _processes(
  options: argparse.Namespace,
) -> tuple[str | None, int | None, int | None]:
  return options.coordinator, options.processes, options.process


def _add_report(commands) -> None:
  parser = commands.add_parser(
    'report',
    help='draws run directories as one HTML page',
    description='Writes one self-contained page; the first run is the '
    'baseline of differences.',
  )
  parser.add_argument('runs', nargs='+', metavar='RUN_DIR', type=cli.place)
  parser.add_argument(
    '--out', type=cli.place, help='default: report.html in the first'
  )
  parser.set_defaults(call=_report)


def _report(options: argparse.Namespace) -> int:
  from train.report import write_report

  runs = {run.name: run for run in options.runs}
  if len(runs) < len(options.runs):
    runs = {str(run): run for run in options.runs}
  out = options.out or options.runs[0] / 'report.html'
  write_report(
    out, runs, title=' against '.join(runs), baseline=next(iter(runs))
  )
  cli.say(f'report: {out}')
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
    type=cli.place,
    help='a run directory, or a Hugging Face folder with a tokenizer.json',
  )
  parser.add_argument(
    '--step', type=cli.positive, help="of the run's checkpoint; default: latest"
  )
  default = sample_options.Options()
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
  from train import sample

  names = [field.name for field in dataclasses.fields(sample_options.Options)]
  wanted = sample_options.Options(
    **{name: getattr(options, name) for name in names}
  )
  status = sample.run(options.source, wanted, options.step)
  return _INTERRUPTED if status == 'interrupted' else _DONE


def _add_recipes(commands) -> None:
  parser = commands.add_parser(
    'recipes',
    help='lists the recipes and what each costs',
    description='Lists the recipes, with tokens, steps, FLOPs and estimated '
    'device-hours.',
  )
  parser.add_argument(
    '--data.corpus',
    dest='corpus',
    choices=paper.CORPORA,
    help="of the paper's runs; default: c4",
  )
  parser.add_argument(
    '--device',
    choices=recipe_table.DEVICES,
    default='h100',
    help='whose hours to estimate; default: h100',
  )
  parser.add_argument(
    '--mfu',
    type=cli.share,
    help='of its peak, what a run is assumed to reach; default: '
    f'{recipe_table.DENSE_MFU}, with experts {recipe_table.SPARSE_MFU}',
  )
  parser.set_defaults(call=_recipes)


def _recipes(options: argparse.Namespace) -> int:
  configs = {
    name: recipes.get(name, corpus=options.corpus) for name in recipes.RECIPES
  }
  cli.say(recipe_table.table(configs, options.device, options.mfu))
  return _DONE


_MOST_SLICES = 256


def _add_aot(commands) -> None:
  parser = commands.add_parser(
    'aot',
    help='compiles a recipe for TPUs that are not there, and predicts',
    description="Compiles a recipe's train step for a TPU topology, without "
    'the hardware: memory, collectives, a predicted time. See docs/aot.md.',
  )
  parser.add_argument('recipe', metavar='RECIPE')
  parser.add_argument(
    '--topology',
    required=True,
    metavar='NAME',
    help='generation and shape of a slice: v4, v5e, v5p, v6e or tpu7x, as '
    'v5p:4x4x2',
  )
  parser.add_argument(
    '--slices',
    type=_slices,
    default=1,
    help='such slices, at most 256, joined along the data axis; default: 1',
  )
  parser.add_argument(
    '--search',
    action='store_true',
    help='walks remat policy, batch per device and mesh; prints the best',
  )
  parser.add_argument(
    '--trials',
    type=cli.positive,
    default=24,
    help='compilations of a search, at most; default: 24',
  )
  parser.add_argument(
    '--json', type=cli.path, metavar='FILE', help='writes all figures'
  )
  parser.add_argument(
    '--hlo', type=cli.path, metavar='FILE', help='writes the compiled program'
  )
  cli.add_config_options(parser)
  parser.set_defaults(call=_aot)


def _slices(text: str) -> int:
  """So many that describing their devices does not take minutes."""
  if cli.positive(text) > _MOST_SLICES:
    raise argparse.ArgumentTypeError(f'{text} is above {_MOST_SLICES}')
  return int(text)


def _aot(options: argparse.Namespace) -> int:
  from train.aot import command

  config = cli.config(options.recipe, options)
  command.run(
    config,
    command.Options(
      topology=options.topology,
      slices=options.slices,
      trials=options.trials if options.search else 0,
      json=options.json,
      hlo=options.hlo,
    ),
  )
  return _DONE


def _interrupted(run_dir: epath.Path, result: Any) -> int:
  """Of a `train.loop.Result` that a signal has brought about."""
  from train import distributed

  if distributed.is_main():
    saved = f'saved in {run_dir}; the same command goes on from there'
    unsaved = 'before the first step: nothing to save'
    print(
      f'interrupted ({result.signal}), {saved if result.step else unsaved}',
      file=sys.stderr,
    )
  return _INTERRUPTED if result.signal == 'SIGINT' else _PREEMPTED
