"""Compiles a recipe's train step for a topology, and reads what came of it."""

import dataclasses
import math
import re
import time
from typing import Any

import jax

from train.aot import collectives as collectives_lib
from train.aot import estimate as estimate_lib
from train.aot import hlo, topology
from train.aot.report import Bytes, Report
from train.config import Config
from train.mesh import make_mesh
from train.step import Programs, programs

# How libtpu refuses a program: by a bound before it assigns buffers, or by what
# it assigned.
_REFUSALS = (
  re.compile(
    r'temporaries \(([\d.]+)([KMGT]?)\) exceeds available HBM '
    r'\(([\d.]+)([KMGT]?)\)'
  ),
  re.compile(r'Used ([\d.]+)([KMGT]?) of ([\d.]+)([KMGT]?) hbm'),
)
_UNITS = {'': 0, 'K': 1, 'M': 2, 'G': 3, 'T': 4}


class DoesNotFitError(Exception):
  """A program that the compiler refuses: it needs more memory than there is."""

  def __init__(self, needed: int, available: int):
    super().__init__(
      f'needs {needed / 1e9:.1f} GB a device, of which there are '
      f'{available / 1e9:.1f}'
    )
    self.needed = needed
    self.available = available


def with_vocabulary(config: Config) -> Config:
  """The config with the vocabulary that its tokenizer will have.

  Nothing is read: a vocabulary of 0 becomes `data.vocab_size`.
  """
  if config.model.vocab_size:
    return config
  model = dataclasses.replace(config.model, vocab_size=config.data.vocab_size)
  return dataclasses.replace(config, model=model)


def compile_step(config: Config, name: str, slices: int = 1) -> Report:
  """Compiles the step of a run on a topology that need not be there.

  Args:
    config: The run.
    name: Of the topology: 'v5p:4x4x2'.
    slices: How many such slices there are.

  Raises:
    UserError: there is no libtpu, or the topology, the mesh and the config do
      not fit together.
    DoesNotFitError: the program needs more memory than a device has.
  """
  config = with_vocabulary(config)
  chip = topology.chip_of(name)
  mesh = make_mesh(config.mesh, topology.devices_of(name, slices))
  step = programs(config, mesh)
  start = time.perf_counter()
  lowered = step.train_step.lower(step.state, step.batch)
  try:
    compiled = lowered.compile()
  except jax.errors.JaxRuntimeError as error:
    raise _too_large(error) from error
  seconds = time.perf_counter() - start
  text = compiled.as_text()
  program = hlo.parse(text)
  found = collectives_lib.find(program, mesh, chip)
  size = _bytes(compiled.memory_analysis(), step)
  return Report(
    config=config,
    topology=name,
    slices=slices,
    chip=chip,
    mesh=dict(mesh.shape),
    bytes=size,
    fits=size.peak <= chip.hbm_bytes,
    collectives=found,
    estimate=estimate_lib.estimate(program, found, chip),
    compile_seconds=seconds,
    text=text,
  )


def _too_large(error: Exception) -> Exception:
  """What a compiler's error means, itself if not that."""
  for pattern in _REFUSALS:
    if found := pattern.search(str(error)):
      needed, available = (
        int(float(number) * 1024 ** _UNITS[unit])
        for number, unit in (found.group(1, 2), found.group(3, 4))
      )
      return DoesNotFitError(needed, available)
  return error


def _bytes(memory: Any, step: Programs) -> Bytes:
  arguments = memory.argument_size_in_bytes
  temporary = memory.temp_size_in_bytes
  kept = memory.output_size_in_bytes - memory.alias_size_in_bytes
  parameters = held(step.state.params)
  # Older plugins do not tell.
  peak = memory.peak_memory_in_bytes or arguments + temporary + kept
  return Bytes(
    arguments=arguments,
    temporary=temporary,
    peak=peak,
    parameters=parameters,
    moments=held(step.state.opt_state),
    # Gradients are as large as the parameters, float32 as well.
    activations=max(0, peak - arguments - parameters),
  )


def held(tree: Any) -> int:
  """Bytes of a device's shards of abstract arrays."""
  return sum(
    x.dtype.itemsize * math.prod(x.sharding.shard_shape(x.shape))
    for x in jax.tree.leaves(tree)
  )
