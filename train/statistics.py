"""Norms of each parameter and of what a step would do to it, layer by layer.

Computed beside the step, by a program of its own: the step's stays as it is, so
a run that looks trains the same numbers, to the bit, as one that does not.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from models import sharding
from models.config import DecoderConfig
from train import deterministic
from train import step as step_lib
from train.config import Config
from train.digest import canonical_parameters
from train.mesh import replicated
from train.optimizer import make_optimizer

NAMES = ('param_norm', 'grad_norm', 'powered_norm', 'update_norm')


def program(config: Config, mesh: Mesh) -> Any:
  """Makes the program, a `jax.jit` function.

  Args:
    config: The run.
    mesh: As of the step.

  Returns:
    (state, batch) to norms, float32, in the tree of the parameters: () each, or
    (layers,) where they are stacked, in a tuple in the order of `NAMES`. Of the
    gradient before clipping, of the powered gradient as the base optimizer
    takes it, of the update with its learning rate.
  """
  model = step_lib.abstract_model(config, mesh)
  optimizer = make_optimizer(config, model, mesh)
  _, graph = step_lib.init(config, optimizer, mesh)

  def statistics(state, batch):
    grads, _ = step_lib.gradients(
      graph, mesh, config.accumulate, state.params, batch
    )
    powered = optimizer.powered(grads)
    updates, _, _ = optimizer.update(grads, state.opt_state, state.params)
    trees = state.params, grads, powered, updates
    return tuple(_norms(tree, config.model) for tree in trees)

  return jax.jit(
    statistics,
    out_shardings=replicated(mesh),
    compiler_options=deterministic.options(
      config, sharding.platform(mesh), None
    ),
  )


def line(norms: Any, config: DecoderConfig) -> dict[str, dict[str, float]]:
  """Norms by dotted path, layers unstacked, each with the keys of `NAMES`."""
  values = jax.tree.map(
    lambda *arrays: np.stack(arrays, -1), *jax.device_get(norms)
  )
  return {
    path: dict(zip(NAMES, parameter.read().tolist(), strict=True))
    for path, parameter in canonical_parameters(values, config).items()
  }


def _norms(tree: Any, config: DecoderConfig) -> Any:
  whole = functools.partial(jax.tree.map, functools.partial(_norm, 0))
  stacked = functools.partial(
    jax.tree.map, functools.partial(_norm, int(config.scan_layers))
  )
  return {
    name: (stacked if name == 'layers' else whole)(part)
    for name, part in tree.items()
  }


def _norm(axes_kept: int, x: jax.Array) -> jax.Array:
  axes = tuple(range(axes_kept, x.ndim))
  return jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=axes))
