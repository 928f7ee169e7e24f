"""What the cells of a figure have come to."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from train.experiments import paired
from train.experiments.comparison import ArmResult, Pair
from train.experiments.figures.design import Case, Design, Request
from train.recipe_table import cost


@dataclasses.dataclass(frozen=True)
class Results:
  """Records of all cases, those that there are."""

  request: Request
  design: Design
  arms: Mapping[str, ArmResult]
  """By the case's name."""
  pairs: Sequence[Pair]
  """Those of the design, adjusted for each other by Holm's method."""

  def pair(self, arm: str, baseline: str) -> Pair:
    """One of the design's pairs."""
    return next(p for p in self.pairs if (p.arm, p.baseline) == (arm, baseline))

  def case(self, name: str) -> Case:
    """A case of the design."""
    return next(case for case in self.design.cases if case.name == name)

  def parameters(self, name: str) -> int:
    """Of the case's model, all of them."""
    return cost(self.case(name).config).parameters.total

  def losses(self, names: Sequence[str]) -> np.ndarray:
    """Final validation losses, (n, len(names)), of the seeds that all have."""
    by_name = [self.arms[name].losses() for name in names]
    seeds = sorted(set.intersection(*(set(losses) for losses in by_name)))
    table = [[losses[seed] for losses in by_name] for seed in seeds]
    return np.asarray(table, np.float64).reshape(len(seeds), len(names))

  def interaction(
    self, first: tuple[str, str], second: tuple[str, str]
  ) -> paired.Paired | None:
    """The difference of the first pair minus that of the second, by seed."""
    a, b, c, d = self.losses([*first, *second]).T
    return paired.difference(a - b, c - d)
