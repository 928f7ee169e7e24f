"""Walks rematerialisation, batch and mesh, and ranks what fits.

These and accumulation (none) are chosen, whatever the recipe has; all else
stays as it is there. Each trial is a compilation, so the walk goes along lines:
batches upwards for each policy in turn, on the mesh that splits parameters over
all devices of a slice; then the best of those on the other meshes.
"""

import dataclasses
import itertools
from collections.abc import Callable

from models.config import Qwen2MoeConfig
from train.aot.compile import DoesNotFitError, compile_step, with_vocabulary
from train.aot.report import Report
from train.aot.topology import devices_of
from train.config import Config, MeshConfig
from train.errors import UserError
from train.mesh import check, make_mesh

REMATS = ('none', 'minimal', 'full')
_MOST_TENSOR = 8
_WORTH = 1.02
"""A larger batch must bring so much speed for the next to be tried."""


class NothingFitsError(UserError):
  """No trial of a walk fits into memory."""


@dataclasses.dataclass(frozen=True)
class Trial:
  """A config of the walk, and what came of it."""

  config: Config
  rows: int
  """Sequences a device."""
  report: Report | None
  """None if it does not fit."""


def walk(
  config: Config,
  topology: str,
  slices: int,
  limit: int,
  say: Callable[[str], None],
) -> list[Trial]:
  """Compiles one config after another.

  Args:
    config: The recipe; its remat policy, batch, mesh and accumulation do not
      count.
    topology: Name of a slice.
    slices: How many of them.
    limit: Compilations, at most.
    say: Gets a line for each.

  Returns:
    The trials that fit, by predicted tokens a second, best first.

  Raises:
    UserError: no mesh fits the recipe.
    NothingFitsError: nothing fits into memory.
  """
  config = with_vocabulary(config)
  devices = len(devices_of(topology, slices))
  first, *others = _meshes(config, topology, slices)
  found: list[Trial] = []
  count = 0

  def attempt(mesh: MeshConfig, remat: str, rows: int) -> Trial | None:
    nonlocal count
    if count == limit:
      return None
    count += 1
    trial_config = _with(config, mesh, remat, rows * devices)
    trial = Trial(trial_config, rows, _compile(trial_config, topology, slices))
    say(f'{count:>3}/{limit} {describe(trial)}')
    if trial.report:
      found.append(trial)
    return trial

  # A third of the trials, at most, is for the other meshes.
  batches = limit - min(len(others), limit // 3)
  speeds = dict.fromkeys(REMATS, 0.0)
  rows = 1
  while speeds and count < batches:
    for remat in list(speeds):
      trial = attempt(first, remat, rows) if count < batches else None
      if trial and trial.report and _speed(trial) > _WORTH * speeds[remat]:
        speeds[remat] = _speed(trial)
      else:
        del speeds[remat]
    rows *= 2
  if found:
    best = max(found, key=_speed)
    for mesh in others:
      attempt(mesh, best.config.model.remat, best.rows)
  if not found:
    raise NothingFitsError(
      f'nothing that was tried fits into memory of {topology}'
    )
  return sorted(found, key=_speed, reverse=True)


def _compile(config: Config, topology: str, slices: int) -> Report | None:
  """The report of a config that fits."""
  try:
    report = compile_step(config, topology, slices)
  except DoesNotFitError:
    return None
  return report if report.fits else None


def _meshes(config: Config, topology: str, slices: int) -> list[MeshConfig]:
  """Meshes that the recipe allows: least tensor and expert, most fsdp first.

  Raises:
    UserError: there is none; the message is about the last.
  """
  described = devices_of(topology, slices)
  per_slice = len(described) // slices
  model = config.model
  experts = model.n_experts if isinstance(model, Qwen2MoeConfig) else 1
  allowed = []
  refused: UserError | None = None
  for tensor, expert in itertools.product(
    _powers(min(_MOST_TENSOR, model.n_heads)), _powers(experts)
  ):
    ways = per_slice // (tensor * expert)
    for fsdp in range(ways, 0, -1):
      if per_slice % (fsdp * tensor * expert):
        continue
      mesh = MeshConfig(data=0, fsdp=fsdp, tensor=tensor, expert=expert)
      try:
        check(
          _with(config, mesh, 'full', len(described)),
          make_mesh(mesh, described),
        )
      except UserError as error:
        refused = error
      else:
        allowed.append(mesh)
  if not allowed and refused:
    raise refused
  return allowed


def _with(config: Config, mesh: MeshConfig, remat: str, batch: int) -> Config:
  return dataclasses.replace(
    config,
    mesh=mesh,
    model=dataclasses.replace(config.model, remat=remat),
    data=dataclasses.replace(config.data, batch_size=batch),
    accumulate=1,
  )


def _powers(most: int) -> list[int]:
  return [2**n for n in range(most.bit_length()) if 2**n <= most]


def _speed(trial: Trial) -> float:
  return trial.report.tokens_per_second if trial.report else 0.0


def describe(trial: Trial) -> str:
  """One trial in one line."""
  m = trial.config.mesh
  axes = f'fsdp {m.fsdp} tensor {m.tensor} expert {m.expert}'
  what = f'{axes:<30} remat {trial.config.model.remat:<8} {trial.rows:>3} rows'
  if trial.report is None:
    return f'{what}  does not fit'
  r = trial.report
  return (
    f'{what}  {r.bytes.peak / 1e9:6.2f} GB  {1e3 * r.estimate.seconds:8.1f} ms'
    f'  {r.tokens_per_second:9,.0f} tokens/s a device  MFU {r.mfu:.1%}'
  )


def options(trial: Trial, recipe: Config) -> str:
  """The command-line options that make a trial's config of the recipe's."""
  m, c = trial.config.mesh, trial.config
  texts = [
    f'--mesh.data {m.data}' if recipe.mesh.data != m.data else '',
    f'--mesh.fsdp {m.fsdp} --mesh.tensor {m.tensor} --mesh.expert {m.expert}',
    f'--model.remat {c.model.remat} --data.batch_size {c.data.batch_size}',
    f'--accumulate {c.accumulate}' if recipe.accumulate != c.accumulate else '',
  ]
  return ' '.join(filter(None, texts))
