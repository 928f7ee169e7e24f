"""Makes the pictures here of the live display and of the report.

    python docs/images/make.py

trains the demo in a terminal of its own, minutes on two CPU cores. With
`--run-dir` of a demo that is over, only the report's pictures are made again.
They need Chromium or Chrome on the PATH.
"""

import argparse
import io
import os
import pathlib
import pty
import re
import shutil
import subprocess
import sys
import tempfile
import termios

import rich.ansi
import rich.console

_HERE = pathlib.Path(__file__).resolve().parent
_BROWSERS = ('chromium', 'chromium-browser', 'google-chrome', 'chrome')
_COLUMNS, _ROWS = 100, 40
_ARM, _STEP = 'adamw_power', 300
_FONTS = (
  "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
)
# Name, width and height of the window, pixels to one of the page's.
_PAGES = (
  ('demo-report.png', 1180, 1460, 1),
  ('demo-report-phone.png', 390, 1500, 2),
)


def main() -> None:
  """Makes all pictures that it can."""
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--run-dir', type=pathlib.Path, help='default: temporary')
  run_dir = parser.parse_args().run_dir
  with tempfile.TemporaryDirectory() as scratch:
    run_dir = (run_dir or pathlib.Path(scratch) / 'demo').resolve()
    frame = _frame(_run_demo(run_dir))
    if frame is None:
      print('display.svg: left as it is, the run was over before')
    else:
      _write_svg(frame, _HERE / 'display.svg')
    browser = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if browser is None:
      sys.exit(f'pictures of the report need one of {", ".join(_BROWSERS)}')
    for name, *size in _PAGES:
      _photograph(browser, run_dir / 'report.html', _HERE / name, *size)


def _run_demo(run_dir: pathlib.Path) -> str:
  """Trains; returns all that the terminal was sent."""
  above, below = pty.openpty()
  termios.tcsetwinsize(below, (_ROWS, _COLUMNS))
  environment = {**os.environ, 'TERM': 'xterm-256color'}
  for name in ('COLUMNS', 'LINES', 'NO_COLOR'):
    environment.pop(name, None)
  program = subprocess.Popen(
    [sys.executable, '-m', 'train', 'demo', '--run-dir', run_dir],
    cwd=_HERE.parents[1], env=environment,
    stdin=below, stdout=below, stderr=below,
  )  # fmt: skip
  os.close(below)
  text = b''
  while part := _read(above):
    text += part
    sys.stdout.write(part.decode(errors='replace'))
    sys.stdout.flush()
  if program.wait():
    sys.exit('the demo has failed')
  return text.decode()


def _read(terminal: int) -> bytes:
  try:
    return os.read(terminal, 65536)
  except OSError:  # Nobody has the other end any more.
    return b''


def _frame(text: str) -> str | None:
  """The display as it was at a step."""
  for frame in re.split(r'\r\x1b\[\d+A', text):
    plain = re.sub(r'\x1b\[[0-9;]*[A-Za-z]', '', frame)
    step = re.match(rf' {_ARM} +step (\d+) of', plain)
    if step and int(step[1]) >= _STEP and ' left' in plain:
      return frame.partition('\x1b[J')[0]
  return None


def _write_svg(frame: str, path: pathlib.Path) -> None:
  console = rich.console.Console(
    record=True, width=_COLUMNS, file=io.StringIO(), force_terminal=True
  )
  lines = frame.replace('\x1b[K', '').replace('\r', '').rstrip('\n')
  console.print()
  for line in rich.ansi.AnsiDecoder().decode(lines):
    console.print(line, soft_wrap=True)
  console.print()
  # Fonts of the reader's: nothing is to be loaded from elsewhere.
  form = re.sub(
    r'@font-face \{\{.*?\}\}', '', rich.console.CONSOLE_SVG_FORMAT,
    flags=re.DOTALL,
  ).replace('Fira Code, monospace', _FONTS)  # fmt: skip
  svg = console.export_svg(
    title='python -m train demo', code_format=form, unique_id='display'
  )
  path.write_text(re.sub(r'[ \t]+\n', '\n', svg), 'utf-8')
  print(f'{path.name}: {len(svg):,} bytes')


def _photograph(
  browser: str,
  page: pathlib.Path,
  path: pathlib.Path,
  width: int,
  height: int,
  scale: int,
) -> None:
  with tempfile.TemporaryDirectory() as profile:
    subprocess.run(
      [
        browser, '--headless', '--no-sandbox', '--disable-gpu',
        '--hide-scrollbars', '--disable-background-networking',
        f'--user-data-dir={profile}', f'--force-device-scale-factor={scale}',
        f'--window-size={width},{height}', f'--screenshot={path}',
        page.as_uri(),
      ],
      check=True, stderr=subprocess.DEVNULL, timeout=120,
    )  # fmt: skip
  print(f'{path.name}: {path.stat().st_size:,} bytes')


if __name__ == '__main__':
  main()
