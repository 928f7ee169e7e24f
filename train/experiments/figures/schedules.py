"""Fig. 3: what the power gains under two schedules and on two texts."""

import pathlib

from train.errors import UserError
from train.experiments.figure_page import Section
from train.experiments.figures import shapes
from train.experiments.figures.design import (
  PAPER,
  Design,
  Drawing,
  Request,
  against_one,
  case,
  power_name,
)
from train.experiments.figures.results import Results

VARIES = (
  'optimizer.power', 'optimizer.schedule', 'data.corpus', 'data.files',
  'data.prepared',
)  # fmt: skip
_POWERS = (1.0, 1.2)
_SCHEDULES = ('cos', 'wsd')
_CORPUS = 'wikipedia_leads'
_NOTES = (
  'The paper: the same p = 1.2 for both schedules and both texts, C4 and '
  'OpenWebText [P]; its gain in each is not known here [?]. Cosine ends at a '
  'tenth of the learning rate on C4, a twentieth on OpenWebText, wsd at a '
  'tenth [C]; the batch on OpenWebText is not known [?].',
  'Losses of two texts have each a tokenizer of its own and are not compared; '
  'the gains, in nats a token, are, with that grain of salt.',
)


def design(request: Request) -> Design:
  """Both schedules on each text, both powers.

  Raises:
    UserError: at paper scale a text has no place.
  """
  size = request.size('dense_0.25m', 'llama_0.2b')
  cases, pairs = [], []
  for text, fields in _texts(request).items():
    for schedule in _SCHEDULES:
      corpus = fields.get('data.corpus', _CORPUS)
      config = request.config(size, corpus=corpus, schedule=schedule)
      prefix = f'{schedule}/{text}'
      for p in _POWERS:
        overrides = {
          **fields, 'optimizer.schedule': schedule, 'optimizer.power': p,
        }  # fmt: skip
        name = power_name(prefix, p)
        cases.append(case(name, size, config, overrides))
      pairs += against_one(prefix, _POWERS)
  return Design('Figure 3: schedules and data', cases, pairs)


def _texts(request: Request) -> dict[str, dict[str, str]]:
  """Each text's fields."""
  if request.scale == PAPER:
    texts = {name: {'data.corpus': name} for name in ('c4', 'openwebtext')}
    if request.texts and request.texts.keys() != texts.keys():
      raise UserError(
        'at paper scale figure 3 has --text c4=DIR --text openwebtext=DIR'
      )
  else:
    texts = {_CORPUS: {'data.corpus': _CORPUS}}
  for name, place in request.texts.items():
    prepared = pathlib.Path(place).is_dir()
    field = 'data.prepared' if prepared else 'data.files'
    texts[name] = {**texts.get(name, {}), field: place}
  return texts


def draw(results: Results) -> Drawing:
  """The gain in each, what differs between them, and the curves."""
  prefixes = list(
    dict.fromkeys(c.name.rpartition('/')[0] for c in results.design.cases)
  )
  pairs = {
    prefix: results.pair(*against_one(prefix, _POWERS)[0])
    for prefix in prefixes
  }
  rows = [
    (prefix, pair.paired, run)
    for run, (prefix, pair) in enumerate(pairs.items())
  ]
  texts = list(dict.fromkeys(p.partition('/')[2] for p in prefixes))
  values = {}
  lines = []
  for text in texts:
    found = results.interaction(
      against_one(f'wsd/{text}', _POWERS)[0],
      against_one(f'cos/{text}', _POWERS)[0],
    )
    rows.append((f'wsd minus cos, {text}', found, len(prefixes)))
    values[text] = found and {
      'n': found.n, 'mean': found.mean, 'ci95': found.ci95,
    }  # fmt: skip
    lines.append(f'gain under wsd minus cos, {text}: {shapes.words(found)}')
  sections = [
    Section(
      'What p = 1.2 changes',
      'Final loss at p = 1.2 minus p = 1, by schedule and text: left of 0 the '
      'power is better; and the difference of two such differences, by seed. '
      f'{shapes.INTERVALS} {shapes.BEYOND}',
      shapes.differences('Paired differences by schedule and text.', rows),
      shapes.pair_table(results.pairs),
    ),
    shapes.gain_curves(
      'p = 1.2 minus p = 1 over time',
      results,
      [(pair, prefix, run) for run, (prefix, pair) in enumerate(pairs.items())],
    ),
    *(
      shapes.curves(
        f'Validation loss, {prefix}',
        results,
        [
          (power_name(prefix, p), f'p = {p:g}', run)
          for run, p in enumerate(_POWERS)
        ],
      )
      for prefix in prefixes
    ),
  ]
  notes = list(_NOTES)
  if len(texts) == 1:
    notes.append(
      'One text alone: a second is given by --text NAME=FILES_OR_PREPARED_DIR.'
    )
  return Drawing(sections, notes, {'wsd_minus_cos': values}, lines)
