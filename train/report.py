"""Runs as one self-contained HTML page: numbers, charts, configuration.

It reads run directories and nothing else (`train/run_log.py`), so it also
draws a run that died or is still going; the same runs give the same bytes.
"""

import html
import json
import math
import os
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from train import (
  charts,
  event_table,
  figures,
  layer_figures,
  marks,
  report_style,
  storage,
)
from train.errors import UserError
from train.lives import alive, clock, duration, lives
from train.run_log import RunLog, paired_difference, read_run, x_key

_DASH = '\N{EM DASH}'


def write_report(
  path: str | os.PathLike[str],
  runs: Mapping[str, str | os.PathLike[str]],
  *,
  title: str,
  notes: Sequence[str] = (),
  baseline: str | None = None,
) -> None:
  """Writes the page for one or several runs, atomically.

  Args:
    path: the HTML file; its folder must exist.
    runs: arm's name to run directory, in the order of the page.
    title: the page's heading.
    notes: caveats, shown in a callout above the charts.
    baseline: the arm that the others are compared with; by default the first.

  Raises:
    UserError: a run directory lacks a readable config.json or metrics.jsonl,
      baseline is not among runs, or path cannot be written.
  """
  if not runs:
    raise UserError('a report needs at least one run')
  if baseline is None:
    baseline = next(iter(runs))
  if baseline not in runs:
    names = ', '.join(map(repr, runs))
    raise UserError(f'baseline {baseline!r} is not among the runs: {names}')
  logs = [read_run(name, place) for name, place in runs.items()]
  base = next(run for run in logs if run.name == baseline)
  # Lone surrogates are legal in JSON's strings and impossible in UTF-8.
  page = _page(title, logs, base, notes).encode('utf-8', 'replace').decode()
  path = epath.Path(path)
  with storage.one_line_errors(path):  # Not all of an object store's are here.
    try:
      storage.write_atomically(path, page)
    except OSError as error:
      raise UserError(storage.reason(error, path)) from error


def _page(
  title: str, runs: Sequence[RunLog], base: RunLog, notes: Sequence[str]
) -> str:
  title = html.escape(title)
  notes = [*notes, *(remark for run in runs for remark in _remarks(run))]
  items = ''.join(f'<p>{html.escape(note)}</p>' for note in notes)
  callout = f'<aside aria-label="Notes">{items}</aside>' if notes else ''
  # The policy holds the page to loading nothing, whatever the runs are named.
  return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{report_style.CSS}</style>
</head>
<body>
{charts.DEFS}{marks.DEFS}
<main>
<h1>{title}</h1>
{_summary(runs, base)}
{callout}
{_section('Curves', figures.draw(runs, base))}
{_section('Time and events', figures.over_time(runs), event_table.draw(runs))}
{_section('Layers', layer_figures.draw(runs))}
<h2>Configuration</h2>
{_configuration(runs)}
</main>
</body>
</html>
"""


def _section(head: str, drawn: str, table: str = '') -> str:
  if not (drawn or table):
    return ''
  return f'<h2>{head}</h2><div class="figures">{drawn}</div>{table}'


def _remarks(run: RunLog) -> list[str]:
  """What a reader must know of a run that did not go smoothly."""
  out = []
  if run.end == 'failed':
    out.append(f'{run.name}: failed {_where(run)}: {run.error or "?"}')
  if run.end == 'open':
    remark = (
      f'{run.name}: no end on record: it is running, or it died; its last line '
      f'is step {run.last_step:,}'
    )
    if found := lives(run):
      at, _ = found[-1].last
      remark += f', its last sign of life at {clock(at)} UTC'
      remark += f', {duration(alive(run)[1])} after it began'
    out.append(f'{remark}.')
  for split, lines in ('training', run.train), ('validation', run.validation):
    skipped = {e.step for e in run.events if e.kind == 'skipped'}
    bad = [
      step
      for step, m in lines.items()
      if not math.isfinite(m['loss']) and step not in skipped
    ]
    if bad:
      out.append(
        f'{run.name}: the {split} loss is not finite from step {bad[0]:,} '
        f'({len(bad):,} of {len(lines):,} measurements).'
      )
  if run.unreadable:
    lines_ = 'line was' if run.unreadable == 1 else 'lines were'
    out.append(f'{run.name}: {run.unreadable:,} unreadable {lines_} left out.')
  return out


def _where(run: RunLog) -> str:
  """How far it came, and of how many steps where some are left."""
  steps, step = run.config.get('steps'), f'at step {run.last_step:,}'
  if isinstance(steps, int) and run.end != 'done' and steps > run.last_step:
    return f'{step} of {steps:,}'
  return step


def _at(x: str, at: float) -> str:
  return f'step {at:,.0f}' if x == 'step' else f'{at:,.0f} tokens'


def _cells(run: RunLog, base: RunLog, x: str, several: bool) -> list[str]:
  """The run's row of the summary, after its name."""
  losses = run.series('loss', 'step', 'validation')
  loss = f'{losses[-1][1]:.4f}' if losses else _DASH
  if losses and run.end != 'done':
    loss += f' <small>at step {losses[-1][0]:,.0f}</small>'
  cells = [loss]
  pairs = paired_difference(run, base, x)
  if several and (run is base or not pairs):
    cells.append('baseline' if run is base else _DASH)
  elif several:
    ends = {r.series('loss', x, 'validation')[-1][0] for r in (run, base)}
    where = (
      '' if len(ends) == 1 else f' <small>at {_at(x, pairs[-1][0])}</small>'
    )
    cells.append(f'<strong>{charts.signed(pairs[-1][1])}</strong>{where}')
  cells.append(_DASH if run.tokens is None else f'{run.tokens:,.0f}')
  speeds = [v for _, v in run.series('tokens_per_second') if math.isfinite(v)]
  cells.append(f'{statistics.median(speeds):,.0f}' if speeds else _DASH)
  status = _where(run) if run.end == 'open' else f'{run.end} {_where(run)}'
  status += ''.join(
    f' <small>{html.escape(fact)}</small>' for fact in _fate(run)
  )
  digest = html.escape(run.params_digest)
  short = html.escape(run.params_digest.rpartition(':')[2][:10])
  code = f'<code title="{digest}">{short}</code>' if digest else _DASH
  return [*cells, status, code]


def _fate(run: RunLog) -> list[str]:
  """What a reader of the summary must know of how it got there."""
  out = []
  if run.end == 'open':
    out.append('no end on record: running, or died')
  if run.error:
    out.append(textwrap.shorten(run.error, 120, placeholder=' ...'))
  if len(run.resumed) > 4:
    out.append(
      f'resumed {len(run.resumed):,} times, last at {run.resumed[-1]:,}'
    )
  elif run.resumed:
    steps = ', '.join(f'{step:,}' for step in run.resumed)
    out.append(f'resumed at {steps}')
  if skipped := max(
    (m.get('skipped', 0) for m in run.train.values()), default=0
  ):
    out.append(f'{skipped:,.0f} step{"s" * (skipped != 1)} skipped')
  living, whole = map(duration, alive(run))
  if whole != duration(0):
    out.append(
      f'in {whole}'
      if living == whole
      else f'running for {living} of the {whole} from its start to its last '
      'sign of life'
    )
  return out


def _summary(runs: Sequence[RunLog], base: RunLog) -> str:
  several = len(runs) > 1
  which = 'Final' if all(run.end == 'done' for run in runs) else 'Last'
  heads = ['Arm' if several else 'Run', f'{which} validation loss']
  heads.append(f'Difference to {base.name}')
  heads += ['Training tokens', 'Tokens per second, median', 'Status']
  heads = [html.escape(head) for head in [*heads, 'Parameters digest']]
  if not several:
    del heads[2]
  rows = []
  for i, run in enumerate(runs):
    cells = _cells(run, base, x_key(runs), several)
    rows.append(
      f'<tr role="row"><th role="rowheader" scope="row" class="arm '
      f'{charts.colour(i)}"><span>{html.escape(run.name)}</span></th>'
      + ''.join(
        f'<td role="cell" data-head="{head}"><span>{cell}</span></td>'
        for head, cell in zip(heads[1:], cells, strict=True)
      )
      + '</tr>'
    )
  # A phone shows rows as cards, which are no table to a screen reader unless
  # the roles say so.
  columns = ''.join(
    f'<th role="columnheader" scope="col">{head}</th>' for head in heads
  )
  caption = 'Loss is the mean in nats per token.'
  if several:
    caption += " A negative difference is a lower loss than the baseline's."
  return (
    f'<table class="summary" role="table"><caption>{caption}</caption>'
    f'<thead role="rowgroup"><tr role="row">{columns}</tr></thead>'
    f'<tbody role="rowgroup">{"".join(rows)}</tbody></table>'
  )


def _configuration(runs: Sequence[RunLog]) -> str:
  keys = list(dict.fromkeys(key for run in runs for key in run.config))
  values = {key: [_value(run, key) for run in runs] for key in keys}
  differ = [key for key in keys if len(set(values[key])) > 1]
  out = []
  if len(runs) > 1:
    heads = ''.join(
      f'<th scope="col">{html.escape(run.name)}</th>' for run in runs
    )
    rows = ''.join(
      _row(key, [f'<code>{html.escape(v)}</code>' for v in values[key]])
      for key in differ
    )
    caption = f'{len(differ)} of {len(keys)} settings differ between runs'
    out.append(
      '<div class="differ" role="region" tabindex="0" aria-label="Settings '
      f'that differ"><table><caption>{caption}</caption><thead><tr>'
      f'<th scope="col">Setting</th>{heads}</tr></thead>'
      f'<tbody>{rows}</tbody></table></div>'
    )
  sections: dict[str, str] = {}
  for key in keys:
    if key not in differ:
      section, _, rest = key.rpartition('.')
      cell = f'<code>{html.escape(values[key][0])}</code>'
      row = _row(rest, [cell])
      sections[section] = sections.get(section, '') + row
  tables = ''.join(
    f'<table><caption>{html.escape(section or "run")}</caption>'
    f'<tbody>{rows}</tbody></table>'
    for section, rows in sections.items()
  )
  return ''.join(out) + f'<div class="sections">{tables}</div>'


def _row(name: str, cells: Sequence[str]) -> str:
  inner = ''.join(f'<td>{cell}</td>' for cell in cells)
  return f'<tr><th scope="row">{html.escape(name)}</th>{inner}</tr>'


def _value(run: RunLog, key: str) -> str:
  if key not in run.config:
    return _DASH
  value: Any = run.config[key]
  return value if isinstance(value, str) and value else json.dumps(value)
