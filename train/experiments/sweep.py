"""Points, each on the same seeds: the loss over learning rate, p, size, ...

DIR/results.json and report.html show the points of the command; cells that an
earlier one has run are taken from the store.
"""

import dataclasses
import itertools
import json
import math
import operator
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from train import cli, distributed, storage
from train.config import Config
from train.errors import UserError
from train.experiments import experiment, place, sweep_page
from train.experiments.arms import ALIASES, parse_change
from train.experiments.cells import Cell, Store
from train.experiments.comparison import ArmResult

SIZE = 'size'
"""Not a field, but another recipe: its model and its steps."""
_RESULTS, _PAGE = 'results.json', 'report.html'
_SHORT = {path: alias for alias, path in ALIASES.items() if alias != 'power'}
# What goes by steps, and is to come after as many tokens.
_BY_STEPS = ('steps', 'optimizer.warmup_steps', 'eval_every', 'save_every')
_PER_STEP = ('data.batch_size', 'data.sequence_length')
_OTHER_TEXT = (
  'The points differ in text, vocabulary, split or held-out tokens: their '
  'losses do not compare, and none is called the best.'
)
_OTHER_TOKENS = 'The points differ in the tokens that they are trained on.'

Overrides = Mapping[str, Any]
"""Dotted path, or 'size', to a value."""


@dataclasses.dataclass(frozen=True)
class Request:
  """What `python -m train sweep` is asked for."""

  recipe: str
  config: Callable[[str], Config]
  """That of a recipe, with the options given."""
  given: frozenset[str]
  """Paths of those options."""
  points: Sequence[Overrides]
  seeds: Sequence[int]
  out: pathlib.Path
  store: pathlib.Path | None = None
  """Of the cells; None for one in `out`."""
  command: str = ''
  """What was typed."""


def parse(grid: Sequence[str], single: Sequence[str]) -> list[Overrides]:
  """Reads the points of a sweep.

  Args:
    grid: 'field=value,value' each, of which all combinations are taken, the
      last field's values one after the other.
    single: 'field=value,field=value' each: a point.

  Raises:
    UserError: there is no such field, or its value makes no sense; or a point
      is there twice.
  """
  axes: dict[str, list[Any]] = {}
  for text in grid:
    field, equals, values = text.partition('=')
    if not (field and equals and values):
      raise UserError(
        f'--over {text}: write field=value,value, as in lr=1e-3,2e-3'
      )
    changes = [_change(f'{field}={value}') for value in values.split(',')]
    path = changes[0][0]
    if path in axes:
      raise UserError(f'--over {text}: {path} is swept already')
    axes[path] = [value for _, value in changes]
  points: list[Overrides] = []
  if axes:
    points += [
      dict(zip(axes, values, strict=True))
      for values in itertools.product(*axes.values())
    ]
  for text in single:
    changes = [_change(change) for change in text.split(',')]
    if len(dict(changes)) < len(changes):
      raise UserError(f'--point {text} sets a field twice')
    points.append(dict(changes))
  if not points:
    raise UserError(
      'nothing is swept: give --over lr=1e-3,2e-3, say, or --point p=1.2'
    )
  for i, point in enumerate(points):
    if point in points[:i]:
      raise UserError(f'the point {label(point)} is there twice')
  return points


def _change(text: str) -> tuple[str, Any]:
  field, equals, value = text.partition('=')
  if field == SIZE and equals and value:
    return SIZE, value
  path, value = parse_change(text)
  if path == 'seed':
    raise UserError(f'{text}: seeds are --seeds, the same for every point')
  return path, value


def label(point: Overrides) -> str:
  """A point's name, 'lr=0.001 p=1.2'."""
  return ' '.join(
    f'{short(path)}={_as_text(value)}' for path, value in point.items()
  )


def short(path: str) -> str:
  """A field's alias, where it has one."""
  return _SHORT.get(path, path)


def _as_text(value: Any) -> str:
  return str(value).lower() if isinstance(value, bool) else str(value)


def config(request: Request, point: Overrides) -> Config:
  """Returns the config of a point.

  A point that changes the tokens of a step has as many tokens in all: steps,
  warm-up, evaluations and saves go by tokens, unless the command or the point
  says how many steps there are. Of them, what is an option of the command, or
  of the point, stays as it is.

  Raises:
    UserError: the values do not go together.
  """
  changes = dict(point)
  base = request.config(changes.pop(SIZE, request.recipe))
  try:
    per_step = {path: changes[path] for path in _PER_STEP if path in changes}
    fixed = request.given | changes.keys()
    if per_step and 'steps' not in fixed:
      new = cli.with_values(base, per_step)
      share = base.tokens_per_step / new.tokens_per_step
      for path in _BY_STEPS:
        value = _value(base, path)
        if value and path not in fixed:
          # As `batches.with_batch`: the same cells, and no token less.
          whole = math.ceil if path == 'steps' else round
          changes[path] = max(1, whole(value * share))
    return cli.with_values(base, changes)
  except UserError as error:
    raise UserError(f'point {label(point)}: {error}') from error


def _value(config: Config, path: str) -> Any:
  """A field's; None where the family of the model has no such field."""
  try:
    return operator.attrgetter(path)(config)
  except AttributeError:
    return None


def _tokens(config: Config) -> int:
  return config.steps * config.tokens_per_step


def run(request: Request, engine: experiment.Engine, *, dry: bool) -> int:
  """Runs what of a sweep is missing, and writes what it has come to.

  Args:
    request: What to sweep.
    engine: Where cells are run.
    dry: Prints what it costs, and ends.

  Returns:
    The exit status.

  Raises:
    UserError: the input is at fault.
  """
  points = {label(point): point for point in request.points}
  configs = {name: config(request, point) for name, point in points.items()}
  cells = [
    experiment.cell(name, dataclasses.replace(own, seed=seed))
    for seed in request.seeds
    for name, own in configs.items()
  ]
  store = Store(request.store or request.out / 'cells')
  new = experiment.missing(cells, store)
  experiment.say_budget(cells, new, store, engine)
  if dry:
    return 0
  status = 0
  with place.held(request.out, store.directory):
    try:
      if new:
        status = experiment.run_missing(
          new, store, request.out / 'runs', engine
        )
    finally:
      result = _write(request, points, cells, store)
  if distributed.is_main():
    order = 'the lowest mean over seeds first'
    if not result.compares:
      order = f'in the order given. {_OTHER_TEXT}'
    cli.say(
      f'\nheld-out loss, nats a token, {order}:\n'
      f'{sweep_page.text(result)}\n\nreport: {request.out / _PAGE}'
    )
  return status


def _write(
  request: Request,
  points: Mapping[str, Overrides],
  cells: Sequence[Cell],
  store: Store,
) -> sweep_page.Sweep:
  """Writes what there is so far.

  Raises:
    UserError: it cannot be written.
  """
  fields = list(
    dict.fromkeys(path for each in points.values() for path in each)
  )
  found = []
  for name, point in points.items():
    own = [cell for cell in cells if cell.arm == name]
    values = {path: _value(own[0].config, path) for path in fields}
    if SIZE in fields:
      values[SIZE] = point.get(SIZE, request.recipe)
    records = {cell.seed: store.get(cell.key) for cell in own}
    found.append(
      sweep_page.Point(
        ArmResult(name, point, records),
        {short(path): value for path, value in values.items()},
        own[0].config,
        f'{own[0].source_hash} {own[0].config.data.validation_tokens}',
      )
    )
  notes = []
  if len({point.held_out for point in found}) > 1:
    notes.append(_OTHER_TEXT)
  if SIZE not in fields and len({_tokens(cell.config) for cell in cells}) > 1:
    notes.append(_OTHER_TOKENS)
  result = sweep_page.Sweep(
    f'{request.recipe}: {", ".join(map(short, fields))}',
    found,
    notes,
    request.command,
  )
  if distributed.is_main():
    path = request.out / _RESULTS
    with storage.one_line_errors(path):
      path.parent.mkdir(parents=True, exist_ok=True)
      text = json.dumps(sweep_page.to_json(result), indent=2)
      storage.write_atomically(path, text + '\n')
    sweep_page.write(request.out / _PAGE, result)
  return result
