"""Lines at the foot of a terminal, drawn again in place.

What else this process prints appears above them, as whole lines: `sys.stdout`
and `sys.stderr` are led through here while the lines are up, and so are
logging's handlers. The cursor stays visible, at the start of the line below: a
process that is killed leaves its terminal as it should be.
"""

import contextlib
import io
import logging
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TextIO

import rich.console
import rich.text

_SECONDS_BETWEEN_DRAWINGS = 0.25

Draw = Callable[[int, int, bool], rich.text.Text]


class Live:
  """Draws until it is stopped, four times a second, in a thread.

  Args:
    file: The terminal.
    draw: Width, height and whether more than ASCII can be shown, to the text.
  """

  def __init__(self, file: TextIO, draw: Draw):
    self._file = file
    self._draw = draw
    self._text = io.StringIO()
    self._console = rich.console.Console(
      file=self._text, force_terminal=True, highlight=False
    )
    encoding = getattr(file, 'encoding', None) or 'ascii'
    self._unicode = encoding.lower().startswith('utf')
    self._lock = threading.RLock()
    self._lengths: list[int] = []  # Of the lines that are up, in cells.
    self._stopped = threading.Event()
    self._streams = contextlib.ExitStack()
    self._streams.enter_context(_lead_through(self.above))
    self._thread = threading.Thread(target=self._keep_drawing, daemon=True)
    self._thread.start()

  def above(self, text: str) -> None:
    """Prints text, which ends in a line break, above the lines."""
    with self._lock:
      self._write(f'{self._to_top()}\x1b[J{text}{self._lines()}')

  def stop(self) -> None:
    """Draws for the last time and leaves the lines as they stand."""
    self._stopped.set()
    self._thread.join()
    self._streams.close()
    self._refresh()

  def _keep_drawing(self) -> None:
    while not self._stopped.is_set():
      self._refresh()
      self._stopped.wait(_SECONDS_BETWEEN_DRAWINGS)

  def _refresh(self) -> None:
    with self._lock:
      # Each line is written over, none is erased before: that would flicker.
      self._write(f'{self._to_top()}{self._lines()}\x1b[J')

  def _to_top(self) -> str:
    """Moves to the first line.

    One too long for a terminal that was made narrower has become several.
    """
    width = self._console.width
    rows = sum(max(1, -(-length // width)) for length in self._lengths)
    return f'\r\x1b[{rows}A' if rows else ''

  def _lines(self) -> str:
    width, height = self._console.size
    # The last column stays free: some terminals break the line there.
    text = self._draw(width - 1, height, self._unicode)
    lines = text.split('\n', allow_blank=True)
    self._lengths = [line.cell_len for line in lines]
    self._text.seek(0)
    self._text.truncate()
    for line in lines:
      self._console.print(line, no_wrap=True, crop=False, soft_wrap=True)
    return self._text.getvalue().replace('\n', '\x1b[K\n')

  def _write(self, text: str) -> None:
    # A terminal that has gone away is no reason to stop training.
    with contextlib.suppress(OSError, ValueError):
      self._file.write(text)
      self._file.flush()


class _Above:
  """A stream of a terminal, whose whole lines go elsewhere."""

  def __init__(self, stream: TextIO, above: Callable[[str], None]):
    self.stream = stream
    self._above = above
    self._rest = ''

  def write(self, text: str) -> int:
    """Passes on what ends in a line break, and keeps the rest."""
    lines, end, self._rest = (self._rest + text).rpartition('\n')
    if end:
      self._above(lines + end)
    return len(text)

  def writelines(self, lines: Iterable[str]) -> None:
    """Likewise."""
    self.write(''.join(lines))

  def flush(self) -> None:
    """Does nothing: whole lines are passed on at once."""

  def finish(self) -> None:
    """Passes on the rest."""
    if self._rest:
      self.write('\n')

  def __getattr__(self, name: str) -> Any:
    return getattr(self.stream, name)


@contextlib.contextmanager
def _lead_through(above: Callable[[str], None]) -> Iterator[None]:
  """Leads what is printed to a terminal through a function."""
  before = {
    name: stream
    for name in ('stdout', 'stderr')
    if (stream := getattr(sys, name)) is not None and stream.isatty()
  }
  streams = {id(old): _Above(old, above) for old in before.values()}
  for name, old in before.items():
    setattr(sys, name, streams[id(old)])
  handlers = [
    handler
    for handler in _handlers()
    if id(getattr(handler, 'stream', None)) in streams
  ]
  for handler in handlers:
    handler.setStream(streams[id(handler.stream)])
  try:
    yield
  finally:
    for name, old in before.items():
      if getattr(sys, name) is streams[id(old)]:
        setattr(sys, name, old)
    for stream in streams.values():
      stream.finish()
    for handler in handlers:
      if isinstance(handler.stream, _Above):
        handler.setStream(handler.stream.stream)


def _handlers() -> list[Any]:
  """Of all loggers, those that write to a stream."""
  loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
  found = [
    handler
    for logger in loggers
    for handler in getattr(logger, 'handlers', ())
    if isinstance(handler, logging.StreamHandler)
  ]
  return list({id(handler): handler for handler in found}.values())
