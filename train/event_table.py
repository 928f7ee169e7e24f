"""The events of runs that matter, in a short table: failures and restarts."""

import collections
import dataclasses
import html
from collections.abc import Sequence
from typing import Any

from train.lives import beginning, clock, duration, lives
from train.run_log import Event, RunLog

_FIRST, _LAST = 8, 16
"""Rows of a run at most: the first ones, and those before the end."""

_NOUNS = {
  'skipped': 'skipped step',
  'save_failed': 'failed save',
  'fell_back': 'refused checkpoint',
  'resumed': 'restart',
  'began': 'restart',
  'stopped': 'stop',
  'failed': 'failure',
}


@dataclasses.dataclass
class _Row:
  """One event, or several alike in a row."""

  kind: str
  text: str
  events: list[Event]

  def takes(self, event: Event, text: str, before: Event) -> bool:
    """Whether an event repeats the last one; before: the one before it."""
    alike = (self.kind, self.text) == (event.kind, text)
    if event.kind == 'skipped':  # Apart from steps that were not skipped.
      return alike and event.step - self.events[-1].step in (0, 1)
    return alike and before is self.events[-1]


def draw(runs: Sequence[RunLog]) -> str:
  """The table as HTML; empty where nothing went wrong."""
  body, several = '', len(runs) > 1
  for run in runs:
    rows = _rows(run)
    since = beginning(run)
    cut = rows[_FIRST : len(rows) - _LAST]
    for i, row in enumerate(rows):
      if not cut or i < _FIRST or i >= len(rows) - _LAST:
        body += _cells(run, row, since, several)
      elif i == _FIRST:
        body += _left_out(cut, several)
  if not body:
    return ''
  run_head = '<th scope="col">Arm</th>' if several else ''
  return (
    '<table class="events"><caption>Failures, skipped steps, restarts; times '
    'are UTC, and since the run began</caption><thead><tr>'
    f'<th scope="col">Time</th>{run_head}<th scope="col">Step</th>'
    f'<th scope="col">Event</th></tr></thead><tbody>{body}</tbody></table>'
  )


def _rows(run: RunLog) -> list[_Row]:
  rows: list[_Row] = []
  found = lives(run)
  for i, event in enumerate(run.events):
    # What a life began with in the very first line is no news.
    if event.kind not in _NOUNS or not i:
      continue
    text = _text(event)
    if event.kind in ('resumed', 'began') and event.time is not None:
      before = [life for life in found if life.points[0][0] < event.time]
      if before and before[-1].end == 'died':
        at, step = before[-1].last
        text += f', {duration(event.time - at)} after the last sign of life'
        if step != event.step:
          text += f', at step {step:,}'
    if rows and rows[-1].takes(event, text, run.events[i - 1]):
      rows[-1].events.append(event)
    else:
      rows.append(_Row(event.kind, text, [event]))
  if run.end == 'open' and found:
    at, step = found[-1].last
    text = 'last sign of life; no end on record: running, or died'
    rows.append(_Row('open', text, [Event('open', step, at, {})]))
  return rows


def _text(event: Event) -> str:
  facts = {name: str(fact) for name, fact in event.facts.items()}
  if event.kind == 'skipped':
    return f'skipped: {facts.get("reason", "no reason told")}'
  if event.kind == 'save_failed':
    return f'not saved: {facts.get("error", "no reason told")}'
  if event.kind == 'fell_back':
    refused = facts.get('refused', '?')
    return f'checkpoint {refused} refused: {facts.get("reason", "?")}'
  if event.kind == 'stopped':
    status = facts.get('status', 'stopped')
    how = {'stopped': '', 'at once': ' at once'}
    return 'stopped' + how.get(status, f' by {status}')
  if event.kind == 'failed':
    return f'failed: {facts.get("error", "no reason told")}'
  moved = ', '.join(
    f'{name} {_plainly(fact)}' for name, fact in event.facts.items()
  )
  text = 'resumed' if event.kind == 'resumed' else 'began again'
  return f'{text} on other {moved}' if moved else text


def _plainly(fact: Any) -> str:
  """'data 1, fsdp 4' of a mesh, 'jax A -> B' of versions."""
  if isinstance(fact, dict):
    return ', '.join(f'{name} {value}' for name, value in fact.items())
  return str(fact)


def _numbers(row: _Row) -> str:
  """What a single skipped step had; of several only the reason is told."""
  facts = row.events[0].facts
  if row.kind != 'skipped' or len(row.events) > 1:
    return ''
  pairs = ('loss', 'loss'), ('gradient norm', 'grad_norm')
  told = ', '.join(
    f'{name} {value:.4g}' if isinstance(value, float) else f'{name} {value}'
    for name, key in pairs
    if (value := facts.get(key)) is not None
  )
  return f' ({told})' if told else ''


def _cells(run: RunLog, row: _Row, since: float | None, several: bool) -> str:
  first, last = row.events[0], row.events[-1]
  when = ''
  if first.time is not None:
    begun = duration(first.time - since) if since is not None else ''
    when = f'{clock(first.time)} <small>{begun}</small>'
  step, text = f'{first.step:,}', html.escape(row.text + _numbers(row))
  if len(row.events) > 1:
    step += f'\N{EN DASH}{last.step:,}' * (last.step != first.step)
    text += f' <small>{len(row.events):,} times</small>'
  name = f'<td class="who">{html.escape(run.name)}</td>' if several else ''
  return (
    f'<tr><td class="when">{when}</td>{name}<td class="at">{step}</td>'
    f'<td>{text}</td></tr>'
  )


def _left_out(rows: Sequence[_Row], several: bool) -> str:
  counts: collections.Counter[str] = collections.Counter()
  for row in rows:
    counts[_NOUNS.get(row.kind, row.kind)] += len(row.events)
  total = sum(counts.values())
  what = ', '.join(
    f'{count:,} {noun}{"s" * (count != 1)}' for noun, count in counts.items()
  )
  return (
    f'<tr class="cut"><td colspan="{4 if several else 3}">{total:,} left out: '
    f'{what}</td></tr>'
  )
