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


class Method(NamedTuple):
  """How to orthogonalize; as in `optax.contrib.scale_by_muon`."""

  steps: Any
  preconditioning: str


class _Dim(NamedTuple):
  """A dimension of an array."""

  size: int
  axes: Axes
  """The mesh axes that split it, major to minor."""


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
  dimension_numbers: Sequence[MuonDimensionNumbers],
  shardings: Sequence[NamedSharding | None],
  coefficients: jax.Array,
  eps: jax.typing.ArrayLike,
  method: Method,
) -> list[jax.Array]:
  """Orthogonalizes every matrix in some arrays.

  Args:
    arrays: Each a stack of matrices, or one; of any rank above 1.
    dimension_numbers: Of each, which dimensions are a matrix's.
    shardings: Of each, where it lies; None if that is not known, or on one
      device. They are then optax's own program, which the compiler splits.
    coefficients: Of the Newton-Schulz iterations, (3,) or (iterations, 3).
    eps: Added to norms that are divided by.
    method: The rest.

  Returns:
    Arrays of the same shapes, dtypes and shardings, each matrix replaced by
    what `optax.contrib.scale_by_muon` makes of it: U S V^T by U S' V^T with S'
    close to one.

  Raises:
    ValueError: an array has no two disjoint groups of dimensions to be a
      matrix's, or arrays lie on different meshes.
  """
  results: list[Any] = [None] * len(arrays)
  apart = []
  for i, (x, numbers, place) in enumerate(
    zip(arrays, dimension_numbers, shardings, strict=True)
  ):
    _check(x, numbers)
    if place is None or math.prod(_sizes(place.mesh).values()) == 1:
      results[i] = _newton_schulz(x, numbers, coefficients, eps, method)
    else:
      apart.append(i)
  if apart:
    meshes = {shardings[i].mesh for i in apart}  # type: ignore[union-attr]
    if len(meshes) > 1:
      raise ValueError(f'muon: parameters lie on {len(meshes)} meshes, not one')
    mesh = meshes.pop()
    leaves = tuple(
      _leaf(arrays[i], dimension_numbers[i], shardings[i], mesh) for i in apart
    )
    taken = [arrays[i] for i in apart]
    travelled = _on_mesh(taken, coefficients, eps, leaves, mesh, method)
    for i, y in zip(apart, travelled, strict=True):
      results[i] = y
  return results


def _check(x, numbers):
  """Says which parameter cannot be a matrix."""
  if numbers is None:
    raise ValueError(
      f'muon: a parameter of shape {x.shape} has no MuonDimensionNumbers'
    )
  dims = [
    dim for of in numbers for dim in ((of,) if isinstance(of, int) else of)
  ]
  inside = all(-x.ndim <= dim < x.ndim for dim in dims)
  if not inside or len({dim % x.ndim for dim in dims}) < len(dims):
    raise ValueError(
      f'muon: {numbers} are not different dimensions of a parameter of shape'
      f' {x.shape}'
    )


def _newton_schulz(x, numbers, coefficients, eps, method):
  """Optax's own iteration: scale_by_muon with a momentum that forgets all."""
  tx = optax.contrib.scale_by_muon(
    ns_steps=method.steps,
    beta=0.0,
    eps=eps,
    nesterov=False,
    preconditioning=method.preconditioning,
    weight_dimension_numbers=numbers,
  )
  state = MuonState(jnp.zeros([], jnp.int32), jnp.zeros_like(x), coefficients)
  return tx.update(x, state)[0]


def _sizes(mesh) -> dict[str, int]:
  """Of the mesh axes that no `jax.shard_map` around this code has taken."""
  taken = jax.sharding.get_abstract_mesh().manual_axes
  return {axis: n for axis, n in mesh.shape.items() if axis not in taken}


def _ways(sizes: dict[str, int], axes: Sequence[str]) -> int:
  return math.prod(sizes[axis] for axis in axes)


def _leaf(x, numbers, place, mesh) -> _Leaf:
  """Reads an array's dimensions and their mesh axes as a stack of matrices."""
  sizes = _sizes(mesh)
  named = (
    (entry,) if isinstance(entry, str) else tuple(entry or ())
    for entry in (*place.spec, *[None] * (x.ndim - len(place.spec)))
  )
  spec = [tuple(axis for axis in axes if axis in sizes) for axes in named]
  dims = [
    _Dim(size, tuple(axis for axis in axes if sizes[axis] > 1))
    for size, axes in zip(x.shape, spec, strict=True)
  ]
  sides = [
    tuple(axis % x.ndim for axis in ((of,) if isinstance(of, int) else of))
    for of in numbers
  ]
  # An iteration commutes with the transpose: the shorter side first, so that a
  # matrix and one that is its transpose in shape and sharding travel together.
  rows, columns = sorted(
    sides,
    key=lambda side: (
      math.prod(x.shape[dim] for dim in side),
      [dims[dim] for dim in side],
    ),
  )
  stack = tuple(dim for dim in range(x.ndim) if dim not in rows + columns)
  kind = _Class(
    dtype=x.dtype,
    rows=tuple(dims[dim] for dim in rows),
    columns=tuple(dims[dim] for dim in columns),
    split=tuple(axis for dim in stack for axis in dims[dim].axes),
  )
  order = (*stack, *rows, *columns)
  return _Leaf(PartitionSpec(*spec), order, kind)


@functools.partial(
  jax.jit, static_argnames=('leaves', 'mesh', 'method'), inline=True
)
def _on_mesh(arrays, coefficients, eps, leaves, mesh, method):
  """Orthogonalizes arrays on a mesh, class by class, each device its share."""
  classes: dict[_Class, list[int]] = {}
  for i, leaf in enumerate(leaves):
    classes.setdefault(leaf.kind, []).append(i)
  sizes = _sizes(mesh)  # Inside, all of them are taken.

  def local(arrays, coefficients, eps):
    results = [None] * len(arrays)
    for kind, members in classes.items():
      stacks = [_as_stack(arrays[i], leaves[i].order, kind) for i in members]
      ends = [sum(len(s) for s in stacks[: j + 1]) for j in range(len(stacks))]
      done = _class_on_mesh(
        jnp.concatenate(stacks), kind, sizes, coefficients, eps, method
      )
      for i, y in zip(members, jnp.split(done, ends[:-1]), strict=True):
        results[i] = _from_stack(y, arrays[i].shape, leaves[i].order)
    return results

  specs = [leaf.spec for leaf in leaves]
  here = jax.sharding.get_abstract_mesh()
  return jax.shard_map(
    local,
    mesh=here if here.manual_axes else mesh,
    in_specs=(specs, PartitionSpec(), PartitionSpec()),
    out_specs=specs,
    axis_names=set(sizes),
    check_vma=False,  # Copies stay copies: all devices compute the same.
  )(arrays, coefficients, eps)


def _as_stack(x, order, kind):
  """A device's part of an array as (matrices, *rows, *columns), in parts."""
  x = x.transpose(order)
  stacked = x.ndim - len(kind.rows) - len(kind.columns)
  return x.reshape(-1, *x.shape[stacked:])


def _from_stack(y, shape, order):
  y = y.reshape([shape[dim] for dim in order])
  return y.transpose([order.index(dim) for dim in range(len(order))])


def _class_on_mesh(parts, kind, sizes, coefficients, eps, method):
  """Orthogonalizes a stack of which every device holds a part of each matrix.

  Args:
    parts: (matrices, *rows, *columns), each dimension but the first one
      device's part.
    kind: What they have in common.
    sizes: Of the mesh's axes.
    coefficients: As in `orthogonalize`.
    eps: Likewise.
    method: Likewise.

  Returns:
    The same parts of the results.
  """
  dims = kind.rows + kind.columns
  apart = tuple(axis for dim in dims for axis in dim.axes)
  copies = _divided(len(parts), kind, apart, sizes)
  senders, sharers = _ways(sizes, apart), _ways(sizes, copies)
  each = -(-len(parts) // (senders * sharers))
  total = each * senders * sharers
  stack = jnp.pad(
    parts, [(0, total - len(parts))] + [(0, 0)] * (parts.ndim - 1)
  )
  if copies:
    mine = lax.axis_index(copies) * each * senders
    stack = lax.dynamic_slice_in_dim(stack, mine, each * senders)
  if apart:
    stack = lax.all_to_all(stack, apart, 0, 0, tiled=True)

  # (senders of each dimension, matrices, *parts) to (matrices, rows, columns).
  ways = [_ways(sizes, dim.axes) for dim in dims]
  by_sender = (*ways, each, *parts.shape[1:])
  n = len(dims)
  together = (n, *(i for dim in range(n) for i in (dim, n + 1 + dim)))
  whole = stack.reshape(by_sender).transpose(together)
  shape = whole.shape
  rows = math.prod(dim.size for dim in kind.rows)
  columns = math.prod(dim.size for dim in kind.columns)
  done = _newton_schulz(
    whole.reshape(each, rows, columns),
    MuonDimensionNumbers(1, 2),
    coefficients,
    jnp.asarray(eps, whole.dtype),
    method,
  )
  back = [together.index(i) for i in range(len(together))]
  stack = done.reshape(shape).transpose(back).reshape(stack.shape)

  if apart:
    stack = lax.all_to_all(stack, apart, 0, 0, tiled=True)
  if copies:
    stack = lax.all_gather(stack, copies, tiled=True)
  return stack[: len(parts)]


def _divided(
  matrices: int, kind: _Class, apart: Axes, sizes: dict[str, int]
) -> Axes:
  """The mesh axes of copies along which dividing the stack saves work."""
  chosen: Axes = ()
  for axis, size in sizes.items():
    if axis in apart or axis in kind.split:
      continue
    ways = _ways(sizes, apart + chosen)
    if -(-matrices // (ways * size)) < -(-matrices // ways):
      chosen += (axis,)
  return chosen
