"""One device's programs of `benchmarks.optimizer`, and their arrays."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from flax import nnx

from benchmarks import timing
from benchmarks.model import _parts
from benchmarks.optimizer_work import (
  LAYERS,
  REST,
  abstract_model,
  dimension_numbers,
)
from gradpower_optax import muon
from models import families, sharding
from models.config import DecoderConfig

ADAMW, MUON, OPTAX = 'AdamW, layers', 'Muon, layers', "optax's Muon, layers"
REST_ADAMW = 'AdamW, other parameters'
LIMIT = 'square product'

_RATE, _DECAY = 1e-5, 0.1
_WARM_SECONDS = 1.0


def optimizers(
  numbers: Any, places: Any = None
) -> dict[str, optax.GradientTransformation]:
  """AdamW, our Muon and optax's, by name.

  Args:
    numbers: A tree of `optax.contrib.MuonDimensionNumbers` or None.
    places: Where parameters lie, for ours.
  """
  options: dict[str, Any] = {
    'weight_decay': _DECAY,
    'adam_weight_decay': _DECAY,
    'adam_b2': 0.95,
    'muon_weight_dimension_numbers': numbers,
    'consistent_rms': 0.2,
  }
  return {
    ADAMW: optax.adamw(_RATE, b2=0.95, weight_decay=_DECAY),
    MUON: muon(_RATE, **options, param_shardings=places),
    OPTAX: optax.contrib.muon(_RATE, **options),
  }


def updating(tx: optax.GradientTransformation, places: Any = None) -> Any:
  """A jitted (params, state, grads) to params and state, which are donated.

  Args:
    tx: The optimizer.
    places: Where to leave parameters and state, if on several devices.
  """

  def update(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  return jax.jit(update, donate_argnums=(0, 1), out_shardings=places)


class Programs:
  """Compiled programs that work on one model's arrays in turn.

  `runs` has, by name, what starts each and returns its outputs: updates of the
  layers' parameters and of all others (embedding, norm, head), forward and
  backward of the layers and of the rest, and a square float32 product.

  Args:
    config: The model, with as many layers as are timed.
    batch: Sequences.
    length: Tokens of each.
    side: Of the square product.
  """

  def __init__(self, config: DecoderConfig, batch: int, length: int, side: int):
    mesh = sharding.make_mesh(jax.devices()[:1])
    model = abstract_model(config, mesh)
    self._graph = nnx.graphdef(model)

    def init():
      built = families.build(config, rngs=nnx.Rngs(params=0), mesh=mesh)
      return nnx.to_pure_dict(nnx.state(built, nnx.Param))

    @jax.jit
    def arrays(key):
      keys = jax.random.split(key, 4)
      shape = (batch, length, config.d_model)
      return (
        jax.random.randint(keys[0], (batch, length + 1), 0, config.vocab_size),
        *(jax.random.normal(key, shape, config.dtype) for key in keys[1:3]),
        jax.random.normal(keys[3], (side, side), jnp.float32),
      )

    params = jax.jit(init)()
    self._params = {
      'layers': {'layers': params.pop('layers')}, 'rest': params,
    }  # fmt: skip
    self._grads = jax.tree.map(_noise, self._params)
    tokens_BU, x_BTD, dy_BTD, square = arrays(jax.random.key(0))
    self.runs: dict[str, Callable[[], Any]] = {}
    numbers = dimension_numbers(model)
    for name, tx in optimizers({'layers': numbers['layers']}).items():
      self._add_update(name, tx, 'layers')
    self._add_update(REST_ADAMW, optimizers(numbers)[ADAMW], 'rest')
    self._add_gradient(LAYERS, 'layers', _layers, (x_BTD, dy_BTD))
    parts = _parts(config, mesh)
    embed, head = parts['embedding'].call, parts['head and loss'].call

    def rest(model, tokens_BU):
      return head(model, tokens_BU, *embed(model, tokens_BU))[0]

    self._add_gradient(REST, 'rest', rest, (tokens_BU, jnp.float32(1)))
    product = jax.jit(jnp.matmul).lower(square, square).compile()
    self.runs[LIMIT] = lambda: product(square, square)

  def _add_update(self, name, tx, part):
    state = jax.jit(tx.init)(self._params[part])
    arguments = self._params[part], state, self._grads[part]
    program = updating(tx).lower(*arguments).compile()

    def run():
      nonlocal state
      params = self._params[part]
      self._params[part], state = program(params, state, self._grads[part])
      return self._params[part], state

    self.runs[name] = run

  def _add_gradient(self, name, part, function, arguments):
    """Gradients of a part's parameters and, if they have one, activations."""
    other = {'layers': 'rest', 'rest': 'layers'}[part]

    def gradient(own, others, x, dy):
      def forward(own, x):
        return function(nnx.merge(self._graph, own | others), x)

      if jnp.issubdtype(x.dtype, jnp.integer):
        _, pull = jax.vjp(lambda own: forward(own, x), own)
      else:
        _, pull = jax.vjp(forward, own, x)
      return pull(dy)

    program = (
      jax.jit(gradient)
      .lower(self._params[part], self._params[other], *arguments)
      .compile()
    )
    self.runs[name] = lambda: program(
      self._params[part], self._params[other], *arguments
    )


def _layers(model, x_BTD):
  """What the blocks make of activations."""
  positions_BT = jnp.arange(x_BTD.shape[1])[None, :]
  mask_BT = jnp.ones(x_BTD.shape[:2], jnp.float32)
  context = model._angles(positions_BT), None, mask_BT
  if model.config.scan_layers:
    for group in model.layers:
      x_BTD, _ = model._scan(group, x_BTD, context)
  else:
    for block in model.layers:
      graph, params = nnx.split(block)
      x_BTD, _ = model._remat(graph)(params, x_BTD, context)
  return x_BTD


@jax.jit
def _noise(tree):
  """Gradients for parameters: of full rank, as those of many tokens."""
  leaves, structure = jax.tree.flatten(tree)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  noise = [
    1e-3 * jax.random.normal(key, x.shape, x.dtype)
    for key, x in zip(keys, leaves, strict=True)
  ]
  return jax.tree.unflatten(structure, noise)


def time_rounds(
  programs: dict[str, Callable[[], Any]], rounds: int
) -> dict[str, tuple[float, ...]]:
  """As `timing.time_rounds`, of programs that are compiled and may be long.

  Those of seconds are warm after one call.
  """
  calls = {}
  for name, run in programs.items():
    taken = timing._sample(run, 1)
    if taken < _WARM_SECONDS:
      taken = timing._sample(run, 2)
    calls[name] = max(1, math.ceil(timing._SAMPLE_SECONDS / taken))
  seconds: dict[str, list[float]] = {name: [] for name in programs}
  for number in range(rounds):
    for name in programs if number % 2 == 0 else reversed(programs):
      seconds[name].append(timing._sample(programs[name], calls[name]))
  return {name: tuple(taken) for name, taken in seconds.items()}
