"""Muon for sharded parameters, with optax's signature and state."""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from optax.contrib import MuonDimensionNumbers, MuonState

from gradpower_optax.orthogonalize import is_matrix, orthogonalize
from gradpower_optax.placement import UNKNOWN, Placements, by_leaf

Scalar: TypeAlias = jax.typing.ArrayLike
Coefficients: TypeAlias = tuple[Scalar, Scalar, Scalar]
ScalarOrSchedule: TypeAlias = optax.ScalarOrSchedule
# Trees of MuonDimensionNumbers, or of NamedSharding, or functions to them.
DimensionNumbers: TypeAlias = Any | Callable[[optax.Params], Any]
Shardings: TypeAlias = Any | Callable[[optax.Params], Any]
Preconditioning: TypeAlias = Literal['frobenius', 'spectral', 'aol', 'schatten']

_STANDARD = (3.4445, -4.7750, 2.0315)
_DION = (  # Of Ahn et al, arXiv 2504.05295, 2025.
  (4.0848, -6.8946, 2.9270), (3.9505, -6.3029, 2.6377),
  (3.7418, -5.5913, 2.3037), (2.8769, -3.1427, 1.2046),
  (2.8366, -3.0525, 1.2012),
)  # fmt: skip
_PRESETS = {'standard': _STANDARD, 'dion': _DION}


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
    param_shardings: Where the parameters lie: a tree of
      :class:`jax.sharding.NamedSharding` with their structure, a prefix of
      one, or a function from parameters to one; an empty spec means copies.
      None takes it from the arrays where all axes are Explicit, and outside of
      :func:`jax.jit`. Under jit on other meshes, None takes the shardings that
      ``init`` has seen. Pass it where ``init`` is traced too or not called, and
      under :func:`optax.inject_hyperparams`, where each update has a Muon of
      its own (a function goes into ``static_args``). Without it the program is
      optax's there, and a warning says so.

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
  placements = Placements(param_shardings)

  def labels(params):
    kinds = ['adam' if n is None else 'muon' for n in numbers_of(params)]
    return jax.tree.unflatten(jax.tree.structure(params), kinds)

  def init_fn(params):
    placements.see(params)
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
    places, unknown = placements.of(updates, leaves)
    try:
      done = orthogonalize(
        leaves, numbers, places, state.ns_coeffs, eps, ns_steps, preconditioning
      )
    except Exception as error:  # JAX raises its own on axes of both kinds.
      if unknown:
        error.add_note(UNKNOWN)
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
  found = by_leaf(
    given, tree, MuonDimensionNumbers, 'muon_weight_dimension_numbers'
  )
  for (path, x), numbers in zip(paths, found, strict=True):
    if numbers is not None and not is_matrix(x, numbers):
      raise ValueError(
        f'muon: parameter {jax.tree_util.keystr(path)} of shape {x.shape} is no'
        f' matrix by {numbers}, which must name different dimensions of it'
      )
  return found
