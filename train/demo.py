"""The demo: an optimizer against the same behind the power, on real text."""

import dataclasses
import json
import textwrap

from etils import epath

from train import cli, distributed, loop
from train.config import Config
from train.errors import UserError
from train.report import write_report
from train.run_dir import plain
from train.storage import one_line_errors, write_atomically

TITLES = {'adamw': 'AdamW', 'muon': 'Muon'}
WARNING = (
  'One seed at this size proves nothing: another seed can move the final loss '
  'by as much as the power does. This page shows that both runs work, not '
  'which optimizer is better.'
)


def arms(config: Config) -> tuple[str, str]:
  """The names of both: the baseline's, and with the power."""
  return config.optimizer.name, f'{config.optimizer.name}_power'


def run(config: Config, directory: epath.Path) -> loop.Result | None:
  """Trains both arms from the same parameters on the same batches.

  Args:
    config: The powered arm; the other has power 1 and nothing else changed.
    directory: Holds a run directory per arm, results.json and report.html.

  Returns:
    Of the arm that a signal has stopped; None where both are done.

  Raises:
    UserError: the input is at fault, or the disk is full.
  """
  if config.optimizer.power == 1.0:
    raise UserError(
      '--optimizer.power 1.0 makes both arms the same: the demo compares '
      'power 1 with another'
    )
  if (directory / 'config.json').exists():
    raise UserError(
      f'{directory} is the directory of a single run: name another --run-dir'
    )
  for name in TITLES.keys() - {config.optimizer.name}:
    if (directory / name).exists():
      raise UserError(
        f'{directory} holds a demo with --optimizer.name {name}: name another'
        ' --run-dir'
      )
  without = dataclasses.replace(config.optimizer, power=1.0)
  configs = dict(
    zip(arms(config), (dataclasses.replace(config, optimizer=without), config),
        strict=True)
  )  # fmt: skip
  results = {}
  for name, arm in configs.items():
    result = loop.run(arm, directory / name, name=name)
    results[name] = result
    if result.status != 'done' or (
      result.signal and len(results) < len(configs)
    ):
      return result
  with distributed.together():
    if distributed.is_main():
      _present(config, directory, results)
  return None


def _present(
  config: Config, directory: epath.Path, results: dict[str, loop.Result]
) -> None:
  _write_results(directory, results)
  power = f'{config.optimizer.power:g}'
  title = TITLES[config.optimizer.name]
  write_report(
    directory / 'report.html',
    {name: directory / name for name in results},
    title=f'{title} against {title} behind sign_power({power})',
    notes=[WARNING],
    baseline=arms(config)[0],
  )
  cli.say(_table(directory, results))


def _write_results(
  directory: epath.Path, results: dict[str, loop.Result]
) -> None:
  arms = {
    name: {
      'validation_loss': plain(result.validation_loss),
      'params_digest': result.params_digest,
      'run_dir': str(directory / name),
    }
    for name, result in results.items()
  }
  document = {'arms': arms, 'difference': plain(_difference(results))}
  with one_line_errors(directory):
    write_atomically(
      directory / 'results.json', json.dumps(document, indent=2) + '\n'
    )


def _difference(results: dict[str, loop.Result]) -> float:
  """Powered minus plain, in nats a token: negative where the power helps."""
  without, powered = (arm.validation_loss for arm in results.values())
  return powered - without


def _table(directory: epath.Path, results: dict[str, loop.Result]) -> str:
  rows = [
    f'  {name:<12} {result.validation_loss:>16.4f}'
    for name, result in results.items()
  ]
  return '\n'.join(
    [
      '',
      f'  {"arm":<12} {"held-out loss":>16}   (nats a token)',
      *rows,
      f'  {"difference":<12} {_difference(results):>+16.4f}',
      '',
      *textwrap.wrap(WARNING, 78, initial_indent='  ', subsequent_indent='  '),
      '',
      f'  report: {directory / "report.html"}',
    ]
  )
