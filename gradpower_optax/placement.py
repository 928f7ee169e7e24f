"""The shardings of an optimizer's parameters, as far as they are known."""

import warnings
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding

UNKNOWN = (
  'muon: update is traced and does not know how the parameters are sharded, so'
  ' that a sharded matrix is gathered in every product: pass param_shardings'
  ' (NamedSharding(mesh, PartitionSpec()) for copies), or call init outside of'
  ' jit on the sharded parameters'
)


class Placements:
  """The shardings of one Muon's parameters: given, in their types, or seen.

  The type of a traced array on Auto axes has its mesh, but not its spec. The
  spec is then that of the array which `init` has seen at the same place in the
  same tree, with the same shape and type. Devices are not remembered, since
  those of `update` may be others.

  Args:
    given: A tree of shardings, a prefix of one, a function from parameters to
      one, or None.
  """

  def __init__(self, given: Any):
    self._given = given
    self._seen: dict[Any, PartitionSpec] = {}
    self._warned = False

  def see(self, params: Any) -> None:
    """Remembers the specs of concrete arrays; tracers have none."""
    leaves, structure = jax.tree.flatten(params)
    for i, x in enumerate(leaves):
      concrete = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
      if concrete and isinstance(x.sharding, NamedSharding):
        self._seen[_key(structure, i, x)] = x.sharding.spec

  def of(
    self, tree: Any, leaves: Sequence[jax.Array]
  ) -> tuple[list[NamedSharding | None], bool]:
    """Returns the sharding of each leaf; warns once where one is needed.

    Args:
      tree: Gradients.
      leaves: Arrays that were computed from its leaves, in their order.

    Returns:
      The sharding of each leaf or None, and whether it is None for a leaf that
      the compiler may split over devices.
    """
    if self._given is not None:
      given = by_leaf(self._given, tree, Sharding, 'param_shardings')
      return [x if isinstance(x, NamedSharding) else None for x in given], False
    structure = jax.tree.structure(tree)
    found = [self._known(structure, i, x) for i, x in enumerate(leaves)]
    unknown = any(
      place is None and _may_be_split(x)
      for x, place in zip(leaves, found, strict=True)
    )
    if unknown and not self._warned:
      self._warned = True
      warnings.warn(UNKNOWN, stacklevel=2)
    return found, unknown

  def _known(self, structure, i: int, x) -> NamedSharding | None:
    of_type = jax.typeof(x).sharding
    if {*of_type.mesh.axis_types} - {AxisType.Manual} == {AxisType.Explicit}:
      return of_type
    if not isinstance(x, jax.core.Tracer):
      return x.sharding if isinstance(x.sharding, NamedSharding) else None
    spec = self._seen.get(_key(structure, i, x))
    return None if spec is None else NamedSharding(of_type.mesh, spec)


def _key(structure, i: int, x):
  return structure, i, x.shape, jax.typeof(x).sharding


def _may_be_split(x) -> bool:
  """Whether the compiler may split a tracer over devices."""
  mesh = jax.typeof(x).sharding.mesh
  axes = zip(mesh.shape.values(), mesh.axis_types, strict=True)
  return isinstance(x, jax.core.Tracer) and any(
    size > 1 and kind == AxisType.Auto for size, kind in axes
  )


def by_leaf(given, tree, kind: type, argument: str) -> list[Any]:
  """Returns the value that an argument has for each leaf of a tree.

  Args:
    given: A tree of values, a prefix of one, or a function from `tree` to one.
    tree: The tree.
    kind: The type of a value, which may also be None.
    argument: The argument's name, for errors.

  Raises:
    ValueError: the structure is another.
    TypeError: a value is of another type.
  """
  if not jax.tree.leaves(tree):
    return []  # Such as the placeholder that optax.tree.map_params inits with.
  given = given(tree) if callable(given) else given
  found: list[Any] = []
  try:
    jax.tree.map(
      lambda value, part: found.extend([value] * len(jax.tree.leaves(part))),
      given,
      tree,
      is_leaf=lambda x: x is None or isinstance(x, kind),
    )
  except ValueError as error:
    raise ValueError(
      f'muon: {argument} must have the structure of the parameters, or of a'
      f' prefix, with a {kind.__name__} or None for each'
    ) from error
  for value in found:
    if not isinstance(value, kind | None):
      raise TypeError(
        f'muon: {argument} must hold {kind.__name__} or None, not {value!r}'
      )
  return found
