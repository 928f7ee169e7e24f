"""A comparison as one self-contained HTML page: words, figures, every cell."""

import html
from collections.abc import Iterable, Sequence

from etils import epath

from train import charts, report_style
from train.experiments import figure_page, page_controls, page_figures
from train.experiments import page_tables as tables
from train.experiments.comparison import Comparison, Pair, number
from train.experiments.page_figures import name, span, tokens_share
from train.experiments.page_tables import DASH

_LEVEL = 0.05
_TIED = '\N{NO-BREAK SPACE}'
_NAMED = 3  # Pairs that a remark names, of those that it is true of.


def write(path: epath.PathLike, comparison: Comparison) -> None:
  """Writes the page, atomically; the same comparison gives the same bytes.

  Args:
    path: The HTML file; its folder must exist.
    comparison: Finished or not.

  Raises:
    UserError: path cannot be written.
  """
  figures = page_figures.draw(comparison)
  body = f"""{_headline(comparison)}
{_pairs(comparison)}
{page_controls.draw(comparison)}
{figure_page.callout([*comparison.notes, *_remarks(comparison)])}
{f'<h2>Figures</h2><div class="figures">{figures}</div>' if figures else ''}
<h2>Cells</h2>
{tables.cell_table(comparison)}
<h2>Configuration</h2>
{tables.configuration(comparison)}
{_command(comparison)}"""
  figure_page.save(path, report_style.page(comparison.title, body))


def verdict(pair: Pair, p_value: float | None) -> str:
  """What the pair tells: 'better', 'worse', 'the same' or 'cannot be told'.

  Args:
    pair: Of an arm and its baseline.
    p_value: To judge it by.
  """
  found = pair.paired
  if found is None or found.n < 2:
    return 'cannot be told'
  if found.sd == 0:  # There is no p-value then.
    if found.mean == 0:
      return 'the same'
  elif p_value is None or p_value >= _LEVEL:
    return 'cannot be told'
  return 'better' if found.mean < 0 else 'worse'


def _headline(comparison: Comparison) -> str:
  if comparison.headline is None:
    return _lead(
      'No comparison was named before it was run',
      'All that follows is exploration: what stands out among many pairs may '
      'be chance, and a p-value by itself does not say so.',
    )
  arm, baseline = comparison.headline
  pair = next(
    (
      pair
      for pair in comparison.pairs
      if (pair.arm, pair.baseline) == (arm, baseline)
    ),
    None,
  )
  small = f'Named before it was run: {arm} against {baseline}'
  if comparison.seen:
    small = (
      f'{arm} against {baseline}, named when {comparison.seen} of its pairs '
      'had been finished already: it may have been chosen for them'
    )
  return _lead(
    small,
    *(_finding(comparison, pair) if pair else ('There is no such pair.',)),
  )


def _lead(small: str, first: str, *rest: str) -> str:
  return figure_page.lead(small, first, *([' '.join(rest)] if rest else []))


def _finding(comparison: Comparison, pair: Pair) -> Iterable[str]:
  """What the headline pair has come to, in sentences."""
  arm, baseline, p = pair.arm, pair.baseline, pair.paired
  diverged = {each: n for each, n in pair.diverged.items() if n}
  planned = _planned(comparison, pair)
  head = f'{arm} against {baseline}'
  if p is None:
    yield f'{head}: cannot be told, as no seed has finished with both.'
  elif p.n == 1:
    yield f'{head}: {charts.signed(p.mean)} from one seed: cannot be told.'
    yield 'Nothing says how much of it is chance.'
  else:
    assert p.ci95 is not None
    # Chosen for its outcome, it is one of many.
    told = verdict(pair, pair.p_holm if comparison.seen else p.p_value)
    yield (
      f'{head}: {charts.signed(p.mean)} (95{_TIED}%{_TIED}{span(p.ci95)}) over '
      f'{p.n} seeds{" that both finished" if diverged else ""}: {told}.'
    )
    if told == 'cannot be told':
      if p.p_value is not None and p.p_value < _LEVEL:
        yield f'p after Holm, over all pairs here, is not below {_LEVEL:g}.'
      else:
        yield 'The interval holds zero: either may be the better one.'
    yield (
      'It is the mean paired difference of final validation loss, in nats a '
      f'token: below zero {arm} is better.'
    )
    tests = f'Paired t-test p {_equals(p.p_value)}'
    if p.p_sign_flip is not None:
      tests += f', sign-flip test p {_equals(p.p_sign_flip)}'
    yield f'{tests}.'
  if diverged:
    words = ' and '.join(f'{each} in {n}' for each, n in diverged.items())
    yield (
      f'Cells diverged, of {planned} seeds: {words}. They are in no mean, and '
      'the difference does not tell what they cost.'
    )
  waiting = sum(
    any(
      comparison.arms[each].seeds.get(seed) is None for each in (arm, baseline)
    )
    for seed in _seeds(comparison, pair)
  )
  if waiting:
    yield f'Preliminary: {waiting} of {planned} seeds are not run yet.'


def _equals(p: float | None) -> str:
  if p is None:
    return 'undefined, as all differences are equal'
  text = number(p)
  return text.replace('<', '< ') if text.startswith('<') else f'= {text}'


def _seeds(comparison: Comparison, pair: Pair) -> list[int]:
  """Planned for the pair."""
  return [
    seed
    for seed in comparison.arms[pair.arm].seeds
    if seed in comparison.arms[pair.baseline].seeds
  ]


def _planned(comparison: Comparison, pair: Pair) -> int:
  return len(_seeds(comparison, pair))


_HEADS = (
  'Arm against baseline', 'n', 'Mean', 'sd',
  '95 % interval', 'p, t-test', 'p, sign flip', 'p, Holm',
  "Tokens to baseline's loss", 'Diverged',
)  # fmt: skip


def _pairs(comparison: Comparison) -> str:
  if not comparison.pairs:
    return ''
  rows = []
  for pair in comparison.pairs:
    named = (
      not comparison.seen and (pair.arm, pair.baseline) == comparison.headline
    )
    p = pair.paired
    told = verdict(pair, (p.p_value if p else None) if named else pair.p_holm)
    remark = f'{told}; named before it was run' if named else told
    reached = tokens_share(pair)
    diverged = ', '.join(
      f'{each} {n}' for each, n in pair.diverged.items() if n
    )
    n = p.n if p else 0
    cells = [
      f'{n}' if n == _planned(comparison, pair)
      else f'{n} of {_planned(comparison, pair)}',
      charts.signed(p.mean) if p else DASH,
      f'{p.sd:.4f}' if p and p.sd is not None else DASH,
      span(p.ci95) if p and p.ci95 else DASH,
      _p(p.p_value if p else None),
      _p(p.p_sign_flip if p else None),
      _p(pair.p_holm),
      f'{100 * reached:.0f} %' if reached else 'not reached' if p else DASH,
      diverged or 'none',
    ]  # fmt: skip
    rows.append((name(pair), remark, cells))
  caption = (
    'Final validation loss, arm minus baseline of the same seed, in nats per '
    'token: negative where the arm is better. Better or worse is said where p '
    f'is below {_LEVEL:g}: after Holm, for the number of pairs in this table; '
    'by the paired t-test itself where the pair was named before it was run. '
    'sd is that of the differences over seeds. '
    "Sign flips are tested from eight seeds on. Tokens: where the arm's mean "
    "curve comes down to the baseline's final loss, of the baseline's tokens."
  )
  return tables.cards(caption, _HEADS, rows)


def _p(p: float | None) -> str:
  return DASH if p is None else number(p)


def _remarks(comparison: Comparison) -> list[str]:
  """What a reader must know of how the numbers came about."""
  found: dict[str, list[str]] = {}
  for pair in comparison.pairs:
    for remark in _mixtures(comparison, pair):
      found.setdefault(remark, []).append(name(pair))
  out = []
  for remark, names in found.items():
    which = ', '.join(names[:_NAMED])
    if len(names) > _NAMED:
      which += f' and {len(names) - _NAMED} more'
    out.append(f'{which}: {remark}')
  out += [
    f'{arm.name}: diverged with {_list(seeds)}.'
    for arm in comparison.arms.values()
    if (
      seeds := [
        s for s, r in arm.seeds.items() if tables.status_of(r) == 'diverged'
      ]
    )
  ]
  out += [
    f'{arm}: of its learning rates, {best} has the lowest mean loss.'
    for arm, best in comparison.tuned.items()
  ]
  return out


def _list(seeds: Sequence[int]) -> str:
  words = ', '.join(map(str, seeds))
  return f'seed {words}' if len(seeds) == 1 else f'seeds {words}'


def _mixtures(comparison: Comparison, pair: Pair) -> Iterable[str]:
  """In what the cells of the pair differ beside arm and seed."""
  arms = comparison.arms
  records = [
    (arms[pair.arm].seeds[seed], arms[pair.baseline].seeds[seed])
    for seed in pair.seeds
  ]
  both = [(ours, theirs) for ours, theirs in records if ours and theirs]
  within, across = [], []
  for key, word in (
    ('device', 'devices'), ('versions', 'versions'), ('code', 'code'),
  ):  # fmt: skip
    values = [
      tuple(tables.as_text(r.get(key)) for r in cells) for cells in both
    ]
    if any(ours != theirs for ours, theirs in values):
      within.append(word)
    elif len(set(values)) > 1:
      across.append(word)
  if within:
    yield (
      f'the two cells of a seed come from different {_and(within)}, which is '
      'part of their difference.'
    )
  if across:
    yield (
      f'its seeds come from different {_and(across)}; the two cells of a seed '
      'from the same.'
    )


def _and(words: Sequence[str]) -> str:
  *first, last = words
  return f'{", ".join(first)} and {last}' if first else last


def _command(comparison: Comparison) -> str:
  if not comparison.command:
    return ''
  return (
    '<h2>To run it again</h2>'
    f'<pre><code>{html.escape(comparison.command)}</code></pre>'
    '<p class="note">It goes on where it stopped: a finished cell is taken '
    'from the store and not run again.</p>'
  )
