"""Our training step and what the trainer's loop does around it, in blocks.

A block is so many steps after one that is not timed. Time runs from when the
first step's metrics are there until the last's are: the device is busy in
between, as in a long run.
"""

import gc
import json
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from models.config import DecoderConfig
from train import step
from train.config import Config, DataConfig, MeshConfig, OptimizerConfig
from train.feed import Feed
from train.mesh import make_mesh

POWER = 1.2
_STREAM_TOKENS = 2**20
_LIMIT_SECONDS = 0.3


class OwnStep:
  """Compiles the step with the power and without.

  Args:
    config: The model.
    batch: Sequences; all local devices share them.
    length: Tokens of each.
    side: Of the square product.
    log: A file to append to, as the trainer does.
  """

  def __init__(
    self,
    config: DecoderConfig,
    batch: int,
    length: int,
    side: int,
    log: pathlib.Path,
  ):
    mesh = make_mesh(MeshConfig(), jax.local_devices())
    self._batch, self._length, self._log = batch, length, log
    self._feed = Feed(mesh, batch)
    self._rng = np.random.default_rng(0)
    self._stream = self._rng.integers(
      config.vocab_size, size=_STREAM_TOKENS + length + 1, dtype=np.int32
    )
    self._resting = self._feed(self._build())
    self._programs = {
      power: step.programs(_config(config, batch, length, power), mesh)
      for power in (1.0, POWER)
    }
    # Both programs go on from the same arrays: only tuples around them differ.
    self._leaves = jax.tree.leaves(self._programs[POWER].init())
    self.first_call_seconds: dict[float, float] = {}
    """From a program's first call to its result: tracing and compilation."""
    for power in self._programs:
      start = time.perf_counter()
      self.once(power)
      self.first_call_seconds[power] = time.perf_counter() - start
    self._square = jax.random.normal(
      jax.random.key(0), (side, side), config.dtype
    )
    self._product = jax.jit(jnp.matmul)
    self._products = 1
    self.limit()
    self._products = max(1, round(_LIMIT_SECONDS / self.limit()))
    self.host: list[dict[str, float]] = []
    """Of each block of `loop`: seconds of the host a step, by what it did."""

  def device(self, power: float, steps: int) -> float:
    """A block of bare steps on a batch that is there; returns seconds a step.

    The host does nothing but start one step after the other.
    """
    state, train_step = self._take(power)
    state, first = train_step(state, self._resting)
    state, metrics = train_step(state, self._resting)
    # Not later: where a call waits for the step before it, the first step's end
    # would be long past.
    jax.block_until_ready(first)
    start = time.perf_counter()
    for _ in range(steps - 1):
      state, metrics = train_step(state, self._resting)
    jax.block_until_ready((state, metrics))
    seconds = (time.perf_counter() - start) / steps
    self._leaves = jax.tree.leaves(state)
    return seconds

  def loop(self, steps: int) -> float:
    """A block as the trainer's loop takes it; returns seconds a step.

    Each step: cuts a batch from a stream of tokens, puts it on the devices,
    starts the step, reads the metrics of the one before and appends them to a
    file as a line of JSON. Garbage is not collected meanwhile.
    """
    state, train_step = self._take(POWER)
    taken = dict.fromkeys(('batch', 'dispatch', 'log'), 0.0)
    came: list[float] = []

    def read(metrics):
      numbers = {k: v.tolist() for k, v in jax.device_get(metrics).items()}
      came.append(time.perf_counter())
      line = {'step': len(came), 'split': 'train', **numbers}
      with self._log.open('a') as file:
        file.write(json.dumps(line) + '\n')
      taken['log'] += time.perf_counter() - came[-1]

    pending = None
    gc.disable()
    try:
      thread = time.thread_time()
      for _ in range(steps + 1):
        start = time.perf_counter()
        batch = self._feed(self._build())
        built = time.perf_counter()
        state, metrics = train_step(state, batch)
        taken['dispatch'] += time.perf_counter() - built
        taken['batch'] += built - start
        if pending is not None:
          read(pending)
        pending = metrics
      read(pending)
      taken['thread'] = time.thread_time() - thread
    finally:
      gc.enable()
    self._leaves = jax.tree.leaves(state)
    self.host.append({k: v / (steps + 1) for k, v in taken.items()})
    return (came[-1] - came[0]) / steps

  def limit(self) -> float:
    """Square products for a while; returns seconds of one."""
    self._product(self._square, self._square).block_until_ready()
    start = time.perf_counter()
    for _ in range(self._products):
      out = self._product(self._square, self._square)
    out.block_until_ready()
    return (time.perf_counter() - start) / self._products

  def idle_dispatch(self, steps: int) -> float:
    """Median seconds that a call takes to return with the devices at rest."""
    state, train_step = self._take(POWER)
    taken = []
    for _ in range(steps):
      start = time.perf_counter()
      state, _ = train_step(state, self._resting)
      taken.append(time.perf_counter() - start)
      jax.block_until_ready(state)
    self._leaves = jax.tree.leaves(state)
    return float(np.median(taken))

  def once(self, power: float) -> float:
    """Takes one step and returns its loss."""
    state, train_step = self._take(power)
    state, metrics = train_step(state, self._resting)
    self._leaves = jax.tree.leaves(jax.block_until_ready(state))
    return float(metrics['loss'])

  def _take(self, power: float) -> tuple[Any, Any]:
    programs = self._programs[power]
    structure = jax.tree.structure(programs.state)
    return jax.tree.unflatten(structure, self._leaves), programs.train_step

  def _build(self) -> dict[str, np.ndarray]:
    """'tokens', int32 (batch, length + 1): windows at random places."""
    starts = self._rng.integers(_STREAM_TOKENS, size=self._batch)
    at = starts[:, None] + np.arange(self._length + 1)
    return {'tokens': self._stream[at]}


def _config(
  model: DecoderConfig, batch: int, length: int, power: float
) -> Config:
  return Config(
    model=model,
    data=DataConfig(batch_size=batch, sequence_length=length),
    optimizer=OptimizerConfig(power=power, schedule='constant'),
  )
