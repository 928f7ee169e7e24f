"""Ours and optax's Muon of sharded parameters, on eight fake CPU devices.

All devices share the machine's cores, so a program's time is that of the work
of all devices together, padding and repeated work included; a network it does
not show, for which there are the collectives of the compiled program. Axes of
the mesh are Auto; ours is told where parameters lie. Run by
`benchmarks.optimizer` in a process of its own:

    python -m benchmarks.optimizer_sharded llama
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import jax
import optax
from flax import nnx

from benchmarks import optimizer_programs, optimizer_work, timing
from models import presets, sharding
from models.config import DecoderConfig
from train.aot import collectives, hlo
from train.aot.chips import CHIPS
from train.aot.compile import held
from train.mesh import replicated

DEVICES = 8
_FLAG = f'--xla_force_host_platform_device_count={DEVICES}'
_ROOT = pathlib.Path(__file__).parents[1]
MESHES = {
  'llama': ({'fsdp': 8}, {'fsdp': 4, 'tensor': 2}),
  'qwen2_moe': ({'fsdp': 2, 'expert': 4},),
}
"""By family."""
_SECONDS = 300


class SubprocessError(Exception):
  """The other process failed; the message is one line."""


def measure_apart(family: str) -> list[dict[str, Any]]:
  """What `measure` returns, from a process that has eight devices.

  Args:
    family: A key of `MESHES`.

  Raises:
    SubprocessError: it failed.
  """
  flags = f'{os.environ.get("XLA_FLAGS", "")} {_FLAG}'
  command = [sys.executable, '-m', 'benchmarks.optimizer_sharded', family]
  try:
    done = subprocess.run(
      command,
      cwd=_ROOT,
      env=os.environ | {'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': flags},
      capture_output=True,
      text=True,
      timeout=_SECONDS,
      check=False,
    )
  except subprocess.TimeoutExpired as error:
    raise SubprocessError(f'took more than {_SECONDS} s') from error
  if done.returncode:
    lines = done.stderr.strip().splitlines() or [f'exit {done.returncode}']
    raise SubprocessError(lines[-1])
  return json.loads(done.stdout)


def measure(
  config: DecoderConfig, meshes: Sequence[dict[str, int]], pairs: int
) -> list[dict[str, Any]]:
  """Times and reads both programs on each mesh.

  Args:
    config: The model whose parameters are updated.
    meshes: Sizes of axes by name, of each mesh.
    pairs: Of timings, on each mesh.

  Returns:
    For each mesh `mesh`, the sizes of its axes; `ours` and `optax`, each `ms`
    (median), `collectives` as of `train.aot.collectives.totals`, and `bytes`,
    theirs; `ratio`, the median of optax's time over ours, and
    `ratio_quartiles`; `least_bytes`: each matrix out and back once, in the
    parts that a device has.
  """
  return [_on_mesh(config, sizes, pairs) for sizes in meshes]


def _on_mesh(config, sizes, pairs):
  mesh = sharding.make_mesh(jax.devices()[:DEVICES], **sizes)
  model = optimizer_work.abstract_model(config, mesh)
  places = sharding.param_shardings(model, mesh)
  shapes = jax.tree.map(
    lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
    nnx.to_pure_dict(nnx.state(model, nnx.Param)),
    places,
  )
  numbers = optimizer_work.dimension_numbers(model)
  optimizers = optimizer_programs.optimizers(numbers, places)
  ours, theirs = (
    optimizers[name]
    for name in (optimizer_programs.MUON, optimizer_programs.OPTAX)
  )
  # Their states are alike; optax.tree.map_params does not take optax's.
  whole = replicated(mesh)
  of_state = optax.tree.map_params(
    ours,
    lambda x, place: x if isinstance(x, optax.MaskedNode) else place,
    jax.eval_shape(ours.init, shapes),
    places,
    transform_non_params=lambda _: whole,
    is_leaf=lambda x: isinstance(x, optax.MaskedNode),
  )
  made, runs = {}, {}
  for name, tx in (('ours', ours), ('optax', theirs)):
    runs[name], made[name] = _program(tx, shapes, (places, of_state), mesh)
  taken = timing.time_pairs(runs['ours'], runs['optax'], pairs)
  low, middle, high = timing.quartiles(taken.ratios)
  matrices = [
    x
    for x, number in zip(
      jax.tree.leaves(shapes),
      optimizer_work.numbers_by_leaf(numbers),
      strict=True,
    )
    if number is not None
  ]
  return {
    'mesh': sizes,
    'ours': _entry(taken.first, made['ours']),
    'optax': _entry(taken.second, made['optax']),
    'ratio': middle,
    'ratio_quartiles': [low, high],
    'least_bytes': 2 * held(matrices),
  }


def _program(tx, shapes, places, mesh):
  """A call that starts an update in place, and the program's collectives."""

  def fill(key):
    leaves, structure = jax.tree.flatten(shapes)
    keys = jax.random.split(key, len(leaves))
    values = [
      jax.random.normal(key, x.shape)
      for key, x in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, values)

  of_params, of_state = places
  params = jax.jit(fill, out_shardings=of_params)(jax.random.key(0))
  grads = jax.jit(fill, out_shardings=of_params)(jax.random.key(1))
  state = jax.jit(tx.init, out_shardings=of_state)(params)
  compiled = (
    optimizer_programs.updating(tx, places)
    .lower(params, state, grads)
    .compile()
  )

  def run():
    nonlocal params, state
    params, state = compiled(params, state, grads)
    return params, state

  program = hlo.parse(compiled.as_text())
  # Any chip will do: what the network takes is not looked at.
  found = collectives.find(program, mesh, CHIPS['v5e'])
  return run, collectives.totals(found)


def _entry(seconds, collectives):
  return {
    'ms': 1e3 * timing.quartiles(seconds)[1],
    'collectives': collectives,
    'bytes': sum(one['bytes'] for one in collectives),
  }


def main(argv: list[str] | None = None) -> None:
  """Prints the measurement of a family as JSON."""
  (family,) = sys.argv[1:] if argv is None else argv
  small: dict[str, tuple[str, dict[str, Any]]] = {
    'llama': ('llama_0.2b', {'d_model': 192, 'd_ff': 768, 'n_heads': 4}),
    'qwen2_moe': ('qwen2_moe_0.2b', {
      'd_model': 128, 'd_expert': 88, 'd_shared': 352, 'n_heads': 2,
      'n_experts': 16,
    }),
  }  # fmt: skip
  name, fields = small[family]
  config = dataclasses.replace(
    presets.get(name), n_layers=8, vocab_size=1024, dtype='float32', **fields
  )
  print(json.dumps(measure(config, MESHES[family], pairs=5)))


if __name__ == '__main__':
  main()
