"""Every optax optimizer with a learning rate, behind the power."""

import functools
import inspect
import types
import warnings
from typing import Any

import chex
import jax
import jax.numpy as jnp
import optax
import optax.contrib
import pytest

from gradpower_optax import sign_power

# Arguments by name. One that is a function of no argument is called.
RATE = {'learning_rate': 0.01}
KEY = functools.partial(jax.random.key, 0)
TABLE: dict[str, dict[str, Any]] = {
  'optax.adabelief': RATE,
  'optax.adadelta': RATE,
  'optax.adafactor': {**RATE, 'min_dim_size_to_factor': 2},
  'optax.adagrad': RATE,
  'optax.adam': RATE,
  'optax.adamax': RATE,
  'optax.adamaxw': RATE,
  'optax.adamw': RATE,
  'optax.adan': RATE,
  'optax.amsgrad': RATE,
  'optax.fromage': RATE,
  'optax.lamb': RATE,
  'optax.lars': RATE,
  'optax.lbfgs': {},  # Its line search finds the rate.
  'optax.lion': RATE,
  'optax.nadam': RATE,
  'optax.nadamw': RATE,
  'optax.noisy_sgd': {**RATE, 'key': KEY},
  'optax.novograd': RATE,
  'optax.optimistic_adam': RATE,
  'optax.optimistic_adam_v2': RATE,
  'optax.optimistic_gradient_descent': RATE,
  'optax.polyak_sgd': {'max_learning_rate': 0.1},
  'optax.radam': RATE,
  'optax.rmsprop': RATE,
  'optax.rprop': RATE,
  'optax.scale_by_backtracking_linesearch': {
    'max_backtracking_steps': 5, 'max_learning_rate': 1.0,
  },
  'optax.scale_by_learning_rate': RATE,
  'optax.scale_by_polyak': {'max_learning_rate': 0.1},
  'optax.scale_by_rprop': RATE,
  'optax.scale_by_zoom_linesearch': {
    'max_linesearch_steps': 5, 'max_learning_rate': 1.0,
  },
  'optax.sgd': {**RATE, 'momentum': 0.9},
  'optax.sign_sgd': RATE,
  'optax.signum': RATE,
  'optax.sm3': RATE,
  'optax.yogi': RATE,
  'optax.contrib.acprop': RATE,
  'optax.contrib.ademamix': RATE,
  'optax.contrib.adopt': RATE,
  'optax.contrib.cocob': RATE,
  'optax.contrib.dadapt_adamw': RATE,
  'optax.contrib.dog': RATE,
  'optax.contrib.dowg': RATE,
  'optax.contrib.dpsgd': {
    **RATE, 'l2_norm_clip': 1.0, 'noise_multiplier': 0.1, 'seed': 0,
  },
  'optax.contrib.galore': {**RATE, 'rank': 2, 'update_proj_gap': 2},
  'optax.contrib.madgrad': RATE,
  'optax.contrib.momo': RATE,
  'optax.contrib.momo_adam': RATE,
  'optax.contrib.muon': RATE,
  'optax.contrib.prodigy': RATE,
  'optax.contrib.scale_by_madgrad': RATE,
  'optax.contrib.schedule_free': {
    **RATE, 'base_optimizer': functools.partial(optax.sgd, 0.01),
  },
  'optax.contrib.schedule_free_adamw': RATE,
  'optax.contrib.schedule_free_sgd': RATE,
  'optax.contrib.simplified_ademamix': RATE,
  'optax.contrib.sophia': {**RATE, 'update_interval': 2},
}  # fmt: skip
# They take the gradients of single examples, along a leading axis.
PER_EXAMPLE = {'optax.contrib.dpsgd'}
# They take the objective as obj_fn; the line searches would refuse it.
TAKES_OBJECTIVE = {'optax.contrib.sophia'}
STEPS = 3

PARAMS = {
  'w': jnp.linspace(-1.0, 1.5, 12).reshape(4, 3),
  'b': jnp.array([0.5, -2.0, 0.25]),
}


def loss(params):
  coefficients = jnp.arange(1.0, 5.0)[:, None]
  w, b = jnp.sum(coefficients * params['w'] ** 2), jnp.sum(params['b'] ** 2)
  return w / 8 + b / 2


def with_learning_rate(module: types.ModuleType) -> set[str]:
  """Exported functions that take a learning rate and return a transformation.

  A function without a return annotation counts too.
  """
  names = set()
  for name, function in vars(module).items():
    if name.startswith('_') or inspect.isclass(function):
      continue
    try:
      signature = inspect.signature(function)
    except (TypeError, ValueError):
      continue  # Not a function: a module, an alias of a type.
    returns = signature.return_annotation
    transforms = returns is signature.empty or 'GradientTransformation' in str(
      returns
    )
    if transforms and any('learning_rate' in p for p in signature.parameters):
      names.add(f'{module.__name__}.{name}')
  return names


def exported() -> set[str]:
  return with_learning_rate(optax) | with_learning_rate(optax.contrib)


def optimizer(name: str) -> optax.GradientTransformationExtraArgs:
  module, _, function = name.rpartition('.')
  build = getattr({'optax': optax}.get(module, optax.contrib), function)
  arguments = {
    argument: value() if callable(value) else value
    for argument, value in TABLE[name].items()
  }
  with warnings.catch_warnings():
    warnings.simplefilter('ignore', DeprecationWarning)
    return optax.with_extra_args_support(build(**arguments))


def run(name: str, tx: optax.GradientTransformationExtraArgs):
  """Parameters and state after some steps, all in one jit.

  The scan refuses a state that changes its structure, a shape or a dtype.
  """
  extra_args = {'obj_fn': loss} if name in TAKES_OBJECTIVE else {}

  def step(carry, _):
    params, state = carry
    value, grads = jax.value_and_grad(loss)(params)
    updates = grads
    if name in PER_EXAMPLE:
      updates = jax.tree.map(lambda g: jnp.stack([g, 2 * g]), grads)
    updates, state = tx.update(
      updates, state, params,
      value=value, grad=grads, value_fn=loss, **extra_args,
    )  # fmt: skip
    return (optax.apply_updates(params, updates), state), None

  # Compiling is what takes the time here.
  @functools.partial(
    jax.jit, compiler_options={'xla_backend_optimization_level': 0}
  )
  def steps(params):
    return jax.lax.scan(step, (params, tx.init(params)), length=STEPS)[0]

  return steps(PARAMS)


def test_every_export_is_tabled():
  new = exported() - set(TABLE)
  assert not new, f'not in the table: {", ".join(sorted(new))}'


def test_every_entry_takes_a_learning_rate():
  assert not set(TABLE) - exported()


def test_discovery_sees_functions_without_annotations():
  def unannotated(learning_rate):
    return learning_rate

  def annotated(max_learning_rate) -> optax.GradientTransformation:
    return optax.sgd(max_learning_rate)

  def schedule(learning_rate) -> float:
    return learning_rate

  module = types.ModuleType('new')
  vars(module).update(
    unannotated=unannotated, annotated=annotated, schedule=schedule,
    _private=annotated, partial=functools.partial(annotated),
    State=optax.EmptyState, number=1,
  )  # fmt: skip
  assert with_learning_rate(module) == {
    'new.unannotated', 'new.annotated', 'new.partial',
  }  # fmt: skip


@pytest.mark.parametrize('name', TABLE)
def test_behind_the_power(name):
  alone = optimizer(name)
  params, state = run(name, alone)
  same = run(name, optax.chain(sign_power(1.0), alone))
  chex.assert_trees_all_equal(same, (params, (optax.EmptyState(), state)))

  powered = optax.chain(sign_power(1.2), alone)
  other_params, other_state = run(name, powered)
  first = jax.eval_shape(powered.init, PARAMS)
  chex.assert_trees_all_equal_shapes_and_dtypes(first, other_state)
  chex.assert_trees_all_equal_shapes_and_dtypes(PARAMS, other_params)
  chex.assert_tree_all_finite(other_params)
