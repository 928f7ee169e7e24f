"""Muon for sharded parameters, with optax's signature and state."""

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax.sharding import AxisType, NamedSharding, PartitionSpec, Sharding
from optax.contrib import MuonDimensionNumbers, MuonState

from gradpower_optax.orthogonalize import is_matrix, orthogonalize

Scalar: TypeAlias = jax.typing.ArrayLike
Coefficients: TypeAlias = tuple[Scalar, Scalar, Scalar]
ScalarOrSchedule: TypeAlias = optax.ScalarOrSchedule
# Trees of MuonDimensionNumbers, or of NamedSharding, or functions to them.
DimensionNumbers: TypeAlias = Any | Callable[[optax.Params], Any]
Shardings: TypeAlias = Any | Callable[[optax.Params], Any]
# How parameters lay at init, by tree, number in it, shape and what their type
# shows of it: an abstract mesh, as update's devices may be others.
_Seen: TypeAlias = dict[tuple[Any, int, tuple[int, ...], Any], PartitionSpec]
Preconditioning: TypeAlias = Literal['frobenius', 'spectral', 'aol', 'schatten']

_STANDARD = (3.4445, -4.7750, 2.0315)
_DION = (  # Of Ahn et al, arXiv 2504.05295, 2025.
  (4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377),
  (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046),
  (2.8366, -3.0525, 1.2012),
)  # fmt: skip
_PRESETS = {'standard': _STANDARD, 'dion': _DION}
_UNKNOWN = (
  'muon: how parameters lie on their mesh is not known where update is traced:'
  ' matrices are gathered in every product; pass param_shardings, or call init'
  ' outside of jit on the sharded parameters'
)


def muon(
  learning_rate: ScalarOrSchedule,
  ns_coeffs: Coefficients | tuple[Coefficients, ...] | str = _STANDARD,
  ns_steps: Scalar = 5,
  beta: Scalar = 0.95,
  eps: Scalar = 1e-8,
  weight_decay: Scalar = 0.0,
  weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
  mu_dtype: Any | None = None,
  *,
  nesterov: bool = True,
  adaptive: bool = False,
  preconditioning: Preconditioning = 'frobenius',
  adam_b1: Scalar = 0.9,
  adam_b2: Scalar = 0.999,
  adam_eps_root: Scalar = 0.0,
  adam_weight_decay: Scalar = 0.0,
  adam_learning_rate: ScalarOrSchedule | None = None,
  muon_weight_dimension_numbers: DimensionNumbers | None = None,
  consistent_rms: Scalar | None = None,
  param_shardings: Shardings | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Muon whose matrices travel at most twice, however they are sharded.

  Signature, state and, on one device, updates are those of
  :func:`optax.contrib.muon`, so that either goes on from the other's
  checkpoint. On a mesh of devices :func:`optax.contrib.muon` gathers a sharded
  matrix in every product of its orthogonalization, or raises an error on a
  mesh of Explicit axes. Here matrices of one shape, sharded alike, are stacked
  and exchanged by one all-to-all, so that each device orthogonalizes its share
  of them whole, and by another one back.

  Args:
    learning_rate: As in :func:`optax.contrib.muon`; all others too, but for
      the last.
    ns_coeffs: Of the Newton-Schulz iterations: three, or three for each, or
      the name of a preset, 'standard' or 'dion'.
    ns_steps: Newton-Schulz iterations.
    beta: Decay of the momentum.
    eps: Added to norms that are divided by, and Adam's.
    weight_decay: Decoupled, times the learning rate, of Muon's parameters.
    weight_decay_mask: Which of them decay.
    mu_dtype: Of the first moments.
    nesterov: Whether momentum is Nesterov's.
    adaptive: Whether updates are scaled by the dual norm of momentum.
    preconditioning: What comes before the iterations.
    adam_b1: Adam's, for parameters that are no matrices.
    adam_b2: Likewise.
    adam_eps_root: Likewise.
    adam_weight_decay: Likewise.
    adam_learning_rate: Likewise; None for that of the matrices.
    muon_weight_dimension_numbers: Which dimensions of a parameter are a
      matrix's, :class:`optax.contrib.MuonDimensionNumbers`, those left over
      being a stack's, or None for a parameter that Adam takes: a tree with the
      structure of the parameters, a prefix of one, or a function from
      parameters to one. None takes each parameter of rank 2 as a matrix, as
      optax does: name the axes where layers are stacked, or where an embedding
      is to be Adam's.
    consistent_rms: Scales updates by ``sqrt(max(fan_in, fan_out))`` times
      this, 0.2 to have Adam's size; None for ``sqrt(max(1, fan_out /
      fan_in))``.
    param_shardings: Where parameters lie: a tree of
      :class:`jax.sharding.NamedSharding` with their structure, a prefix of
      one, or a function from parameters to one. None reads it off the arrays
      where all axes are Explicit, and outside of :func:`jax.jit`; under jit on
      other meshes it is where ``init`` has seen them. It must be given if that
      was traced too, or not called, and under
      :func:`optax.inject_hyperparams`, which makes a new Muon of each update
      (name it in ``static_args`` if it is a function): left out there, the
      program is optax's, and a warning says so. One
      :class:`jax.sharding.NamedSharding` with an empty spec is for copies.

  Returns:
    The corresponding :class:`optax.GradientTransformationExtraArgs`.

  Raises:
    ValueError: ns_coeffs names no preset, or has not the shape of one; from
      ``init``, a parameter has not the dimensions named; from ``update``,
      parameters lie on several meshes, or not as ``param_shardings`` says.
    TypeError: a tree holds something else than it should.

  Examples:
    >>> import jax.numpy as jnp
    >>> from optax.contrib import MuonDimensionNumbers
    >>> from gradpower_optax import muon
    >>> params = {'layers': jnp.ones((2, 4, 3)), 'bias': jnp.zeros(3)}
    >>> tx = muon(0.02, muon_weight_dimension_numbers={
    ...   'layers': MuonDimensionNumbers(1, 2), 'bias': None,
    ... })
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> print({name: update.shape for name, update in updates.items()})
    {'bias': (3,), 'layers': (2, 4, 3)}

  References:
    Jordan, `Muon: an optimizer for hidden layers in neural networks
    <https://kellerjordan.github.io/posts/muon/>`_, 2024

    Liu et al, `Muon is Scalable for LLM Training
    <https://arxiv.org/abs/2502.16982>`_, 2025
  """
  if isinstance(ns_coeffs, str):
    if ns_coeffs not in _PRESETS:
      raise ValueError(f'ns_coeffs is {ns_coeffs!r}, not one of {[*_PRESETS]}')
    ns_coeffs = _PRESETS[ns_coeffs]  # type: ignore[assignment]
  given = muon_weight_dimension_numbers
  numbers_of = functools.partial(_dimension_numbers, given)
  seen: _Seen = {}
  warned: list[bool] = []

  def labels(params):
    kinds = ['adam' if n is None else 'muon' for n in numbers_of(params)]
    return jax.tree.unflatten(jax.tree.structure(params), kinds)

  def init_fn(params):
    _see(params, seen)
    return optaxs.init(params)

  def update_fn(updates, state, params=None):
    del params
    mu = optax.tree.update_moment(updates, state.mu, beta, 1)
    count = optax.safe_increment(state.count)
    ahead = optax.safe_increment(count) if nesterov else count
    momentum = optax.tree.bias_correction(mu, beta, ahead)
    if nesterov:
      newest = optax.tree.bias_correction(updates, beta, count)
      momentum = jax.tree.map(
        lambda m, g: beta * m + (1 - beta) * g, momentum, newest
      )
    leaves, structure = jax.tree.flatten(momentum)
    numbers = numbers_of(updates)
    places = _places(param_shardings, updates, leaves, seen)
    unknown = param_shardings is None and any(
      place is None and _may_be_split(x)
      for x, place in zip(leaves, places, strict=True)
    )
    if unknown and not warned:
      warned.append(True)
      warnings.warn(_UNKNOWN, stacklevel=2)
    try:
      done = orthogonalize(
        leaves, numbers, places, state.ns_coeffs, eps, ns_steps, preconditioning
      )
    except Exception as error:  # On axes of both kinds JAX has its own.
      if unknown:
        error.add_note(_UNKNOWN)
      raise
    if adaptive:
      done = [
        jnp.sum(x.conj() * y) * y for x, y in zip(leaves, done, strict=True)
      ]
    done = [
      _shape_factor(x.shape, of, consistent_rms) * x
      for x, of in zip(done, numbers, strict=True)
    ]
    state = MuonState(count, optax.tree.cast(mu, mu_dtype), state.ns_coeffs)
    return jax.tree.unflatten(structure, done), state

  optaxs = optax.contrib.scale_by_muon(ns_coeffs, ns_steps, mu_dtype=mu_dtype)
  of_matrices = optax.chain(
    optax.GradientTransformation(init_fn, update_fn),
    optax.identity(),  # Where optax scales by shape: the state is its.
    optax.add_decayed_weights(weight_decay, weight_decay_mask),
    optax.scale_by_learning_rate(learning_rate),
  )
  of_others = optax.adamw(
    learning_rate if adam_learning_rate is None else adam_learning_rate,
    adam_b1, adam_b2, eps, adam_eps_root, mu_dtype, adam_weight_decay,
    nesterov=nesterov,
  )  # fmt: skip
  return optax.partition({'muon': of_matrices, 'adam': of_others}, labels)


def _shape_factor(shape, numbers, consistent_rms):
  fan_in, fan_out = (
    math.prod(shape[dim] for dim in ((of,) if isinstance(of, int) else of))
    for of in numbers
  )
  if consistent_rms is None:
    return math.sqrt(max(1.0, fan_out / fan_in))
  return math.sqrt(max(fan_in, fan_out)) * consistent_rms


def _dimension_numbers(given, tree) -> list[MuonDimensionNumbers | None]:
  """One for each leaf; None where Adam takes it."""
  paths, _ = jax.tree_util.tree_flatten_with_path(tree)
  if given is None:
    return [MuonDimensionNumbers() if x.ndim == 2 else None for _, x in paths]
  found = _by_leaf(
    given, tree, MuonDimensionNumbers, 'muon_weight_dimension_numbers'
  )
  for (path, x), numbers in zip(paths, found, strict=True):
    if numbers is not None and not is_matrix(x, numbers):
      raise ValueError(
        f'muon: parameter {jax.tree_util.keystr(path)} of shape {x.shape} is no'
        f' matrix by {numbers}, which must name different dimensions of it'
      )
  return found


def _see(params, seen: _Seen) -> None:
  """Remembers how arrays lie on meshes; tracers do not show it."""
  leaves, structure = jax.tree.flatten(params)
  for i, x in enumerate(leaves):
    concrete = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
    if concrete and isinstance(x.sharding, NamedSharding):
      seen[structure, i, x.shape, jax.typeof(x).sharding] = x.sharding.spec


def _places(given, tree, leaves, seen: _Seen) -> list[NamedSharding | None]:
  """Where each leaf lies, as far as it is known."""
  if given is None:
    structure = jax.tree.structure(tree)
    found = [_known_place(x, seen, structure, i) for i, x in enumerate(leaves)]
  else:
    found = _by_leaf(given, tree, Sharding, 'param_shardings')
  return [x if isinstance(x, NamedSharding) else None for x in found]


def _by_leaf(given, tree, kind: type, argument: str) -> list[Any]:
  """A tree of a kind, or a function to one, or its prefix, as one a leaf."""
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


def _known_place(x, seen: _Seen, structure, i: int) -> Sharding | None:
  """Of Explicit axes from a type, outside of jit from an array, or as seen."""
  of_type = jax.typeof(x).sharding
  if {*of_type.mesh.axis_types} - {AxisType.Manual} == {AxisType.Explicit}:
    return of_type
  if not isinstance(x, jax.core.Tracer):
    return x.sharding
  spec = seen.get((structure, i, x.shape, of_type))
  return None if spec is None else NamedSharding(of_type.mesh, spec)


def _may_be_split(x) -> bool:
  """Whether a compiler may be splitting a tracer over devices."""
  mesh = jax.typeof(x).sharding.mesh
  axes = zip(mesh.shape.values(), mesh.axis_types, strict=True)
  return isinstance(x, jax.core.Tracer) and any(
    size > 1 and kind == AxisType.Auto for size, kind in axes
  )
