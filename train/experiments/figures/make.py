"""Makes a figure: runs the cells that are missing, and draws what there is."""

import importlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from train import cli, distributed, storage
from train.errors import UserError
from train.experiments import (
  comparison,
  experiment,
  figure_page,
  outputs,
  page,
  place,
)
from train.experiments.cells import Cell, Store
from train.experiments.comparison import ArmResult, Comparison
from train.experiments.figures import shapes
from train.experiments.figures.design import PAPER, Design, Drawing, Request
from train.experiments.figures.results import Results
from train.recipe_table import DENSE_MFU, DEVICES, SPARSE_MFU, cost

FIGURES = {
  '1': 'scaling',
  '2': 'powers',
  '3': 'schedules',
  '4': 'experts',
  '5': 'combined',
  '6': 'batch_sizes',
  '7': 'example',
  'adagrad': 'adagrad',
}
"""Each figure's module."""
_RESULTS, _PAGE = 'results.json', 'report.html'
_NOTHING = 'Nothing yet: no seed is finished on both sides of a pair.'
_FEW = 4  # Pairs that are told one by one.
_MARKS = (
  'Marks: [P] printed in the paper (arXiv 2505.24275), [C] read in its '
  "authors' code, [N] a second-hand note of it, [I] inferred or computed in "
  'this project, [?] not known, chosen here.'
)


def run(request: Request, engine: experiment.Engine) -> int:
  """Runs what of a figure is missing, and writes what it has come to.

  Args:
    request: Which figure.
    engine: Where cells are run.

  Returns:
    The exit status.

  Raises:
    UserError: the input is at fault; the directory holds another figure.
  """
  module = importlib.import_module(
    f'train.experiments.figures.{FIGURES[request.figure]}'
  )
  _check(request, module)
  design = module.design(request)
  main = distributed.is_main()
  if main:
    cli.say(design.title + (f': {design.work}' if design.work else ''))
  status = 0
  store, cells = None, []
  if design.cases:
    try:
      cells = _cells(design, request.seeds)
    except UserError as error:
      if not request.dry:
        raise
      if main:
        cli.say(f'{_on_paper(design, request)}\nno more to be said: {error}')
      return 0
    store = Store(request.store or request.out / 'cells')
    new = experiment.missing(cells, store)
    experiment.say_budget(cells, new, store, engine)
    if main and request.scale == PAPER:
      cli.say(_on_paper(design, request))
    with place.held(request.out, store.directory):
      try:
        if new and not request.dry:
          status = experiment.run_missing(
            new, store, request.out / 'runs', engine
          )
      finally:
        if main:
          _write(request, module, _results(request, design, cells, store))
  elif main and not request.dry:
    _write(request, module, _results(request, design, [], None))
  return status


def _check(request: Request, module: ModuleType) -> None:
  """Raises: UserError: what was given does not go with the figure."""
  for path in module.VARIES:
    if path in request.fields:
      hint = ': give --text NAME=FILES' if path.startswith('data.f') else ''
      raise UserError(
        f'--{path} is what figure {request.figure} sets itself{hint}'
      )
  if 'seed' in request.fields:
    raise UserError('--seed: the seeds of a figure are --seeds')
  if request.texts and request.figure != '3':
    raise UserError(
      '--text goes with figure 3; others take --data.files or --data.prepared'
    )
  if request.noise_run and request.figure != '7':
    raise UserError('--noise-run goes with figure 7')
  given = [*request.fields, *(['sizes'] if request.sizes else [])]
  if given and not getattr(module, 'TRAINS', True):
    raise UserError(
      f'figure {request.figure} trains no model: it takes no --{given[0]}'
    )
  outputs.check(request.out, outputs.figure(request.figure))


def _cells(design: Design, seeds: Sequence[int]) -> list[Cell]:
  """All cases of a seed before the next seed."""
  return [
    experiment.cell(case.name, cli.with_values(case.config, {'seed': seed}))
    for seed in seeds
    for case in design.cases
  ]


def _on_paper(design: Design, request: Request) -> str:
  """What all cells cost by count, on a device that is not here."""
  label, peak = DEVICES['h100']
  flops = hours = 0.0
  for case in design.cases:
    of = cost(case.config)
    sparse = of.parameters.active < of.parameters.total
    flops += of.flops
    hours += of.hours(peak, SPARSE_MFU if sparse else DENSE_MFU)
  n = len(request.seeds)
  return (
    f'all {n * len(design.cases)} cells: {n * flops:.2e} FLOPs; on one '
    f'{label} about {n * hours:,.0f} hours, an estimate (an assumed MFU of '
    f'{100 * DENSE_MFU:g} %, with experts {100 * SPARSE_MFU:g} %)'
  )


def _results(
  request: Request,
  design: Design,
  cells: Sequence[Cell],
  store: Store | None,
) -> Results:
  arms = {}
  for case in design.cases:
    own = [cell for cell in cells if cell.arm == case.name]
    records = {
      cell.seed: store.get(cell.key) if store else None for cell in own
    }
    keys = {cell.seed: cell.key for cell in own}
    arms[case.name] = ArmResult(case.name, case.overrides, records, keys)
  pairs = comparison.pairs(arms, design.pairs)
  return Results(request, design, arms, pairs)


def _write(request: Request, module: ModuleType, results: Results) -> None:
  """Writes file and page, and prints the table."""
  drawing: Drawing = module.draw(results)
  small, told = _this_run(results)
  notes = [*told, *drawing.notes, _MARKS]
  whole = Comparison(
    results.design.title, results.arms, results.pairs, None, notes,
    request.command,
  )  # fmt: skip
  _save(request.out / _RESULTS, _document(request, results, whole, drawing))
  lines, sections = list(drawing.lines), drawing.sections
  found = [*_pairs(results), *map(_sentence, lines)]
  if results.design.cases:
    # Of what is not run there is nothing to be seen.
    sections = [section for section in sections if section.drawn]
    if not sections:
      lines, found = [], [_NOTHING]
  figure_page.write(
    request.out / _PAGE, results.design.title, sections, notes,
    found=found, small=small,
  )  # fmt: skip
  if results.pairs:
    head = '\nheld-out loss, arm minus baseline, nats a token:'
    lines = [head, comparison.table(whole), *([''] if lines else []), *lines]
  cli.say('\n'.join([*lines, '', f'report: {request.out / _PAGE}']))


def _pairs(results: Results) -> list[str]:
  """What the pairs of a figure have come to, where they are few."""
  if len(results.pairs) > _FEW:
    return []
  return [
    f'{pair.arm} against {pair.baseline}: {shapes.words(pair.paired)} over '
    f'{pair.paired.n} seeds: {page.verdict(pair, pair.p_holm)}.'
    for pair in results.pairs
    if pair.paired
  ]


def _sentence(line: str) -> str:
  return f'{line[0].upper()}{line[1:]}.'


def _document(
  request: Request, results: Results, whole: Comparison, drawing: Drawing
) -> dict[str, Any]:
  return {
    'figure': request.figure,
    'scale': request.scale,
    **comparison.to_json(whole),
    'recipes': {case.name: case.recipe for case in results.design.cases},
    'fields': dict(request.fields),
    **drawing.values,
  }


def _this_run(results: Results) -> tuple[str, list[str]]:
  """What this run is, and what it can and cannot tell, in words."""
  cases = results.design.cases
  if not cases:
    return '', []
  counts = [cost(case.config) for case in cases]
  ratios = [of.tokens / of.parameters.total for of in counts]
  sizes = [of.parameters.total for of in counts]
  all_cells = [r for arm in results.arms.values() for r in arm.seeds.values()]
  run = [record for record in all_cells if record]
  diverged = sum(arm.diverged() for arm in results.arms.values())
  n = len(results.request.seeds)
  this = (
    f'{_range(sizes, ",.0f")} parameters, {_range(ratios, ".3g")} '
    f'tokens a parameter, {n} {"seed" if n == 1 else "seeds"}; '
    f'{len(run)} of {len(all_cells)} cells are finished'
    + (f', {diverged} of them diverged and in no mean.' if diverged else '.')
  )
  halves = [
    half
    for pair in results.pairs
    if pair.paired and (half := pair.paired.half_width) is not None
  ]
  if halves:
    text = (
      f'Half-widths reached: {_range(halves, ".4f")} nats; what is smaller '
      'cannot be told here. '
    )
  else:
    text = 'Without two seeds of a pair nothing can be told from chance. '
  text += (
    'A seed gives all arms the same initial parameters, data order and '
    'validation set. p-values are adjusted for the pairs of this figure alone. '
    'Nothing here says what happens at another size.'
  )
  mixed = {pair.mixed for pair in results.pairs if pair.mixed}
  if mixed:
    text += f' Some pairs differ in {" and ".join(sorted(mixed))} too.'
  return this, [text]


def _range(values: Sequence[float], form: str) -> str:
  low, high = format(min(values), form), format(max(values), form)
  return low if low == high else f'{low} to {high}'


def _save(path: pathlib.Path, value: Mapping[str, Any]) -> None:
  with storage.one_line_errors(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.write_atomically(path, json.dumps(value, indent=2) + '\n')
