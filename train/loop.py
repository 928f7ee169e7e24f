"""The run: data in, steps, evaluation, saves."""

import dataclasses
import gc
import logging
import math
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp

from train import data, distributed, kept_programs
from train import step as step_lib
from train.checkpoint import Checkpoints
from train.config import Config
from train.digest import params_digest
from train.errors import UserError
from train.feed import Feed
from train.interrupt import Interrupt
from train.mesh import check, make_mesh
from train.monitor import Display
from train.optimizer import schedule
from train.run_dir import RunDir

_logger = logging.getLogger('train')


@dataclasses.dataclass(frozen=True)
class Result:
  """How a run ended."""

  status: str
  """'done', 'stopped' (--stop-at) or 'interrupted' (a signal)."""
  step: int
  """Steps taken in all."""
  validation_loss: float = math.nan
  """Nats a token on the held-out split, where done."""
  params_digest: str = ''
  """See `train/digest.py`; empty unless done."""
  interrupted: bool = False
  """Whether a signal came, if only in a run's last moments."""


def resolve(config: Config, dataset: data.Dataset) -> Config:
  """Sizes the model's vocabulary for the tokenizer where it is left open.

  Raises:
    UserError: the vocabulary asked for is too small.
  """
  if config.model.vocab_size == 0:
    model = dataclasses.replace(config.model, vocab_size=dataset.vocab_size)
    return dataclasses.replace(config, model=model)
  if config.model.vocab_size < dataset.vocab_size:
    raise UserError(
      f'--model.vocab_size ({config.model.vocab_size}) must be at least the '
      f"tokenizer's ({dataset.vocab_size})"
    )
  return config


def run(
  config: Config,
  run_dir: pathlib.Path,
  *,
  name: str = 'run',
  stop_at: int | None = None,
) -> Result:
  """Trains, or goes on training, or finds that all is done.

  Args:
    config: The run.
    run_dir: Made, or continued from its last checkpoint.
    name: Shown with the progress.
    stop_at: Save and return after this many steps in all.

  Returns:
    How it ended; the directory holds the rest.

  Raises:
    UserError: the input is at fault, or the disk is full.
  """
  kept_programs.keep()
  with distributed.together():
    mesh = make_mesh(config.mesh)
    check(config, mesh)
    dataset = data.load(config.data)
    dataset.check_steps(config.steps)
    config = resolve(config, dataset)
    check(config, mesh)  # Of the vocabulary too, now that it is known.
  directory = _open(run_dir, config, dataset)
  if (end := distributed.share(directory.done())) is not None:
    _logger.info('%s: already done, at step %d', name, end['step'])
    return Result(
      'done', end['step'], float(end['validation_loss']), end['params_digest']
    )
  with Interrupt() as interrupt:
    parts = config, directory, dataset, mesh, name, stop_at
    result = _Run(*parts, interrupt)()
    return dataclasses.replace(result, interrupted=bool(interrupt.received))


def _open(path: pathlib.Path, config: Config, dataset: data.Dataset) -> RunDir:
  """One process makes the directory, then all others find it made."""
  parts = path, config, dataset.source_hash, dataset.tokenizer.to_json()
  main = distributed.is_main()
  with distributed.together():
    directory = RunDir(*parts) if main else None
  with distributed.together():
    return directory or RunDir(*parts, writes=False)


class _Run:
  """The parts of a run that is under way."""

  def __init__(
    self, config, directory, dataset, mesh, name, stop_at, interrupt
  ):
    self.config = config
    self.directory = directory
    self.interrupt = interrupt
    self.last = min(config.steps, stop_at or config.steps)
    # All at once: asked step by step, it would queue behind the step under way.
    self.learning_rates = jax.device_get(
      jax.vmap(schedule(config.optimizer, config.steps))(
        jnp.arange(config.steps)
      )
    )
    self.programs = step_lib.programs(config, mesh)
    self.feed = Feed(mesh, config.data.batch_size)
    self.batches = dataset.train(config.seed)
    rows = self.feed.rows
    self.held_out = [
      self.feed({name: array[rows] for name, array in batch.items()})
      for batch in dataset.validation()
    ]
    self.checkpoints = Checkpoints(directory.checkpoints)
    self.step, self.state = self._start()
    self.saved = self.step
    self.display = Display(
      name, config.steps, self.step, shown=distributed.is_main()
    )
    self.clock: float | None = None  # When the last logged step was done.

  def __call__(self) -> Result:
    try:
      if self.last <= self.step < self.config.steps:
        return Result('stopped', self.step)  # As it was before.
      self.directory.rewind(self.step)
      if self.step:
        self._say_resumed()
      status = self._train()
      if status == 'done':
        return self._finish()
      self.directory.log({'event': 'stopped', 'step': self.step})
      return Result(status, self.step)
    finally:
      self.display.close()
      self.checkpoints.close()

  def _start(self) -> tuple[int, step_lib.TrainState]:
    """Takes up the last checkpoint, or begins."""
    step = distributed.share(self.checkpoints.latest_step())
    if step is None:
      return 0, self.programs.init()
    with distributed.together():
      return step, self.checkpoints.restore(step, self.programs.state)

  def _say_resumed(self) -> None:
    moved = self.directory.moved
    self.directory.log({'event': 'resumed', 'step': self.step, **moved})
    self.display.say(f'continues from step {self.step}')
    if moved:
      self.display.say(
        f'laid out in another way than it began ({", ".join(moved)}): what '
        'follows is the same up to rounding'
      )

  def _train(self) -> str:
    """Steps until the end, --stop-at or a signal."""
    # Collecting garbage takes longer than all else here: it waits for a save
    # or an evaluation, and what is there already is never looked at.
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
      return self._steps()
    finally:
      gc.enable()
      gc.unfreeze()

  def _steps(self) -> str:
    every_eval, every_save = self.config.eval_every, self.config.save_every
    pending = None
    while self.step < self.last and not self.interrupt.stop():
      batch = self.feed(self.batches.rows(self.step, self.feed.rows))
      self.state, metrics = self.programs.train_step(self.state, batch)
      self.step += 1
      # The device is busy with this step while the one before is logged.
      self._log(pending)
      pending = (self.step, metrics)
      evaluate = self.step % every_eval == 0 and self.step < self.config.steps
      save = self.step % every_save == 0
      if evaluate or save:
        self._log(pending)
        pending = None
        if evaluate:
          self.directory.log(self._evaluate())
        if save:
          self._save()
        gc.collect()
        self.clock = time.monotonic()
    self._log(pending)
    if self.step == self.config.steps:
      return 'done'
    self._save()
    return 'interrupted' if self.interrupt.received else 'stopped'

  def _log(self, pending: tuple[int, dict[str, jax.Array]] | None) -> None:
    """Waits for a step's metrics and writes them down."""
    if pending is None:
      return
    step, metrics = pending
    numbers = {k: v.tolist() for k, v in jax.device_get(metrics).items()}
    now = time.monotonic()
    line = {
      'step': step,
      'split': 'train',
      'loss': numbers.pop('loss'),
      **numbers,
      'learning_rate': float(self.learning_rates[step - 1]),
      'tokens': step * self.config.tokens_per_step,
    }
    if self.clock is not None:  # The first step's time is compilation.
      rate = self.config.tokens_per_step / (now - self.clock)
      line['tokens_per_second'] = rate
      self.display.train(step, line['loss'], rate)
    self.clock = now
    self.directory.log(line)

  def _evaluate(self) -> dict[str, Any]:
    """The mean loss on the held-out split, as a line of metrics.jsonl."""
    sums = [
      self.programs.eval_step(self.state.params, batch)
      for batch in self.held_out
    ]
    losses, weights = zip(*jax.device_get(sums), strict=True)
    loss = math.fsum(map(float, losses)) / math.fsum(map(float, weights))
    self.display.validation(loss)
    return {
      'step': self.step,
      'split': 'validation',
      'loss': loss,
      'tokens': self.step * self.config.tokens_per_step,
    }

  def _save(self) -> None:
    if self.saved != self.step:
      self.directory.sync()
      self.checkpoints.save(self.step, self.state)
      self.saved = self.step

  def _finish(self) -> Result:
    """The final state is safe before the run says that it is done."""
    self._save()
    self.checkpoints.wait()
    validation = self._evaluate()
    digest = params_digest(self.state.params, self.config.model)
    self.directory.log(
      validation,
      {
        'event': 'done',
        'step': self.step,
        'validation_loss': validation['loss'],
        'params_digest': digest,
      },
    )
    return Result('done', self.step, validation['loss'], digest)
