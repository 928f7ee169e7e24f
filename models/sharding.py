"""Logical axis names, and the one table that maps them to mesh axes.

Every parameter and activation names its axes by what they mean; `RULES` says
which mesh axes split them. Mesh axes are Auto: the compiler partitions what
lies between the constraints, and kernels that it cannot are islands of
`jax.shard_map`, made by `island`.

All of it works inside of a `jax.shard_map` over some of the axes too, such as
the train step's over 'data': there those axes are out of sight, arrays are one
device's part along them, and sums over them are the caller's.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from models.config import DecoderConfig, Qwen2MoeConfig

AXES = ('data', 'fsdp', 'tensor', 'expert')
"""Of every mesh: copies of the parameters, parameters split along their model
width, heads and hidden widths split, experts split."""

BATCH = ('data', 'fsdp', 'expert')
"""Axes that split a batch; experts get their tokens by an all-to-all."""

RULES: dict[str, tuple[str, ...]] = {
  # Activations.
  'batch': BATCH,
  'rows': ('data',),  # A batch whose width is split by the other axes instead.
  'length': (),
  'width': (),
  # Both.
  'heads': ('tensor',),
  'kv_heads': ('tensor',),
  'head_dim': (),
  'mlp': ('tensor',),
  'vocab': ('tensor',),
  # Parameters.
  'layers': (),
  'norm': (),
  'embed': ('fsdp', 'expert'),
  'experts': ('expert',),
  'expert_embed': ('fsdp',),
  'expert_mlp': ('tensor',),
  'router': (),
}


def make_mesh(devices: Any = None, **sizes: int) -> Mesh:
  """A mesh over all four axes.

  Several slices of TPUs are joined along 'data', whose collectives are the
  fewest; the other axes stay inside of a slice.

  Args:
    devices: Their sequence; all of the default backend's if left out.
    **sizes: Of the axes by name; 1 if left out. Their product is the number
      of devices.

  Raises:
    ValueError: an axis is unknown, the sizes do not fit the devices, or 'data'
      is no multiple of the slices.
  """
  if unknown := sorted(set(sizes) - set(AXES)):
    raise ValueError(f'mesh.{unknown[0]}: the axes are {", ".join(AXES)}')
  array = np.asarray(jax.devices() if devices is None else devices)
  shape = [sizes.get(axis, 1) for axis in AXES]
  if min(shape) < 1 or np.prod(shape) != array.size:
    raise ValueError(
      f'a mesh of {" x ".join(map(str, shape))} ({", ".join(AXES)}) does not '
      f'fit {array.size} devices'
    )
  devices = list(array.ravel())
  types = (AxisType.Auto,) * len(AXES)
  slices = len({getattr(device, 'slice_index', 0) for device in devices})
  # An axis may end within a dimension of the slice: 64 of 16 x 16 x 24.
  split = {'allow_split_physical_axes': True}
  if slices == 1:
    placed = mesh_utils.create_device_mesh(shape, devices, **split)
    return Mesh(placed, AXES, axis_types=types)
  copies, *inner = shape
  if copies % slices:
    raise ValueError(
      f'mesh.data ({copies}) must be a multiple of the {slices} slices'
    )
  placed = mesh_utils.create_hybrid_device_mesh(
    [copies // slices, *inner], [slices, 1, 1, 1], devices, **split
  )
  return Mesh(placed, AXES, axis_types=types)


def platform(mesh: Mesh | None) -> str:
  """Whose kernels to use: 'cpu', 'gpu' (CUDA) or 'tpu'.

  'cpu' stands for those that run anywhere, also without a mesh.

  The default backend has no say: a program compiled on a CPU for a TPU's mesh
  holds the TPU's kernels.
  """
  if mesh is None:
    return 'cpu'
  found = mesh.devices.flat[0].platform
  return {'cuda': 'gpu', 'gpu': 'gpu', 'tpu': 'tpu'}.get(found, 'cpu')


def visible() -> tuple[str, ...]:
  """The mesh axes that no `jax.shard_map` around this code has taken."""
  taken = jax.sharding.get_abstract_mesh().manual_axes
  return tuple(axis for axis in AXES if axis not in taken)


def axes_of(name: str, mesh: Mesh | None = None) -> tuple[str, ...]:
  """The visible mesh axes that split a logical axis.

  Args:
    name: A key of `RULES`.
    mesh: Leaves out its axes of one device, over which a collective would only
      copy.
  """
  return tuple(
    axis
    for axis in RULES[name]
    if axis in visible() and (mesh is None or mesh.shape[axis] > 1)
  )


def ways(mesh: Mesh, name: str) -> int:
  """How many parts the visible mesh axes split a logical axis into."""
  return math.prod(mesh.shape[axis] for axis in axes_of(name))


def spec(*names: str | None, mesh: Mesh | None = None) -> PartitionSpec:
  """The mesh axes that split an array, from the meaning of its axes."""
  axes = (axes_of(name, mesh) if name else () for name in names)
  return PartitionSpec(*axes)


def island(
  function: Callable[..., Any],
  mesh: Mesh,
  *,
  in_specs: Any,
  out_specs: Any,
  check_vma: bool = True,
) -> Callable[..., Any]:
  """`jax.shard_map` over all visible axes."""
  return jax.shard_map(
    function,
    mesh=_seen(mesh),
    in_specs=in_specs,
    out_specs=out_specs,
    axis_names=set(visible()),
    check_vma=check_vma,
  )


def _seen(mesh: Mesh) -> Any:
  """A mesh as it is called inside of a `jax.shard_map` over some axes."""
  here = jax.sharding.get_abstract_mesh()
  return here if here.manual_axes else mesh


def constrain(x: jax.Array, mesh: Mesh | None, *names: str | None) -> jax.Array:
  """Tells the compiler how an array is split, if there is a mesh.

  A batch that the mesh does not divide, as of a single prompt, is not split.
  """
  if mesh is None or mesh.size == 1:
    return x
  if names[0] in ('batch', 'rows'):
    names = divided(mesh, x.shape[0], names[0]), *names[1:]
  place = NamedSharding(_seen(mesh), spec(*names))
  return jax.lax.with_sharding_constraint(x, place)


def divides(mesh: Mesh, size: int, name: str) -> bool:
  """Whether the visible mesh axes of a logical axis divide its size."""
  return size % ways(mesh, name) == 0


def divided(mesh: Mesh, size: int, name: str) -> str | None:
  """The name of a logical axis, or None where it cannot be split evenly."""
  return name if divides(mesh, size, name) else None


def param(value: jax.Array, *names: str, is_cast: bool = False) -> nnx.Param:
  """A parameter that knows the meaning of its axes.

  Args:
    value: float32.
    *names: Keys of `RULES`.
    is_cast: Whether all that reads it casts it to the dtype of activations
      first.
  """
  if value.ndim != len(names):
    raise ValueError(f'{value.ndim} axes have the names {names}')
  return nnx.Param(value, logical_axes=names, is_cast=is_cast)


def pinned(module: nnx.Module, mesh: Mesh | None) -> nnx.Module:
  """Tells the compiler how a module's parameters are split.

  Their gradients are split alike, so that each is reduced to where it belongs
  as soon as it is there.
  """
  if mesh is None or mesh.size == 1:
    return module
  graph, state = nnx.split(module, nnx.Param)
  params = jax.lax.with_sharding_constraint(
    nnx.to_pure_dict(state), param_shardings(module, mesh)
  )
  return nnx.merge(graph, params)


def param_shardings(model: nnx.Module, mesh: Mesh) -> Any:
  """Where each parameter lies.

  Args:
    model: Real, or abstract from `nnx.eval_shape`.
    mesh: Over `AXES`.

  Returns:
    A nested dict of `NamedSharding`, like `nnx.to_pure_dict` of the model's
    parameters. An axis in front of the named ones is that of stacked layers.
  """

  def place(variable: nnx.Param) -> NamedSharding:
    names = variable.get_metadata('logical_axes')
    stacked = ('layers',) * (len(variable.shape) - len(names))
    return NamedSharding(_seen(mesh), spec(*stacked, *names))

  state = nnx.state(model, nnx.Param)
  placed = jax.tree.map(
    place, state, is_leaf=lambda x: isinstance(x, nnx.Variable)
  )
  return nnx.to_pure_dict(placed)


def check(config: DecoderConfig, mesh: Mesh) -> None:
  """Checks that a mesh divides a model.

  Raises:
    ValueError: naming the field and the axes that do not divide it.
  """

  def require(field: str, size: int, logical: str) -> None:
    if not divides(mesh, size, logical):
      raise ValueError(
        f'model.{field} ({size}) must be a multiple of {ways(mesh, logical)}, '
        f'the size of the mesh over {" x ".join(axes_of(logical))}'
      )

  require('d_model', config.d_model, 'embed')
  require('n_heads', config.n_heads, 'heads')
  kv = 'n_kv_heads' if config.n_kv_heads else 'n_heads'
  require(kv, config.kv_heads, 'kv_heads')
  require('vocab_size', config.vocab_size, 'vocab')
  layers = range(config.n_layers)
  if not all(config.is_sparse(layer) for layer in layers):
    require('d_ff', config.d_ff, 'mlp')
  if isinstance(config, Qwen2MoeConfig) and any(map(config.is_sparse, layers)):
    require('n_experts', config.n_experts, 'experts')
    require('d_expert', config.d_expert, 'expert_mlp')
    require('d_shared', config.d_shared, 'mlp')
