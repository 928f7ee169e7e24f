"""Arms against a baseline on paired seeds: the comparison as a directory.

DIR/plan.json is written before the first cell is run, and names the headline;
results.json and report.html follow. A later call adds arms and seeds.
"""

import contextlib
import json
import pathlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from train import cli, distributed, storage
from train import config as config_lib
from train.errors import UserError
from train.experiments import comparison, experiment, page, place
from train.experiments.arms import Arm
from train.experiments.cells import Store
from train.experiments.design import Design, Request, make_design

_PLAN, _RESULTS, _PAGE = 'plan.json', 'results.json', 'report.html'
_TUNED = (
  'Of arms that are tuned, the learning rate with the lowest mean loss is '
  'taken on the seeds that it is then compared on, for both sides alike.'
)


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
  design = make_design(request)
  with contextlib.ExitStack() as stack:
    if not dry:
      store = request.store or request.out / 'cells'
      stack.enter_context(place.held(request.out, store))
    return _run(request, design, engine, dry=dry)


def _run(
  request: Request, design: Design, engine: experiment.Engine, *, dry: bool
) -> int:
  cells = experiment.cells(design.arms, request.seeds, request.config)
  store = Store(request.store or request.out / 'cells')
  new = experiment.missing(cells, store)
  plan = _plan(request, design, store)
  main = distributed.is_main()
  if main:
    arm, baseline = plan['headline']
    seen = plan.get('seen', 0)
    cli.say(
      f'headline: {arm} against {baseline}, '
      + (f'named when {seen} of its pairs had been finished' if seen
         else 'named before it is run')
    )  # fmt: skip
  if not dry:
    with distributed.together():
      if main:
        _write(request.out / _PLAN, plan)
  experiment.say_budget(cells, new, store, engine)
  if dry:
    return 0
  status = 0
  try:
    if new:
      status = experiment.run_missing(new, store, request.out / 'runs', engine)
  finally:
    if main:
      # Another experiment may have added cells meanwhile.
      result = _result(request, plan, Store(store.directory))
      _write(request.out / _RESULTS, comparison.to_json(result))
      page.write(request.out / _PAGE, result)
  if main:
    _say(result, request.out)
  return status


def _seen(
  request: Request, plan: Mapping[str, Any], seeds: Sequence[int], store: Store
) -> int:
  """Pairs of the headline that are finished on these seeds."""
  arms = [Arm(name, plan['arms'][name]) for name in plan['headline']]
  cells = experiment.cells(arms, seeds, request.config)
  done = {(c.arm, c.seed) for c in cells if store.get(c.key) is not None}
  return sum(all((arm.name, seed) in done for arm in arms) for seed in seeds)


def _plan(request: Request, design: Design, store: Store) -> dict[str, Any]:
  """What plan.json is to hold: what it held, and what is asked for now.

  Args:
    request: What is asked for.
    design: All of it.
    store: A headline that is named now, or seeds that are added, might have
      been chosen for what is in it.

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
    'config': wanted,
    'arms': {},
    'seeds': [],
    'pairs': [],
    'tuned': {},
    'calls': [],
  }
  if plan['recipe'] != request.recipe or plan['config'] != wanted:
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
  added = sorted({*request.seeds} - {*plan['seeds']})
  plan['seeds'] = sorted({*plan['seeds'], *added})
  seen = _seen(request, plan, plan['seeds'], store)
  if not plan['calls']:
    plan['seen'] = seen
  plan['pairs'] += [[*p] for p in design.pairs if [*p] not in plan['pairs']]
  for name, members in design.tuned.items():
    old = plan['tuned'].setdefault(name, [])
    old += [member for member in members if member not in old]
  plan['calls'].append({
    'time': _now(), 'command': request.command, 'seeds': added, 'seen': seen,
  })  # fmt: skip
  return plan


def _read_plan(path: pathlib.Path) -> dict[str, Any] | None:
  if not path.exists():
    return None
  try:
    plan = json.loads(path.read_text())
    for name in ('recipe', 'headline', 'config', 'arms', 'seeds', 'pairs',
                 'tuned', 'calls'):  # fmt: skip
      plan[name]
    plan['config'] = config_lib.with_defaults(plan['config'])
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
  added = [
    comparison.Added(call['seeds'], call['seen'])
    for call in plan['calls'][1:]
    if call.get('seeds') and call['seen']
  ]
  notes = [each.words for each in added]
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
    added=added,
    command=request.command,
    tuned=tuned,
  )


def _say(result: comparison.Comparison, out: pathlib.Path) -> None:
  notes = ''.join(f'\n{note}' for note in result.notes)
  cli.say(
    f'\nheld-out loss, arm minus baseline, nats a token:\n'
    f'{comparison.table(result)}\n{notes}\nreport: {out / _PAGE}'
  )


def _write(path: pathlib.Path, value: Any) -> None:
  with storage.one_line_errors(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    storage.write_atomically(path, json.dumps(value, indent=2) + '\n')


def _now() -> str:
  return time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())
