"""The collectives of a compiled program: kind, mesh axes, bytes.

Bytes are those of the whole array on one device: what an all-gather yields,
what a reduce-scatter takes, what an all-reduce, an all-to-all or a permutation
takes. A program counts loops by their trips and an asynchronous pair once.
"""

import collections
import dataclasses
import re
from typing import Any

from jax.sharding import Mesh

from train.aot import groups as groups_lib
from train.aot import hlo
from train.aot.chips import Chip
from train.aot.network import Network

KINDS = (
  'all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all',
  'ragged-all-to-all', 'collective-permute', 'collective-broadcast',
)  # fmt: skip

# libtpu's way of reduce-scatter on newer chips: a fusion of an all-reduce with
# the slice of it that a device needs.
_SLICED = 'all-reduce-scatter'

# It repeats a collective in each fusion that computes beside it and in one that
# ends it; the one that begins it has a custom call, AsyncCollectiveStart.
_GOES_ON = 'async_collective_fusion'

# Between slices a program sends and receives through its hosts.
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')


@dataclasses.dataclass(frozen=True)
class Collective:
  """All runs of one instruction."""

  kind: str
  """One of `KINDS`."""
  axis: str
  """Mesh axes joined by '+', or 'mixed'."""
  count: int
  """How often a step runs it."""
  bytes: int
  """Of all its runs, on one device."""
  seconds: float
  """Of all its runs, at the network's full rate."""
  overlaps: bool
  """Whether the program computes between its start and its end."""


def find(program: hlo.Program, mesh: Mesh, chip: Chip) -> list[Collective]:
  """Lists a program's collectives between different devices.

  Args:
    program: Compiled for the mesh.
    mesh: Its devices, real or described.
    chip: Theirs.
  """
  shape = dict(mesh.shape)
  network = Network(mesh, chip)
  found = []
  for run in program.runs():
    instruction = run.instruction
    transfer = _BETWEEN_SLICES.search(instruction.attributes)
    if instruction.opcode == 'send' and transfer:
      kind = transfer[1].lower().replace('_', '-')
      # models.sharding joins slices along 'data' alone.
      axis, size = 'data', _bytes(run, 'send', 1)
      seconds = network.seconds_between_slices(kind, size)
      overlaps = True
    else:
      kind = _kind(run)
      if not kind:
        continue
      groups = groups_lib.parse_groups(instruction.attributes, mesh.size)
      are_pairs = kind == 'collective-permute'
      axis = groups_lib.axes_of(groups, shape, are_pairs=are_pairs)
      if not axis:
        continue
      size = _bytes(run, kind, groups.shape[1])
      seconds = network.seconds(instruction, kind, size, groups)
      overlaps = (
        instruction.opcode.endswith('-start')
        or run.is_async
        or _holds(run, 'AsyncCollectiveStart')
      )
    found.append(
      Collective(
        kind=kind,
        axis=axis,
        count=run.times,
        bytes=run.times * size,
        seconds=run.times * seconds,
        overlaps=overlaps,
      )
    )
  return found


def _kind(run: hlo.Run) -> str:
  """The kind of collective that a run begins, '' if none."""
  kind = run.instruction.opcode.removesuffix('-start')
  if kind not in KINDS:
    return ''
  if run.fused and run.where.startswith(_SLICED) and kind == 'all-reduce':
    return 'reduce-scatter'
  if run.fused and (
    run.where.startswith(_GOES_ON) or _holds(run, 'AsyncCollectiveDone')
  ):
    return ''
  return kind


def _holds(run: hlo.Run, target: str) -> bool:
  """Whether a custom call with a target is in the same fusion."""
  return run.fused and any(
    f'custom_call_target="{target}"' in one.attributes
    for one in run.computation.values()
  )


def totals(found: list[Collective]) -> list[dict[str, Any]]:
  """Sums by kind and axis, the most bytes first, as JSON holds them."""
  sums: dict[tuple[str, str], list[int]] = collections.defaultdict(
    lambda: [0, 0]
  )
  for one in found:
    sums[one.kind, one.axis][0] += one.count
    sums[one.kind, one.axis][1] += one.bytes
  ordered = sorted(sums.items(), key=lambda item: (-item[1][1], item[0]))
  return [
    {'kind': kind, 'axis': axis, 'count': count, 'bytes': size}
    for (kind, axis), (count, size) in ordered
  ]


def _bytes(run: hlo.Run, kind: str, members: int) -> int:
  shapes = [run.computation[name].shape for name in run.instruction.operands]
  if kind in ('collective-permute', 'ragged-all-to-all', 'send'):
    shapes = shapes[:1]  # Further operands say where, not what.
  size = sum(map(hlo.byte_size, shapes))
  return size * members if kind == 'all-gather' else size
