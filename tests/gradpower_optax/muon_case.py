"""A model's parameters on meshes of eight devices, and what a program sends."""

import collections
import math
import re
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers

AXES = ('data', 'fsdp', 'tensor', 'expert')
# Every mesh of eight devices over these axes.
MESHES = [sizes for sizes in np.ndindex(9, 9, 9, 9) if math.prod(sizes) == 8]
STANDARD = (3.4445, -4.7750, 2.0315)
# Compiling for a CPU takes half the time, and leaves collectives as they are.
UNOPTIMIZED = {'xla_backend_optimization_level': 0}
# The default's five iterations as a loop, which is less to compile.
LOOPED = (STANDARD,) * 5


class Param(NamedTuple):
  """A parameter: its shape, its matrices' dimensions, its mesh axes."""

  shape: tuple[int, ...]
  numbers: MuonDimensionNumbers | None
  axes: tuple[str | tuple[str, ...] | None, ...]


def _matrices(rows, columns):
  return MuonDimensionNumbers(rows, columns)


# Three layers, stacked. Of matrices that travel together there are three, five,
# six and seven, so that few stacks divide evenly, and 48 of experts.
PARAMS = {
  'query': Param(
    (3, 16, 8, 4), _matrices(1, (2, 3)), (None, 'fsdp', 'tensor', None)
  ),
  # Key heads are fewer than a tensor axis may have devices.
  'key': Param((3, 16, 2, 4), _matrices(1, (2, 3)), (None, 'fsdp')),
  'out': Param(
    (3, 8, 4, 16), _matrices((1, 2), 3), (None, 'tensor', None, 'fsdp')
  ),
  'query_by_head': Param(
    (3, 16, 8, 4), _matrices(1, 3), (None, 'fsdp', 'tensor', None)
  ),
  'up': Param((3, 16, 40), _matrices(1, 2), (None, 'fsdp', 'tensor')),
  'down': Param((3, 40, 16), _matrices(-2, -1), (None, 'tensor', 'fsdp')),
  'expert_up': Param(
    (3, 8, 16, 24), _matrices(2, 3), (None, 'expert', 'fsdp', 'tensor')
  ),
  'expert_down': Param(
    (3, 8, 24, 16), _matrices(2, 3), (None, 'expert', 'tensor', 'fsdp')
  ),
  'alone': Param((16, 40), _matrices(0, 1), ('fsdp', 'tensor')),
  'two_axes': Param(
    (5, 16, 48), _matrices(1, 2), (None, ('fsdp', 'expert'), 'tensor')
  ),
  'embedding': Param((48, 16), None, ('tensor', ('fsdp', 'expert'))),
  'norm': Param((3, 16), None, ()),
}  # fmt: skip


def mesh_of(sizes, kind='Auto'):
  """A mesh of eight devices, of sizes along AXES."""
  if len(jax.devices()) < 8:
    pytest.skip('needs 8 devices; tests/conftest.py asks for fake ones')
  types = (getattr(AxisType, kind),) * len(AXES)
  return jax.make_mesh(sizes, AXES, axis_types=types)


def shardings(mesh, params=PARAMS):
  return {
    name: NamedSharding(mesh, PartitionSpec(*param.axes))
    for name, param in params.items()
  }


def arrays(seed, params=PARAMS):
  """Of full rank: independent Gaussians, and no matrix is square."""
  rng = np.random.default_rng(seed)
  return {
    name: rng.standard_normal(param.shape, np.float32)
    for name, param in params.items()
  }


def errors(actual, expected):
  """Of each array the largest error, over its largest entry."""
  return {
    name: float(
      np.abs(np.asarray(actual[name]) - np.asarray(x)).max()
      / np.abs(np.asarray(x)).max()
    )
    for name, x in expected.items()
  }


# What a compiled program sends.


class Collective(NamedTuple):
  kind: str
  nbytes: int
  """What a device holds after it."""
  ways: int
  """Devices in a group."""


_COLLECTIVE = re.compile(
  r'= (?P<result>\([^()]*\)|\S+) (?P<kind>all-reduce|all-gather|all-to-all|'
  r'ragged-all-to-all|collective-permute|collective-broadcast|reduce-scatter)'
  r'(?P<start>-start)?\('
)
_ARRAY = re.compile(r'\b[a-z]+(\d+)[a-z0-9]*\[([\d,]*)\]')
# Groups that are listed, {{0,1},{2,3}}; by their number and size, [2,4]<=[8];
# by axes of a mesh, mesh['x'=2,'y'=4] {'y'}, or parts of those, {'y':(1)2}.
_LISTED = re.compile(r'replica_groups=\{\{([\d,]+)\}')
_SIZED = re.compile(r'replica_groups=\[\d+,(\d+)\]')
_NAMED = re.compile(r'replica_groups=mesh\[([^]]*)\][^{]*\{([^}]*)\}')


def _ways(line):
  if listed := _LISTED.search(line):
    return listed[1].count(',') + 1
  if sized := _SIZED.search(line):
    return int(sized[1])
  named = _NAMED.search(line)
  assert named, line
  sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
  axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
  return math.prod(int(part or sizes[axis]) for axis, part in axes)


def collectives(text):
  """Of a compiled program's text, in which each stands once, outside loops."""
  found = []
  for line in text.splitlines():
    match = _COLLECTIVE.search(line)
    if match is None:
      continue
    sizes = [
      int(bits) * math.prod(int(n) for n in dims.split(',') if n) // 8
      for bits, dims in _ARRAY.findall(match['result'])
    ]
    # What starts holds its operand too.
    nbytes = sizes[1] if match['start'] else sum(sizes)
    found.append(Collective(match['kind'], nbytes, _ways(line)))
  return found


def counts(found):
  return dict(collections.Counter(collective.kind for collective in found))


def bytes_sent(found):
  """By a device, of what it holds; its own share stays."""
  return sum(c.nbytes * (c.ways - 1) // c.ways for c in found)


def classes(params, sizes):
  """Matrices that can travel together.

  Args:
    params: Of which some are matrices.
    sizes: Of the mesh's axes, along AXES.

  Returns:
    For each class (matrices, nbytes, ways, free): how many a device has a part
    of, the bytes of a part in float32, over how many devices each is split,
    and over how many others there are copies.
  """
  sizes = dict(zip(AXES, sizes, strict=True))
  ways = lambda axes: math.prod(sizes[axis] for axis in axes)
  found = collections.Counter()
  for shape, numbers, axes in params.values():
    if numbers is None:
      continue
    named = [(a,) if isinstance(a, str) else a or () for a in axes]
    named += [()] * (len(shape) - len(axes))
    dims = [
      (n, tuple(axis for axis in names if sizes[axis] > 1))
      for n, names in zip(shape, named, strict=True)
    ]
    sides = [
      [d % len(shape) for d in ((side,) if isinstance(side, int) else side)]
      for side in numbers
    ]
    stack = set(range(len(shape))).difference(*sides)
    split = tuple(axis for d in sorted(stack) for axis in dims[d][1])
    kind = tuple(sorted(tuple(dims[d] for d in side) for side in sides)), split
    found[kind] += math.prod(shape[d] for d in stack) // ways(split)
  result = []
  for (sides, split), matrices in found.items():
    apart = [axis for side in sides for _, names in side for axis in names]
    size = math.prod(n for side in sides for n, _ in side)
    n = ways(apart)
    free = math.prod(sizes.values()) // n // ways(split)
    result.append((matrices, 4 * size // n, n, free))
  return result


def check_traffic(found, params, sizes):
  """Each matrix travels out and back once, and nothing else does.

  Args:
    found: The collectives of a compiled update.
    params: As for `classes`.
    sizes: As for `classes`.
  """
  kinds = classes(params, sizes)
  by_kind = {kind: [] for kind in ('all-to-all', 'all-gather')}
  for collective in found:
    by_kind[collective.kind].append(collective)
  apart = sum(ways > 1 for _, _, ways, _ in kinds)
  assert len(by_kind['all-to-all']) == 2 * apart
  assert len(by_kind['all-gather']) <= sum(
    free > 1 and matrices > ways for matrices, _, ways, free in kinds
  )
  sent = bytes_sent(by_kind['all-to-all'])
  # Copies share the work; what they lack to an equal share is one matrix.
  least = most = 0
  for matrices, nbytes, ways, free in kinds:
    sharers = min(free, -(-matrices // ways))
    each = 2 * nbytes * (ways - 1) // ways
    least += each * matrices // sharers
    most += each * (matrices // sharers + ways)
  assert least <= sent <= most, (least, sent, most)


def compiled_update(build, params, mesh, options=None, **arguments):
  """The compiled first update by `build(0.1, ...)`, its gradients abstract.

  Args:
    build: muon, or optax's.
    params: Which `build` is given the numbers of.
    mesh: Where they lie.
    options: The compiler's.
    **arguments: More of `build`.

  Returns:
    A program of the gradients alone.
  """
  where = shardings(mesh, params)
  numbers = {name: param.numbers for name, param in params.items()}
  tx = build(0.1, muon_weight_dimension_numbers=numbers, **arguments)
  grads = {
    name: jax.ShapeDtypeStruct(param.shape, np.float32, sharding=where[name])
    for name, param in params.items()
  }

  def update(grads):
    return tx.update(grads, tx.init(grads), grads)[0]

  lowered = jax.jit(update, out_shardings=where).lower(grads)
  return lowered.compile(compiler_options=options)
