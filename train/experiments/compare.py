"""Arms against a baseline on paired seeds: the comparison as a directory.

DIR/plan.json is written before the first cell is run, and names the headline;
results.json and report.html follow. A later call adds arms and seeds.
"""

import dataclasses
import json
import pathlib
import time
from collections.abc import Mapping, Sequence, Set
from typing import Any

from train import cli, distributed, storage
from train import config as config_lib
from train.config import Config
from train.errors import UserError
from train.experiments import (
  comparison,
  controls,
  experiment,
  measured_moments,
  page,
)
from train.experiments.arms import Arm
from train.experiments.cells import Cell, Store

_PLAN, _RESULTS, _PAGE = 'plan.json', 'results.json', 'report.html'
_TUNED = (
  'Of arms that are tuned, the learning rate with the lowest mean loss is '
  'taken on the seeds that it is then compared on, for both sides alike.'
)


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
class _Design:
  """All arms and pairs, those of controls too."""

  arms: Sequence[Arm]
  pairs: Sequence[tuple[str, str]]
  tuned: Mapping[str, Sequence[str]]
  """Names of an arm at all learning rates."""


def run(request: Request, engine: experiment.Engine, *, dry: bool) -> int:
  """Runs what of a comparison is missing, and writes what it has come to.

  Args:
    request: What to compare.
    engine: Where cells are run.
    dry: Prints the plan and what it costs, and ends.

  Returns:
    The exit status.

  Raises:
    UserError: the input is at fault; the directory holds another comparison.
  """
  design = _design(request)
  cells = experiment.cells(design.arms, request.seeds, request.config)
  store = Store(request.store or request.out / 'cells')
  new = experiment.missing(cells, store)
  plan = _plan(request, design, _finished(cells, store))
  main = distributed.is_main()
  if main:
    arm, baseline = plan['headline']
    seen = plan.get('seen', 0)
    cli.say(
      f'headline: {arm} against {baseline}, '
      + (f'named when {seen} of its pairs were finished' if seen
         else 'named before it is run')
    )  # fmt: skip
  if not dry:
    with distributed.together():
      if main:
        _write(request.out / _PLAN, plan)
  experiment.say_budget(cells, new, store, engine.workers)
  if dry:
    return 0
  status = 0
  try:
    if new:
      status = experiment.run_missing(new, store, request.out / 'runs', engine)
  finally:
    if main:
      # Another call may have added arms, seeds and cells meanwhile.
      plan = _read_plan(request.out / _PLAN) or plan
      result = _result(request, plan, Store(store.directory))
      _write(request.out / _RESULTS, comparison.to_json(result))
      page.write(request.out / _PAGE, result)
  if main:
    _say(result, request.out)
  return status


def _design(request: Request) -> _Design:
  base, config = request.arms[0], request.config
  arms = list(request.arms)
  pairs = [(arm.name, base.name) for arm in arms[1:]]
  tuned: dict[str, list[str]] = {}
  for name in request.controls:
    if name == 'lr-tuned':
      compared = [base, *controls.powered(arms, config, name)]
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
  return _Design(arms, pairs, tuned)


def _finished(cells: Sequence[Cell], store: Store) -> set[tuple[str, int]]:
  """Arm and seed of the cells that there are."""
  return {(c.arm, c.seed) for c in cells if store.get(c.key) is not None}


def _plan(
  request: Request, design: _Design, finished: Set[tuple[str, int]]
) -> dict[str, Any]:
  """What plan.json is to hold: what it held, and what is asked for now.

  Args:
    request: What is asked for.
    design: All of it.
    finished: Arm and seed of the cells that there are: a headline that is named
      now might have been chosen for them.

  Raises:
    UserError: it is that of another comparison.
  """
  out = request.out / _PLAN
  wanted = config_lib.to_dict(request.config)
  base = request.arms[0].name
  if request.headline in (base, *(a.name for a in design.arms[1:])) or (
    not request.headline
  ):
    named = [request.headline or request.arms[1].name, base]
  else:
    raise UserError(f'--headline {request.headline}: there is no such arm')
  if named[0] == base:
    raise UserError(f'--headline {base} is the baseline itself')
  plan = _read_plan(out) or {
    'recipe': request.recipe,
    'headline': named,
    'named': _now(),
    'seen': sum(
      {(name, seed) for name in named} <= finished for seed in request.seeds
    ),
    'config': wanted,
    'arms': {},
    'seeds': [],
    'pairs': [],
    'tuned': {},
    'calls': [],
  }
  if plan['recipe'] != request.recipe or (
    config_lib.with_defaults(plan['config']) != wanted
  ):
    raise UserError(
      f'{request.out} holds a comparison of another configuration: name '
      'another --out'
    )
  if plan['headline'] != named and (
    request.headline or plan['headline'][1] != base
  ):
    raise UserError(
      f'{request.out}: its headline was named before it was run, '
      f'{" against ".join(plan["headline"])}: name another --out for another'
    )
  for arm in design.arms:
    known = plan['arms'].setdefault(arm.name, dict(arm.overrides))
    if known != dict(arm.overrides):
      raise UserError(
        f'{request.out} has another arm {arm.name}: give it another name'
      )
  plan['seeds'] = sorted({*plan['seeds'], *request.seeds})
  plan['pairs'] += [[*p] for p in design.pairs if [*p] not in plan['pairs']]
  for name, members in design.tuned.items():
    old = plan['tuned'].setdefault(name, [])
    old += [member for member in members if member not in old]
  plan['calls'].append({'time': _now(), 'command': request.command})
  return plan


def _read_plan(path: pathlib.Path) -> dict[str, Any] | None:
  if not path.exists():
    return None
  try:
    plan = json.loads(path.read_text())
    for name in ('recipe', 'headline', 'config', 'arms', 'seeds', 'pairs',
                 'tuned', 'calls'):  # fmt: skip
      plan[name]
  except (OSError, ValueError, LookupError, TypeError) as error:
    raise UserError(f'{path} is damaged ({error!r}): remove it') from error
  return plan


def _result(
  request: Request, plan: Mapping[str, Any], store: Store
) -> comparison.Comparison:
  arms = [Arm(name, over) for name, over in plan['arms'].items()]
  cells = experiment.cells(arms, plan['seeds'], request.config)
  results = {}
  for arm in arms:
    own = {cell.seed: cell.key for cell in cells if cell.arm == arm.name}
    records = {seed: store.get(key) for seed, key in own.items()}
    results[arm.name] = comparison.ArmResult(
      arm.name, arm.overrides, records, own
    )
  pairs = [(arm, baseline) for arm, baseline in plan['pairs']]
  tuned = {
    name: best.name
    for name, members in plan['tuned'].items()
    if (best := comparison.lowest([results[m] for m in members]))
  }
  base = plan['headline'][1]
  notes = []
  if base in tuned:
    pairs += [
      (best, tuned[base])
      for name, best in tuned.items()
      if name != base and (best, tuned[base]) not in pairs
    ]
    notes.append(_TUNED)
  return comparison.Comparison(
    title=f'{request.recipe}: {" and ".join(plan["headline"])}',
    arms=results,
    pairs=comparison.pairs(results, pairs),
    headline=(plan['headline'][0], base),
    notes=notes,
    seen=plan.get('seen', 0),
    command=request.command,
    tuned=tuned,
  )


def _say(result: comparison.Comparison, out: pathlib.Path) -> None:
  cli.say(
    f'\nheld-out loss, arm minus baseline, nats a token:\n'
    f'{comparison.table(result)}\n\nreport: {out / _PAGE}'
  )


def _write(path: pathlib.Path, value: Any) -> None:
  with storage.one_line_errors(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.write_atomically(path, json.dumps(value, indent=2) + '\n')


def _now() -> str:
  return time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())
