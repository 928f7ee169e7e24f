"""A directory holds one experiment: no other is written over it."""

import json
import pathlib

from train import step_dirs
from train.errors import UserError

COMPARISON, SWEEP = 'a comparison', 'a sweep'
_ELSE = 'something else'


def figure(name: str) -> str:
  """What a directory with a figure holds, for `check`."""
  return f'figure {name}'


def check(out: pathlib.Path, kind: str) -> None:
  """Refuses a directory of another kind of experiment, or one unfit for runs.

  Args:
    out: Where results.json and report.html go; it need not exist.
    kind: `COMPARISON`, `SWEEP`, or a `figure`.

  Raises:
    UserError: it holds another, or cannot hold checkpoints.
  """
  step_dirs.absolute(out)
  held = _held(out)
  if held not in ('', kind):
    raise UserError(
      f'{out} holds {held}, which {kind} would write over: name another --out'
    )


def _held(out: pathlib.Path) -> str:
  """What a directory holds; empty where nothing would be lost."""
  if (out / 'plan.json').exists():
    return COMPARISON
  results = out / 'results.json'
  if not results.exists():
    return f'the report of {_ELSE}' if (out / 'report.html').exists() else ''
  try:
    document = json.loads(results.read_text())
    if 'figure' in document:
      return figure(document['figure'])
    return SWEEP if 'points' in document else _ELSE
  except (OSError, ValueError, TypeError):
    return _ELSE
