"""The programs of `benchmarks.transform`: updates of one float32 array.

Each takes parameters, AdamW's state as leaves (count, mu, nu), a gradient and
the power as a scalar array, of which a form that has it fixed uses nothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from gradpower_optax import sign_power
from train.config import Config, OptimizerConfig
from train.optimizer import make_optimizer

# A form makes a transformation from the power as a Python number and, for the
# one that is given it at run time, as a scalar array.
Form = Callable[[float, jax.Array], optax.GradientTransformation]
# (params, state leaves, grads, traced p) to new params and state leaves, and
# whatever else is to be computed.
Update = Callable[..., tuple[jax.Array, list[jax.Array], Any]]

_CLIP_NORM = 1.0
_LEARNING_RATE, _B2, _WEIGHT_DECAY = 1e-3, 0.95, 0.1
# Seven blocks of 64 KiB lie in a core's second cache.
_BLOCK = 2**14

FORMS: dict[str, Form] = {
  'sign_power': lambda p, traced_p: sign_power(p),
  'sign_power, traced p': lambda p, traced_p: sign_power(traced_p),
  'sign(g) * abs(g)**p': lambda p, traced_p: _elementwise(
    lambda g: jnp.sign(g) * jnp.abs(g) ** p
  ),
  'g * exp2((p-1) * log2|g|)': lambda p, traced_p: _elementwise(
    lambda g: g * jnp.exp2((p - 1) * jnp.log2(jnp.abs(g)))
  ),
}


def _elementwise(function):
  return optax.stateless(lambda grads, _: jax.tree.map(function, grads))


class Program(NamedTuple):
  """One row of the table."""

  clip: bool
  power: str | None
  """Which form of `FORMS`, or None."""
  whole: str | None
  """None for optax's chain, else which other way of computing the whole."""
  update: Update
  in_text: bool
  """Whether the compiled text shows the traffic: not that of a loop."""

  @property
  def least(self) -> tuple[int, int]:
    """Words per element that any program has to read and to write.

    The gradient, the parameter and two moments are read, all but the gradient
    written; a clip has to know the norm of the gradient before it uses it.
    """
    return 4 + self.clip, 3


def programs(p: float, elements: int) -> list[Program]:
  """Every program, each clip's base without the power first."""
  found = []
  for clip in (False, True):

    def add(power, whole, update, in_text=True, clip=clip):
      found.append(Program(clip, power, whole, update, in_text))

    add(None, None, chain_update(clip, None, p))
    for name, form in FORMS.items():
      add(name, None, chain_update(clip, form, p))
    if clip:
      add('sign_power', 'one factor', _factor_update(p))
      if elements <= _BLOCK or elements % _BLOCK == 0:
        add('sign_power', 'blocks', _block_update(p, elements), False)
    add('sign_power', 'trainer', _trainer_update(clip, p))
  return found


def chain_update(clip: bool, form: Form | None, p: float) -> Update:
  """Optax's chain of an optional clip, a form of the power and AdamW."""

  def update(params, state, grads, traced_p):
    power = None if form is None else form(p, traced_p)
    chain = _chain(clip, power)
    return *_apply(chain, params, state, grads), None

  return update


def _chain(clip: bool, power: optax.GradientTransformation | None):
  parts = [optax.clip_by_global_norm(_CLIP_NORM)] if clip else []
  parts += [] if power is None else [power]
  adamw = optax.adamw(_LEARNING_RATE, b2=_B2, weight_decay=_WEIGHT_DECAY)
  return optax.chain(*parts, adamw)


def _apply(chain, params, state, grads):
  # Every chain keeps AdamW's state alone; only the tuples around it differ.
  structure = jax.tree.structure(chain.init(params))
  state = jax.tree.unflatten(structure, state)
  updates, state = chain.update(grads, state, params)
  return optax.apply_updates(params, updates), jax.tree.leaves(state)


def _clip_factor(grads):
  norm = optax.tree.norm(grads)
  return jnp.where(norm < _CLIP_NORM, 1.0, _CLIP_NORM / norm)


def _factor_update(p: float) -> Update:
  """The clip as one product: XLA keeps a quotient with two readers in memory.

  It rounds once where optax's clip rounds twice.
  """
  chain = _chain(False, sign_power(p))

  def update(params, state, grads, traced_p):
    grads = grads * _clip_factor(grads)
    return *_apply(chain, params, state, grads), None

  return update


def _block_update(p: float, elements: int) -> Update:
  """One pass: the norm, then block by block in place, within the cache."""
  chain = _chain(False, sign_power(p))
  block = min(_BLOCK, elements)

  def update(params, state, grads, traced_p):
    count, *moments = state
    factor = _clip_factor(grads)

    def step(grad, param, *old):
      param, (new_count, *new) = _apply(chain, param, [count, *old], grad)
      return new_count, param, *new

    def body(i, carry):
      _, *arrays = carry
      start = i * block
      # Without the branch the loops of the three outputs read one another's
      # inputs, and XLA copies whole arrays for each block.
      new_count, *new = lax.cond(
        factor < 1,
        lambda grad, *others: step(grad * factor, *others),
        step,
        *(lax.dynamic_slice_in_dim(x, start, block) for x in (grads, *arrays)),
      )
      return new_count, *(
        lax.dynamic_update_slice_in_dim(x, y, start, 0)
        for x, y in zip(arrays, new, strict=True)
      )

    carry = (count, params, *moments)
    carry = lax.fori_loop(0, elements // block, body, carry)
    count, params, *moments = carry
    return params, [count, *moments], None

  return update


def _trainer_update(clip: bool, p: float) -> Update:
  """The trainer's own, which also returns three norms."""
  optimizer = make_optimizer(
    Config(
      steps=1000,
      optimizer=OptimizerConfig(
        learning_rate=_LEARNING_RATE,
        schedule='constant',
        warmup_steps=0,
        b2=_B2,
        weight_decay=_WEIGHT_DECAY,
        clip_norm=_CLIP_NORM if clip else 0.0,
        power=p,
        power_eps=0.0,
      ),
    )
  )

  def update(params, state, grads, traced_p):
    # Its schedule counts as well.
    structure = jax.tree.structure(optimizer.init(params))
    state = jax.tree.unflatten(structure, [*state, state[0]])
    updates, state, norms = optimizer.update(grads, state, params)
    params = optax.apply_updates(params, updates)
    return params, jax.tree.leaves(state)[:3], norms

  return update


def compile_update(update: Update, arguments: Any) -> Any:
  """Compiles an update in place; arguments may be shapes with shardings."""
  return jax.jit(update, donate_argnums=(0, 1)).lower(*arguments).compile()


def shapes(elements: int, sharding: Any = None) -> tuple[Any, ...]:
  """The arguments of an update as shapes."""
  array, number, count = (
    jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    for shape, dtype in (
      ((elements,), jnp.float32),
      ((), jnp.float32),
      ((), jnp.int32),
    )
  )
  return array, [count, array, array], array, number


class Arrays:
  """One parameter array, AdamW's state for it and a gradient.

  The programs take turns in updating it, so that none is lucky with its memory.
  """

  def __init__(self, elements: int, p: float):
    self.params = jnp.ones(elements, jnp.float32)
    self.state = jax.tree.leaves(_chain(False, None).init(self.params))
    # At 16M elements of norm 4: clipped at 1.
    self.grads = 1e-3 * jax.random.normal(jax.random.key(0), (elements,))
    self.p = jnp.float32(p)

  def compile(self, update: Update) -> Any:
    """Compiles an update of these arrays."""
    arguments = (self.params, self.state, self.grads, self.p)
    return compile_update(update, arguments)

  def runner(self, compiled: Any) -> Callable[[], Any]:
    """Returns a call that starts one update in place."""

    def run():
      self.params, self.state, more = compiled(
        self.params, self.state, self.grads, self.p
      )
      return self.params, self.state, more

    return run
