"""Ready-made chains: optional clipping, the power, then an optax optimizer.

Each takes the arguments of the optax function that it ends in, in the same
order, and three by name: the power ``p``, its ``power_eps`` and ``clip_norm``.
"""

import inspect
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import optax

from gradpower_optax.muon import muon
from gradpower_optax.sign_power import PowerOrSchedule, sign_power

ScalarOrSchedule: TypeAlias = optax.ScalarOrSchedule


def _chain(
  base: optax.GradientTransformation,
  p: PowerOrSchedule,
  power_eps: float,
  clip_norm: jax.typing.ArrayLike | None,
) -> optax.GradientTransformationExtraArgs:
  known = not (clip_norm is None or isinstance(clip_norm, jax.core.Tracer))
  if known and not clip_norm > 0:  # type: ignore[operator]
    raise ValueError(
      f'clip_norm must be positive, or None for no clipping, not {clip_norm}'
    )
  clip = () if clip_norm is None else (optax.clip_by_global_norm(clip_norm),)
  return optax.chain(*clip, sign_power(p, eps=power_eps), base)


def adamw_power(
  learning_rate: ScalarOrSchedule,
  b1: jax.typing.ArrayLike = 0.9,
  b2: jax.typing.ArrayLike = 0.999,
  eps: jax.typing.ArrayLike = 1e-8,
  eps_root: jax.typing.ArrayLike = 0.0,
  mu_dtype: Any | None = None,
  weight_decay: ScalarOrSchedule = 1e-4,
  mask: Any | Callable[[optax.Params], Any] | None = None,
  *,
  nesterov: bool = False,
  p: PowerOrSchedule = 1.2,
  power_eps: float = 0.0,
  clip_norm: jax.typing.ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
  """AdamW behind the gradient power: the paper's AdamPower.

  The paper trains with b2 = 0.95, weight_decay = 0.1 and clip_norm = 1.0; the
  defaults here are optax's.

  Args:
    learning_rate: As in :func:`optax.adamw`.
    b1: As in :func:`optax.adamw`.
    b2: As in :func:`optax.adamw`.
    eps: As in :func:`optax.adamw`. At p > 1 it acts on larger gradients than
      at p = 1; ``eps ** p`` acts on the same ones.
    eps_root: As in :func:`optax.adamw`.
    mu_dtype: As in :func:`optax.adamw`.
    weight_decay: As in :func:`optax.adamw`.
    mask: As in :func:`optax.adamw`.
    nesterov: As in :func:`optax.adamw`.
    p: The power, as in :func:`gradpower_optax.sign_power`.
    power_eps: The ``eps`` of :func:`gradpower_optax.sign_power`.
    clip_norm: Global norm to clip gradients at before the power; None for no
      clipping.

  Returns:
    The corresponding :class:`optax.GradientTransformationExtraArgs`.

  Examples:
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import optax
    >>> from gradpower_optax import adamw_power
    >>> def f(x): return jnp.sum(x ** 2)
    >>> tx = adamw_power(0.003, b2=0.95, weight_decay=0.1, clip_norm=1.0)
    >>> params = jnp.array([1.0, 2.0, 3.0])
    >>> state = tx.init(params)
    >>> for _ in range(3):
    ...   updates, state = tx.update(jax.grad(f)(params), state, params)
    ...   params = optax.apply_updates(params, updates)
    >>> print(f'objective {f(params):.2f}')
    objective 13.87

  References:
    Wang et al, `GradPower: Powering Gradients for Faster Language Model
    Pre-Training <https://arxiv.org/abs/2505.24275>`_, 2025
  """
  base = optax.adamw(
    learning_rate, b1, b2, eps, eps_root, mu_dtype, weight_decay, mask,
    nesterov=nesterov,
  )  # fmt: skip
  return _chain(base, p, power_eps, clip_norm)


def adam_power(
  learning_rate: ScalarOrSchedule,
  b1: jax.typing.ArrayLike = 0.9,
  b2: jax.typing.ArrayLike = 0.999,
  eps: jax.typing.ArrayLike = 1e-8,
  eps_root: jax.typing.ArrayLike = 0.0,
  mu_dtype: Any | None = None,
  *,
  nesterov: bool = False,
  p: PowerOrSchedule = 1.2,
  power_eps: float = 0.0,
  clip_norm: jax.typing.ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Adam behind the gradient power.

  Args:
    learning_rate: As in :func:`optax.adam`.
    b1: As in :func:`optax.adam`.
    b2: As in :func:`optax.adam`.
    eps: As in :func:`optax.adam`; see :func:`adamw_power`.
    eps_root: As in :func:`optax.adam`.
    mu_dtype: As in :func:`optax.adam`.
    nesterov: As in :func:`optax.adam`.
    p: The power, as in :func:`gradpower_optax.sign_power`.
    power_eps: The ``eps`` of :func:`gradpower_optax.sign_power`.
    clip_norm: Global norm to clip gradients at before the power; None for no
      clipping.

  Returns:
    The corresponding :class:`optax.GradientTransformationExtraArgs`.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gradpower_optax import adam_power
    >>> tx = adam_power(1e-3)
    >>> params = jnp.array([1.0, -2.0])
    >>> updates, _ = tx.update(jnp.array([0.5, -0.5]), tx.init(params), params)
    >>> print(updates.round(6))
    [-0.001  0.001]

  References:
    Wang et al, `GradPower: Powering Gradients for Faster Language Model
    Pre-Training <https://arxiv.org/abs/2505.24275>`_, 2025
  """
  base = optax.adam(
    learning_rate, b1, b2, eps, eps_root, mu_dtype, nesterov=nesterov
  )
  return _chain(base, p, power_eps, clip_norm)


def adagrad_power(
  learning_rate: ScalarOrSchedule,
  initial_accumulator_value: jax.typing.ArrayLike = 0.1,
  eps: jax.typing.ArrayLike = 1e-7,
  *,
  p: PowerOrSchedule = 1.2,
  power_eps: float = 0.0,
  clip_norm: jax.typing.ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Adagrad behind the gradient power: the paper's AdagradPower.

  The paper's theory (Section 4.2) starts the accumulator at 0 and finds a
  faster rate for p < 1 where gradient noise is low.

  Args:
    learning_rate: As in :func:`optax.adagrad`.
    initial_accumulator_value: As in :func:`optax.adagrad`.
    eps: As in :func:`optax.adagrad`.
    p: The power, as in :func:`gradpower_optax.sign_power`.
    power_eps: The ``eps`` of :func:`gradpower_optax.sign_power`.
    clip_norm: Global norm to clip gradients at before the power; None for no
      clipping.

  Returns:
    The corresponding :class:`optax.GradientTransformationExtraArgs`.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gradpower_optax import adagrad_power
    >>> tx = adagrad_power(1.0, initial_accumulator_value=0.0, p=0.5)
    >>> params = jnp.array([1.0, -2.0])
    >>> updates, _ = tx.update(jnp.array([0.5, -0.5]), tx.init(params), params)
    >>> print(updates.round(4))
    [-1.  1.]

  References:
    Wang et al, `GradPower: Powering Gradients for Faster Language Model
    Pre-Training <https://arxiv.org/abs/2505.24275>`_, 2025, Section 4.2
  """
  base = optax.adagrad(learning_rate, initial_accumulator_value, eps)
  return _chain(base, p, power_eps, clip_norm)


def lion_power(
  learning_rate: ScalarOrSchedule,
  b1: jax.typing.ArrayLike = 0.9,
  b2: jax.typing.ArrayLike = 0.99,
  mu_dtype: Any | None = None,
  weight_decay: ScalarOrSchedule = 1e-3,
  mask: Any | Callable[[optax.Params], Any] | None = None,
  *,
  p: PowerOrSchedule = 1.2,
  power_eps: float = 0.0,
  clip_norm: jax.typing.ArrayLike | None = None,
) -> optax.GradientTransformationExtraArgs:
  """Lion behind the gradient power; not in the paper.

  Args:
    learning_rate: As in :func:`optax.lion`.
    b1: As in :func:`optax.lion`.
    b2: As in :func:`optax.lion`.
    mu_dtype: As in :func:`optax.lion`.
    weight_decay: As in :func:`optax.lion`.
    mask: As in :func:`optax.lion`.
    p: The power, as in :func:`gradpower_optax.sign_power`.
    power_eps: The ``eps`` of :func:`gradpower_optax.sign_power`.
    clip_norm: Global norm to clip gradients at before the power; None for no
      clipping.

  Returns:
    The corresponding :class:`optax.GradientTransformationExtraArgs`.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gradpower_optax import lion_power
    >>> tx = lion_power(1e-3, weight_decay=0.0)
    >>> params = jnp.array([1.0, -2.0])
    >>> updates, _ = tx.update(jnp.array([0.5, -0.5]), tx.init(params), params)
    >>> print(updates)
    [-0.001  0.001]

  References:
    Wang et al, `GradPower: Powering Gradients for Faster Language Model
    Pre-Training <https://arxiv.org/abs/2505.24275>`_, 2025
  """
  base = optax.lion(learning_rate, b1, b2, mu_dtype, weight_decay, mask)
  return _chain(base, p, power_eps, clip_norm)


def muon_power(
  learning_rate: ScalarOrSchedule,
  *args: Any,
  p: PowerOrSchedule = 1.2,
  power_eps: float = 0.0,
  clip_norm: jax.typing.ArrayLike | None = None,
  **kwargs: Any,
) -> optax.GradientTransformationExtraArgs:
  """Muon behind the gradient power: the paper's MuonPower.

  Its Muon is :func:`gradpower_optax.muon`, for sharded parameters. The power
  comes before momentum and orthogonalization, and also before the Adam that
  takes the parameters which are not matrices. Muon discards only the scale of
  its momentum, so the power reweights elements within a matrix; the p that
  suits Adam need not suit Muon.

  Args:
    learning_rate: As in :func:`gradpower_optax.muon`.
    *args: As in :func:`gradpower_optax.muon`.
    p: The power, as in :func:`gradpower_optax.sign_power`.
    power_eps: The ``eps`` of :func:`gradpower_optax.sign_power`.
    clip_norm: Global norm to clip gradients at before the power; None for no
      clipping.
    **kwargs: As in :func:`gradpower_optax.muon`.

  Returns:
    The corresponding :class:`optax.GradientTransformationExtraArgs`.

  Examples:
    >>> import jax.numpy as jnp
    >>> from gradpower_optax import muon_power
    >>> tx = muon_power(0.02, p=1.2, weight_decay=0.1)
    >>> params = {'w': jnp.eye(4), 'b': jnp.zeros(4)}
    >>> updates, _ = tx.update(params, tx.init(params), params)
    >>> print({name: update.shape for name, update in updates.items()})
    {'b': (4,), 'w': (4, 4)}

  References:
    Wang et al, `GradPower: Powering Gradients for Faster Language Model
    Pre-Training <https://arxiv.org/abs/2505.24275>`_, 2025
  """
  base = muon(learning_rate, *args, **kwargs)
  return _chain(base, p, power_eps, clip_norm)


def _named_arguments() -> inspect.Signature:
  """muon_power's arguments by name, for inject_hyperparams and for help()."""
  own = inspect.signature(muon_power)
  of_muon = inspect.signature(muon).parameters.values()
  by_name = [own.parameters[name] for name in ('p', 'power_eps', 'clip_norm')]
  return own.replace(parameters=[*of_muon, *by_name])


muon_power.__signature__ = _named_arguments()  # type: ignore[attr-defined]
