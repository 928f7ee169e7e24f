"""What Muon has to do on each of N devices, read off its own program.

The update is traced, not compiled, for a mesh of devices that are not there:
operations of its products and bytes of its collectives, on one device, padding
included.
"""

import functools
import math
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import AbstractMesh
from optax.contrib import MuonDimensionNumbers

from gradpower_optax import muon
from models import accounting, families, sharding
from models.config import DecoderConfig
from models.matrices import Matrix, matrices

LAYERS, REST = 'layers, forward and backward', 'embedding, head and loss'
"""What programs of a step are called."""
STEPS = 5
FORMULA = '5 x (4 m^2 n + 2 m^3) for a matrix of m x n, m <= n'


class Work(NamedTuple):
  """Of one device, for one update."""

  flops: int
  """Of the products."""
  sent: int
  """Bytes to other devices: parts of matrices there and back."""


def newton_schulz_flops(m: int, n: int) -> int:
  """Operations of the products that orthogonalize an m x n matrix, m <= n.

  A step has X X^T and B X of 2 m^2 n, and A A of 2 m^3.
  """
  return STEPS * (4 * m * m * n + 2 * m**3)


def largest(config: DecoderConfig) -> tuple[int, int]:
  """The shape m x n, m <= n, of the matrix with the most operations."""
  model = abstract_model(config)
  found = []
  for x, number in zip(
    jax.tree.leaves(nnx.to_pure_dict(nnx.state(model, nnx.Param))),
    numbers_by_leaf(dimension_numbers(model)),
    strict=True,
  ):
    if number is not None:
      m, n = sorted(math.prod(x.shape[i] for i in side) for side in number)
      found.append((m, n))
  return max(found, key=lambda shape: newton_schulz_flops(*shape))


@functools.cache
def on_devices(config: DecoderConfig, devices: int) -> Work:
  """What one of the devices that share a model's parameters does."""
  mesh: Any = abstract_mesh(config, devices)
  model = abstract_model(config)
  places = sharding.param_shardings(model, mesh)
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  tx = muon(
    1e-3,
    muon_weight_dimension_numbers=dimension_numbers(model),
    param_shardings=places,
  )
  state = jax.eval_shape(tx.init, params)
  traced = jax.make_jaxpr(tx.update)(params, state, params)
  return _count(traced.jaxpr, dict(mesh.shape))


def _count(jaxpr, sizes: dict[str, int]) -> Work:
  """Of the equations, those of inner programs included."""
  flops = sent = 0
  for eqn in jaxpr.eqns:
    taken, made = ([v.aval for v in side] for side in (eqn.invars, eqn.outvars))
    match eqn.primitive.name:
      case 'dot_general':
        (summed, _), _ = eqn.params['dimension_numbers']
        inner = math.prod(taken[0].shape[i] for i in summed)
        flops += 2 * inner * math.prod(made[0].shape)
      case 'all_to_all' | 'all_gather' as name:
        over = eqn.params['axis_name']
        ways = math.prod(
          sizes[axis] for axis in ([over] if isinstance(over, str) else over)
        )
        size = taken[0].size * taken[0].dtype.itemsize * (ways - 1)
        sent += size if name == 'all_gather' else size // ways
    times = eqn.params['length'] if eqn.primitive.name == 'scan' else 1
    for value in eqn.params.values():
      inside = getattr(value, 'jaxpr', value)
      if hasattr(inside, 'eqns'):
        work = _count(inside, sizes)
        flops, sent = flops + times * work.flops, sent + times * work.sent
  return Work(flops, sent)


def abstract_mesh(config: DecoderConfig, devices: int) -> AbstractMesh:
  """Parameters split over as many devices as divide them; copies of that."""
  fsdp = math.gcd(config.d_model, devices)
  sizes = {'data': devices // fsdp, 'fsdp': fsdp}
  shape = tuple(sizes.get(axis, 1) for axis in sharding.AXES)
  types = (jax.sharding.AxisType.Auto,) * len(shape)
  return AbstractMesh(shape, sharding.AXES, axis_types=types)


def abstract_model(config: DecoderConfig, mesh: Any = None) -> nnx.Module:
  """The model with shapes in the place of parameters."""
  return nnx.eval_shape(
    lambda: families.build(config, rngs=nnx.Rngs(params=0), mesh=mesh)
  )


def numbers_by_leaf(numbers: Any) -> list[MuonDimensionNumbers | None]:
  """A table of dimension numbers as a list, in the order of parameters."""
  return jax.tree.leaves(
    numbers, is_leaf=lambda x: x is None or isinstance(x, MuonDimensionNumbers)
  )


def dimension_numbers(model: nnx.Module) -> Any:
  """The trainer's table: which axes of each parameter are a matrix's."""
  return jax.tree.map(
    lambda matrix: matrix and MuonDimensionNumbers(*matrix),
    matrices(model),
    is_leaf=lambda x: x is None or isinstance(x, Matrix),
  )


def forward_and_backward_flops(
  config: DecoderConfig, tokens: int, length: int
) -> dict[str, int]:
  """Operations of the layers and of the rest, by the names of their programs.

  Args:
    config: The model, with as many layers as are timed.
    tokens: Of a step.
    length: Of a sequence.
  """
  by_part = accounting.flops_by_part(config, length)
  head = by_part.pop('head')
  return {LAYERS: tokens * sum(by_part.values()), REST: tokens * head}
