"""How a report looks: wide and narrow, light and dark, on screen and paper."""

import html

from train import charts, marks, plots

CSS = f"""
:root {{ color-scheme: light dark; --page: #f6f6f4; --card: #fff;
  --ink: #1c1d20; --soft: #5c6068; --rule: #e3e3df; --edge: #d9d9d4;
  --note: #fff6dc; --note-edge: #d9a400; --hit: #fdf3d3; {charts.LIGHT} }}
@media screen and (prefers-color-scheme: dark) {{
  :root {{ --page: #111316; --card: #191c20; --ink: #eceae6; --soft: #a5a9b1;
    --rule: #2b2f35; --edge: #30353c; --note: #2d2610; --note-edge: #d9a400;
    --hit: #332b12; {charts.DARK} }}
}}
"""
CSS += charts.CSS + plots.CSS
CSS += """
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
.summary small { display: block; white-space: normal; max-width: 26em;
  overflow-wrap: anywhere; }
figure { display: flex; flex-direction: column; margin: 0;
  padding: 16px 4px 4px; background: var(--card);
  border: 1px solid var(--edge); border-radius: 8px; min-width: 0; }
figure > :not(.plot) { margin-left: 14px; margin-right: 14px; }
/* Below a wide one, the last of an odd number is not left beside a hole. */
.wide, .wide ~ .half:last-child:nth-child(even) { grid-column: 1 / -1; }
figcaption { color: var(--soft); font-size: 14px; line-height: 1.4; }
figcaption h3 { color: var(--ink); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 2px 18px;
  padding: 0; margin-top: 8px; margin-bottom: 0; font-size: 14px; }
.axis-title { font-size: 12px; color: var(--soft); margin-top: 0;
  margin-bottom: 2px; padding-top: 8px; }
figure > .lanes { margin: 12px 22px 4px 58px; }
.lanes svg { display: block; width: 100%; overflow: visible; }
.lanes text { font-size: 12px; fill: var(--soft); }
.bar { fill: currentColor; opacity: .75; }
.tick { stroke: currentColor; stroke-width: 1.5; }
.rule { stroke: currentColor; stroke-width: 1.2; stroke-dasharray: 4 4; }
.many { stroke-width: 1; stroke-dasharray: none; opacity: .25; }
.skip { fill: none; stroke: currentColor; stroke-width: 2; }
.events { margin-top: 18px; font-size: 15px; }
.events td { padding: 7px 14px; }
.events .when, .events .at { white-space: nowrap; }
.events small { margin-left: 8px; }
.events .cut td { color: var(--soft); text-align: center; }
.heats { display: grid; gap: 14px 30px; padding-bottom: 14px;
  grid-template-columns: repeat(2, minmax(0, 1fr)); }
.heat h4 { font-size: 13px; font-weight: 600; margin: 8px 0 4px; }
.rows, .heat p { margin: 0 0 0 66px; }
.heat svg { display: block; width: 100%; fill: currentColor;
  overflow: visible; }
.heat text { font-size: 12px; fill: var(--soft); }
.heat p { display: flex; align-items: center; gap: 8px; padding-top: 6px;
  font-size: 12px; color: var(--soft); font-variant-numeric: tabular-nums; }
.heat p span { white-space: nowrap; }
.heat .ramp { flex: 1; width: 0; height: 8px; }
details { margin: 0 0 14px; font-size: 14px; }
summary { cursor: pointer; color: var(--soft); padding: 4px 0; }
.norms { overflow-x: auto; }
.norms table { font-size: 13px; }
.norms td, .norms th { padding: 3px 10px; white-space: nowrap; }
.norms td { text-align: right; }
.differ { overflow-x: auto; margin-bottom: 18px; font-size: 15px;
  overflow-wrap: break-word; }
.differ td { background: var(--hit); }
.lead { background: var(--card); border: 1px solid var(--edge);
  border-radius: 8px; padding: 14px 20px; margin: 0 0 22px; }
.lead p { margin: 0; }
.lead .first { font-size: 20px; line-height: 1.35; margin: 4px 0 6px;
  text-wrap: pretty; }
.tight .summary { font-size: 14px; }
.tight .summary th, .tight .summary td { padding: 8px; }
.tight .summary th.arm { box-shadow: none; }
.tight .summary thead th { overflow-wrap: normal; }
.tight small { font-weight: 400; }
.tight .summary thead th:last-child { white-space: nowrap; }
/* A shadow at an edge tells that the table goes on beyond it. */
.scroll { overflow-x: auto; margin: 14px 0; font-size: 14px;
  overflow-wrap: normal; background:
  linear-gradient(90deg, var(--page) 12px, transparent) 0 / 36px 100% local,
  linear-gradient(270deg, var(--page) 12px, transparent) 100% / 36px 100% local,
  linear-gradient(90deg, var(--edge), transparent) 0 / 14px 100% scroll,
  linear-gradient(270deg, var(--edge), transparent) 100% / 14px 100% scroll;
  background-repeat: no-repeat; }
.scroll table { background: none; }
.scroll th, .scroll td { padding: 5px 10px; white-space: nowrap; }
.scroll tbody th { white-space: normal; min-width: 9em;
  overflow-wrap: anywhere; }
.scroll caption { position: sticky; left: 0; }
.note { color: var(--soft); font-size: 14px; margin: 0 0 10px; }
aside.small { font-size: 14px; margin-top: 0; padding: 10px 16px; }
.lead p + p:not(.first) { margin-top: 2px; }
.told { margin: 0; padding-left: 20px; }
.told li + li { margin-top: 4px; }
.alone { margin-top: 18px; }
pre { background: var(--card); border: 1px solid var(--edge);
  border-radius: 6px; padding: 12px 16px; white-space: pre-wrap; }
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
  .tight .summary td, .tight .summary th { padding: 5px 14px; }
  .summary td { display: flex; justify-content: space-between; gap: 16px;
    text-align: right; white-space: normal; padding: 6px 14px; }
  .summary td::before { content: attr(data-head); color: var(--soft);
    font-size: 14px; text-align: left; overflow-wrap: normal; }
}
@media screen and (max-width: 620px) {
  .heats { grid-template-columns: minmax(0, 1fr); }
  .events, .events tbody, .events tr, .events td, .events caption {
    display: block; border-width: 0; }
  .events { background: none; }
  .events thead { display: none; }
  .events tr { background: var(--card); border: 1px solid var(--edge);
    padding: 8px 14px; margin-bottom: 8px; display: grid; column-gap: 8px;
    grid-template-columns: auto 1fr; }
  .events td { padding: 0; }
  .events .when { color: var(--soft); font-size: 13px; }
  .events .when, .events .who, .events .cut td { grid-column: 1 / -1; }
  .events .at { font-weight: 600; }
  .events .at::before { content: 'step '; }
}
@media print {
  @page { margin: 14mm 12mm; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { background: none; font-size: 11px; }
  main { padding: 0; max-width: none; }
  .summary, .differ, .scroll, .events, .sections table, figcaption, .legend,
  caption, aside { font-size: 12px; }
  thead th, small, code { font-size: 11px; }
  h2 { break-after: avoid; margin-top: 20px; }
  figure, aside, tr, .events { break-inside: avoid; }
  th, td { padding: 5px 8px; }
  .plot > svg { flex-basis: 124px; }
  .wide .plot > svg { flex-basis: 205px; }
  .sections { columns: 3; }
  .sections table { font-size: 10.5px; }
  .sections th, .sections td { padding: 2px 6px; }
  .sections th { width: 60%; }
  .events td { padding: 3px 8px; }
  .heat { break-inside: avoid; }
  details { display: none; }
}
"""


def page(title: str, body: str) -> str:
  """A whole page.

  Args:
    title: its heading.
    body: HTML of what follows.

  Returns:
    HTML that loads nothing, as its policy has it, whatever runs are named.
  """
  title = html.escape(title)
  # Lone surrogates are legal in JSON's strings and impossible in UTF-8.
  return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{CSS}</style>
</head>
<body>
{charts.DEFS}{marks.DEFS}{plots.DEFS}
<main>
<h1>{title}</h1>
{body}
</main>
</body>
</html>
""".encode('utf-8', 'replace').decode()
