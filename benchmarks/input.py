"""How fast text becomes batches, against what bounds it and against peers.

    python -m benchmarks.input --tokenizer gpt2.tiktoken --files 'text/*.jsonl'
    python -m benchmarks.input --tokenizer gpt2.tiktoken \
      --tokenizer t5.spiece.model --minutes 10 --json FILE

Preparing is timed against the tokenizer's library alone, which encodes the same
text from memory in as many processes; reading against a gather from one
memory-mapped array, single reads through TFDS, and Grain's own pipelines.
Nothing is dropped from the page cache: what is timed is the processor's work.
Without `--files` the text is the prose in the directory that GRADPOWER_DATA
names, a few times over.
"""

# Processes that are started import this file again: the rest when it is needed.
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
  import argparse
  import pathlib

_PROSE = 'prose.jsonl.xz'
_COPIES = 3
_FILES_PER_COPY = 8
_VERSIONS = (
  'array_record', 'grain', 'numpy', 'sentencepiece', 'tensorflow-datasets',
  'tiktoken', 'tokenizers',
)  # fmt: skip


def measure(
  options: 'argparse.Namespace', scratch: 'pathlib.Path'
) -> dict[str, Any]:
  """Measures all; see the modules for what each part of the result holds.

  Args:
    options: The command line.
    scratch: A directory for what is prepared.

  Returns:
    Facts of the machine, settings, `prepare`, `profile`, `read`, `order`,
    `start` and `memory`.

  Raises:
    UserError: the text or a tokenizer cannot be read, or the text is too
      little.
  """
  import pathlib
  from importlib import metadata

  from benchmarks import input_prepare, input_read, input_start, timing
  from train.data import tokenizer as tokenizer_lib

  opened = [
    (pathlib.Path(name).name, tokenizer_lib.open_tokenizer(name))
    for name in options.tokenizer
  ]
  pattern = options.files or _default_text(scratch)
  workers = sorted({1, options.workers})
  result: dict[str, Any] = {
    'benchmark': 'input',
    'machine': timing.machine_facts()
    | {name: metadata.version(name) for name in _VERSIONS},
    'settings': {
      'text': pathlib.Path(pattern).name
      if options.files
      else f'{_PROSE}, {_COPIES} times over',
      **input_prepare.amount(pattern),
      'prepare_rounds': options.prepare_rounds,
      'read_rounds': options.read_rounds,
      'validation_fraction': input_prepare.HELD_OUT,
    },
    'prepare': [],
    'profile': [],
  }
  for name, tokenizer in opened:
    _say(f'preparing with {name}')
    timed = input_prepare.Preparing(name, tokenizer, pattern, scratch)
    result['prepare'] += timed.measure(workers, options.prepare_rounds)
    result['profile'].append(timed.profile())

  _say('preparing what is read')
  directories = input_read.prepare(
    pattern, opened[0][1], options.shapes, workers[-1], scratch
  )
  result['read'] = []
  for shape in options.shapes:
    for layout in input_read.LAYOUTS:
      _say(f'reading {layout}, {shape[0]} x {shape[1]}')
      result['read'].append(
        input_read.measure(
          directories, layout, shape, options.read_rounds, scratch
        )
      )
  first = options.shapes[0]
  stream = directories['stream', first[1]]
  _say('starting')
  result['order'] = input_start.order_alone(first[0])
  result['start'] = input_start.start(stream, first[0])
  _say(f'reading for {options.minutes:g} minutes')
  result['memory'] = input_start.memory(stream, first[0], options.minutes)
  return result


def _say(what: str) -> None:
  print(f'{what} ...', file=sys.stderr, flush=True)


def _default_text(scratch: 'pathlib.Path') -> str:
  """Writes the prose as plain files, so that there are parts for all workers.

  Raises:
    UserError: it is not there.
  """
  import lzma
  import os
  import pathlib

  from train import errors

  directory = os.environ.get('GRADPOWER_DATA')
  if not directory or not (pathlib.Path(directory) / _PROSE).is_file():
    raise errors.UserError(
      'no text: give --files GLOB, or set GRADPOWER_DATA to the directory that'
      f' holds {_PROSE}'
    )
  with lzma.open(pathlib.Path(directory) / _PROSE) as file:
    lines = file.readlines()
  text = scratch / 'text'
  text.mkdir()
  for number in range(_COPIES * _FILES_PER_COPY):
    some = lines[number % _FILES_PER_COPY :: _FILES_PER_COPY]
    (text / f'{number:02d}.jsonl').write_bytes(b''.join(some))
  return str(text / '*.jsonl')


def _shape(text: str) -> tuple[int, int]:
  batch, _, length = text.partition('x')
  if not (batch.isdecimal() and length.isdecimal() and int(batch) * int(length)):
    import argparse

    raise argparse.ArgumentTypeError(f"{text!r} is not as '512x256'")
  return int(batch), int(length)


def main(argv: list[str] | None = None) -> None:
  """Measures, prints, and writes the result as JSON if asked to."""
  import tempfile

  from benchmarks import input_result, timing
  from train import errors

  parser = timing.Parser(
    prog='python -m benchmarks.input',
    description='Times how text becomes batches.',
    allow_abbrev=False,
  )
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
    '--shapes', type=_shape, nargs='+', default=[(512, 256), (128, 1024)],
    metavar='BxT', help='batches; default: 512x256 128x1024',
  )  # fmt: skip
  parser.add_argument(
    '--minutes', type=_minutes, default=1.0, help='of reading, for the memory'
  )
  parser.add_argument('--scratch', metavar='DIR', help='for temporary files')
  parser.add_argument('--json', metavar='FILE', help='write the result here')
  options = parser.parse_args(argv)
  if options.json:
    timing.check_writable(parser, options.json)
  try:
    with tempfile.TemporaryDirectory(dir=options.scratch) as directory:
      import pathlib

      result = measure(options, pathlib.Path(directory))
  except errors.UserError as error:
    parser.error(str(error))
  except OSError as error:
    parser.error(f'cannot write: {error}')
  print(input_result.text(result))
  if options.json:
    timing.write_json(options.json, result)
    print(f'written to {options.json}', file=sys.stderr)


def _minutes(text: str) -> float:
  import argparse

  value = float(text)
  if not 0 < value < 1e6:
    raise argparse.ArgumentTypeError(f'{text} is not a positive number')
  return value


_minutes.__name__ = 'float'  # argparse names it where float fails.


if __name__ == '__main__':
  main()
