"""--data.prepared as it is typed: directories, weights and stages."""

import dataclasses
import os
import re

from train import errors
from train.data import order

_STAGE = re.compile(r'(\d+):')
_WEIGHT = re.compile(r'(.*)=((?:\d+\.?\d*|\.\d+)(?:e[+-]?\d+)?)', re.DOTALL)

UNREADABLE = (
  "the name of a directory to train on must not hold ',', ';' or '://', begin "
  "with '~', begin or end with a space, or look like a weight ('a=3') or a "
  "stage ('5:a'): name another"
)


@dataclasses.dataclass(frozen=True)
class Stage:
  """Some steps, in which the weights stay the same."""

  first_step: int
  """Steps before it: 0 for the first stage."""
  weights: tuple[float, ...]
  """Of each directory; 0 where the stage does not name it."""


@dataclasses.dataclass(frozen=True)
class Spec:
  """What is to be mixed, and how."""

  directories: tuple[str, ...]
  """Each once, in the order in which they are first named."""
  stages: tuple[Stage, ...]
  """At least one, in order."""


def parse(text: str, option: str = '--data.prepared') -> Spec:
  """Reads 'DIR', 'DIR=3,DIR=1' or 'DIR=3,DIR=1;1000:DIR=1,DIR=1'.

  From step 1000 on the last one has other weights. A directory without a
  weight has weight 1; only what is a number counts as one, so that a name can
  hold '=' as in 'lang=en', but not ',' or ';'. What is no number after the name
  of a directory is a mistake, unless there is one of the whole name.

  Args:
    text: As typed.
    option: Its name, for errors.

  Raises:
    UserError: it does not read as one of these, or is a directory's name that
      reads as something else.
  """
  if not is_name(text) and os.path.isdir(text):
    raise errors.UserError(f'{option} {text!r}: {UNREADABLE}')
  named: list[tuple[int, dict[str, float]]] = []
  for number, typed in enumerate(text.split(';')):
    first_step, part = 0, typed.strip()
    if match := _STAGE.match(part):
      first_step, part = int(match[1]), part[match.end() :]
    elif number:
      raise errors.UserError(
        f'{option}: {part!r} does not say from which step on it holds: write'
        " it as 'STEP:DIR=WEIGHT,DIR=WEIGHT'"
      )
    if not number and first_step:
      raise errors.UserError(
        f'{option}: the first stage must begin at step 0, not {first_step}'
      )
    if number and first_step <= named[-1][0]:
      raise errors.UserError(
        f'{option}: the stage from step {first_step} on must come after that'
        f' from step {named[-1][0]} on'
      )
    named.append((first_step, _weights(part, option)))
  directories = tuple(
    dict.fromkeys(name for _, stage in named for name in stage)
  )
  return Spec(
    directories,
    tuple(
      Stage(first, tuple(stage.get(name, 0.0) for name in directories))
      for first, stage in named
    ),
  )


def is_name(text: str) -> bool:
  """Whether a path is read as one directory, without a weight or a stage."""
  special = (
    _STAGE.match(text)
    or _WEIGHT.fullmatch(text)
    or re.search('^~|[,;]|://', text)
  )
  return not special and text == text.strip()


def _weights(text: str, option: str) -> dict[str, float]:
  """Reads the directories of a stage, and the weight of each."""
  weights: dict[str, float] = {}
  for item in text.split(','):
    name, weight = item.strip(), 1.0
    if match := _WEIGHT.fullmatch(name):
      name, weight = match[1].strip(), float(match[2])
    if not name:
      raise errors.UserError(
        f'{option}: {text!r} lacks the name of a directory'
      )
    if '://' in name:
      raise errors.UserError(
        f'{option}: {name} is not on a disk: copy it to one, records are read'
        ' at random'
      )
    name = os.path.normpath(os.path.expanduser(name))
    head, equals, tail = name.rpartition('=')
    if equals and os.path.isdir(head) and not os.path.exists(name):
      raise errors.UserError(
        f'{option}: the weight of {head} must be a number, not {tail!r}'
      )
    if name in weights:
      raise errors.UserError(f'{option}: {text!r} names {name} twice')
    if not 0 < weight < float('inf'):
      raise errors.UserError(
        f'{option}: the weight of {name} must be a number above 0, not'
        f' {weight:g}; a stage leaves out a directory that it does not name'
      )
    weights[name] = weight
  if not order.shares(list(weights.values())).all():
    raise errors.UserError(
      f'{option}: {text!r} gives a directory less than 1 example in'
      f' {order.BLOCK:,}: weights may not differ so much'
    )
  return weights
