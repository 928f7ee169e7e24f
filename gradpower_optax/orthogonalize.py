"""Newton-Schulz orthogonalization of matrices that lie in parts on a mesh.

A matrix that is split over devices would be gathered in each of the fifteen
products of an orthogonalization. Here it travels twice. Matrices of one shape,
split alike, are stacked; one all-to-all changes "a part of each matrix" into
"some matrices whole"; every device orthogonalizes those by itself; one
all-to-all changes back. Along mesh axes that hold copies the stack is divided
as well, as long as there are more matrices than devices, and the results are
gathered once.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers, MuonState

Axes = tuple[str, ...]


class _Dim(NamedTuple):
  """A dimension of an array, and the mesh axes that split it, major first."""

  size: int
  axes: Axes


class _Class(NamedTuple):
  """What matrices must share to travel together."""

  dtype: Any
  rows: tuple[_Dim, ...]
  """The dimensions that, flattened, are the shorter side of the matrix."""
  columns: tuple[_Dim, ...]
  split: Axes
  """The mesh axes that split the stack."""


class _Leaf(NamedTuple):
  """An array as a stack of matrices."""

  spec: PartitionSpec
  order: tuple[int, ...]
  """Its dimensions: those of the stack, of rows, of columns."""
  kind: _Class


def orthogonalize(
  arrays: Sequence[jax.Array],
  numbers: Sequence[MuonDimensionNumbers],
  places: Sequence[NamedSharding | None],
  coefficients: jax.Array,
  eps: jax.typing.ArrayLike,
  steps: jax.typing.ArrayLike,
  preconditioning: str,
) -> list[jax.Array]:
  """Orthogonalizes every matrix in some arrays.

  Args:
    arrays: Each a stack of matrices, or one; of any rank above 1.
    numbers: Of each, which dimensions are a matrix's; see `is_matrix`.
    places: Of each, where it lies; None if that is not known: it is then
      optax's own program, which the compiler splits.
    coefficients: Of the Newton-Schulz iterations, (3,) or (iterations, 3).
    eps: Added to norms that are divided by.
    steps: Iterations, where coefficients are not those of each.
    preconditioning: As in `optax.contrib.scale_by_muon`.

  Returns:
    Arrays of the same shapes, dtypes and shardings, each matrix replaced by
    what `optax.contrib.scale_by_muon` makes of it: U S V^T by U S' V^T with S'
    close to one.

  Raises:
    ValueError: arrays lie on different meshes, or cannot lie as said; or a
      matrix is split over a mesh axis that a `jax.shard_map` has taken.
  """
  results: dict[int, Any] = dict.fromkeys(range(len(arrays)))
  on_mesh: dict[Any, dict[int, _Leaf]] = {}
  for i, (x, of, place) in enumerate(zip(arrays, numbers, places, strict=True)):
    by_rows = preconditioning == 'aol'
    leaf = None if place is None else _leaf(x, of, place, by_rows)
    if place is None or leaf is None or _is_stack_on_one_device(leaf, place):
      results[i] = _newton_schulz(
        x, of, coefficients, eps, steps, preconditioning
      )
    else:
      on_mesh.setdefault(place.mesh, {})[i] = leaf
  if len(on_mesh) > 1:
    raise ValueError(f'muon: parameters lie on {len(on_mesh)} meshes, not one')
  for mesh, leaves in on_mesh.items():
    known = isinstance(steps, int)  # Not if optax.inject_hyperparams has it.
    done = _on_mesh(
      [arrays[i] for i in leaves],
      (coefficients, eps, None if known else steps),
      leaves=tuple(leaves.values()),
      mesh=mesh,
      steps=steps if known else None,
      preconditioning=preconditioning,
    )
    results |= dict(zip(leaves, done, strict=True))
  return list(results.values())


def is_matrix(x: jax.Array, numbers: MuonDimensionNumbers) -> bool:
  """Whether numbers name different dimensions of an array, some on each side.

  Args:
    x: The array.
    numbers: Which of its dimensions are a matrix's.
  """
  sides = [_as_tuple(side) for side in numbers]
  dims = [dim for side in sides for dim in side]
  within = [dim % x.ndim for dim in dims if -x.ndim <= dim < x.ndim]
  return all(sides) and len(set(within)) == len(dims)


def _is_stack_on_one_device(leaf, place) -> bool:
  """Nothing to gain there; single matrices are faster in a stack."""
  sides = len(leaf.kind.rows + leaf.kind.columns)
  return len(leaf.order) > sides and math.prod(_sizes(place.mesh).values()) == 1


def _as_tuple(side):
  return (side,) if isinstance(side, int) else tuple(side)


def _newton_schulz(x, numbers, coefficients, eps, steps, preconditioning):
  """Optax's own iteration: scale_by_muon with a momentum that forgets all."""
  tx = optax.contrib.scale_by_muon(
    ns_steps=steps, beta=0.0, eps=eps, nesterov=False,
    preconditioning=preconditioning, weight_dimension_numbers=numbers,
  )  # fmt: skip
  state = MuonState(jnp.zeros([], jnp.int32), jnp.zeros_like(x), coefficients)
  return tx.update(x, state)[0]


def _sizes(mesh) -> dict[str, int]:
  """Of the mesh axes that no `jax.shard_map` around this code has taken."""
  taken = jax.sharding.get_abstract_mesh().manual_axes
  return {axis: n for axis, n in mesh.shape.items() if axis not in taken}


def _ways(sizes: dict[str, int], axes: Axes) -> int:
  return math.prod(sizes[axis] for axis in axes)


def _leaf(x, numbers, place, by_rows) -> _Leaf:
  """Reads an array's dimensions and their mesh axes as a stack of matrices."""
  if x.ndim == 2:
    numbers = MuonDimensionNumbers()  # As optax does, whatever they are.
  sizes = _sizes(place.mesh)
  named = [
    (entry,) if isinstance(entry, str) else tuple(entry or ())
    for entry in (*place.spec, *[None] * (x.ndim - len(place.spec)))
  ]
  spec = [tuple(axis for axis in axes if axis in sizes) for axes in named]
  ways = [_ways(sizes, axes) for axes in spec]
  if len(ways) > x.ndim or any(map(int.__mod__, x.shape, ways)):
    raise ValueError(
      f'muon: a parameter of shape {x.shape} cannot lie as {place.spec} on a'
      f' mesh of {dict(place.mesh.shape)}'
    )
  dims = [
    _Dim(size, tuple(axis for axis in axes if sizes[axis] > 1))
    for size, axes in zip(x.shape, spec, strict=True)
  ]

  def of(side):
    return tuple(dims[dim] for dim in side)

  # The shorter side first, as optax does. An iteration commutes with the
  # transpose, unless it starts by scaling rows: so square matrices are turned
  # until one that is another's transpose in sharding travels with it.
  rows, columns = sorted(
    (tuple(dim % x.ndim for dim in _as_tuple(side)) for side in numbers),
    key=lambda side: (
      math.prod(dim.size for dim in of(side)),
      () if by_rows else of(side),
    ),
  )
  taken = {axis for dim in rows + columns for axis in named[dim]} - {*sizes}
  if any(place.mesh.shape[axis] > 1 for axis in taken):
    raise ValueError(
      f'muon: matrices of a parameter of shape {x.shape} are split over'
      f' {sorted(taken)}, which a shard_map around the update has taken'
    )
  stack = tuple(dim for dim in range(x.ndim) if dim not in rows + columns)
  split = tuple(axis for dim in stack for axis in dims[dim].axes)
  kind = _Class(x.dtype, of(rows), of(columns), split)
  return _Leaf(PartitionSpec(*spec), (*stack, *rows, *columns), kind)


@functools.partial(
  jax.jit,
  static_argnames=('leaves', 'mesh', 'steps', 'preconditioning'),
  inline=True,
)
def _on_mesh(arrays, scalars, *, leaves, mesh, steps, preconditioning):
  """Orthogonalizes arrays on a mesh, class by class, each device its share."""
  classes: dict[_Class, list[int]] = {}
  for i, leaf in enumerate(leaves):
    classes.setdefault(leaf.kind, []).append(i)
  sizes = _sizes(mesh)  # Inside, all of them are taken.

  def local(arrays, scalars):
    coefficients, eps, traced_steps = scalars
    results = dict.fromkeys(range(len(arrays)))
    for kind, members in classes.items():
      sides = len(kind.rows + kind.columns)
      turned = {i: arrays[i].transpose(leaves[i].order) for i in members}
      stacks = [
        x.reshape(math.prod(x.shape[:-sides]), *x.shape[-sides:])
        for x in turned.values()
      ]
      function = functools.partial(
        _newton_schulz, numbers=MuonDimensionNumbers(1, 2),
        coefficients=coefficients, eps=jnp.asarray(eps, kind.dtype),
        steps=traced_steps if steps is None else steps,
        preconditioning=preconditioning,
      )  # fmt: skip
      done = _exchanged(function, jnp.concatenate(stacks), kind, sizes)
      ends = itertools.accumulate(map(len, stacks[:-1]))
      parts = jnp.split(done, list(ends))
      for (i, x), y in zip(turned.items(), parts, strict=True):
        back = sorted(range(x.ndim), key=leaves[i].order.__getitem__)
        results[i] = y.reshape(x.shape).transpose(back)
    return list(results.values())

  specs = [leaf.spec for leaf in leaves]
  here = jax.sharding.get_abstract_mesh()
  return jax.shard_map(
    local,
    mesh=here if here.manual_axes else mesh,
    in_specs=(specs, PartitionSpec()),
    out_specs=specs,
    axis_names=set(sizes),
    check_vma=False,  # Copies stay copies: all devices compute the same.
  )(arrays, scalars)


def _exchanged(function, parts, kind, sizes):
  """Applies a function of whole matrices to a stack of which all hold parts.

  Args:
    function: Of (matrices, rows, columns).
    parts: (matrices, *rows, *columns), each dimension but the first one
      device's part.
    kind: What they have in common.
    sizes: Of the mesh's axes.

  Returns:
    The same parts of the results.
  """
  dims = kind.rows + kind.columns
  apart = tuple(axis for dim in dims for axis in dim.axes)
  copies = _dividing(len(parts), kind, apart, sizes)
  senders, ways = _ways(sizes, apart), _ways(sizes, apart + copies)
  each = -(-len(parts) // ways)
  padding = [(0, each * ways - len(parts))] + [(0, 0)] * len(dims)
  stack = jnp.pad(parts, padding)
  if copies:
    mine = lax.axis_index(copies) * each * senders
    stack = lax.dynamic_slice_in_dim(stack, mine, each * senders)
  if apart:
    stack = lax.all_to_all(stack, apart, 0, 0, tiled=True)

  # (senders of each dimension, matrices, *parts) to (matrices, rows, columns).
  n = len(dims)
  by_sender = [_ways(sizes, dim.axes) for dim in dims]
  together = (n, *(i for dim in range(n) for i in (dim, n + 1 + dim)))
  whole = stack.reshape(*by_sender, each, *parts.shape[1:]).transpose(together)
  rows, columns = (
    math.prod(dim.size for dim in side) for side in (kind.rows, kind.columns)
  )
  done = function(whole.reshape(each, rows, columns)).reshape(whole.shape)
  back = sorted(range(2 * n + 1), key=together.__getitem__)
  stack = done.transpose(back).reshape(stack.shape)

  if apart:
    stack = lax.all_to_all(stack, apart, 0, 0, tiled=True)
  if copies:
    stack = lax.all_gather(stack, copies, tiled=True)
  return stack[: len(parts)]


def _dividing(matrices: int, kind: _Class, apart: Axes, sizes) -> Axes:
  """The mesh axes of copies along which dividing the stack saves work."""
  chosen: Axes = ()
  for axis in (a for a in sizes if a not in apart + kind.split):
    ways = _ways(sizes, apart + chosen)
    if -(-matrices // (ways * sizes[axis])) < -(-matrices // ways):
      chosen += (axis,)
  return chosen
