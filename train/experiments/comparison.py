"""What a comparison has come to: from records to pairs, a table and a file."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from train.experiments import paired
from train.experiments.cells import DIVERGED, DONE, Record


@dataclasses.dataclass(frozen=True)
class ArmResult:
  """One arm on all seeds."""

  name: str
  overrides: Mapping[str, Any]
  """What it changes of the recipe, by dotted path."""
  seeds: Mapping[int, Record | None]
  """None where the cell has not been run."""
  cells: Mapping[int, str] = dataclasses.field(default_factory=dict)
  """What each is known by in the store."""

  def losses(self) -> dict[int, float]:
    """Final validation loss by seed, of those that have one."""
    return {
      seed: record['validation_loss']
      for seed, record in self.seeds.items()
      if record and record['status'] == DONE
    }

  def diverged(self) -> int:
    """Cells that have."""
    return sum(
      record is not None and record['status'] == DIVERGED
      for record in self.seeds.values()
    )

  @property
  def mean(self) -> float:
    """Of the final losses; nan without any, or where a cell diverged."""
    losses = list(self.losses().values())
    if not losses or self.diverged():
      return math.nan
    return math.fsum(losses) / len(losses)


@dataclasses.dataclass(frozen=True)
class Pair:
  """An arm against a baseline, on the seeds that both have finished."""

  arm: str
  baseline: str
  seeds: Sequence[int]
  paired: paired.Paired | None
  """Of the final losses, arm minus baseline, in nats a token; None without a
  seed."""
  p_holm: float | None
  """The p-value, adjusted for the number of pairs of the table."""
  tokens_to_baseline: float | None
  """Tokens at which the arm's mean curve first comes down to the baseline's
  final loss, between evaluations by a straight line; None if it never does."""
  baseline_tokens: float | None
  """Tokens of the baseline's curve; None without a seed."""
  diverged: Mapping[str, int]
  """Cells of either arm that diverged, by its name; they are in no mean."""
  mixed: str = ''
  """In what the two cells of a seed differ beside the arm: 'device',
  'versions', 'code'."""


@dataclasses.dataclass(frozen=True)
class Added:
  """Seeds of a later call than the first, with results to be looked at."""

  seeds: Sequence[int]
  """Ascending."""
  seen: int
  """Pairs of the headline that were finished then."""

  @property
  def words(self) -> str:
    """For people."""
    one = self.seen == 1
    return (
      f'{_spans(self.seeds)} {"was" if len(self.seeds) == 1 else "were"} added '
      f'when {self.seen} {"pair" if one else "pairs"} of the headline had been '
      f'seen: where {"it" if one else "they"} decided it, intervals are too '
      'narrow and p-values too small.'
    )


def _spans(seeds: Sequence[int]) -> str:
  """Ascending seeds, for people: 'Seed 3', 'Seeds 0-2, 5'."""
  runs: list[list[int]] = []
  for seed in seeds:
    if runs and seed == runs[-1][1] + 1:
      runs[-1][1] = seed
    else:
      runs.append([seed, seed])
  text = ', '.join(f'{a}' if a == b else f'{a}-{b}' for a, b in runs)
  return f'{"Seed" if len(seeds) == 1 else "Seeds"} {text}'


@dataclasses.dataclass(frozen=True)
class Comparison:
  """All that a page shows."""

  title: str
  arms: Mapping[str, ArmResult]
  pairs: Sequence[Pair]
  headline: tuple[str, str] | None
  """Arm and baseline of the comparison that was named before it was run."""
  notes: Sequence[str] = ()
  command: str = ''
  """What runs it again."""
  seen: int = 0
  """Pairs of the headline that were finished when it was named."""
  added: Sequence[Added] = ()
  """Seeds that came when pairs of the headline had been seen."""
  tuned: Mapping[str, str] = dataclasses.field(default_factory=dict)
  """Arm to that of its learning rates with the lowest mean loss."""


def pairs(
  arms: Mapping[str, ArmResult], wanted: Sequence[tuple[str, str]]
) -> list[Pair]:
  """Compares arms, and adjusts their p-values for each other."""
  found = [_pair(arms[arm], arms[baseline]) for arm, baseline in wanted]
  adjusted = paired.holm(
    [p.paired.p_value if p.paired else None for p in found]
  )
  return [
    dataclasses.replace(pair, p_holm=p)
    for pair, p in zip(found, adjusted, strict=True)
  ]


def lowest(arms: Sequence[ArmResult]) -> ArmResult | None:
  """The arm with the lowest mean loss, none of whose cells has diverged.

  None while the arms have not all finished the same seeds.
  """
  if len({tuple(sorted(_ended(arm))) for arm in arms}) != 1:
    return None
  finished = [arm for arm in arms if math.isfinite(arm.mean)]
  return min(finished, key=lambda arm: arm.mean, default=None)


def _ended(arm: ArmResult) -> list[int]:
  return [seed for seed, record in arm.seeds.items() if record]


def _pair(arm: ArmResult, baseline: ArmResult) -> Pair:
  ours, theirs = arm.losses(), baseline.losses()
  seeds = sorted(ours.keys() & theirs.keys())
  of_arm = [arm.seeds[seed] for seed in seeds]
  of_base = [baseline.seeds[seed] for seed in seeds]
  tokens = of_base[0]['validation'][-1][1] if of_base and of_base[0] else None
  target = np.mean([theirs[s] for s in seeds]) if seeds else None
  mixed = [
    name
    for name in ('device', 'versions', 'code')
    if any(
      a.get(name) != b.get(name)
      for a, b in zip(of_arm, of_base, strict=True)
      if a and b
    )
  ]
  return Pair(
    arm.name,
    baseline.name,
    seeds,
    paired.difference([ours[s] for s in seeds], [theirs[s] for s in seeds]),
    None,
    None if target is None else _reaches(arm, seeds, float(target)),
    tokens,
    {each.name: each.diverged() for each in (arm, baseline)},
    ' and '.join(mixed),
  )


def mean_curve(
  arm: ArmResult, seeds: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
  """Validation losses of some seeds.

  Returns:
    Tokens, (k,), at which all of them were evaluated, and losses, (seeds, k).
  """
  curves = []
  for seed in seeds:
    record = arm.seeds[seed]
    assert record is not None
    curves.append({
      tokens: loss for _, tokens, loss in record['validation']
      if loss is not None
    })  # fmt: skip
  common = sorted(set.intersection(*map(set, curves)))
  losses = [[curve[at] for at in common] for curve in curves]
  return np.asarray(common, float), np.asarray(losses, float)


def _reaches(
  arm: ArmResult, seeds: Sequence[int], target: float
) -> float | None:
  tokens, losses = mean_curve(arm, seeds)
  curve = losses.mean(0)
  below = np.flatnonzero(curve <= target)
  if not len(below):
    return None
  i = int(below[0])
  if i == 0:
    return float(tokens[0])
  share = (curve[i - 1] - target) / (curve[i - 1] - curve[i])
  return float(tokens[i - 1] + share * (tokens[i] - tokens[i - 1]))


def to_json(comparison: Comparison) -> dict[str, Any]:
  """What results.json holds; docs/experiments.md describes it."""
  return {
    'title': comparison.title,
    'headline': comparison.headline and list(comparison.headline),
    'headline_seen': comparison.seen,
    'seeds_added': [dataclasses.asdict(each) for each in comparison.added],
    'arms': {
      arm.name: {
        'overrides': dict(arm.overrides),
        'seeds': {
          str(seed): {
            'validation_loss': record and record['validation_loss'],
            'status': record['status'] if record else 'not run',
            'cell': arm.cells.get(seed),
          }
          for seed, record in arm.seeds.items()
        },
      }
      for arm in comparison.arms.values()
    },
    'paired': [_pair_json(pair) for pair in comparison.pairs],
    'tuned': dict(comparison.tuned),
    'notes': list(comparison.notes),
    'command': comparison.command,
  }


def _pair_json(pair: Pair) -> dict[str, Any]:
  p = pair.paired
  return {
    'arm': pair.arm,
    'baseline': pair.baseline,
    'n': p.n if p else 0,
    'mean': p and p.mean,
    'sd': p and p.sd,
    'ci95': p and p.ci95 and list(p.ci95),
    'p_value': p and p.p_value,
    'p_sign_flip': p and p.p_sign_flip,
    'p_holm': pair.p_holm,
    'tokens_to_baseline': pair.tokens_to_baseline,
    'baseline_tokens': pair.baseline_tokens,
    'diverged': dict(pair.diverged),
    'mixed': pair.mixed,
  }


def table(comparison: Comparison) -> str:
  """The pairs, for a terminal."""
  if not any(pair.paired for pair in comparison.pairs):
    return '  no seed is finished on both sides of a pair yet'
  head = ('arm', 'against', 'n', 'mean', '95 % interval', 'sd', 'p', 'Holm',
          'tokens to baseline')  # fmt: skip
  rows = [head, *(_row(pair) for pair in comparison.pairs)]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  lines = [
    '  '
    + '  '.join(
      cell.ljust(width) if i < 2 else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    for row in rows
  ]
  return '\n'.join(lines)


def _row(pair: Pair) -> tuple[str, ...]:
  p = pair.paired
  diverged = sum(pair.diverged.values())
  arm = f'{pair.arm} ({diverged} diverged)' if diverged else pair.arm
  if p is None:
    return (arm, pair.baseline, '0', *['-'] * 6)
  reached = '-'
  if pair.tokens_to_baseline is not None and pair.baseline_tokens:
    reached = f'{100 * pair.tokens_to_baseline / pair.baseline_tokens:.0f} %'
  return (
    arm,
    pair.baseline,
    str(p.n),
    f'{p.mean:+.4f}',
    f'{p.ci95[0]:+.4f} to {p.ci95[1]:+.4f}' if p.ci95 else '-',
    '-' if p.sd is None else f'{p.sd:.4f}',
    number(p.p_value),
    number(pair.p_holm),
    reached,
  )


def number(p: float | None) -> str:
  """A p-value for people."""
  if p is None:
    return '-'
  return f'{p:.3f}' if p >= 0.001 else '<0.001'
