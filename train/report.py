"""Runs as one self-contained HTML page: numbers, charts, configuration.

It reads run directories and nothing else (`train/run_log.py`), so it also
draws a run that died or is still going; the same runs give the same bytes.
"""

import html
import json
import math
import os
import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from train import charts, figures
from train.errors import UserError
from train.run_log import RunLog, paired_difference, read_run, x_key

_DASH = '\N{EM DASH}'

_CSS = f"""
:root {{ color-scheme: light dark; --page: #f6f6f4; --card: #fff;
  --ink: #1c1d20; --soft: #5c6068; --rule: #e3e3df; --edge: #d9d9d4;
  --note: #fff6dc; --note-edge: #d9a400; --hit: #fdf3d3; {charts.LIGHT} }}
@media screen and (prefers-color-scheme: dark) {{
  :root {{ --page: #111316; --card: #191c20; --ink: #eceae6; --soft: #a5a9b1;
    --rule: #2b2f35; --edge: #30353c; --note: #2d2610; --note-edge: #d9a400;
    --hit: #332b12; {charts.DARK} }}
}}
"""
_CSS += """
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans',
  'Liberation Sans', Arial, sans-serif; overflow-wrap: anywhere; }
main { max-width: 1160px; margin: 0 auto; padding: 28px 24px 56px; }
h1 { font-size: clamp(24px, 3.4vw, 34px); line-height: 1.2; margin: 0 0 20px;
  letter-spacing: -.01em; text-wrap: balance; }
h2 { font-size: 20px; margin: 40px 0 14px; }
h3 { font-size: 16px; margin: 0; }
code { font: 13px ui-monospace, 'DejaVu Sans Mono', Menlo, monospace; }
aside { background: var(--note); border-left: 5px solid var(--note-edge);
  border-radius: 6px; padding: 12px 18px; margin: 20px 0; }
aside p { margin: 0; }
aside p + p { margin-top: 8px; }
table { width: 100%; border-collapse: collapse; background: var(--card);
  border: 1px solid var(--edge); }
caption { text-align: left; color: var(--soft); font-size: 14px;
  padding-bottom: 8px; }
th, td { text-align: left; padding: 9px 14px; vertical-align: top;
  border-top: 1px solid var(--rule); font-variant-numeric: tabular-nums; }
thead th { font-size: 13px; font-weight: 600; color: var(--soft);
  border-top: 0; vertical-align: bottom; }
tbody th { font-weight: 600; }
small { color: var(--soft); font-size: 13px; }
.arm { box-shadow: inset 5px 0 currentColor; }
.arm span { color: var(--ink); }
.figures { display: grid; gap: 18px;
  grid-template-columns: repeat(2, minmax(0, 1fr)); }
.summary { font-size: 15px; }
.summary th.arm { min-width: 10.5em; }
.summary td { white-space: nowrap; }
/* A number is never broken; a long arm's name beside it is. */
.summary td > span { overflow-wrap: normal; }
.summary small { display: block; white-space: normal; }
figure { display: flex; flex-direction: column; margin: 0;
  padding: 16px 4px 4px; background: var(--card);
  border: 1px solid var(--edge); border-radius: 8px; min-width: 0; }
figure > :not(.plot) { margin-left: 14px; margin-right: 14px; }
.wide { grid-column: 1 / -1; }
figcaption { color: var(--soft); font-size: 14px; line-height: 1.4; }
figcaption h3 { color: var(--ink); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 18px;
  padding: 0; margin-top: 8px; margin-bottom: 0; font-size: 14px; }
.axis-title { font-size: 12px; color: var(--soft); margin-top: auto;
  margin-bottom: 2px; padding-top: 8px; }
.differ { overflow-x: auto; margin-bottom: 18px; font-size: 15px;
  overflow-wrap: break-word; }
.differ td { background: var(--hit); }
.sections { columns: 3 300px; column-gap: 18px; }
.sections table { break-inside: avoid; margin-bottom: 18px; font-size: 14px; }
.sections caption { color: var(--ink); font-weight: 600; padding-bottom: 4px; }
.sections th, .sections td { padding: 4px 10px; width: 50%; }
.sections th { font-weight: 400; color: var(--soft); }
@media screen and (max-width: 860px) {
  main { padding: 20px 14px 40px; }
  .figures { grid-template-columns: minmax(0, 1fr); }
  .summary, .summary tbody, .summary tr, .summary th, .summary caption {
    display: block; border-width: 0; }
  .summary thead { display: none; }
  .summary { background: none; }
  .summary tr { background: var(--card); border: 1px solid var(--edge);
    margin-bottom: 12px; }
  .summary th.arm { font-size: 17px; }
  .summary td { display: flex; justify-content: space-between; gap: 16px;
    text-align: right; white-space: normal; padding: 6px 14px; }
  .summary td::before { content: attr(data-head); color: var(--soft);
    font-size: 14px; text-align: left; }
}
@media print {
  @page { margin: 14mm 12mm; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { background: none; font-size: 11px; }
  main { padding: 0; max-width: none; }
  .summary, .differ, .sections table, figcaption, .legend, caption, aside {
    font-size: 12px; }
  thead th, small, code { font-size: 11px; }
  h2 { break-after: avoid; margin-top: 20px; }
  figure, aside, tr { break-inside: avoid; }
  th, td { padding: 5px 8px; }
  .plot > svg { height: 150px; }
  .wide .plot > svg { height: 230px; }
}
"""


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
  logs = [read_run(name, pathlib.Path(place)) for name, place in runs.items()]
  base = next(run for run in logs if run.name == baseline)
  # Lone surrogates are legal in JSON's strings and impossible in UTF-8.
  page = _page(title, logs, base, notes).encode('utf-8', 'replace')
  path = pathlib.Path(path)
  partial = path.with_name(f'.{path.name}.{os.getpid()}.partial')
  try:
    try:
      partial.write_bytes(page)
      os.replace(partial, path)
    finally:
      partial.unlink(missing_ok=True)
  except OSError as error:
    raise UserError(f'cannot write {path}: {error.strerror}') from error


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
<style>{_CSS}{charts.CSS}</style>
</head>
<body>
{charts.DEFS}
<main>
<h1>{title}</h1>
{_summary(runs, base)}
{callout}
<h2>Curves</h2>
<div class="figures">
{figures.draw(runs, base)}
</div>
<h2>Configuration</h2>
{_configuration(runs)}
</main>
</body>
</html>
"""


def _remarks(run: RunLog) -> list[str]:
  """What a reader must know of a run that did not go smoothly."""
  out = []
  if run.end == 'died':
    out.append(
      f'{run.name}: no end on record, so it died or is still running; its '
      f'last line is step {run.last_step:,}.'
    )
  for split, lines in ('training', run.train), ('validation', run.validation):
    bad = [s for s, m in lines.items() if not math.isfinite(m['loss'])]
    if bad:
      out.append(
        f'{run.name}: the {split} loss is not finite from step {bad[0]:,} '
        f'({len(bad):,} of {len(lines):,} measurements).'
      )
  if run.unreadable:
    lines_ = 'line was' if run.unreadable == 1 else 'lines were'
    out.append(f'{run.name}: {run.unreadable:,} unreadable {lines_} left out.')
  return out


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
  status = f'{run.end} at step {run.last_step:,}'
  if run.resumed:
    steps = ', '.join(f'{step:,}' for step in run.resumed)
    status += f' <small>resumed at {steps}</small>'
  digest = html.escape(run.params_digest)
  short = html.escape(run.params_digest.rpartition(':')[2][:10])
  code = f'<code title="{digest}">{short}</code>' if digest else _DASH
  return [*cells, status, code]


def _summary(runs: Sequence[RunLog], base: RunLog) -> str:
  several = len(runs) > 1
  heads = ['Arm', 'Final validation loss', f'Difference to {base.name}']
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
