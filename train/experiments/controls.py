"""The controls: arms that take away what else the power changes.

One that changes a learning rate holds learning rate x weight decay fixed, so
that the parameters of its pair decay alike.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from train import paper
from train.config import Config, OptimizerConfig
from train.errors import UserError
from train.experiments.arms import Arm

_RATE = 'optimizer.learning_rate'
_KNOWN_RATE = 1e-3  # What the paper's grid lies around.


@dataclasses.dataclass(frozen=True)
class Controlled:
  """What a control adds to a comparison."""

  arms: Sequence[Arm]
  """New ones."""
  pairs: Sequence[tuple[str, str]]
  """Arm and baseline, to be compared as well."""


def effective_step(p: float) -> float:
  """How much the power shrinks a step of steady sign, if noise is Gaussian.

  Args:
    p: The power.

  Returns:
    r(p) = E|g|^p / sqrt(E|g|^2p), relative to p = 1: 0.94 at 1.2. Adam's step
    along a gradient of constant sign is E|g|^p / sqrt(E|g|^2p) of its learning
    rate.
  """

  def ratio(p):
    # E|g|^p = 2^(p/2) Gamma((p+1)/2) / sqrt(pi); powers of 2 cancel.
    log = math.lgamma((p + 1) / 2) - (math.lgamma(p + 0.5) + _LOG_ROOT_PI) / 2
    return math.exp(log)

  return ratio(p) / ratio(1.0)


_LOG_ROOT_PI = math.lgamma(0.5)


def _lr_matched(
  base: Arm, arm: Arm, config: Config, shrinks: Mapping[float, float] | None
) -> Controlled:
  name, tag = 'lr-matched', 'lr'
  if shrinks is not None:
    name, tag = 'lr-measured', 'measured-lr'

  def step(of: Arm) -> float:
    p = of.config(config).optimizer.power
    if shrinks is None:
      return effective_step(p)
    if p not in shrinks:
      known = ', '.join(f'{p:g}' for p in shrinks)
      raise UserError(
        f'--noise-run has no moments of p = {p:g}, only of {known}'
      )
    return shrinks[p]

  for of in (base, arm):
    if of.config(config).optimizer.name == 'muon':
      raise UserError(
        f"--control {name} is of Adam's step, which the power shrinks: arm "
        f'{of.name} has Muon, whose step is of one size at every power; '
        'compare it in a call without this control, or take lr-tuned'
      )
  r = step(arm) / step(base)  # The baseline may be behind a power too.
  # Either may have a learning rate of its own: the other's is what is met.
  slow = _with_step_of(arm, base, f'{base.name}-{tag}-of-{arm.name}', config, r)
  fast = _with_step_of(base, arm, f'{arm.name}-{tag}', config, 1 / r)
  return Controlled(
    (slow, fast), ((arm.name, slow.name), (fast.name, base.name))
  )


def _eps_matched(
  base: Arm, arm: Arm, config: Config, shrinks: Mapping[float, float] | None
) -> Controlled:
  del shrinks
  # Muon's matrices have their own use of eps, for a norm that it is far below:
  # what counts is the group that is AdamW's.
  plain = base.config(config).optimizer
  power = arm.config(config).optimizer.power
  new = arm.but(f'{arm.name}-eps', eps=plain.eps ** (power / plain.power))
  return Controlled((new,), ((new.name, base.name),))


def _norm_matched(
  base: Arm, arm: Arm, config: Config, shrinks: Mapping[float, float] | None
) -> Controlled:
  del config, shrinks
  new = arm.but(f'{arm.name}-norm', match_norm=True)
  return Controlled((new,), ((new.name, base.name),))


_CONTROLS: dict[str, Callable[..., Controlled]] = {
  'lr-matched': _lr_matched,
  'lr-measured': _lr_matched,
  'eps-matched': _eps_matched,
  'norm-matched': _norm_matched,
}
NAMES = (*_CONTROLS, 'lr-tuned')
"""Of the controls."""


def expand(
  name: str,
  arms: Sequence[Arm],
  config: Config,
  shrinks: Mapping[float, float] | None = None,
) -> Controlled:
  """Makes the arms of a control, of each arm that has another power.

  Args:
    name: One of `NAMES`, 'lr-tuned' excepted.
    arms: Those asked for; the first is the baseline.
    config: What they change.
    shrinks: r(p) as measured, for 'lr-measured'.

  Raises:
    UserError: no arm has another power; r(p) is not known, or is none of an
      arm's optimizer.
  """
  base = arms[0]
  parts = [
    _CONTROLS[name](base, arm, config, shrinks if 'measured' in name else None)
    for arm in powered(arms, config, name)
  ]
  return Controlled(
    [arm for part in parts for arm in part.arms],
    [pair for part in parts for pair in part.pairs],
  )


def powered(arms: Sequence[Arm], config: Config, control: str) -> list[Arm]:
  """Arms behind another power than the baseline.

  Raises:
    UserError: there is none.
  """
  plain = arms[0].config(config).optimizer.power
  found = [
    arm for arm in arms[1:] if arm.config(config).optimizer.power != plain
  ]
  if not found:
    raise UserError(
      f'--control {control} needs an arm whose power is not the baseline '
      f"{arms[0].name}'s, {plain:g}"
    )
  return found


def rates(config: Config, recipe: str) -> tuple[float, ...]:
  """The learning rates to tune over.

  Those of the paper's grid; of a recipe that is not the paper's, such as lie
  around its own as the grid lies around 1e-3.
  """
  if recipe in paper.RECIPES:
    return paper.LEARNING_RATES
  own = config.optimizer.learning_rate
  return tuple(
    float(f'{rate / _KNOWN_RATE * own:.6g}') for rate in paper.LEARNING_RATES
  )


def tuned(
  arms: Sequence[Arm], config: Config, grid: Sequence[float]
) -> dict[str, list[Arm]]:
  """Arms at each rate of a grid, by the name of the one that is tuned.

  Args:
    arms: The first is the baseline.
    config: What they change.
    grid: The rates.

  Raises:
    UserError: a rate is there twice; an arm's own rate would have it decay
      unlike the baseline at each of them.
  """
  for i, rate in enumerate(grid):
    if any(f'{rate:g}' == f'{other:g}' for other in grid[:i]):
      raise UserError(f'--lr-grid has {rate:g} twice')
  decays = [_decay(arm, config) for arm in arms]
  out = {}
  for arm, decay in zip(arms, decays, strict=True):
    if _RATE in arm.overrides and not math.isclose(decay, decays[0]):
      raise UserError(
        f'--control lr-tuned holds learning rate x weight decay, {decays[0]:g} '
        f'of {arms[0].name} and {decay:g} of {arm.name}, whose lr is its own: '
        'leave lr to the grid'
      )
    own = arm.config(config).optimizer.learning_rate
    out[arm.name] = [
      arm
      if math.isclose(rate, own)
      else _with_step_of(arm, arm, f'{arm.name}-lr{rate:g}', config, rate / own)
      for rate in grid
    ]
  return out


def _decay(arm: Arm, config: Config) -> float:
  c: OptimizerConfig = arm.config(config).optimizer
  return c.learning_rate * c.weight_decay


def _with_step_of(
  other: Arm, arm: Arm, name: str, config: Config, factor: float
) -> Arm:
  """An arm at a multiple of the other's learning rate, which decays alike."""
  c: OptimizerConfig = other.config(config).optimizer
  return arm.but(
    name,
    learning_rate=c.learning_rate * factor,
    weight_decay=c.weight_decay / factor,
  )
