"""What a comparison is asked for, and the arms and pairs that it comes to."""

import dataclasses
import itertools
import pathlib
from collections.abc import Mapping, Sequence

from train.config import Config
from train.errors import UserError
from train.experiments import controls, measured_moments
from train.experiments.arms import Arm


@dataclasses.dataclass(frozen=True)
class Request:
  """What `python -m train compare` is asked for."""

  recipe: str
  config: Config
  """What arms change."""
  arms: Sequence[Arm]
  """The first is the baseline."""
  seeds: Sequence[int]
  out: pathlib.Path
  store: pathlib.Path | None = None
  """Of the cells; None for one in `out`."""
  controls: Sequence[str] = ()
  """Of `controls.NAMES`."""
  headline: str = ''
  """The arm that is compared with the baseline first of all; empty for the
  second arm, or for that of an earlier call."""
  rates: Sequence[float] = ()
  """Learning rates of 'lr-tuned'; empty for the paper's grid."""
  noise_run: pathlib.Path | None = None
  """The run that 'lr-measured' has r(p) from."""
  command: str = ''
  """What was typed."""


@dataclasses.dataclass(frozen=True)
class Design:
  """All arms and pairs, those of controls too."""

  arms: Sequence[Arm]
  pairs: Sequence[tuple[str, str]]
  tuned: Mapping[str, Sequence[str]]
  """Names of an arm at all learning rates."""


def make_design(request: Request) -> Design:
  """Makes the arms and pairs of a comparison, those of controls too.

  Raises:
    UserError: the input is at fault, or a run would be compared with itself.
  """
  base, config = request.arms[0], request.config
  arms = list(request.arms)
  pairs = [(arm.name, base.name) for arm in arms[1:]]
  tuned: dict[str, list[str]] = {}
  for name in request.controls:
    if name == 'lr-tuned':
      # Not those of other controls: their learning rate is what they are for.
      compared = [base, *controls.powered(request.arms, config, name)]
      grid = request.rates or controls.rates(config, request.recipe)
      by_name = controls.tuned(compared, config, grid)
      for of, members in by_name.items():
        tuned[of] = [arm.name for arm in members]
        arms += [arm for arm in members if arm not in arms]
      continue
    shrinks = None
    if name == 'lr-measured':
      if request.noise_run is None:
        raise UserError(
          '--control lr-measured needs --noise-run, a run directory with '
          'moments: python -m train run RECIPE --noise 100 --run-dir ...'
        )
      shrinks = measured_moments.step_ratios(request.noise_run)
    added = controls.expand(name, request.arms, config, shrinks)
    arms += [arm for arm in added.arms if arm not in arms]
    pairs += added.pairs
  names = [arm.name for arm in arms]
  for name in names:
    if names.count(name) > 1:
      raise UserError(f'a control makes an arm {name}, and there is one')
  _check_different(request, arms, pairs)
  return Design(arms, pairs, tuned)


def _check_different(
  request: Request, arms: Sequence[Arm], pairs: Sequence[tuple[str, str]]
) -> None:
  """Refuses to compare a run with itself.

  Raises:
    UserError: the arms of a pair, or two that were asked for, are the same.
  """
  configs = {arm.name: arm.config(request.config) for arm in arms}
  asked = [arm.name for arm in request.arms]
  of_pairs = [(baseline, arm) for arm, baseline in pairs]
  for one, other in [*itertools.combinations(asked, 2), *of_pairs]:
    if configs[one] == configs[other]:
      raise UserError(
        f'arms {one} and {other} are the same run: what they change comes to '
        'the same values'
      )
