"""The steps from a source to a directory that can be trained on."""

import logging
import pathlib
import shutil
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from train import errors, storage
from train.data import layouts
from train.data import source as source_lib
from train.data import stats as stats_lib
from train.data import tokenizer as tokenizer_lib
from train.data.prepare import (
  directory,
  files,
  find_duplicates,
  held_out,
  piece,
  plan,
  records,
  tokenize_part,
  vocabulary,
  wording,
  write_records,
)
from train.data.prepare import engine as engine_lib
from train.data.prepare import progress as progress_lib

_logger = logging.getLogger('train.data')

_SMALLEST_VOCABULARY = 257
_NAMED = 5  # Bad documents.
_FEW = 100  # Documents of which a share may be none.
_STEPS = ('tokens', 'near-duplicates', 'records')
_LONGEST = 2**17 - 3  # What numbers of 16 bits count in a row: pieces of 2.


def prepare(
  source: source_lib.Source,
  tokenizer: tokenizer_lib.Tokenizer | int,
  request: source_lib.Request,
  out: pathlib.Path,
  *,
  workers: int = 1,
  engine: str = 'local',
  beam_options: Sequence[str] = (),
  progress: progress_lib.Progress | None = None,
) -> stats_lib.Stats:
  """Makes a directory of token windows, or goes on with it.

  The same source, tokenizer and request give the same bytes in all files,
  whoever does the work, and however often it was cut off.

  Args:
    source: The text.
    tokenizer: How to cut it, or of how many tokens to train a byte-level BPE
      on its training split first.
    request: What to make of it.
    out: The directory; made where it is not there. `stats.json` in it, written
      last of all, says that it is complete.
    workers: Processes of this machine.
    engine: 'local', or 'beam' for Apache Beam.
    beam_options: Beam's own, as '--runner=FlinkRunner'.
    progress: Told how far it is.

  Returns:
    What the directory holds.

  Raises:
    UserError: the text cannot be read or is too little, the disk cannot be
      written, or the directory holds, or is to hold, something else.
  """
  _check(request, tokenizer)
  directory.check_directory(out)
  if engine == 'beam':  # Its workers may be at work elsewhere.
    out = out.absolute()
  source.parts()  # What is wrong with it is told before anything is made.
  wanted = plan.plan(source, tokenizer, request)
  if found := _found(out, wanted, source, request):
    return found
  work = out / directory.WORK
  runner = _engine(engine, workers, beam_options, work)
  with files.writing(out):
    directory.check_free(out)
    storage.make_directory(work)
  with directory.alone(work):
    if found := _found(out, wanted, source, request):
      return found  # Another process has just made it.
    with files.writing(out):
      if not plan.begun(work, wanted):
        plan.begin(work, wanted)
    shown = progress or progress_lib.Progress()
    first = ('vocabulary',) if isinstance(tokenizer, int) else ()
    shown.steps = (*first, *_STEPS)
    try:
      stats = _prepare(source, tokenizer, request, out, wanted, runner, shown)
    finally:
      shown.end()
    shutil.rmtree(work, ignore_errors=True)
  return stats


def _prepare(
  source: source_lib.Source,
  tokenizer: tokenizer_lib.Tokenizer | int,
  request: source_lib.Request,
  out: pathlib.Path,
  wanted: plan.Plan,
  runner: engine_lib.Engine,
  shown: progress_lib.Progress,
) -> stats_lib.Stats:
  work = out / directory.WORK
  tokenizer, tasks = _tokenize(source, tokenizer, request, work, runner, shown)
  pieces = [work / task.name for task in tasks]
  dtype = layouts.token_dtype(tokenizer.padded_vocab_size)

  shown.end()
  validation = held_out.LayOut(
    tuple(pieces), request, tokenizer.end_of_text, dtype, work
  )()
  pieces_of = {'train': pieces, 'validation': [validation]}
  summaries_of = {
    split: [piece.summary(path) for path in paths]
    for split, paths in pieces_of.items()
  }
  rows = {
    split: piece.Rows(
      {
        path: summary.units
        for path, summary in zip(paths, summaries_of[split], strict=True)
      },
      request.layout,
      request.sequence_length,
      dtype,
    )
    for split, paths in pieces_of.items()
  }
  of_parts = summaries_of['train']
  documents = _total(summary.documents for summary in of_parts)
  tokens = _total(summary.tokens for summary in of_parts)
  for split in stats_lib.SPLITS:
    if not len(rows[split]):
      directory.discard(out)
      raise _too_small(
        split, documents, tokens[split], request, tasks, of_parts
      )

  lookups = [
    find_duplicates.Task(path, task.size)
    for path, task in zip(pieces, tasks, strict=True)
  ]
  shown.begin('near-duplicates', sum(lookup.size for lookup in lookups))
  runner.run(find_duplicates.FindDuplicates(validation), lookups, shown)
  shards = _write_records(rows, request, dtype, out, runner, shown)

  stats = stats_lib.Stats(
    format=stats_lib.FORMAT,
    layout=request.layout,
    sequence_length=request.sequence_length,
    documents=documents,
    tokens=tokens,
    windows={split: len(rows[split]) for split in stats_lib.SPLITS},
    targets={
      split: (
        len(rows[split]) * request.sequence_length
        if request.layout in layouts.CONTIGUOUS
        else sum(summary.targets for summary in summaries_of[split])
      )
      for split in stats_lib.SPLITS
    },
    skipped=_total(summary.skipped for summary in of_parts),
    near_duplicates=find_duplicates.summary(documents['validation'], pieces),
    vocab_size=tokenizer.vocab_size,
    padded_vocab_size=tokenizer.padded_vocab_size,
    tokenizer=tokenizer.file_name,
    tokenizer_hash=tokenizer.digest(),
    source_hash=plan.source_hash([summary.digest for summary in of_parts]),
    validation_fraction=request.validation_fraction,
    request=wanted.digest(),
    files={
      shard.name: (out / shard.name).stat().st_size
      for split in stats_lib.SPLITS
      for shard in shards[split]
    },
  )
  _complete(out, request, tokenizer, dtype, shards, stats)
  _tell_problems(of_parts)
  return stats


def _tokenize(
  source: source_lib.Source,
  tokenizer: tokenizer_lib.Tokenizer | int,
  request: source_lib.Request,
  work: pathlib.Path,
  runner: engine_lib.Engine,
  shown: progress_lib.Progress,
) -> tuple[tokenizer_lib.Tokenizer, list[tokenize_part.Task]]:
  """Makes the piece of every part; trains a tokenizer first, if need be."""
  digests: list[str] = []
  if isinstance(tokenizer, int):
    tokenizer, digests = vocabulary.trained(
      source, tokenizer, request, work, shown
    )
  tasks = [
    tokenize_part.Task(i, part, digests[i] if i < len(digests) else '')
    for i, part in enumerate(source.parts())
  ]
  shown.begin('tokens', sum(task.size for task in tasks))
  dtype = layouts.token_dtype(tokenizer.padded_vocab_size)
  runner.run(
    tokenize_part.TokenizePart(tokenizer, request, dtype, work), tasks, shown
  )
  return tokenizer, tasks


def _write_records(
  rows: dict[str, piece.Rows],
  request: source_lib.Request,
  dtype: np.dtype,
  out: pathlib.Path,
  runner: engine_lib.Engine,
  shown: progress_lib.Progress,
) -> dict[str, list[plan.Shard]]:
  """Writes every file of records, and returns which those are, by split."""
  serializer = records.Serializer(
    request.layout, request.sequence_length, dtype
  )
  shards = {
    split: plan.shards(split, len(rows[split]), serializer.size)
    for split in stats_lib.SPLITS
  }
  every = [shard for split in stats_lib.SPLITS for shard in shards[split]]
  shown.begin('records', sum(shard.size for shard in every))
  runner.run(
    write_records.WriteRecords(rows, serializer, out, out / directory.WORK),
    every,
    shown,
  )
  return shards


def _check(
  request: source_lib.Request, tokenizer: tokenizer_lib.Tokenizer | int
) -> None:
  """Raises: UserError: what is asked for cannot be."""
  if isinstance(tokenizer, int) and tokenizer < _SMALLEST_VOCABULARY:
    raise errors.UserError(
      f'a vocabulary of {tokenizer:,} tokens: it needs at least'
      f' {_SMALLEST_VOCABULARY}, all bytes and the end-of-text'
    )
  if request.layout not in layouts.LAYOUTS:
    raise errors.UserError(
      f'there is no layout {request.layout!r}, only'
      f' {", ".join(layouts.LAYOUTS)}'
    )
  if not 0 < request.validation_fraction < 1:
    raise errors.UserError(
      f'the share held out, {request.validation_fraction}, is not between 0'
      ' and 1'
    )
  if not 1 <= request.sequence_length <= _LONGEST:
    raise errors.UserError(
      f'windows of {request.sequence_length:,} tokens: from 1 to {_LONGEST:,}'
    )


def _found(
  out: pathlib.Path,
  wanted: plan.Plan,
  source: source_lib.Source,
  request: source_lib.Request,
) -> stats_lib.Stats | None:
  """Returns what there is already, if that is what is wanted."""
  found = plan.completed(out, wanted, request.skip_bad)
  if found:
    # Names and sizes are the same; the text is read to be sure.
    digests = [part.digest() for part in source.parts()]
    if plan.source_hash(digests) != found.source_hash:
      raise errors.UserError(
        f'{out} was prepared from other text of the same size: name another'
        ' directory, or remove this one'
      )
    # Of a process that was killed in the last moment.
    shutil.rmtree(out / directory.WORK, ignore_errors=True)
    _logger.info('%s is complete already', out)
  return found


def _engine(
  name: str, workers: int, beam_options: Sequence[str], work: pathlib.Path
) -> engine_lib.Engine:
  if name == 'local':
    return engine_lib.Local(workers)
  from train.data.prepare.beam_engine import Beam  # An extra.

  return Beam(beam_options, work)


def _too_small(
  split: str,
  documents: Mapping[str, int],
  tokens: int,
  request: source_lib.Request,
  tasks: Sequence[tokenize_part.Task],
  summaries: Sequence[piece.Summary],
) -> errors.UserError:
  in_all = sum(documents.values())
  if in_all:
    name = {'train': 'training'}.get(split, split)
    count = wording.counted(documents[split], 'document')
    message = (
      f'the {name} split has {tokens:,} tokens ({count}), one window needs'
      f' {request.sequence_length + 1:,}: {_remedies(split, documents)}'
    )
    if in_all <= _FEW:
      message += f'; the text has {wording.counted(in_all, "document")} in all'
  else:
    message = f'there is no document in {tasks[0].part.name}'
    if len(tasks) > 1:
      message += f' and {wording.counted(len(tasks) - 1, "part")} more'
  if skipped := _total(summary.skipped for summary in summaries):
    first = next(m for summary in summaries for m in summary.problems)
    message += f'; left out: {wording.left_out(skipped)}, the first: {first}'
  return errors.UserError(message)


def _remedies(split: str, documents: Mapping[str, int]) -> str:
  remedies = [
    'give more text',
    'shorten the windows with --seq (of a run, --data.sequence_length)',
  ]
  if split == 'validation' or not documents[split]:
    amount = 'more' if split == 'validation' else 'less'
    remedies.insert(
      0,
      f'hold {amount} out with --validation-fraction (of a run,'
      ' --data.validation_fraction)',
    )
  return ', or '.join(remedies)


def _total(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
  """Adds up, key by key."""
  total: dict[str, int] = {}
  for each in counts:
    for key, count in each.items():
      total[key] = total.get(key, 0) + count
  return total


def _complete(
  out: pathlib.Path,
  request: source_lib.Request,
  tokenizer: tokenizer_lib.Tokenizer,
  dtype: np.dtype,
  shards: Mapping[str, Sequence[plan.Shard]],
  stats: stats_lib.Stats,
) -> None:
  """Writes what describes the records; stats.json last."""
  from train.data.prepare import metadata  # A second, for TFDS.

  with files.writing(out):
    metadata.write(out, request, dtype, shards)
    (out / tokenizer.file_name).write_bytes(tokenizer.content)
    files.sync(out / tokenizer.file_name)
    storage.write_atomically(out / stats_lib.FILE, stats.to_json())


def _tell_problems(summaries: Sequence[piece.Summary]) -> None:
  """Names the first few documents that were left out."""
  first = [message for summary in summaries for message in summary.problems]
  for message in first[:_NAMED]:
    _logger.warning('left out: %s', message)
