"""Figures with their tables alone on a page."""

import dataclasses
import html
from collections.abc import Sequence

from etils import epath

from train import plots, report_style, storage
from train.errors import UserError


@dataclasses.dataclass(frozen=True)
class Section:
  """A figure, and the table of what it shows."""

  heading: str
  caption: str
  drawn: str
  """HTML: a legend if need be, and a plot; '' for none."""
  rows: Sequence[Sequence[str]] = ()
  """The heads, and the cells of each row; none for no table."""


def write(
  path: epath.PathLike,
  title: str,
  sections: Sequence[Section],
  notes: Sequence[str] = (),
  *,
  found: Sequence[str] = (),
  small: str = '',
) -> None:
  """Writes a self-contained page, atomically; the same input, the same bytes.

  Args:
    path: The HTML file; its folder must exist.
    title: The page's heading.
    sections: What stands on it, from above.
    notes: Caveats, shown in a callout below all.
    found: What has come of it, in sentences: the first stands out, above all.
    small: What they rest on, in small letters.

  Raises:
    UserError: path cannot be written.
  """
  body = lead(small, *found) if found else ''
  body += ''.join(map(_section, sections))
  if notes:
    body += f'<h2>Notes</h2>{callout(notes, small=True)}'
  save(path, report_style.page(title, body))


def save(path: epath.PathLike, text: str) -> None:
  """Writes a page, atomically.

  Raises:
    UserError: path cannot be written.
  """
  path = epath.Path(path)
  with storage.one_line_errors(path):
    try:
      storage.write_atomically(path, text)
    except OSError as error:
      raise UserError(storage.reason(error, path)) from error


def lead(small: str, first: str, *rest: str) -> str:
  """What a page has to say, as HTML: a remark, the result, and more of it."""
  remark = f'<p><small>{html.escape(small)}</small></p>' if small else ''
  more = ''.join(f'<p>{html.escape(each)}</p>' for each in rest)
  return (
    f'<div class="lead">{remark}<p class="first">{html.escape(first)}</p>'
    f'{more}</div>'
  )


def callout(notes: Sequence[str], *, small: bool = False) -> str:
  """The notes in a box, as HTML."""
  items = ''.join(f'<p>{html.escape(note)}</p>' for note in notes)
  size = ' class="small"' if small else ''
  return f'<aside aria-label="Notes"{size}>{items}</aside>' if notes else ''


def table(caption: str, rows: Sequence[Sequence[str]]) -> str:
  """A table as HTML that scrolls sideways where the page is narrow.

  Args:
    caption: Above it.
    rows: The heads, and the cells of each row, as plain text.
  """
  heads, *body = [[html.escape(cell) for cell in row] for row in rows]
  head = ''.join(f'<th scope="col">{cell}</th>' for cell in heads)
  lines = ''.join(
    f'<tr><th scope="row">{row[0]}</th>'
    + ''.join(f'<td>{cell}</td>' for cell in row[1:])
    + '</tr>'
    for row in body
  )
  caption = html.escape(caption)
  return (
    f'<div class="scroll" role="region" tabindex="0" aria-label="{caption}">'
    f'<table><caption>{caption}</caption><thead><tr>{head}</tr></thead>'
    f'<tbody>{lines}</tbody></table></div>'
  )


def _section(section: Section) -> str:
  drawn = plots.figure(
    section.heading, section.caption, section.drawn, wide=True
  )
  if drawn:
    drawn = f'<div class="figures alone">{drawn}</div>'
  else:
    # What cannot be drawn is still told.
    drawn = (
      f'<h2>{html.escape(section.heading)}</h2>'
      f'<p>{html.escape(section.caption)}</p>'
    )
  return drawn + (table(section.heading, section.rows) if section.rows else '')
