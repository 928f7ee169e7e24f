"""`python -m train prepare`: its options, and what it says at the end."""

import argparse
import os
import pathlib
import shlex
import sys
import time

from train import cli, errors

_DONE = 0
_INTERRUPTED = 130


def add(commands) -> None:
  """Adds the command.

  Args:
    commands: What `add_subparsers` returned.
  """
  parser = commands.add_parser(
    'prepare',
    help='turns text into token windows, once, to train on',
    description='Tokenizes text and lays it out in windows, as a TFDS dataset '
    'in ArrayRecord; the same command again goes on after a kill.',
  )
  text = parser.add_mutually_exclusive_group(required=True)
  text.add_argument(
    '--files',
    metavar='GLOB',
    help='.txt, .jsonl, .json or .ndjson, also .gz, .zst or .xz, or .parquet',
  )
  text.add_argument(
    '--tfds',
    metavar='NAME',
    help="a TFDS dataset, 'c4/en' or 'huggingface:org/name', or its directory",
  )
  text.add_argument('--corpus', metavar='NAME', help='one that can be fetched')
  vocabulary = parser.add_mutually_exclusive_group(required=True)
  vocabulary.add_argument(
    '--tokenizer',
    metavar='PATH_OR_ID',
    help="a file, a folder that holds one, or 'org/name' on the hub",
  )
  vocabulary.add_argument(
    '--vocab-size',
    type=cli.positive,
    metavar='N',
    help='trains a byte-level BPE of N tokens on the text',
  )
  parser.add_argument(
    '--layout',
    required=True,
    metavar='LAYOUT',
    help='stream, random, truncate or packed (docs/data.md)',
  )
  parser.add_argument(
    '--seq',
    type=cli.positive,
    required=True,
    metavar='T',
    help='tokens that the model sees at once',
  )
  parser.add_argument('--out', type=cli.path, required=True, metavar='DIR')
  parser.add_argument(
    '--text-field',
    metavar='NAME',
    help="of a JSON object, a row or an example; default: 'text'",
  )
  parser.add_argument('--tfds-split', metavar='SPLIT', help='default: train')
  parser.add_argument(
    '--validation-fraction',
    type=cli.part,
    default=0.005,
    metavar='F',
    help='of the documents, held out; default: 0.005',
  )
  parser.add_argument(
    '--skip-bad',
    action='store_true',
    help='leaves documents out that cannot be read, and counts them',
  )
  cores = len(os.sched_getaffinity(0))
  parser.add_argument(
    '--workers',
    type=cli.positive,
    default=cores,
    metavar='N',
    help=f'processes; default: {cores}, the cores here',
  )
  parser.add_argument(
    '--engine',
    choices=('local', 'beam'),
    default='local',
    help="beam: Apache Beam, which needs the 'beam' extra, and --out on a file "
    'system that its workers share; default: local',
  )
  parser.add_argument(
    '--beam-option',
    action='append',
    metavar='OPTION',
    help="Beam's own, again and again: --beam-option=--runner=FlinkRunner",
  )
  parser.set_defaults(call=run)


def run(options: argparse.Namespace) -> int:
  """Prepares, and says what there is then.

  Returns:
    The exit status.

  Raises:
    UserError: as `train.data.prepare.prepare`, or what reads the options.
  """
  from train.data import mixture, prepare, tokenizer
  from train.data import source as source_lib
  from train.data.prepare import progress

  if options.beam_option and options.engine != 'beam':
    raise errors.UserError('--beam-option needs --engine beam')
  if options.tfds_split is not None and options.tfds is None:
    raise errors.UserError('--tfds-split needs --tfds')
  if options.text_field is not None and options.corpus is not None:
    raise errors.UserError('--text-field does not go with --corpus')
  if not mixture.is_name(str(options.out)):
    raise errors.UserError(f'--out {str(options.out)!r}: {mixture.UNREADABLE}')
  begun = time.monotonic()
  shown = progress.Shown()
  try:
    stats = prepare.prepare(
      _source(options),
      tokenizer.open_tokenizer(options.tokenizer)
      if options.tokenizer is not None
      else options.vocab_size,
      source_lib.Request(
        layout=options.layout,
        sequence_length=options.seq,
        validation_fraction=options.validation_fraction,
        skip_bad=options.skip_bad,
      ),
      options.out,
      workers=options.workers,
      engine=options.engine,
      beam_options=options.beam_option or (),
      progress=shown,
    )
  except KeyboardInterrupt:
    print(
      f'\ninterrupted; the same command goes on in {options.out}',
      file=sys.stderr,
    )
    return _INTERRUPTED
  cli.say(_summary(stats))
  if shown.tokens:
    speed = shown.tokens / (time.monotonic() - begun)
    cli.say(f'{speed / 1e6:.2f}M tokens a second')
  cli.say(_next_command(stats, options.out))
  return _DONE


def _source(options: argparse.Namespace):
  field = 'text' if options.text_field is None else options.text_field
  if options.files is not None:
    from train.data import text_files

    return text_files.TextFiles(options.files, field)
  if options.tfds is not None:
    from train.data import tfds_source

    return tfds_source.TfdsSource(
      options.tfds, field, options.tfds_split or 'train'
    )
  from train.data import cache, corpora

  return corpora.open_corpus(options.corpus, cache.default_directory())


def _next_command(stats, out: pathlib.Path) -> str:
  """What trains any recipe's model on a prepared directory."""
  return (
    'train on it: python -m train run RECIPE --run-dir runs/NAME'
    f' --data.prepared {shlex.quote(str(out))} \\\n'
    f'  --data.layout {stats.layout}'
    f' --data.sequence_length {stats.sequence_length} --model.vocab_size 0'
  )


def _summary(stats) -> str:
  """What a prepared directory holds, in lines."""
  from train.data.prepare import wording

  lines = [_split(stats, split) for split in stats.documents]
  if stats.skipped:
    lines.append(f'left out: {wording.left_out(stats.skipped)}')
  return '\n'.join([*lines, *_near_duplicates(stats.near_duplicates)])


def _split(stats, split: str) -> str:
  from train.data.prepare import wording

  documents, tokens = stats.documents[split], stats.tokens[split]
  line = (
    f'{split}: {wording.counted(documents, "document")}, {tokens:,} tokens,'
    f' {wording.counted(stats.windows[split], "window")} of'
    f' {stats.sequence_length:,}'
  )
  if stats.layout != 'truncate':  # Every token is a target, but for the rest.
    return line
  targets = stats.targets[split]
  line += f' ({targets:,} targets'
  # A document's first token is none.
  if cut := tokens - targets - documents:
    percent = min(99, round(100 * cut / tokens))
    line += f': {percent or "under 1"} % of the tokens are cut off'
  return line + ')'


def _near_duplicates(found) -> list[str]:
  """What `train.data.prepare.find_duplicates` found, in lines."""
  from train.data.prepare import wording

  held_out, train = found['validation_documents'], found['train_documents']
  if not train:
    return ['near-duplicates: no held-out document has one in training']
  lines = [
    f'near-duplicates: {held_out:,} of {found["looked_at"]:,} held-out'
    ' documents have one in training,',
    f'  and {wording.counted(train, "training document")} one held out',
  ]
  if found['examples']:
    lines[-1] += ' (examples: see stats.json)'
  return lines
