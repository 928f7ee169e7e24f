"""The tables of a comparison's page: cells, versions, configuration."""

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from train.experiments import figure_page
from train.experiments.cells import DONE, Record
from train.experiments.comparison import ArmResult, Comparison
from train.lives import duration

DASH = '\N{EM DASH}'
_OPEN = 30  # Cells; more are folded away.
_MOST_DIGITS = 8  # Of a number that is shown as it is.


def cards(
  caption: str,
  heads: Sequence[str],
  rows: Sequence[tuple[str, str, Sequence[str]]],
) -> str:
  """A table that a phone shows as cards; the roles keep it one to a reader."""
  heads = [html.escape(head) for head in heads]
  columns = ''.join(
    f'<th role="columnheader" scope="col">{head}</th>' for head in heads
  )
  lines = ''.join(
    '<tr role="row"><th role="rowheader" scope="row" class="arm">'
    f'<span>{html.escape(first)}</span><small>{html.escape(small)}</small></th>'
    + ''.join(
      f'<td role="cell" data-head="{head}">'
      f'<span>{html.escape(cell)}</span></td>'
      for head, cell in zip(heads[1:], cells, strict=True)
    )
    + '</tr>'
    for first, small, cells in rows
  )
  return (
    '<div class="tight"><table class="summary" role="table">'
    f'<caption>{html.escape(caption)}</caption>'
    f'<thead role="rowgroup"><tr role="row">{columns}</tr></thead>'
    f'<tbody role="rowgroup">{lines}</tbody></table></div>'
  )


def status_of(record: Record | None) -> str:
  """What has become of a cell."""
  return record['status'] if record else 'not run yet'


def cell_table(comparison: Comparison) -> str:
  """Every cell: what it gave, where and with what."""
  cells = [
    (arm.name, seed, record)
    for arm in comparison.arms.values()
    for seed, record in arm.seeds.items()
  ]
  records = [record for _, _, record in cells if record]
  counts: dict[str, int] = {}
  for _, _, record in cells:
    counts[status_of(record)] = counts.get(status_of(record), 0) + 1
  caption = f'{len(cells)} cells: ' if cells else 'There is no cell.'
  caption += ', '.join(f'{n} {status}' for status, n in counts.items())
  if records:
    seconds = sum(record.get('seconds') or 0.0 for record in records)
    flops = sum(record.get('flops') or 0.0 for record in records)
    caption += (
      f'. Their steps took {duration(seconds)} and {flops:.2g} FLOPs in all.'
    )
  sets = list(dict.fromkeys(_versions(record) for record in records))
  rows = [
    '<tr>'
    f'<th scope="row">{html.escape(arm)}</th><td>{seed}</td>'
    + ''.join(f'<td>{cell}</td>' for cell in _cell(record, sets))
    + '</tr>'
    for arm, seed, record in cells
  ]
  heads = ''.join(
    f'<th scope="col">{head}</th>'
    for head in ('Arm', 'Seed', 'Status', 'Final validation loss',
                 'Parameters digest', 'Seconds', 'Device', 'Versions', 'Code')
  )  # fmt: skip
  table = (
    '<div class="scroll" role="region" tabindex="0" aria-label="Cells">'
    f'<table><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody>'
    '</table></div>'
  )
  if len(cells) > _OPEN:
    table = f'<details><summary>Every cell</summary>{table}</details>'
  caption = f'<p class="note">{html.escape(caption)}</p>'
  return caption + (table if cells else '') + _version_table(sets)


def _cell(record: Record | None, sets: Sequence[str]) -> Iterable[str]:
  status = html.escape(status_of(record))
  if record is None:
    yield f'<em>{status}</em>'
    yield from [DASH] * 6
    return
  done = record['status'] == DONE
  yield status if done else f'<strong>{status}</strong>'
  yield f'{record["validation_loss"]:.4f}' if done else DASH
  digest = str(record.get('params_digest') or '')
  short = html.escape(digest.rpartition(':')[2][:10])
  yield (
    f'<code title="{html.escape(digest)}">{short}</code>' if digest else DASH
  )
  seconds = record.get('seconds')
  yield DASH if seconds is None else f'{seconds:,.0f}'
  yield html.escape(str(record.get('device') or DASH))
  yield str(1 + sets.index(_versions(record)))
  yield f'<code>{html.escape(str(record.get("code") or DASH))}</code>'


def _versions(record: Record) -> str:
  return json.dumps(record.get('versions') or {}, sort_keys=True)


def _version_table(sets: Sequence[str]) -> str:
  """The sets of versions that the cells name by number."""
  if not sets:
    return ''
  found = [json.loads(each) for each in sets]
  names = list(dict.fromkeys(name for each in found for name in each))
  rows = [
    [name, *(str(each.get(name, DASH)) for each in found)] for name in names
  ]
  # What differs is what a reader looks for.
  rows.sort(key=lambda row: len(set(row[1:])) == 1)
  heads = ['Package', *(str(i) for i in range(1, 1 + len(sets)))]
  caption = (
    'Versions' if len(sets) == 1 else 'Versions, those that differ first'
  )
  return figure_page.table(caption, [heads, *rows])


def configuration(comparison: Comparison) -> str:
  """What the arms change, and what all share."""
  arms = list(comparison.arms.values())
  configs = [_config(arm) for arm in arms]
  known = [config for config in configs if config is not None]
  keys = list(dict.fromkeys(key for config in known for key in config))
  changed = list(dict.fromkeys(key for arm in arms for key in arm.overrides))
  differ = [
    key
    for key in dict.fromkeys([*changed, *keys])
    if key in changed or len({config.get(key) for config in known}) > 1
  ]
  rows = [['Arm', *differ]]
  for arm, config in zip(arms, configs, strict=True):
    own = {key: as_text(value) for key, value in arm.overrides.items()}
    values = ((config or own).get(key, DASH) for key in differ)
    rows.append([arm.name, *map(_short, values)])
  out = figure_page.table('What the arms change', rows) if differ else ''
  sections: dict[str, str] = {}
  for key in keys:
    if key not in differ:
      section, _, rest = key.rpartition('.')
      row = (
        f'<tr><th scope="row">{html.escape(rest)}</th>'
        f'<td><code>{html.escape(known[0].get(key, DASH))}</code></td></tr>'
      )
      sections[section] = sections.get(section, '') + row
  tables = ''.join(
    f'<table><caption>{html.escape(section or "run")}</caption>'
    f'<tbody>{lines}</tbody></table>'
    for section, lines in sections.items()
  )
  if tables:
    out += f'<p class="note">What all share:</p><div class="sections">{tables}'
    out += '</div>'
  return out or '<p class="note">No cell has been run.</p>'


def _config(arm: ArmResult) -> dict[str, str] | None:
  """An arm's configuration by dotted path, without the seed."""
  for record in arm.seeds.values():
    if record:
      flat = dict(_flat(record['config']))
      flat.pop('seed', None)
      return flat
  return None


def _short(value: str) -> str:
  """A number with four figures, where it has more than people read."""
  try:
    return value if len(value) <= _MOST_DIGITS else f'{float(value):.4g}'
  except ValueError:
    return value


def _flat(values: Mapping[str, Any], prefix: str = '') -> Any:
  for key, value in values.items():
    if isinstance(value, dict):
      yield from _flat(value, f'{prefix}{key}.')
    else:
      yield f'{prefix}{key}', as_text(value)


def as_text(value: Any) -> str:
  """A value of a record as people and JSON write it."""
  if isinstance(value, str) and value:
    return value
  return json.dumps(value, sort_keys=True)
