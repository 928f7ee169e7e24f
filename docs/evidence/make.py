"""Writes the tables of docs/results.md from the cells beside this file.

    python docs/evidence/make.py
    python docs/evidence/make.py --add NAME OUT/results.json --store DIR

Each `NAME.json` here is the results.json of a comparison, whose cells lie in
`cells/`; the table of NAME stands between two comments in the page. All numbers
are computed anew from the cells. `--add` brings a comparison here first, its
cells from a store (default: OUT/cells), without the folders of the machine.
"""

import argparse
import json
import pathlib
import re
import shlex
import sys
from collections.abc import Iterable
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
PAGE = HERE.parent / 'results.md'
sys.path.insert(0, str(HERE.parents[1]))

from train.errors import UserError  # noqa: E402
from train.experiments import cells, comparison  # noqa: E402

HEAD = (
  'arm', 'against', 'seeds', 'tokens a parameter', 'arm minus baseline (nats)',
  '95 % interval', 'half-width', 'sd', 'p', 'Holm', 'tokens to its final loss',
)  # fmt: skip
_PLACES = ('files', 'tokenizer', 'prepared')  # Of a cell's data.


def load(
  name: str, store: cells.Store, here: pathlib.Path = HERE
) -> comparison.Comparison:
  """The comparison of a file here, with the numbers of its cells."""
  found = json.loads((here / f'{name}.json').read_text())
  arms = {}
  for arm, about in found['arms'].items():
    keys = {int(seed): cell['cell'] for seed, cell in about['seeds'].items()}
    records = {seed: store.get(key) for seed, key in keys.items()}
    arms[arm] = comparison.ArmResult(arm, about['overrides'], records, keys)
  wanted = [(pair['arm'], pair['baseline']) for pair in found['paired']]
  headline = found['headline']
  return comparison.Comparison(
    found['title'],
    arms,
    comparison.pairs(arms, wanted),
    (headline[0], headline[1]) if headline else None,
    # A figure's are about the paper, and stand on its own page.
    notes=() if 'figure' in found else found.get('notes', ()),
    seen=found.get('headline_seen', 0),
    tuned=found.get('tuned', {}),
  )


def table(result: comparison.Comparison) -> str:
  """The pairs of a comparison in Markdown, and what must be known of them."""
  lines = [HEAD, ['---'] * len(HEAD)]
  lines += [_row(result, pair) for pair in result.pairs]
  rows = '\n'.join(f'| {" | ".join(line)} |' for line in lines)
  return '\n\n'.join([rows, *_remarks(result)])


def _remarks(result: comparison.Comparison) -> Iterable[str]:
  mixed: dict[str, list[str]] = {}
  arms = [pair.arm for pair in result.pairs]
  for pair in result.pairs:
    if pair.mixed:
      name = f'`{pair.arm}`'
      if arms.count(pair.arm) > 1:
        name += f' against `{pair.baseline}`'
      mixed.setdefault(pair.mixed, []).append(name)
  for what, names in mixed.items():
    yield (
      f'The two sides of a seed differ in {what} too, which is part of their '
      f'difference: {", ".join(names)}.'
    )
  if result.tuned:
    best = ', '.join(f'`{a}`: `{b}`' for a, b in result.tuned.items())
    yield f'Of the learning rates tried, that of the lowest mean loss: {best}.'
  if result.seen:
    yield (
      f'The headline was named when {result.seen} of its pairs had been '
      'finished.'
    )
  yield from result.notes


def _row(
  result: comparison.Comparison, pair: comparison.Pair
) -> tuple[str, ...]:
  name = f'`{pair.arm}`'
  if (pair.arm, pair.baseline) == result.headline:
    name = f'**{name}**'
  diverged = sum(pair.diverged.values())
  if diverged:
    name += f' ({diverged} diverged)'
  p = pair.paired
  if p is None:
    return (name, f'`{pair.baseline}`', '0', *['-'] * 8)
  record: Any = result.arms[pair.arm].seeds[pair.seeds[0]]
  reached = '-'
  if pair.tokens_to_baseline is not None and pair.baseline_tokens:
    reached = f'{100 * pair.tokens_to_baseline / pair.baseline_tokens:.0f} %'
  return (
    name,
    f'`{pair.baseline}`',
    str(p.n),
    f'{record["tokens"] / record["parameters"]:.0f}',
    f'{p.mean:+.4f}',
    f'{p.ci95[0]:+.4f} to {p.ci95[1]:+.4f}' if p.ci95 else '-',
    f'{p.half_width:.4f}' if p.half_width is not None else '-',
    f'{p.sd:.4f}' if p.sd is not None else '-',
    comparison.number(p.p_value),
    comparison.number(pair.p_holm),
    reached,
  )


def losses(result: comparison.Comparison) -> str:
  """The final losses of a comparison in Markdown, a row an arm."""
  seeds = sorted({s for arm in result.arms.values() for s in arm.seeds})
  head = ('arm', *(f'seed {seed}' for seed in seeds), 'mean')
  lines = [head, ['---'] * len(head)]
  for arm in result.arms.values():
    found = arm.losses()
    cells_ = [f'{found[s]:.4f}' if s in found else '-' for s in seeds]
    mean = f'{sum(found.values()) / len(found):.4f}' if found else '-'
    lines.append((f'`{arm.name}`', *cells_, mean))
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


_DRAW = {'table': table, 'losses': losses}


def fill(text: str, store: cells.Store) -> str:
  """The page with its tables as they are now."""

  def block(match):
    kind, name = match['kind'], match['name']
    drawn = _DRAW[kind](load(name, store))
    return f'<!-- {kind}: {name} -->\n\n{drawn}\n\n<!-- end -->'

  return re.sub(
    r'<!-- (?P<kind>table|losses): (?P<name>\w+) -->.*?<!-- end -->',
    block,
    text,
    flags=re.DOTALL,
  )


def add(
  name: str,
  results: pathlib.Path,
  source: cells.Store,
  here: pathlib.Path = HERE,
) -> None:
  """Brings a comparison here, and those of its cells that are finished.

  Args:
    name: Of the file.
    results: results.json of a comparison.
    source: Where its cells are.
    here: Where they go.

  Raises:
    UserError: the file is no comparison's, or a cell is not in the store.
  """
  if not re.fullmatch(r'\w+', name):
    raise UserError(f'{name!r} is no name: letters, digits and _')
  try:
    found = json.loads(results.read_text())
    words = shlex.split(found['command'])
    found['command'] = shlex.join(map(without_folders, words))
    if 'fields' in found:  # Of a figure.
      found['fields'] = _plain(found['fields'])
    for arm in found['arms'].values():
      arm['overrides'] = _plain(arm['overrides'])
    of_arms = [arm['seeds'].values() for arm in found['arms'].values()]
    finished = [
      cell['cell']
      for seeds in of_arms
      for cell in seeds
      if cell['status'] != 'not run'
    ]
    found['paired'], found['headline']
  except (
    OSError, ValueError, LookupError, TypeError, AttributeError,
  ) as error:  # fmt: skip
    raise UserError(f'{results} is no comparison ({error!r})') from error
  records = {key: source.get(key) for key in finished}
  if lost := [key for key, record in records.items() if record is None]:
    raise UserError(
      f'{source.directory} has no cell {lost[0]} ({len(lost)} are missing): '
      'name another --store'
    )
  own = cells.Store(here / 'cells')
  for key, record in records.items():
    if record and own.get(key) is None:
      data = record['config']['data']
      names = {place: without_folders(data[place]) for place in _PLACES}
      config = record['config'] | {'data': data | names}
      own.put(key, record | {'config': config})
  (here / f'{name}.json').write_text(json.dumps(found, indent=2) + '\n')


def _plain(fields: dict[str, Any]) -> dict[str, Any]:
  return {
    field: without_folders(value) if isinstance(value, str) else value
    for field, value in fields.items()
  }


def without_folders(text: str) -> str:
  """Leaves the last component of each path: '--out=/a b/c' to '--out=c'."""
  return re.sub('[^=,]*/(?=[^=,])', '', text)


def main(argv: list[str] | None = None) -> int:
  """Adds what is to be added, and writes the page."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--add', nargs=2, metavar=('NAME', 'RESULTS'))
  parser.add_argument('--store', type=pathlib.Path, metavar='DIR')
  options = parser.parse_args(argv)
  try:
    if options.add:
      name, results = options.add[0], pathlib.Path(options.add[1])
      store = options.store or results.parent / 'cells'
      add(name, results, cells.Store(store))
      if f': {name} -->' not in PAGE.read_text():
        print(f'{PAGE.name} has no <!-- table: {name} --> <!-- end --> yet')
    text = fill(PAGE.read_text(), cells.Store(HERE / 'cells'))
  except UserError as error:
    parser.error(str(error))
  PAGE.write_text(text)
  return 0


if __name__ == '__main__':
  sys.exit(main())
