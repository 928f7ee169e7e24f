"""What a run directory says about its run: configuration, metrics, history.

Lenient where a run can die (a cut-off line, no end on record), strict where
only a wrong path or a damaged disk explains what is found.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from train import storage
from train.errors import UserError

_NUMBERS = (
  'tokens', 'learning_rate', 'grad_norm', 'clipped_norm', 'powered_norm',
  'tokens_per_second', 'data_seconds', 'skipped', 'memory', 'mfu', 'time',
)  # fmt: skip
# Lists of a number for each sparse layer, of which that of the one worst off.
_LISTS = {'expert_load_max': max, 'router_entropy': min}
# Of a measurement of noise: what others read, a number each.
_NOISE = ('power', 'power_error', 'noise_scale')
_TURNS = ('began', 'resumed', 'stopped', 'failed', 'done')
_FINITE = ('tokens', 'time')  # What other things are drawn against.
_STEPS = 10**15  # What would not fit in here is no step ...
_SECONDS = 253402300799.0  # ... no time (unix seconds) ...
_HUGE = 1e100  # ... and as good as infinity.
_NOT_OURS = (
  ValueError, TypeError, LookupError, AttributeError, OverflowError,
  RecursionError,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Event:
  """Something that happened to a run; `RunDir.event` writes them."""

  kind: str
  """'began', 'resumed', 'saved', 'skipped', 'stopped', 'failed', 'done' ..."""
  step: int
  time: float | None
  """Unix seconds; None where an older run does not say."""
  facts: dict[str, Any]
  """What else it says, as JSON holds it."""


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
  layers: dict[int, dict[str, dict[str, float]]] = dataclasses.field(
    default_factory=dict
  )
  """Step to path of a parameter to norms ('grad_norm' ...), by step."""
  noise: dict[int, dict[str, Any]] = dataclasses.field(default_factory=dict)
  """Step to what was measured of gradients' noise, by step: 'powers', 'parts',
  'seconds', 'overall' and 'tensors' (by path), each of which maps the fields of
  `gradpower_optax.noise.Noise` to a number, or to a list along the powers."""
  end: str = 'open'
  """'done', 'stopped' (asked to), 'failed' (with an error), or 'open': no end
  is on record, so the run is going on, or died."""
  error: str = ''
  """Why it failed, in one line."""
  params_digest: str = ''
  resumed: list[int] = dataclasses.field(default_factory=list)
  """Steps that the run was taken up from."""
  events: list[Event] = dataclasses.field(default_factory=list)
  """Its history, in order, over all restarts."""
  unreadable: int = 0
  """Lines of metrics.jsonl and events.jsonl that could not be read."""

  @property
  def last_step(self) -> int:
    """The last step with a measurement."""
    measured = [*self.train, *self.validation]
    # A run may die before it has measured anything.
    return max(measured or [event.step for event in self.events], default=0)

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


def read_run(name: str, directory: epath.PathLike) -> RunLog:
  """Reads a run directory, on a disk or an object store; changes nothing.

  Raises:
    UserError: config.json or metrics.jsonl is missing, empty, or not what it
      should be.
  """
  directory = epath.Path(directory)
  config = _read_object(directory / 'config.json')
  extra = directory / 'run.json'
  facts = _read_object(extra) if _exists(extra) else {}
  if isinstance(facts.get('versions'), dict):
    config = {**config, 'versions': facts['versions']}
  if isinstance(facts.get('devices'), str):
    config = {**config, 'devices': facts['devices']}
  run = RunLog(name, _flatten(config))
  metrics, history = directory / 'metrics.jsonl', directory / 'events.jsonl'
  # A run may die before it has measured anything; then its history is all.
  unmeasured = _exists(history) and not _exists(metrics)
  for line in _lines('' if unmeasured else _read(metrics)):
    try:
      _add(run, json.loads(line))
    except _NOT_OURS:
      run.unreadable += 1
  _add_history(run, history)
  if not (run.train or run.validation or run.events):
    raise UserError(f'{metrics} holds no measurement')
  run.train = dict(sorted(run.train.items()))
  run.validation = dict(sorted(run.validation.items()))
  run.layers = dict(sorted(run.layers.items()))
  run.noise = dict(sorted(run.noise.items()))
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


def _exists(path: epath.Path) -> bool:
  with storage.one_line_errors(path, 'read'):
    return path.exists()


def _text(path: epath.Path) -> str:
  with storage.one_line_errors(path, 'read'):
    # A line can be cut off inside a character.
    return path.read_bytes().decode('utf-8', 'replace')


def _read(path: epath.Path) -> str:
  text = _text(path)
  if not text.strip():
    raise UserError(f'{path} is empty')
  return text


def _lines(text: str) -> Iterator[str]:
  """Those that hold something; splitlines() would cut a string at U+2028."""
  return (line for line in text.split('\n') if line.strip())


def _read_object(path: epath.Path) -> dict[str, Any]:
  try:
    value = json.loads(_read(path))
  except (ValueError, RecursionError) as error:
    raise UserError(f'{path} is not JSON: {error}') from error
  if not isinstance(value, dict):
    raise UserError(f'{path} does not hold a JSON object')
  return value


def _add_history(run: RunLog, path: epath.Path) -> None:
  """Prefers events.jsonl, which nothing rewinds, to what metrics.jsonl says."""
  if not _exists(path):
    return
  events = []
  for line in _lines(_text(path)):
    try:
      events.append(_event(json.loads(line)))
    except _NOT_OURS:
      run.unreadable += 1
  if not events:
    return
  run.events = events
  run.resumed = [event.step for event in events if event.kind == 'resumed']
  turns = [event for event in events if event.kind in _TURNS]
  # How a run failed, or stopped in a hurry, is told here alone.
  if turns and turns[-1].kind in ('failed', 'stopped'):
    run.end = turns[-1].kind
    run.error = str(turns[-1].facts.get('error', ''))


def _event(line: dict[str, Any]) -> Event:
  facts = dict(line)
  kind, step = str(facts.pop('event')), _step(facts.pop('step'))
  time = float(facts.pop('time')) if 'time' in facts else None
  if not 0 <= (time or 0.0) <= _SECONDS:
    raise ValueError(line)
  return Event(kind, step, time, facts)


def _step(value: Any) -> int:
  if not 0 <= (step := int(value)) < _STEPS:
    raise ValueError(value)
  return step


def _number(value: Any) -> float:
  """Of what JSON holds; the strings 'nan', 'inf' and '-inf' too."""
  number = float(value)
  return math.copysign(math.inf, number) if abs(number) > _HUGE else number


def _add(run: RunLog, line: Any) -> None:
  """Adds one line to run; an exception says that it is not one of ours."""
  if not isinstance(line, dict):
    raise TypeError(line)
  event = line.get('event')
  if event is not None:
    run.events.append(_event(line))
  if event == 'resumed':
    step = _step(line['step'])
    # What came after the save that the run went on from was done again.
    dicts: list[dict[int, Any]] = [run.train, run.validation]
    for lines in (*dicts, run.layers, run.noise):
      for later in [s for s in lines if s > step]:
        del lines[later]
    run.resumed.append(step)
    run.end = 'open'
  elif event == 'stopped':
    run.end = 'stopped'
  elif event == 'done':
    step = _step(line['step'])
    if 'validation_loss' in line:
      last = {'step': step, 'loss': _number(line['validation_loss'])}
      trained = run.train.get(step, {})
      kept = {'tokens': trained['tokens']} if 'tokens' in trained else {}
      run.validation[step] = kept | run.validation.get(step, {}) | last
    run.params_digest = str(line.get('params_digest') or '')
    run.end = 'done'
  elif event is None and line['split'] == 'layers':
    run.layers[_step(line['step'])] = {
      path: {name: _number(norm) for name, norm in norms.items()}
      for path, norms in line['layers'].items()
    }
  elif event is None and line['split'] == 'noise':
    run.noise[_step(line['step'])] = _noise(line)
  elif event is None:
    step = _step(line['step'])
    point = {key: _number(line[key]) for key in _NUMBERS if key in line}
    for key, worst in _LISTS.items():
      if values := [_number(value) for value in line.get(key, ())]:
        point[key] = worst(values)
    if not all(math.isfinite(point.get(key, 0)) for key in _FINITE):
      raise ValueError(line)
    if not 0 <= point.get('time', 0) <= _SECONDS:
      raise ValueError(line)
    lines = {'train': run.train, 'validation': run.validation}[line['split']]
    lines[step] = {'step': step, 'loss': _number(line['loss']), **point}


def _noise(line: dict[str, Any]) -> dict[str, Any]:
  powers = [float(p) for p in line['powers']]
  if not all(0 < p < _HUGE for p in powers):
    raise ValueError(line)

  def numbers(found: dict[str, Any]) -> dict[str, Any]:
    read = {
      name: list(map(_number, x)) if isinstance(x, list) else _number(x)
      for name, x in found.items()
    }
    lists = {name: x for name, x in read.items() if isinstance(x, list)}
    if (
      any(len(values) != len(powers) for values in lists.values())
      or not lists['step_ratio']
      or not read.keys() - lists.keys() >= {*_NOISE}
    ):
      raise ValueError(line)
    return read

  tensors = {str(path): numbers(x) for path, x in line['tensors'].items()}
  return {
    'step': _step(line['step']),
    'powers': powers,
    'parts': int(line['parts']),
    'seconds': _number(line['seconds']),
    'overall': numbers(line['overall']),
    'tensors': tensors,
  }


def _flatten(value: Any, prefix: str = '') -> dict[str, Any]:
  if not isinstance(value, dict) or not value:
    return {prefix: value} if prefix else {}
  flat: dict[str, Any] = {}
  for key, inner in value.items():
    flat |= _flatten(inner, f'{prefix}.{key}' if prefix else key)
  return flat
