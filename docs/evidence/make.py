"""Writes the tables of docs/results.md from the cells beside this file.

    python docs/evidence/make.py

Each `NAME.json` here is the results.json of a comparison, whose cells lie in
`cells/`; the table of NAME stands between two comments in the page. All numbers
are computed anew from the cells.
"""

import json
import pathlib
import re
import sys
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
PAGE = HERE.parent / 'results.md'
sys.path.insert(0, str(HERE.parents[1]))

from train.experiments import cells, comparison  # noqa: E402

HEAD = (
  'arm', 'against', 'seeds', 'tokens a parameter', 'arm minus baseline (nats)',
  '95 % interval', 'half-width', 'sd', 'p', 'Holm', 'tokens to its final loss',
)  # fmt: skip


def load(name: str, store: cells.Store) -> comparison.Comparison:
  """The comparison of a file here, with the numbers of its cells."""
  found = json.loads((HERE / f'{name}.json').read_text())
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
  )


def table(result: comparison.Comparison) -> str:
  """The pairs of a comparison in Markdown."""
  lines = [HEAD, ['---'] * len(HEAD)]
  lines += [_row(result, pair) for pair in result.pairs]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


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


if __name__ == '__main__':
  PAGE.write_text(fill(PAGE.read_text(), cells.Store(HERE / 'cells')))
