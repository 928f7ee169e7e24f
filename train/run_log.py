"""What a run directory says about its run: config.json and metrics.jsonl.

Lenient where a run can die (a cut-off line, no end on record), strict where
only a wrong path or a damaged disk explains what is found.
"""

import dataclasses
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any

from train.errors import UserError

_NUMBERS = ('tokens', 'learning_rate', 'grad_norm', 'tokens_per_second')


@dataclasses.dataclass
class RunLog:
  """One run, as its directory tells it."""

  name: str
  config: dict[str, Any]
  """Flat, 'optimizer.power' to value; versions are 'versions.jax' and so on."""
  train: dict[int, dict[str, float]] = dataclasses.field(default_factory=dict)
  """Step to measurements ('step', 'loss', maybe 'tokens' ...), by step."""
  validation: dict[int, dict[str, float]] = dataclasses.field(
    default_factory=dict
  )
  """As train, on held-out text; the final loss is the last entry."""
  end: str = 'died'
  """'done', 'stopped' (asked to, and said so), or 'died' (no end on record)."""
  params_digest: str = ''
  resumed: list[int] = dataclasses.field(default_factory=list)
  """Steps that the run was taken up from."""
  unreadable: int = 0
  """Lines of metrics.jsonl that could not be read."""

  @property
  def last_step(self) -> int:
    """The last step with a measurement."""
    return max([*self.train, *self.validation])

  @property
  def tokens(self) -> float | None:
    """Training tokens seen; None where no line says."""
    lines = [*self.train.values(), *self.validation.values()]
    return max((m['tokens'] for m in lines if 'tokens' in m), default=None)

  def series(
    self, key: str, x: str = 'step', split: str = 'train'
  ) -> Sequence[tuple[float, float]]:
    """(x, key) of the split's lines that have both; x: 'step' or 'tokens'."""
    lines = self.train if split == 'train' else self.validation
    return [(m[x], m[key]) for m in lines.values() if x in m and key in m]


def read_run(name: str, directory: pathlib.Path) -> RunLog:
  """Reads a run directory.

  Raises:
    UserError: config.json or metrics.jsonl is missing, empty, or not what it
      should be.
  """
  config = _read_object(directory / 'config.json')
  extra = directory / 'run.json'
  versions = _read_object(extra).get('versions') if extra.exists() else None
  if isinstance(versions, dict):
    config = {**config, 'versions': versions}
  run = RunLog(name, _flatten(config))
  metrics = directory / 'metrics.jsonl'
  # Split at '\n' alone: splitlines() would also split at U+2028 in a string.
  for line in _read(metrics).split('\n'):
    if line.strip():
      try:
        _add(run, json.loads(line))
      except (
        ValueError,
        TypeError,
        LookupError,
        OverflowError,
        RecursionError,
      ):
        run.unreadable += 1
  if not run.train and not run.validation:
    raise UserError(f'{metrics} holds no measurement')
  run.train = dict(sorted(run.train.items()))
  run.validation = dict(sorted(run.validation.items()))
  return run


def x_key(runs: Sequence[RunLog]) -> str:
  """'tokens' where runs differ in tokens a step, else 'step'."""
  rates = {
    round(m['tokens'] / m['step'], 3) if 'tokens' in m else 0
    for run in runs
    for m in run.train.values()
    if m['step']
  }
  return 'tokens' if len(rates) > 1 and 0 not in rates else 'step'


def paired_difference(
  run: RunLog, base: RunLog, x: str
) -> list[tuple[float, float]]:
  """(x, validation loss of run minus that of base) where both have one."""
  theirs = dict(base.series('loss', x, 'validation'))
  ours = run.series('loss', x, 'validation')
  return [(at, loss - theirs[at]) for at, loss in ours if at in theirs]


def _read(path: pathlib.Path) -> str:
  try:
    # A line can be cut off inside a character.
    text = path.read_bytes().decode('utf-8', 'replace')
  except OSError as error:
    raise UserError(f'cannot read {path}: {error.strerror}') from error
  if not text.strip():
    raise UserError(f'{path} is empty')
  return text


def _read_object(path: pathlib.Path) -> dict[str, Any]:
  try:
    value = json.loads(_read(path))
  except (ValueError, RecursionError) as error:
    raise UserError(f'{path} is not JSON: {error}') from error
  if not isinstance(value, dict):
    raise UserError(f'{path} does not hold a JSON object')
  return value


def _add(run: RunLog, line: Any) -> None:
  """Adds one line to run; an exception says that it is not one of ours."""
  if not isinstance(line, dict):
    raise TypeError(line)
  event = line.get('event')
  if event == 'resumed':
    step = int(line['step'])
    # What came after the save that the run went on from was done again.
    for lines in (run.train, run.validation):
      for later in [s for s in lines if s > step]:
        del lines[later]
    run.resumed.append(step)
    run.end = 'died'
  elif event == 'stopped':
    run.end = 'stopped'
  elif event == 'done':
    step = int(line['step'])
    if 'validation_loss' in line:
      last = {'step': step, 'loss': float(line['validation_loss'])}
      trained = run.train.get(step, {})
      kept = {'tokens': trained['tokens']} if 'tokens' in trained else {}
      run.validation[step] = kept | run.validation.get(step, {}) | last
    run.params_digest = str(line.get('params_digest') or '')
    run.end = 'done'
  elif event is None:
    step = int(line['step'])
    # float() also reads the strings 'nan', 'inf' and '-inf'.
    point = {key: float(line[key]) for key in _NUMBERS if key in line}
    if not math.isfinite(point.get('tokens', 0)):
      raise ValueError(line)
    lines = {'train': run.train, 'validation': run.validation}[line['split']]
    lines[step] = {'step': step, 'loss': float(line['loss']), **point}


def _flatten(value: Any, prefix: str = '') -> dict[str, Any]:
  if not isinstance(value, dict) or not value:
    return {prefix: value} if prefix else {}
  flat: dict[str, Any] = {}
  for key, inner in value.items():
    flat |= _flatten(inner, f'{prefix}.{key}' if prefix else key)
  return flat
