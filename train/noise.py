"""Noise of gradients, measured beside a run: `gradpower_optax.noise`.

By a program of its own, as `train/statistics.py`: the step stays as it is, so a
run that measures trains the same numbers, to the bit, as one that does not.

Shape suffixes: B batch, P parts of it.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from gradpower_optax import noise
from models import sharding
from models.config import DecoderConfig
from models.decoder import layer_places
from train import deterministic, run_dir
from train import step as step_lib
from train.config import Config
from train.errors import UserError

_LEAST = 8  # Parts: below, fourth moments tell little.


def parts(config: Config, mesh: Mesh) -> int:
  """In how many parts, of whole sequences, a batch is measured.

  The fewest from 8 on that take no more memory for activations than the step:
  parts are as near to a batch as can be. Each takes its share of the rows of
  every device, as a micro-batch does. Where devices have too few rows for that,
  some compute padding meanwhile.

  Raises:
    UserError: a batch has less than 8 sequences.
  """
  rows = config.data.batch_size
  if rows < _LEAST:
    raise UserError(
      f'--noise takes a batch in {_LEAST} parts or more: --data.batch_size '
      f'({rows}) must be at least {_LEAST}'
    )
  least = max(_LEAST, config.accumulate)
  whole = rows // sharding.ways(mesh, 'batch')
  divided = whole if whole >= least else rows
  return next(n for n in range(least, divided + 1) if divided % n == 0)


def program(config: Config, mesh: Mesh) -> Any:
  """Makes the program, a `jax.jit` function.

  Args:
    config: The run.
    mesh: As of the step.

  Returns:
    (params, batch) to `gradpower_optax.noise.Stats` over the gradients of the
    batch's parts, not clipped, split over the devices as the parameters are.

  Raises:
    UserError: as `parts`.
  """
  model = step_lib.abstract_model(config, mesh)
  graph, _ = nnx.split(model, nnx.Param)
  places = sharding.param_shardings(model, mesh)
  count = parts(config, mesh)

  def add(params, stats, part):
    grads, _ = step_lib.gradients(graph, mesh, 1, params, part)
    return _place(noise.update(stats, grads), places, mesh), None

  def sums(params, batch):
    # Padding has none.
    ones = jnp.ones_like(batch['tokens'][:, 1:], jnp.float32)
    batch = {'weights': ones, **batch}
    split = jax.tree.map(functools.partial(_split, mesh, count), batch)
    start = _place(noise.init(params), places, mesh)
    return jax.lax.scan(functools.partial(add, params), start, split)[0]

  return jax.jit(
    sums,
    compiler_options=deterministic.options(
      config, sharding.platform(mesh), None
    ),
  )


def _place(stats: noise.Stats, places: Any, mesh: Mesh) -> noise.Stats:
  """Has the sums of each parameter lie where it does."""
  if mesh.size == 1:
    return stats
  by_name = {
    jax.tree_util.keystr(path, simple=True, separator='/'): place
    for path, place in jax.tree_util.tree_leaves_with_path(places)
  }
  tensors = {
    name: jax.tree.map(
      lambda x, place=by_name[name]: (
        jax.lax.with_sharding_constraint(x, place) if x.ndim else x
      ),
      sums,
    )
    for name, sums in stats.tensors.items()
  }
  return dataclasses.replace(stats, tensors=tensors)


def _split(mesh: Mesh, count: int, x_BU: jax.Array) -> jax.Array:
  """Rows in parts, (P, B / P, ...): a share of every device's where it can.

  Else with rows of zeros, as many as it takes for all devices to have the same.
  """
  ways = sharding.ways(mesh, 'batch')
  if len(x_BU) // ways % count:
    x_PBU = x_BU.reshape(count, -1, *x_BU.shape[1:])
    padding = [(0, 0)] * x_PBU.ndim
    padding[1] = 0, -x_PBU.shape[1] % ways
    x_PBU = jnp.pad(x_PBU, padding)
  else:
    x_DPRU = x_BU.reshape(ways, count, -1, *x_BU.shape[1:])
    x_PBU = x_DPRU.swapaxes(0, 1).reshape(count, -1, *x_BU.shape[1:])
  return sharding.constrain(x_PBU, mesh, None, 'batch', 'length')


class Probe:
  """Measures a batch, and makes a line of metrics.jsonl of it.

  Args:
    config: The run.
    mesh: As of the step.

  Raises:
    UserError: as `parts`.
  """

  def __init__(self, config: Config, mesh: Mesh):
    self._config = config
    self._parts = parts(config, mesh)
    self._sums = program(config, mesh)
    self._compiled = False

  def __call__(
    self, step: int, params: Any, batch: dict[str, jax.Array]
  ) -> dict[str, Any]:
    """Measures, and waits for it; all processes alike.

    Its sums, some 15 float32 numbers for each parameter, are free again when it
    returns.

    Args:
      step: About to be taken.
      params: Before it.
      batch: Its own.

    Returns:
      The line; `seconds` is without compilation.
    """
    if not self._compiled:  # Twice, the first time, for what is then compiled.
      self._compiled = True
      self._measure(params, batch)
    jax.block_until_ready(params)
    start = time.monotonic()
    summary = self._measure(params, batch)
    return {
      'step': step,
      'split': 'noise',
      'powers': list(summary.powers),
      'parts': self._parts,
      'seconds': time.monotonic() - start,
      'overall': _numbers(summary.overall),
      'tensors': {
        _dotted(path, self._config.model): _numbers(found)
        for path, found in summary.tensors.items()
      },
    }

  def _measure(self, params, batch) -> noise.Summary:
    c = self._config
    return noise.summarize(
      self._sums(params, batch),
      eps=c.optimizer.eps,
      parts=self._parts,
      examples_per_part=c.data.batch_size // self._parts,
      clip_norm=c.optimizer.clip_norm or math.inf,
    )


def _numbers(found: noise.Noise) -> dict[str, Any]:
  return {
    name: run_dir.plain(list(value) if isinstance(value, Sequence) else value)
    for name, value in found._asdict().items()
  }


def _dotted(path: str, config: DecoderConfig) -> str:
  """A tensor's path; of a stack with its layers as a slice, 'layers.0:12.'."""
  names = path.split('/')
  if names[0] == 'layers' and config.scan_layers:
    group, slot, *rest = names[1:]
    layers = [
      layer
      for layer, place in enumerate(layer_places(config))
      if place[:2] == (int(group), int(slot))
    ]
    names = ['layers', _span(layers), *rest]
  return '.'.join(names)


def _span(layers: Sequence[int]) -> str:
  if len(layers) == 1:
    return str(layers[0])
  apart = layers[1] - layers[0]
  span = f'{layers[0]}:{layers[-1] + 1}'
  return span if apart == 1 else f'{span}:{apart}'
