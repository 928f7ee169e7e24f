"""What several figures draw: curves over tokens, intervals, tables of pairs."""

import math
from collections.abc import Sequence

import numpy as np

from train import charts, plots
from train.experiments import comparison, paired
from train.experiments.comparison import ArmResult, Pair
from train.experiments.figure_page import Section
from train.experiments.figures.results import Results

INTERVALS = 'Intervals: 95 % of the mean over paired seeds (Student, t).'
BANDS = 'Shaded: 95 % intervals of the mean, at each point by itself.'
BEYOND = 'An interval without a mark at its end goes on beyond the edge.'
_FIRST = 0.1  # Share of the tokens that no axis has to fit.
_WIDE = 4  # Times the median interval: as much as an axis must show.


def estimate(found: paired.Paired | None) -> plots.Estimate:
  """A mean with its interval, of which one seed has none; nan for None."""
  if found is None:
    return plots.Estimate(math.nan)
  return plots.Estimate(found.mean, *(found.ci95 or ()))


def mean_of(losses: np.ndarray) -> plots.Estimate:
  """The mean of (n,) values with its interval; nan for n = 0."""
  if not len(losses):
    return plots.Estimate(math.nan)
  (mean,), (half,) = paired.interval(losses[:, None])
  return plots.Estimate(float(mean), float(mean - half), float(mean + half))


def ends(estimates: Sequence[plots.Estimate]) -> list[float]:
  """What an axis must fit: the values, and of their intervals the usual."""
  halves = [
    (each.high - each.low) / 2 for each in estimates if each.low < each.high
  ]
  most = _WIDE * float(np.median(halves)) if halves else 0.0
  out = []
  for each in estimates:
    half = (each.high - each.low) / 2 if each.low < each.high else 0.0
    out += [each.value - min(half, most), each.value + min(half, most)]
  return out


def words(found: paired.Paired | None) -> str:
  """A difference and its interval, for people."""
  if found is None:
    return 'not run yet'
  text = charts.signed(found.mean)
  if found.ci95 is None:
    return f'{text} (one seed)'
  return f'{text} ({" to ".join(map(charts.signed, found.ci95))})'


def differences(
  label: str, rows: Sequence[tuple[str, paired.Paired | None, int]]
) -> str:
  """Differences of final losses in rows, as HTML.

  Args:
    label: A sentence for readers who cannot see it.
    rows: Name, difference, and index of the colour.
  """
  drawn = [
    plots.Row(name, [estimate(found)], run, words(found))
    for name, found, run in rows
    if found is not None
  ]
  found = [row.estimates[0] for row in drawn]
  x = charts.y_axis(
    'Difference of final loss, nats a token',
    ends(found) if drawn else [],
    symmetric=True,
  )
  return plots.rows(label, x, drawn, line=0.0)


def pair_table(pairs: Sequence[Pair]) -> list[list[str]]:
  """Pairs as the rows of a section's table."""
  rows = [['Arm', 'Against', 'Seeds', 'Difference, nats a token',
           '95 % interval', 'p', 'p (Holm)', 'Diverged']]  # fmt: skip
  for pair in pairs:
    p = pair.paired
    if p is None and not any(pair.diverged.values()):
      continue  # Not run yet.
    rows.append([
      pair.arm,
      pair.baseline,
      str(p.n if p else 0),
      charts.signed(p.mean) if p else '-',
      ' to '.join(map(charts.signed, p.ci95)) if p and p.ci95 else '-',
      comparison.number(p.p_value if p else None),
      comparison.number(pair.p_holm),
      str(sum(pair.diverged.values())),
    ])  # fmt: skip
  return rows


def curves(
  heading: str, results: Results, named: Sequence[tuple[str, str, int]]
) -> Section:
  """Mean validation loss over tokens with bands.

  Args:
    heading: Of the section.
    results: Where the records are.
    named: Name of a case, what it is called, and index of its colour.
  """
  items: list[charts.Curve | plots.Band] = []
  legend = [''] * (1 + max(run for _, _, run in named))
  late, most = [], 0.0
  for name, called, run in named:
    arm = results.arms[name]
    tokens, losses = _mean_curve(arm)
    if not len(tokens):
      continue
    legend[run] = called
    most = max(most, tokens[-1])
    items += _with_band(run, called, tokens, losses)
    mean, half = paired.interval(losses)
    after = tokens >= _FIRST * tokens[-1]
    half = np.minimum(half, _WIDE * np.median(half[after]))
    late += [*(mean - half)[after], *(mean + half)[after]]
  if not items:
    return Section(heading, 'No cell of these is finished.', '')
  drawn = plots.plot(
    f'{heading}: mean validation loss of {", ".join(filter(None, legend))}.',
    charts.Axis('Training tokens', 0, most),
    charts.y_axis('Validation loss, nats a token', late),
    items,
  )
  text = (
    f'Means over seeds. {BANDS} Part of their width is what a seed does to all '
    'arms alike.'
  )
  return Section(heading, text, charts.legend(legend) + drawn)


def gain_curves(
  heading: str, results: Results, named: Sequence[tuple[Pair, str, int]]
) -> Section:
  """Paired differences over tokens with bands.

  Args:
    heading: Of the section.
    results: Where the records are.
    named: A pair, what it is called, and index of its colour.
  """
  items: list[charts.Curve | plots.Band] = []
  legend = [''] * (1 + max(run for _, _, run in named))
  late, most = [0.0], 0.0
  for pair, called, run in named:
    if not pair.seeds:
      continue
    (x, ours), (x_base, theirs) = (
      comparison.mean_curve(results.arms[name], pair.seeds)
      for name in (pair.arm, pair.baseline)
    )
    tokens, i, j = np.intersect1d(x, x_base, return_indices=True)
    if not len(tokens):
      continue
    gaps = ours[:, i] - theirs[:, j]
    legend[run] = called
    most = max(most, tokens[-1])
    items += _with_band(run, called, tokens, gaps)
    after = tokens >= _FIRST * tokens[-1]
    mean, half = paired.interval(gaps)
    half = np.minimum(half, _WIDE * np.median(half[after]))
    late += [*(mean - half)[after], *(mean + half)[after]]
  if not items:
    return Section(heading, 'No pair of these is finished.', '')
  drawn = plots.plot(
    f'{heading}: mean paired difference by training tokens.',
    charts.Axis('Training tokens', 0, most),
    charts.y_axis('Difference, nats a token', late, symmetric=True),
    items,
    zero=True,
  )
  text = (
    f'Arm minus baseline of the same seed; below 0 the arm is better. {BANDS}'
  )
  return Section(heading, text, charts.legend(legend) + drawn)


def _mean_curve(arm: ArmResult) -> tuple[np.ndarray, np.ndarray]:
  seeds = sorted(arm.losses())
  if not seeds:
    return np.zeros(0), np.zeros((0, 0))
  return comparison.mean_curve(arm, seeds)


def _with_band(
  run: int, name: str, tokens: np.ndarray, values: np.ndarray
) -> list[charts.Curve | plots.Band]:
  mean, half = paired.interval(values)
  points = list(zip(tokens.tolist(), mean.tolist(), strict=True))
  curve = charts.Curve(run, points, 'marked', name)
  if len(values) == 1:
    return [curve]
  edges = zip(
    tokens.tolist(), (mean - half).tolist(), (mean + half).tolist(), strict=True
  )
  return [plots.Band(run, list(edges)), curve]
