"""The entry point of `python -m models`: a table of the presets.

It needs neither JAX nor Flax.
"""

import argparse
import dataclasses
import json
import os
import sys
import textwrap
from typing import Any, NoReturn

from models import accounting, presets

_PROG = 'python -m models'
_WIDTH = 80


class _Error(Exception):
  """A mistake in the command line."""


class _Parser(argparse.ArgumentParser):
  def error(self, message: str) -> NoReturn:
    raise _Error(f'{message} (see {self.prog} --help)')


def main(argv: list[str] | None = None) -> int:
  """Prints the table.

  Args:
    argv: The command line after the program's name.

  Returns:
    The exit status: 0 done, 2 a mistake in the command line.
  """
  try:
    options = _parse(argv)
    entries = [
      _entry(name, options.vocab, options.length)
      for name in options.names or presets.PRESETS
    ]
  except (_Error, ValueError) as error:
    print(f'{_PROG}: error: {error}', file=sys.stderr)
    return 2
  if options.json:
    text = json.dumps(dict(entries), indent=2)
  else:
    text = _format(entries, named=bool(options.names))
  try:
    print(text, flush=True)
  except OSError as error:
    # What is left in the buffer must not fail again on the way out.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if not isinstance(error, BrokenPipeError):  # `head` has seen enough.
      print(f'{_PROG}: error: {error.strerror}', file=sys.stderr)
      return 2
  return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
  parser = _Parser(
    prog=_PROG,
    description="The paper's models: shapes, parameters, FLOPs and memory.",
    allow_abbrev=False,
  )
  parser.add_argument(
    'names', nargs='*', metavar='NAME', help='of a model; all if left out'
  )
  parser.add_argument(
    '--vocab', choices=presets.VOCABULARIES, default='t5',
    help='whose vocabulary: t5 (32100 tokens) or gpt2 (50304); t5 if left out',
  )  # fmt: skip
  parser.add_argument(
    '--length', type=_positive, metavar='T',
    help="tokens of a sequence; the paper's if left out, 256 with t5 and 1024 "
    'with gpt2',
  )  # fmt: skip
  parser.add_argument('--json', action='store_true', help='exact numbers')
  options = parser.parse_args(argv)
  for name in ('vocab', 'length'):
    if getattr(options, name) == []:  # '--vocab=--' before Python 3.13.
      parser.error(f'argument --{name}: expected one argument')
  if options.length is None:
    options.length = presets.VOCABULARIES[options.vocab].length
  return options


def _positive(text: str) -> int:
  try:
    value = int(text)
  except ValueError:
    value = 0
  if value < 1:
    raise argparse.ArgumentTypeError(
      f'{text!r} is not a whole number of at least 1'
    )
  return value


def _entry(name: str, vocab: str, length: int) -> tuple[str, dict[str, Any]]:
  config = presets.get(name, vocab)
  preset = presets.PRESETS[name]
  flops = accounting.flops_per_token
  return name, {
    'config': {'type': type(config).__name__, **dataclasses.asdict(config)},
    'parameters': dataclasses.asdict(accounting.parameters(config)),
    'length': length,
    'training_flops_per_token': flops(config, length),
    'training_flops_per_token_causal': flops(config, length, causal=True),
    'forward_flops_per_token': flops(config, length, backward=False),
    'training_bytes': accounting.training_bytes(config),
    'marks': preset.marks,
    'note': preset.note,
  }


_HEADER = ('model', 'depth', 'width', 'heads', 'experts', 'total', 'active',
           'non-emb', 'FLOPs', 'bytes', 'mark')  # fmt: skip


def _format(entries: list[tuple[str, dict[str, Any]]], named: bool) -> str:
  rows = [_HEADER, *(_row(name, entry) for name, entry in entries)]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [
    ' '.join(
      cell.ljust(width) if column in (0, len(row) - 1) else cell.rjust(width)
      for column, (cell, width) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    for row in rows
  ]
  config, length = entries[0][1]['config'], entries[0][1]['length']
  marks = {mark for _, entry in entries for mark in entry['marks']}
  footer = [
    'depth: layers. width: d_model. experts: of a token / of a layer, beside '
    'a shared one.',
    f'total, active, non-emb: parameters, the vocabulary being '
    f'{config["vocab_size"]}. active: those of one token, embedding and head '
    'whole. non-emb: of the total, without the embedding and without the head.',
    f'FLOPs: to train on one token at length {length}, 6 x active matrix '
    'parameters (the head, not the embedding) + 12 x layers x d_model x '
    'length. Masked scores count; recomputation does not.',
    'bytes: 16 a parameter, in float32 its value, two AdamW moments and its '
    'gradient. Activations are not in it.',
    'mark: '
    + '; '.join(
      f'{mark}, {meaning}'
      for mark, meaning in presets.MARKS.items()
      if mark in marks
    )
    + '.',
  ]
  notes = [f'{name}: {entry["note"]}.' for name, entry in entries if named]
  paragraphs = [
    textwrap.fill(text, _WIDTH, subsequent_indent='  ', break_on_hyphens=False)
    for text in (*footer, *notes)
  ]
  return '\n'.join([*lines, '', *paragraphs])


def _row(name: str, entry: dict[str, Any]) -> tuple[str, ...]:
  config, counts = entry['config'], entry['parameters']
  experts = '-'
  if 'n_experts' in config:
    experts = f'{config["experts_per_token"]}/{config["n_experts"]}'
  return (
    name,
    *(str(config[field]) for field in ('n_layers', 'd_model', 'n_heads')),
    experts,
    *(_short(counts[key]) for key in ('total', 'active', 'non_embedding')),
    _short(entry['training_flops_per_token'], 'G'),
    _short(entry['training_bytes'], 'G'),
    presets.PRESETS[name].mark,
  )


def _short(number: int, giga: str = 'B') -> str:
  """Three digits and a power of a thousand: '66.4M', '1.00B', '12.1T'."""
  scale, unit = 10**6, 'M'
  for larger in ((10**9, giga), (10**12, 'T')):
    if number >= 0.9995 * larger[0]:
      scale, unit = larger
  value = number / scale
  digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
  return f'{value:.{digits}f}{unit}'


if __name__ == '__main__':
  sys.exit(main())
