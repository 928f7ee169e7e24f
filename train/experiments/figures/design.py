"""What a figure is made of: the cases that are trained, and what is drawn."""

import argparse
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from models.config import Qwen2MoeConfig
from train import cli
from train.config import Config
from train.errors import UserError
from train.experiments.arms import Arm
from train.experiments.figure_page import Section

LAPTOP, PAPER = 'laptop', 'paper'
SCALES = (LAPTOP, PAPER)
POWER = 'optimizer.power'


@dataclasses.dataclass(frozen=True)
class Request:
  """What `python -m train figure` is asked for."""

  figure: str
  """Key of `make.FIGURES`."""
  out: pathlib.Path
  scale: str = LAPTOP
  """One of `SCALES`."""
  sizes: Sequence[str] = ()
  """Recipes; none for those of the scale."""
  seeds: Sequence[int] = (0, 1, 2)
  store: pathlib.Path | None = None
  """Of the cells; None for one in `out`."""
  texts: Mapping[str, str] = dataclasses.field(default_factory=dict)
  """Of figure 3: name to a glob of files or a prepared directory."""
  noise_run: pathlib.Path | None = None
  """Of figure 7: a run with moments of its gradients."""
  fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  """Dotted path to value, in every cell."""
  command: str = ''
  """What was typed."""
  dry: bool = False
  """Whether nothing is to be run."""

  def config(self, recipe: str, **choices: str) -> Config:
    """Returns a recipe's config with the fields that were given.

    Args:
      recipe: Its name.
      **choices: 'corpus' and 'schedule', where they were not given.

    Raises:
      UserError: there is no such recipe, or the values make no valid config.
    """
    paths = {'corpus': 'data.corpus', 'schedule': 'optimizer.schedule'}
    chosen = {paths[name]: value for name, value in choices.items()}
    return cli.config(recipe, argparse.Namespace(**chosen | dict(self.fields)))

  def by_scale(self, laptop: Any, paper: Any) -> Any:
    """Whichever the scale has."""
    return laptop if self.scale == LAPTOP else paper

  def size(self, laptop: str, paper: str) -> str:
    """The one recipe of a figure: as given, or that of the scale.

    Raises:
      UserError: several were given.
    """
    if len(self.sizes) > 1:
      raise UserError(f'figure {self.figure} takes one size, not several')
    return self.sizes[0] if self.sizes else self.by_scale(laptop, paper)


@dataclasses.dataclass(frozen=True)
class Case:
  """One arm of one recipe: a cell on each seed."""

  name: str
  """Unique in its figure: 'dense_0.1m/p1.2'."""
  recipe: str
  config: Config
  overrides: Mapping[str, Any]
  """What the figure changes of the recipe, by dotted path."""


def case(
  name: str, recipe: str, config: Config, overrides: Mapping[str, Any]
) -> Case:
  """Makes a case of a config and what changes of it.

  Raises:
    UserError: the values do not go together.
  """
  arm = Arm(name, dict(overrides))
  return Case(name, recipe, arm.config(config), arm.overrides)


def power_name(prefix: str, p: float) -> str:
  """Of the case at a power."""
  return f'{prefix}/p{p:g}'


def at_powers(
  prefix: str,
  recipe: str,
  config: Config,
  powers: Sequence[float],
  shared: Mapping[str, Any] | None = None,
) -> list[Case]:
  """Cases that differ in the power alone, and share what else is changed."""
  return [
    case(power_name(prefix, p), recipe, config, {**(shared or {}), POWER: p})
    for p in powers
  ]


def against_one(prefix: str, powers: Sequence[float]) -> list[tuple[str, str]]:
  """Each other power against p = 1."""
  base = power_name(prefix, 1.0)
  return [(power_name(prefix, p), base) for p in powers if p != 1.0]


def is_sparse(config: Config) -> bool:
  """Whether the model is a mixture of experts."""
  return isinstance(config.model, Qwen2MoeConfig)


@dataclasses.dataclass(frozen=True)
class Design:
  """All that a figure is to train."""

  title: str
  cases: Sequence[Case] = ()
  pairs: Sequence[tuple[str, str]] = ()
  """Names of a case and of its baseline."""
  work: str = ''
  """What a figure computes that trains nothing, in words."""


@dataclasses.dataclass(frozen=True)
class Drawing:
  """What a figure has come to."""

  sections: Sequence[Section]
  notes: Sequence[str]
  """What the paper has, what is inferred, what this can tell."""
  values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  """For results.json, beside arms and pairs."""
  lines: Sequence[str] = ()
  """For the terminal, below the table of pairs."""
