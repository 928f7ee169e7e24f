"""The model that a benchmark of training steps is about, and its options."""

import argparse
import dataclasses
import typing

from models import accounting, presets
from models.config import DecoderConfig, LlamaConfig, Qwen2MoeConfig

DEFAULT = LlamaConfig(
  vocab_size=8192, d_model=384, n_layers=6, n_heads=6, d_ff=1024
)
"""The one that other frameworks were timed on, in float32, on a CPU."""


def add_options(parser: argparse.ArgumentParser) -> None:
  """Adds `--preset` and, not shown in the help, `--model.FIELD`."""
  parser.add_argument(
    '--preset', choices=presets.PRESETS, metavar='NAME',
    help='see python -m models',
  )  # fmt: skip
  for name, kind in typing.get_type_hints(Qwen2MoeConfig).items():
    if kind in (int, float, str, bool):
      parser.add_argument(
        f'--model.{name}',
        type=_boolean if kind is bool else kind,
        metavar='true|false' if kind is bool else kind.__name__,
        help=argparse.SUPPRESS,
      )


def from_options(
  parser: argparse.ArgumentParser, options: argparse.Namespace
) -> DecoderConfig:
  """Makes the config that was asked for; refuses a bad one in one line."""
  config = presets.get(options.preset) if options.preset else DEFAULT
  given = {
    name.removeprefix('model.'): value
    for name, value in vars(options).items()
    if name.startswith('model.') and value is not None
  }
  if unknown := sorted(set(given) - set(vars(config))):
    parser.error(
      f'--model.{unknown[0]}: a {type(config).__name__} has no such field'
    )
  try:
    config = dataclasses.replace(config, **given)
    accounting.parameters(config)
  except ValueError as error:  # It names 'model.field'.
    parser.error(f'--{error}')
  return config


def _boolean(text: str) -> bool:
  if text not in ('true', 'false'):
    raise argparse.ArgumentTypeError(f'{text!r} is neither true nor false')
  return text == 'true'
