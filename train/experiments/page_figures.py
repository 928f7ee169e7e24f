"""The figures of a comparison's page."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from train import charts, plots, series
from train.experiments import comparison as comparison_lib
from train.experiments import paired
from train.experiments.comparison import ArmResult, Comparison, Pair

_BANDS = 3  # More at once muddy each other.
MINUS = '\N{MINUS SIGN}'
_BAND = 'Shaded: the 95 % interval of the mean over seeds.'
_CURVES = charts.COLOURS  # More could not be told apart.


def draw(comparison: Comparison) -> str:
  """All figures that there is something to draw for, as HTML."""
  arms, pairs = _shown_arms(comparison), _shown_pairs(comparison)
  colours = {arm.name: i for i, arm in enumerate(arms)}
  own = {(p.arm, p.baseline): i for i, p in enumerate(pairs)}
  if len({p.arm for p in pairs}) == len(pairs) <= len(arms) and all(
    p.arm in colours for p in pairs
  ):  # A pair then has the colour that its arm has in the other figures.
    own = {(p.arm, p.baseline): colours[p.arm] for p in pairs}
  return '\n'.join(
    filter(
      None,
      (
        _intervals(comparison.pairs, own),
        _losses(comparison, arms, colours),
        _differences(comparison, pairs, own),
        _by_seed(comparison, colours),
        _tokens(comparison, own),
      ),
    )
  )


def name(pair: Pair) -> str:
  """Of the pair."""
  return f'{pair.arm} against {pair.baseline}'


def span(ends: Sequence[float], digits: int = 4) -> str:
  """An interval in words."""
  return ' to '.join(charts.signed(end, digits) for end in ends)


def _shown_arms(comparison: Comparison) -> list[ArmResult]:
  """The arms whose curves are drawn, in their order."""
  arms = list(comparison.arms.values())
  if len(arms) <= _CURVES:
    return arms
  first = dict.fromkeys(comparison.headline or (), 0)
  first |= {p.baseline: 1 for p in comparison.pairs if p.baseline not in first}

  def rank(arm: ArmResult) -> tuple[int, float]:
    mean = arm.mean
    return first.get(arm.name, 2), mean if math.isfinite(mean) else math.inf

  chosen = {arm.name for arm in sorted(arms, key=rank)[:_CURVES]}
  return [arm for arm in arms if arm.name in chosen]


def _shown_pairs(comparison: Comparison) -> list[Pair]:
  """The pairs whose differences are drawn over time, in their order."""
  pairs = [pair for pair in comparison.pairs if pair.paired]
  if len(pairs) <= _CURVES:
    return pairs

  def rank(pair: Pair) -> tuple[bool, float]:
    assert pair.paired is not None
    return (pair.arm, pair.baseline) != comparison.headline, pair.paired.mean

  chosen = sorted(pairs, key=rank)[:_CURVES]
  return [pair for pair in pairs if pair in chosen]


def _left_out(shown: int, of: int, what: str, which: str) -> str:
  if shown == of:
    return ''
  return f' {shown} of {of} {what} are drawn: {which}; the table has all.'


def _intervals(
  pairs: Sequence[Pair], colours: Mapping[tuple[str, str], int]
) -> str:
  found = [(pair, pair.paired) for pair in pairs if pair.paired]
  # Two seeds give intervals so wide that all others would shrink to dots.
  halves = [p.half_width for _, p in found if p.half_width is not None]
  most = 4 * series.quantile(halves, 0.5) if halves else 0.0
  ends, rows = [0.0], []
  for pair, p in found:
    reach = min(p.half_width or 0.0, most)
    ends += [p.mean - reach, p.mean + reach]
    rows.append(
      plots.Row(
        name(pair),
        [plots.Estimate(p.mean, *(p.ci95 or ()))],
        colours.get((pair.arm, pair.baseline)),
        charts.signed(p.mean) + (f' ({span(p.ci95)})' if p.ci95 else ''),
      )
    )
  x = charts.y_axis('Difference of final loss, nats per token', ends)
  text = (
    'Of the final validation loss, arm minus baseline of the same seed: left '
    'of zero the arm is better. Lines: 95 % intervals of the mean.'
  )
  if any(p.ci95 is None for _, p in found):
    text += ' A single seed has none.'
  if any(half > most for half in halves):
    text += ' One without a mark at its end goes on beyond the edge.'
  label = '; '.join(f'{row.name} {row.text}' for row in rows[:12])
  drawn = plots.rows(
    f'Mean paired differences: {label}.',
    x and dataclasses.replace(x, plus=True),
    rows,
    line=0.0,
  )
  return plots.figure('Mean paired differences', text, drawn, wide=True)


def _band(
  run: int, tokens: np.ndarray, losses: np.ndarray, label: str, *, thin: bool
) -> tuple[list[charts.Curve | plots.Band], list[tuple[float, float, float]]]:
  """The mean over seeds and its band; and where they lie: (x, low, high).

  A thin one has no band.
  """
  mean, half = paired.interval(losses)
  if thin:
    half = np.zeros_like(half)
  edges = [
    (float(at), float(m - h), float(m + h))
    for at, m, h in zip(tokens, mean, half, strict=True)
  ]
  points = [(at, (low + high) / 2) for at, low, high in edges]
  items: list[charts.Curve | plots.Band] = []
  if len(losses) > 1 and not thin:
    items.append(plots.Band(run, edges))
  style = 'soft' if thin else 'marked'
  return [*items, charts.Curve(run, points, style, label)], edges


def _banded(count: int, comparison: Comparison, rest: str) -> str:
  """What is shaded, of so many curves, and what is to be known of it."""
  if count <= _BANDS:
    return f' {_BAND} {rest}'
  if comparison.headline is None:
    return ' So many curves have no bands.'
  return f' {_BAND} Of so many curves the headline alone has one. {rest}'


def _fit(
  edges: Sequence[tuple[float, float, float]], share: float, end: float
) -> list[float]:
  """What the vertical axis must reach, after a share of the horizontal one."""
  late = [edge for edge in edges if edge[0] >= share * end] or edges
  middle = [(low + high) / 2 for _, low, high in late]
  reach = series.quantile([(high - low) / 2 for _, low, high in late], 0.9)
  return [
    value
    for (_, low, high), y in zip(late, middle, strict=True)
    for half in [min((high - low) / 2, reach)]
    for value in (y - half, y + half)
  ]


def _common_seeds(arms: Sequence[ArmResult]) -> list[int]:
  """Seeds that all arms with a finished cell have finished."""
  sets = [set(arm.losses()) for arm in arms if arm.losses()]
  return sorted(set.intersection(*sets)) if sets else []


def _losses(
  comparison: Comparison, arms: Sequence[ArmResult], colours: Mapping[str, int]
) -> str:
  common = _common_seeds(arms)
  items, edges, ends, counts = [], [], [], set()
  names = [''] * len(arms)
  for arm in arms:
    seeds = common or sorted(arm.losses())
    if not arm.losses():
      continue
    tokens, losses = comparison_lib.mean_curve(arm, seeds)
    if not len(tokens):
      continue
    run = colours[arm.name]
    thin = len(arms) > _BANDS and arm.name not in (comparison.headline or ())
    drawn, at = _band(run, tokens, losses, arm.name, thin=thin)
    items += drawn
    edges += at
    counts.add(len(seeds))
    names[run] = arm.name
    ends.append(f'{arm.name} ends at {(at[-1][1] + at[-1][2]) / 2:.4f}')
  if not edges:
    return ''
  x = _tokens_axis(edges)
  text = (
    f'Means over {_seeds(counts)}. The range fits all but the first quarter.'
  )
  if max(counts) > 1:
    text += _banded(
      len(arms), comparison,
      'Part of its width is what a seed does to all arms alike; paired '
      'differences are free of that.',
    )  # fmt: skip
  if not common:
    text += ' No seed is finished in all arms: each mean has seeds of its own.'
  if any(arm.diverged() for arm in arms):
    text += ' Diverged cells are left out.'
  text += _left_out(
    len(arms), len(comparison.arms), 'arms',
    'those of the headline, baselines, and the lowest final losses',
  )  # fmt: skip
  y = charts.y_axis(
    'Validation loss, nats per token', _fit(edges, 0.25, x.high)
  )
  label = f'Mean validation loss by training tokens; {"; ".join(ends)}.'
  drawn_ = plots.plot(label, x, y, items)
  legend = charts.legend(names)
  return plots.figure('Validation loss', text, legend + drawn_, wide=True)


def _seeds(counts: set[int]) -> str:
  least, most = min(counts), max(counts)
  words = f'{most}' if least == most else f'{least} to {most}'
  return 'one seed' if most == 1 else f'{words} seeds'


def _tokens_axis(edges: Sequence[tuple[float, float, float]]) -> charts.Axis:
  return charts.Axis('Training tokens', 0, max(at for at, _, _ in edges) or 1)


def _differences(
  comparison: Comparison,
  pairs: Sequence[Pair],
  colours: Mapping[tuple[str, str], int],
) -> str:
  items, edges, ends, counts = [], [], [], set()
  names = [''] * (1 + max(colours.values(), default=0))
  for pair in pairs:
    ours, theirs = (
      comparison_lib.mean_curve(comparison.arms[arm], pair.seeds)
      for arm in (pair.arm, pair.baseline)
    )
    tokens, i, j = np.intersect1d(ours[0], theirs[0], return_indices=True)
    if not len(tokens):
      continue
    run = colours[pair.arm, pair.baseline]
    gaps = ours[1][:, i] - theirs[1][:, j]
    named = (pair.arm, pair.baseline) == comparison.headline
    thin = len(pairs) > _BANDS and not named
    drawn, at = _band(run, tokens, gaps, name(pair), thin=thin)
    items += drawn
    edges += at
    counts.add(len(pair.seeds))
    names[run] = name(pair)
    last = charts.signed((at[-1][1] + at[-1][2]) / 2)
    ends.append(f'{name(pair)} ends at {last}')
  if not edges:
    return ''
  x = _tokens_axis(edges)
  text = (
    'Arm minus baseline of the same seed at equal tokens, the mean over '
    f'{_seeds(counts)}: below zero the arm is better. The range fits all but '
    'the first fifth.'
  )
  if max(counts) > 1:
    text += _banded(
      len(pairs), comparison,
      'It holds at each point by itself, not for all at once.',
    )  # fmt: skip
  text += _left_out(
    len(pairs), sum(bool(pair.paired) for pair in comparison.pairs), 'pairs',
    'the headline and the lowest',
  )  # fmt: skip
  y = charts.y_axis(
    'Difference, nats per token', _fit(edges, 0.2, x.high), symmetric=True
  )
  label = f'Mean paired difference by training tokens; {"; ".join(ends)}.'
  drawn_ = plots.plot(label, x, y, items, zero=True)
  return plots.figure(
    'Paired differences over time', text, charts.legend(names) + drawn_,
    wide=True,
  )  # fmt: skip


def _by_seed(comparison: Comparison, colours: Mapping[str, int]) -> str:
  arms = list(comparison.arms.values())
  seeds = sorted({seed for arm in arms for seed in arm.seeds})
  rows: list[plots.Row] = []
  values: list[float] = []
  for arm in arms:
    losses = arm.losses()
    # A seed without an end keeps its place, so that dots join by seed.
    found = [plots.Estimate(losses.get(seed, math.nan)) for seed in seeds]
    values += losses.values()
    # Means over other seeds would be compared as if they were over the same.
    text = f'{len(losses)} of {len(seeds)} seeds'
    if len(losses) == len(seeds):
      text = f'mean {arm.mean:.4f}'
    if diverged := arm.diverged():
      text += f', {diverged} diverged'
    rows.append(plots.Row(arm.name, found, colours.get(arm.name), text))
  x = charts.y_axis('Final validation loss, nats per token', values)
  label = f'Final validation loss of {len(arms)} arms on {len(seeds)} seeds.'
  drawn = plots.rows(label, x, rows, joined=True)
  text = 'A dot is a cell; lines join the cells of a seed.'
  return plots.figure('Final loss by seed', text, drawn)


def _tokens(
  comparison: Comparison, colours: Mapping[tuple[str, str], int]
) -> str:
  rows, values = [], [100.0]
  for pair in comparison.pairs:
    if not pair.paired or not (share := tokens_share(pair)):
      continue
    each = [
      100 * found
      for seed in pair.seeds
      if (found := tokens_share(_alone(comparison, pair, seed)))
    ]
    values += [100 * share, *each]
    rows.append(
      plots.Row(
        name(pair),
        [plots.Estimate(100 * share)],
        colours.get((pair.arm, pair.baseline)),
        f'{100 * share:.0f} %',
        each if len(pair.seeds) > 1 else (),
      )
    )
  if not rows:
    return ''
  text = (
    "Where the arm's mean curve comes down to the baseline's final loss. "
    'Small dots: each seed by itself. Arms and seeds that never do are left '
    'out.'
  )
  drawn = plots.rows(
    "Tokens to the baseline's final loss: "
    f'{"; ".join(f"{row.name} {row.text}" for row in rows[:12])}.',
    charts.y_axis("Percent of the baseline's tokens", values),
    rows,
    line=100.0,
  )
  return plots.figure("Tokens to the baseline's final loss", text, drawn)


def tokens_share(pair: Pair) -> float | None:
  """Tokens to the baseline's final loss as a share of its tokens."""
  if pair.tokens_to_baseline is None or not pair.baseline_tokens:
    return None
  return pair.tokens_to_baseline / pair.baseline_tokens


def _alone(comparison: Comparison, pair: Pair, seed: int) -> Pair:
  """The pair as it were with this seed alone."""
  arms = {
    arm: dataclasses.replace(
      comparison.arms[arm], seeds={seed: comparison.arms[arm].seeds[seed]}
    )
    for arm in (pair.arm, pair.baseline)
  }
  return comparison_lib.pairs(arms, [(pair.arm, pair.baseline)])[0]
