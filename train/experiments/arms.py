"""Arms: what each side of a comparison changes of a recipe."""

import dataclasses
import re
from typing import Any

from train import cli
from train.config import Config
from train.errors import UserError

ALIASES = {
  'batch': 'data.batch_size',
  'eps': 'optimizer.eps',
  'lr': 'optimizer.learning_rate',
  'optimizer': 'optimizer.name',
  'p': 'optimizer.power',
  'power': 'optimizer.power',
  'schedule': 'optimizer.schedule',
  'wd': 'optimizer.weight_decay',
}
"""Short names of fields."""

_NAME = re.compile(r'[A-Za-z0-9][\w.+-]*')
# Paired arms begin with the same parameters and see the same text.
_SHARED = ('model.', 'data.', 'mesh.', 'guard.', 'keep.')
_ALSO_SHARED = ('seed', 'eval_every', 'save_every', 'steps', 'accumulate',
                'deterministic')  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Arm:
  """One side of a comparison."""

  name: str
  """Of letters, digits and '_.+-'."""
  overrides: dict[str, Any] = dataclasses.field(default_factory=dict)
  """Dotted path of a field, 'optimizer.power', to its value."""

  def but(self, name: str, **optimizer: Any) -> 'Arm':
    """Returns another arm, with fields of the optimizer changed as well."""
    changed = {f'optimizer.{field}': v for field, v in optimizer.items()}
    return Arm(name, self.overrides | changed)

  def config(self, base: Config) -> Config:
    """Returns a config with what this arm changes.

    Raises:
      UserError: the values do not go together.
    """
    try:
      return cli.with_values(base, self.overrides)
    except UserError as error:
      raise UserError(f'arm {self.name}: {error}') from error


def parse(text: str) -> Arm:
  """Reads 'NAME' or 'NAME:field=value,field=value'.

  Args:
    text: Fields are those of the command line, 'optimizer.power', or
      `ALIASES`.

  Raises:
    UserError: there is no such field, or its value makes no sense.
  """
  name, colon, changes = text.partition(':')
  if not _NAME.fullmatch(name) or (colon and not changes):
    raise UserError(
      f'{text!r} is no arm: write NAME or NAME:field=value,field=value, as in '
      'p12:power=1.2'
    )
  overrides: dict[str, Any] = {}
  for change in changes.split(',') if changes else ():
    path, value = parse_change(change)
    if path in overrides:
      raise UserError(f'arm {name} sets {path} twice')
    overrides[path] = value
  return Arm(name, overrides)


def parse_change(text: str) -> tuple[str, Any]:
  """Reads 'field=value'; returns the dotted path, and the value typed.

  Raises:
    UserError: as for `parse`.
  """
  field, equals, value = text.partition('=')
  if not (field and equals and value):
    raise UserError(f'{text!r} is no change: write field=value, as in lr=1e-3')
  path = ALIASES.get(field, field)
  return path, cli.value(path, value, also=sorted(ALIASES))


def parse_all(texts: list[str]) -> list[Arm]:
  """Reads the arms of a comparison, of which the first is the baseline.

  Raises:
    UserError: as for `parse`; there are too few, two have one name or do the
      same, or one changes what arms of a pair must share.
  """
  arms = [parse(text) for text in texts]
  if len(arms) < 2:
    raise UserError(
      'a comparison needs two arms at least, as in --arm base --arm '
      'p12:power=1.2'
    )
  for i, arm in enumerate(arms):
    for other in arms[:i]:
      if arm.name == other.name:
        raise UserError(f'two arms are named {arm.name}')
      if arm.overrides == other.overrides:
        raise UserError(f'arms {other.name} and {arm.name} change the same')
    for path in arm.overrides:
      if path.startswith(_SHARED) or path in _ALSO_SHARED:
        raise UserError(
          f'arm {arm.name} changes {path}, which the arms of a pair share: '
          f'give --{path} for all of them'
          + (' (seeds are --seeds)' if path == 'seed' else ', or use sweep')
        )
  return arms
