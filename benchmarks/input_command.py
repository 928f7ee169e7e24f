"""The command line of `benchmarks.input`, and what it measures in turn."""

import argparse
import lzma
import os
import pathlib
import sys
import tempfile
from importlib import metadata
from typing import Any

from benchmarks import (
  input_prepare,
  input_read,
  input_result,
  input_start,
  timing,
)
from train import errors
from train.data import tokenizer as tokenizer_lib

_PROSE = 'prose.jsonl.xz'
_COPIES = 3
_FILES_PER_COPY = 8
_SHAPES = [(512, 256), (128, 1024)]


def measure(
  options: argparse.Namespace, scratch: pathlib.Path
) -> dict[str, Any]:
  """Measures all; see the modules for what each part of the result holds.

  Args:
    options: The command line.
    scratch: A directory for the text and for what is prepared.

  Returns:
    Facts of the machine, settings, `prepare`, `profile`, `read`, `order`,
    `start` and `memory`.

  Raises:
    UserError: the text or a tokenizer cannot be read, or the text is too
      little.
  """
  opened = [
    (pathlib.Path(name).name, tokenizer_lib.open_tokenizer(name))
    for name in options.tokenizer
  ]
  pattern = options.files or _default_text(scratch)
  result: dict[str, Any] = {
    'benchmark': 'input',
    'machine': timing.machine_facts()
    | {name: metadata.version(name) for name in input_result.VERSIONS},
    'settings': {
      'text': pathlib.Path(pattern).name
      if options.files
      else f'{_PROSE}, {_COPIES} times over',
      **input_prepare.amount(pattern),
      'held_out': input_prepare.HELD_OUT,
      'prepare_rounds': options.prepare_rounds,
      'read_rounds': options.read_rounds,
    },
    'prepare': [],
    'profile': [],
    'read': [],
  }
  for name, tokenizer in opened:
    _say(f'preparing with {name}')
    timed = input_prepare.Preparing(name, tokenizer, pattern, scratch)
    workers = sorted({1, options.workers})
    result['prepare'] += timed.measure(workers, options.prepare_rounds)
    result['profile'].append(timed.profile())

  _say('preparing what is to be read')
  directories = input_read.prepare(
    pattern, opened[0][1], options.shapes, options.workers, scratch
  )
  for shape in options.shapes:
    for layout in input_read.LAYOUTS:
      _say(f'reading {layout}, {shape[0]} x {shape[1]}')
      result['read'].append(
        input_read.measure(
          directories, layout, shape, options.read_rounds, scratch
        )
      )

  batch, length = options.shapes[0]
  _say('starting')
  result['order'] = input_start.order_alone(batch)
  result['start'] = input_start.start(directories['stream', length], batch)
  _say(f'reading for {options.minutes:g} minutes')
  result['memory'] = input_start.memory(
    directories['stream', length], batch, options.minutes
  )
  return result


def _say(what: str) -> None:
  print(f'{what} ...', file=sys.stderr, flush=True)


def _default_text(scratch: pathlib.Path) -> str:
  """Writes the prose as plain files, so that there are parts for all workers.

  Raises:
    UserError: it is not there.
  """
  directory = os.environ.get('GRADPOWER_DATA')
  path = pathlib.Path(directory or '') / _PROSE
  if not directory or not path.is_file():
    raise errors.UserError(
      'no text: give --files GLOB, or set GRADPOWER_DATA to the directory that'
      f' holds {_PROSE}'
    )
  with lzma.open(path) as file:
    lines = file.readlines()
  text = scratch / 'text'
  text.mkdir()
  for number in range(_COPIES * _FILES_PER_COPY):
    some = lines[number % _FILES_PER_COPY :: _FILES_PER_COPY]
    (text / f'{number:02d}.jsonl').write_bytes(b''.join(some))
  return str(text / '*.jsonl')


def _shape(text: str) -> tuple[int, int]:
  batch, _, length = text.partition('x')
  if not (batch.isdecimal() and length.isdecimal()):
    raise argparse.ArgumentTypeError(f"{text!r} is not as '512x256'")
  return timing.positive(batch), timing.positive(length)


def _minutes(text: str) -> float:
  value = float(text)
  if not 0 < value < 1e6:
    raise argparse.ArgumentTypeError(f'{text} is not a positive number')
  return value


_minutes.__name__ = 'float'  # argparse names it where float fails.


def _options(parser: timing.Parser, argv: list[str] | None) -> Any:
  parser.add_argument(
    '--tokenizer', action='append', required=True, metavar='FILE',
    help='or its folder; again for another one',
  )  # fmt: skip
  parser.add_argument('--files', metavar='GLOB', help='the text; all is read')
  parser.add_argument(
    '--workers', type=timing.positive, default=timing.cores(),
    help='beside one; default: the cores',
  )  # fmt: skip
  parser.add_argument('--prepare-rounds', type=timing.positive, default=2)
  parser.add_argument('--read-rounds', type=timing.positive, default=3)
  parser.add_argument(
    '--shapes', type=_shape, nargs='+', default=_SHAPES, metavar='BxT',
    help='of batches; default: 512x256 128x1024',
  )  # fmt: skip
  parser.add_argument(
    '--minutes', type=_minutes, default=1.0, help='of reading, for the memory'
  )
  parser.add_argument('--scratch', metavar='DIR', help='for temporary files')
  parser.add_argument('--json', metavar='FILE', help='write the result here')
  return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
  """Measures, prints, and writes the result as JSON if asked to."""
  parser = timing.Parser(
    prog='python -m benchmarks.input',
    description='Times how text becomes batches.',
    allow_abbrev=False,
  )
  options = _options(parser, argv)
  if options.json:
    timing.check_writable(parser, options.json)
  try:
    with tempfile.TemporaryDirectory(dir=options.scratch) as directory:
      result = measure(options, pathlib.Path(directory))
  except errors.UserError as error:
    parser.error(str(error))
  except FileNotFoundError as error:  # Of --scratch.
    parser.error(f'{error.strerror}: {error.filename}')
  print(input_result.text(result))
  if options.json:
    timing.write_json(options.json, result)
    print(f'written to {options.json}', file=sys.stderr)
