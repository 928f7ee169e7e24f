"""Fig. 5: the power with blockwise learning rates, and behind Muon."""

from train.experiments import paired
from train.experiments.figure_page import Section
from train.experiments.figures import fits, powers, shapes
from train.experiments.figures.design import (
  Design,
  Drawing,
  Request,
  against_one,
  at_powers,
  case,
  power_name,
)
from train.experiments.figures.results import Results

VARIES = (
  'optimizer.power', 'optimizer.name', 'optimizer.blockwise',
)  # fmt: skip
_BLOCKWISE = 'optimizer.blockwise'
_ARMS = {
  'base': (1.0, False),
  'p1.2': (1.2, False),
  'blockwise': (1.0, True),
  'both': (1.2, True),
}
_PAIRS = (
  ('p1.2', 'base'), ('blockwise', 'base'), ('both', 'base'),
  ('both', 'blockwise'),
)  # fmt: skip
_MUON = (0.8, 0.9, 1.0, 1.2)
_NOTES = (
  'The paper: the power alone gains 0.015, blockwise learning rates alone '
  '0.030, both about 0.045 [N]: they add up. MuonPower takes p = 1.2 too [P]. '
  'A public trial of the power inside Muon at 17M parameters found 0.9 best '
  'and 1.2 worse than 1 [N].',
  'The released ratios [C] are norm 1, value and output 4, feed-forward 6, '
  'query and key 8, embedding 10, head 1, under wsd, which is therefore the '
  'schedule here unless --optimizer.schedule says otherwise; they multiply the '
  'learning rate of AdamW alone, not one tuned for them. Muon is that of '
  'the released script [C]: queries to MLP matrices, one learning rate for '
  'all, at a laptop the one tuned for AdamW. That the power comes '
  'before momentum and orthogonalisation is inferred [I].',
)


def design(request: Request) -> Design:
  """Four arms of AdamW, four of Muon."""
  size = request.size('dense_0.25m', 'llama_0.2b')
  config = request.config(size)
  if 'optimizer.schedule' not in request.fields:
    config = request.config(size, schedule='wsd')
  cases = [
    case(name, size, config, {'optimizer.power': p, _BLOCKWISE: blockwise})
    for name, (p, blockwise) in _ARMS.items()
  ]
  muon = {'optimizer.name': 'muon'}
  cases += at_powers('muon', size, config, _MUON, muon)
  return Design(
    'Figure 5: blockwise learning rates, and Muon',
    cases,
    [*_PAIRS, *against_one('muon', _MUON)],
  )


def draw(results: Results) -> Drawing:
  """Both parts."""
  together = results.interaction(('both', 'blockwise'), ('p1.2', 'base'))
  best = fits.best_power(
    _MUON, results.losses([power_name('muon', p) for p in _MUON])
  )
  told = 'not all powers are run' if best is None else f'p = {best.words}'
  rows: list[tuple[str, paired.Paired | None, int]] = [
    (f'{arm} minus {base}', results.pair(arm, base).paired, run)
    for run, (arm, base) in enumerate(_PAIRS, start=1)
  ]
  rows.append(('interaction', together, 5))
  of_adam = [p for p in results.pairs if (p.arm, p.baseline) in _PAIRS]
  of_muon = [p for p in results.pairs if p not in of_adam]
  sections = [
    Section(
      'The power and blockwise learning rates, AdamW',
      'Final loss; left of 0 the first is better. The interaction is (both '
      'minus blockwise) minus (p = 1.2 minus base), by seed: 0 where the two '
      f'gains add up. {shapes.INTERVALS} {shapes.BEYOND}',
      shapes.differences('Paired differences of four arms.', rows),
      shapes.pair_table(of_adam),
    ),
    shapes.gain_curves(
      'Against AdamW alone, over time',
      results,
      [(results.pair(arm, base), f'{arm} minus {base}', run)
       for run, (arm, base) in enumerate(_PAIRS[:3], start=1)],
    ),
    shapes.curves(
      'Validation loss, AdamW',
      results,
      [(name, name, run) for run, name in enumerate(_ARMS)],
    ),
    Section(
      'The power behind Muon',
      f'Below 0 better than Muon alone. {shapes.INTERVALS} {shapes.BEYOND} '
      f'Minimum of a parabola: {told}; in brackets the 95 % set of Fieller.',
      powers.along_p(results, [('muon', _MUON)], ['']),
      shapes.pair_table(of_muon),
    ),
    shapes.gain_curves(
      'Against Muon alone, over time',
      results,
      [(pair, f'p = {p:g}', _MUON.index(p))
       for pair, p in zip(of_muon, (p for p in _MUON if p != 1), strict=True)],
    ),
    shapes.curves(
      'Validation loss, Muon',
      results,
      [(power_name('muon', p), f'p = {p:g}', run)
       for run, p in enumerate(_MUON)],
    ),
  ]  # fmt: skip
  values = {
    'interaction': together
    and {'n': together.n, 'mean': together.mean, 'ci95': together.ci95},
    'best_power_muon': powers.as_json(best),
  }
  lines = [
    f'interaction of power and blockwise: {shapes.words(together)}',
    f'lowest loss behind Muon: {told}',
  ]
  return Drawing(sections, _NOTES, values, lines)
