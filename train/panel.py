"""What the live display shows: a `View` of a run, drawn as text with styles.

Colours are few, and read on dark and on light terminals.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import rich.text

from train.curve import Curve

_ACCENT = 'color(32)'
_ALERT = 'bold color(166)'
_LABEL_WIDTH = 16
_CURVE_ROWS = 4
_NARROW = 56  # Below, one column.
_WIDE = 108  # From here on, the curve stands beside the columns.
_COLUMN = 36


@dataclasses.dataclass
class View:
  """A run at a moment."""

  name: str
  steps: int
  """Of the whole run."""
  step: int
  """Taken so far."""
  line: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  """The last step's line of metrics.jsonl."""
  losses: Curve = dataclasses.field(default_factory=Curve)
  """Of the steps since this process began."""
  validation: tuple[int, float] | None = None
  """Step and loss of the last evaluation."""
  tokens_per_second: float | None = None
  mfu: float | None = None
  data_share: float | None = None
  """Of the time, what the devices waited for data."""
  memory_limit: int | None = None
  """Bytes."""
  elapsed: float = 0.0
  """Seconds since this process began."""
  left: float | None = None
  """Seconds until the end, as it seems."""
  saved: tuple[int, float] | None = None
  """Step of the last save, and seconds since."""
  status: str = ''
  """What the run waits for."""
  alert: str = ''
  """What is wrong, until it is right again."""


def draw(view: View, width: int, height: int, unicode: bool) -> rich.text.Text:
  """Draws a view, without a line break at its end.

  Args:
    view: The run.
    width: Of the terminal, in cells.
    height: Of the terminal, in lines; what does not fit is left out.
    unicode: Whether the terminal shows more than ASCII.
  """
  columns = _cells(view)
  beside = width >= _WIDE
  if width < _NARROW:
    columns = [[*columns[0], *columns[1]]]
  table = _table(columns, _COLUMN if beside else (width - 1) // len(columns))
  used = 1 + 2 * _COLUMN if beside else 0
  size = (width - used, len(table) if beside else _CURVE_ROWS)
  curve = [
    rich.text.Text.assemble((axis, 'dim'), (dots, _ACCENT))
    for axis, dots in (view.losses.draw(*size, 'loss') if unicode else ())
  ]
  if beside:
    for row, line in zip(table, curve, strict=False):
      row.pad_right(used - row.cell_len)
      row.append_text(line)
    curve = []
  rows = [_title(view, width), _bar(view, width, unicode)]
  room = height - 5  # For an alert and a status after a gap, and the cursor.
  # A low terminal shows what comes first: the loss.
  table = table[: max(0, room - len(rows) - 1)]
  for block in (table, curve):
    if block and len(rows) + 1 + len(block) <= room:
      rows += [rich.text.Text(), *block]
  told = [
    rich.text.Text(f' {text}', style)
    for text, style in ((view.alert, _ALERT), (view.status, 'italic'))
    if text
  ]
  if told:
    rows += [rich.text.Text(), *told]
  for row in rows:
    row.truncate(width, overflow='ellipsis' if unicode else 'crop')
  return rich.text.Text('\n').join(rows[: max(1, height - 1)])


def _title(view: View, width: int) -> rich.text.Text:
  step = f'step {view.step:,} of {view.steps:,}'
  name = rich.text.Text.assemble((f' {view.name}', 'bold'))
  name.truncate(max(1, width - len(step) - 2))
  name.pad_right(max(1, width - 1 - name.cell_len - len(step)))
  return name.append(step)


def _bar(view: View, width: int, unicode: bool) -> rich.text.Text:
  share = view.step / view.steps
  text = f'  {int(100 * share):>3}%'
  if width >= _NARROW:
    text += f'  {clock(view.elapsed):>7} elapsed'
  text += '' if view.left is None else f'  {clock(view.left):>7} left'
  full, rest = ('━', '━') if unicode else ('#', '.')
  length = max(1, width - len(text) - 2)
  filled = int(length * share)
  return rich.text.Text.assemble(
    ' ', (full * filled, _ACCENT), (rest * (length - filled), 'dim'), text
  )


def _cells(view: View) -> list[list[tuple[str, str]]]:
  """Labels and values in two columns; what is not known yet is a dash."""

  def show(value, form='{:.3g}'):
    return '-' if value is None else form.format(value)

  def norm(key):
    # Always four digits, so that nothing flickers as they change.
    return show(line.get(key), '{:#.4g}').removesuffix('.')

  line = view.line
  step, held_out = view.validation or (0, None)
  at = f'  step {step:,}' if view.validation else ''
  learned = [
    ('loss', show(line.get('loss'), '{:.4f}')),
    ('held-out loss', show(held_out, '{:.4f}') + at),
    ('learning rate', show(line.get('learning_rate'), '{:.3e}')),
    ('gradient norm', norm('grad_norm')),
    ('  after clip', norm('clipped_norm')),
    ('  after power', norm('powered_norm')),
  ]
  used = show(line.get('memory'), '{}')
  if 'memory' in line:
    limit = view.memory_limit
    used = gibibytes(line['memory'])
    used += f'  {line["memory"] / limit:.0%}' if limit else ''
  saved = '-'
  if view.saved:
    saved = f'step {view.saved[0]:,}  {clock(view.saved[1])} ago'
  machine = [
    ('tokens/s', show(view.tokens_per_second and thousands(
      view.tokens_per_second), '{}')),
    ('MFU', show(view.mfu, '{:.1%}')),
    ('waits for data', show(view.data_share, '{:.1%}')),
    ('peak memory', used),
    ('skipped steps', show(line.get('skipped'), '{:,}')),
    ('saved', saved),
  ]  # fmt: skip
  if 'expert_load_max' in line:
    loads = line['expert_load_max']
    learned.append(('busiest expert', f'{max(loads):.2f} x mean'))
  return [learned, machine]


def _table(
  columns: Sequence[Sequence[tuple[str, str]]], width: int
) -> list[rich.text.Text]:
  """Rows; of a value that is too long its last part is left out."""
  rows = []
  for cells in itertools.zip_longest(*columns, fillvalue=('', '')):
    row = rich.text.Text(' ')
    for label, value in cells:
      main, _, rest = value.partition('  ')
      fits = _LABEL_WIDTH + len(value) + 1 < width
      cell = rich.text.Text.assemble(
        (label.ljust(_LABEL_WIDTH), 'dim'),
        (main, 'bold'),
        f'  {rest}' if rest and fits else '',
      )
      cell.truncate(width - 1)
      cell.pad_right(width - cell.cell_len)
      row.append_text(cell)
    row.rstrip()
    rows.append(row)
  return rows


def thousands(number: float) -> str:
  """12.3k."""
  for size, letter in ((1e9, 'G'), (1e6, 'M'), (1e3, 'k')):
    if number >= size:
      return f'{number / size:.1f}{letter}'
  return f'{number:.0f}'


def gibibytes(number: float) -> str:
  """1.2 GiB, or MiB below a tenth of one."""
  if number < 0.1 * 2**30:
    return f'{number / 2**20:.0f} MiB'
  return f'{number / 2**30:.1f} GiB'


def clock(seconds: float) -> str:
  """H:MM:SS, or M:SS below an hour; days where there are some."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  days, hours = divmod(hours, 24)
  if days:
    return f'{days} d {hours}:{minutes:02} h'
  if hours:
    return f'{hours}:{minutes:02}:{seconds:02}'
  return f'{minutes}:{seconds:02}'
