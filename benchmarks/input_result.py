"""The result of `benchmarks.input` as text."""

from collections.abc import Sequence
from typing import Any

from benchmarks import input_read, timing

_READERS = {
  input_read.ROWS: 'rows',
  input_read.PREFETCH: 'prefetch',
  input_read.SINGLE: 'TFDS [i]',
  input_read.BY_INDEX: 'Grain [i]',
  input_read.ITERATOR: 'Grain iter',
  input_read.AHEAD: 'Grain ahead',
  input_read.RECORDS: 'records',
  input_read.GATHER: 'gather',
}
VERSIONS = (
  'numpy', 'tensorflow-datasets', 'array_record', 'grain', 'tiktoken',
  'sentencepiece', 'tokenizers',
)  # fmt: skip
"""Distributions whose versions are recorded, beside jax."""


def text(result: dict[str, Any]) -> str:
  """Returns a measurement as text: the machine, then tables."""
  machine, settings = result['machine'], result['settings']
  return '\n'.join((
    timing.format_facts(machine),
    ', '.join(f'{name} {machine[name]}' for name in VERSIONS),
    '',
    f'Preparing {settings["bytes"] / 1e6:,.1f} MB in {settings["parts"]} parts '
    f'({settings["text"]}), medians of {settings["prepare_rounds"]} rounds;',
    "the limit is the tokenizer's library alone, from memory, in as many",
    'processes of one thread; steps in seconds:',
    '',
    _prepare(result['prepare']),
    '',
    'What it is spent on in one process, in % of the time (of the CPU time):',
    '',
    _profile(result['profile']),
    '',
    f'Reading, in M tokens a second, medians of {settings["read_rounds"]} '
    'rounds;',
    'limits are records, the bytes of ArrayRecord, and gather, of an array:',
    '',
    _read(result['read']),
    '',
    'How many times as fast: prefetch as Grain iter and Grain ahead, rows as',
    'the others:',
    '',
    _ratios(result['read']),
    '',
    *_start(result),
    *_memory(result['memory']),
  ))  # fmt: skip


def _prepare(entries: Sequence[dict[str, Any]]) -> str:
  steps = list(dict.fromkeys(name for e in entries for name in e['stages']))
  header = ['tokenizer', 'workers', 'Mtok/s', 'limit', 'ratio']
  rows = []
  for entry in entries:
    rows.append([
      entry['tokenizer'], str(entry['workers']),
      f'{entry["tokens_per_second"] / 1e6:.2f}', f'{entry["limit"] / 1e6:.2f}',
      f'{entry["ratio"]:.2f}',
      *(f'{entry["stages"][step]:.2f}' for step in steps),
    ])  # fmt: skip
  short = [step.replace(' documents', '') for step in steps]
  return timing.format_table([*header, *short], rows)


def _profile(entries: Sequence[dict[str, Any]]) -> str:
  parts = dict.fromkeys(name for e in entries for name in e['seconds'])
  rows = []
  for part in sorted(parts, key=lambda p: -entries[0]['seconds'].get(p, 0)):
    row = [part]
    for entry in entries:
      wall, cpu = (
        100 * entry[table].get(part, 0.0) / sum(entry[table].values())
        for table in ('seconds', 'cpu_seconds')
      )
      row.append(f'{wall:.1f} ({cpu:.1f})')
    rows.append(row)
  rows.append([
    'seconds',
    *(
      f'{sum(e["seconds"].values()):.1f} ({sum(e["cpu_seconds"].values()):.1f})'
      for e in entries
    ),
  ])  # fmt: skip
  return timing.format_table(['', *(e['tokenizer'] for e in entries)], rows)


def _read(entries: Sequence[dict[str, Any]]) -> str:
  rows = [
    _place(entry)
    + [
      f'{entry["tokens_per_second"][name] / 1e6:.2f}'
      if name in entry['tokens_per_second']
      else '-'
      for name in _READERS
    ]
    for entry in entries
  ]
  return timing.format_table(['layout', 'batch', *_READERS.values()], rows)


def _ratios(entries: Sequence[dict[str, Any]]) -> str:
  peers = [name for name in _READERS if name in input_read.AGAINST]
  rows = [
    _place(entry)
    + [
      f'{entry["ratios"][name]["ratio"]:.3g}'
      if name in entry['ratios']
      else '-'
      for name in peers
    ]
    for entry in entries
  ]
  header = ['layout', 'batch', *(_READERS[name] for name in peers)]
  return timing.format_table(header, rows)


def _place(entry: dict[str, Any]) -> list[str]:
  return [entry['layout'], f'{entry["batch"]} x {entry["length"]}']


def _start(result: dict[str, Any]) -> list[str]:
  lines = [
    f'In a new process, from a directory to the batch of step '
    f'{entry["step"]:,}: '
    f'{entry["open"] + entry["first_batch"]:.2f} s ({entry["open"]:.2f} s to '
    f'open it)'
    for entry in result['start']
  ]
  return lines + [
    f'{name} of 1e9 windows, 1e9 rows on: {1e3 * taken["first"]:.2f} ms to '
    f'begin, {1e3 * taken["batch"]:.2f} ms a batch'
    for name, taken in result['order'].items()
  ]


def _memory(memory: dict[str, Any]) -> list[str]:
  shown = ', '.join(f'{x:.0f}' for x in memory['megabytes'])
  return [
    f'Resident memory at the start and each minute of {memory["minutes"]:g} '
    f'({memory["batches"]:,} batches): {shown} MB;',
    f'without pages of files it grows by {memory["slope"]:+.2f} MB a minute: '
    + ('flat' if memory['flat'] else 'not flat'),
  ]
