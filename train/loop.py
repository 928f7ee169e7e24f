"""The run: data in, steps, evaluation, saves; everybody is told."""

import contextlib
import dataclasses
import gc
import logging
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from train import (
  allocator,
  distributed,
  hardware,
  interrupt,
  kept_programs,
  noise,
  statistics,
  step_dirs,
)
from train import step as step_lib
from train.checkpoint import Checkpoints
from train.config import Config, to_dict
from train.data import dataset as data
from train.data.prefetch import Prefetch
from train.digest import params_digest
from train.errors import DivergedError, UserError
from train.feed import Feed
from train.mesh import check, make_mesh
from train.monitor import Monitor
from train.optimizer import schedule
from train.profiler import Profiler
from train.run_dir import RunDir, versions
from train.saving import Saver
from train.watch_options import WatchOptions

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
  signal: str = ''
  """The name of one that came, if only in a run's last moments."""


def resolve(config: Config, dataset: data.Dataset) -> Config:
  """Says what is left open: the layout, and the model's vocabulary.

  Raises:
    UserError: the vocabulary asked for is too small.
  """
  config = dataclasses.replace(config, data=dataset.config)
  if config.model.vocab_size == 0:
    model = dataclasses.replace(
      config.model, vocab_size=dataset.tokenizer.padded_vocab_size
    )
    return dataclasses.replace(config, model=model)
  if config.model.vocab_size < dataset.tokenizer.vocab_size:
    raise UserError(
      f'--model.vocab_size ({config.model.vocab_size}) must be at least the '
      f"tokenizer's ({dataset.tokenizer.vocab_size}): give --model.vocab_size 0"
      ' for just as many'
    )
  return config


def run(
  config: Config,
  run_dir: epath.Path,
  *,
  name: str = 'run',
  stop_at: int | None = None,
  watch: WatchOptions | None = None,
) -> Result:
  """Trains, or goes on training, or finds that all is done.

  Args:
    config: The run.
    run_dir: Made, or continued from its last checkpoint.
    name: Shown with the progress.
    stop_at: Save and return after this many steps in all.
    watch: What else to write down.

  Returns:
    How it ended; the directory holds the rest.

  Raises:
    UserError: the input is at fault, or the end cannot be saved.
    DivergedError: too many steps in a row were not finite.
  """
  kept_programs.keep()
  allocator.keep_memory()
  with distributed.together(distributed.PREPARING):
    step_dirs.absolute(run_dir)  # Refuses a path that cannot hold checkpoints.
    mesh = make_mesh(config.mesh)
    check(config, mesh)
    if watch and watch.noise:
      noise.parts(config, mesh)
    dataset = data.load(config.data)
    dataset.check_steps(config.steps)
    config = resolve(config, dataset)
    check(config, mesh)  # Of the vocabulary too, now that it is known.
  directory = _open(run_dir, config, dataset)
  try:
    result = _go_on(config, directory, dataset, mesh, name, stop_at, watch)
  except BaseException:
    with contextlib.suppress(UserError):  # The first error says more.
      directory.close()
    raise
  directory.close()
  return result


def _go_on(config, directory, dataset, mesh, name, stop_at, watch) -> Result:
  end = directory.done() if distributed.is_main() else None
  if (end := distributed.share(end)) is not None:
    _logger.info('%s: already done, at step %d', name, end['step'])
    return Result(
      'done', end['step'], float(end['validation_loss']), end['params_digest']
    )
  with interrupt.Interrupt() as signals:
    parts = config, directory, dataset, mesh, name, stop_at
    result = _Run(*parts, watch or WatchOptions(), signals)()
    return dataclasses.replace(result, signal=signals.received or '')


def _open(path: epath.Path, config: Config, dataset: data.Dataset) -> RunDir:
  """One process makes the directory, then all others find it made."""
  parts = path, config, dataset.source_hash, dataset.tokenizer
  main = distributed.is_main()
  with distributed.together():
    directory = RunDir(*parts) if main else None
  try:
    with distributed.together():
      return directory or RunDir(*parts, writes=False)
  except BaseException:
    if directory is not None:
      directory.close()
    raise


class _Run:
  """The parts of a run that is under way."""

  def __init__(
    self, config, directory, dataset, mesh, name, stop_at, watch, signals
  ):
    self.config = config
    self.directory = directory
    self.signals = signals
    self.watch = watch
    self.last = min(config.steps, stop_at or config.steps)
    # All at once: asked step by step, it would queue behind the step under way.
    self.learning_rates = jax.device_get(
      jax.vmap(schedule(config.optimizer, config.steps))(
        jnp.arange(config.steps)
      )
    )
    self.programs = step_lib.programs(config, mesh, directory.local)
    self.statistics = (
      statistics.program(config, mesh) if watch.layer_statistics else None
    )
    self.noise = noise.Probe(config, mesh) if watch.noise else None
    self.noise_compiled = False
    self.feed = Feed(mesh, config.data.batch_size)
    rows = self.feed.rows
    batches = dataset.train(config.seed)
    self.read = lambda index: batches.rows(index, rows)
    self.held_out = [
      self.feed({name: array[rows] for name, array in batch.items()})
      for batch in dataset.validation()
    ]
    facts = {
      'config': to_dict(config),
      'versions': versions(),
      'data': {'seed': config.seed, 'source_hash': dataset.source_hash},
    }
    self.checkpoints = Checkpoints(
      directory.checkpoints, config.keep, facts, directory.confirm
    )
    refused = self._start()
    self.monitor = Monitor(
      name, config, self.step,
      shown=distributed.is_main() and not watch.quiet,
      local=directory.local, watch=watch,
    )  # fmt: skip
    self.saver = Saver(
      self.checkpoints, directory, self.tell, config.save_every, self.step
    )
    self.profiler = Profiler(directory.local, watch.profile)
    for step, reason in refused:
      self.tell('fell_back', self.step, refused=step, reason=reason)
    self.behind = False  # Whether lines wait to be written.
    self.clock: float | None = None  # When the last logged step was done.
    self.waited = 0.0  # Seconds since then, at most, without a batch.

  def __call__(self) -> Result:
    wait = True
    try:
      if self.last <= self.step < self.config.steps:
        return Result('stopped', self.step)  # As it was before.
      # At the end, the last evaluation is about to be done again as well.
      again = self.step == self.config.steps
      self.directory.rewind(self.step, again=again)
      self._say_how_it_begins()
      status = self._train()
      if status == 'done':
        return self._finish()
      self.directory.log({'event': 'stopped', 'step': self.step})
      self.tell('stopped', self.step, status=self.signals.received or status)
      return Result(status, self.step)
    except KeyboardInterrupt:  # The second one.
      wait = False
      interrupt.skip_exit()
      self.tell('stopped', self.step, status='at once')
      raise
    except UserError as error:
      self.saver.close()
      self.tell('failed', self.step, error=str(error), status=error.status)
      raise
    finally:
      self.profiler.close()
      if wait:
        self.saver.close()
      self.monitor.close(wait=wait)

  def tell(self, kind: str, step: int, **facts: Any) -> None:
    """Has history and display know of an event."""
    self.directory.event(kind, step, **facts)
    self.monitor.event({'event': kind, 'step': step, **facts})

  def _start(self) -> list[tuple[int, str]]:
    """Takes up the last good checkpoint, or begins; returns those refused."""
    with distributed.together():
      restored = self.checkpoints.restore(self.programs.state)
    if restored is None:
      with distributed.together():
        if (saved := self.directory.saved()) is not None:
          raise UserError(
            f'{self.directory.path} was saved at step {saved}, but no whole '
            'checkpoint is there any more: bring one back, or name another '
            '--run-dir'
          )
      self.step, self.state = 0, self.programs.init()
      return []
    self.step, self.state = restored.step, restored.state
    return restored.refused

  def _say_how_it_begins(self) -> None:
    if not self.step:
      self.tell('began', 0)
      return
    moved = self.directory.moved
    self.directory.log({'event': 'resumed', 'step': self.step, **moved})
    self.tell('resumed', self.step, **moved)
    if moved:
      self.monitor.say(
        f'goes on in another way than it began ({", ".join(moved)}): what '
        'follows is the same up to rounding'
      )

  def _train(self) -> str:
    """Steps until the end, --stop-at or a signal."""
    # Collecting garbage takes longer than all else here: it waits for a save
    # or an evaluation, and what is there already is never looked at.
    gc.collect()
    gc.freeze()
    gc.disable()
    batches = Prefetch(self.read, self.step)
    try:
      return self._steps(batches)
    finally:
      batches.close()
      gc.enable()
      gc.unfreeze()

  def _steps(self, batches: Prefetch) -> str:
    every_eval = self.config.eval_every
    self.skipped = int(self.state.guard.skipped)
    evaluated = None  # The last step that was, and its loss.
    pending: _Pending | None = None
    self.monitor.status('compiling')
    while self.step < self.last and not self.signals.stop():
      self.profiler.step(self.step + 1)
      batch = self._next_batch(batches, pending)
      if self.noise and (self.step + 1) % self.watch.noise == 0:
        self._log(pending)
        pending = None
        self._measure_noise(self.noise, batch)
      norms = self._measure(batch)
      self.state, metrics = self.programs.train_step(self.state, batch)
      self.step += 1
      distributed.progress(self.step)
      # The device is busy with this step while the one before is logged.
      self._log(pending)
      pending = _Pending(self.step, metrics, norms)
      evaluate = self.step % every_eval == 0 and self.step < self.config.steps
      save = self.saver.due(self.step)
      if evaluate or save:
        self._log(pending)
        pending = loss = None
        if evaluate:
          loss = self._evaluate()
          evaluated = self.step, loss
        if save and self.step < self.last:
          self.saver.save(self.step, self.state, loss)
        gc.collect()
        self.clock, self.waited = time.monotonic(), 0.0
    self._log(pending)
    if self.step == self.config.steps:
      return 'done'
    hurry = self.signals.received is not None
    self.monitor.status('saving')
    loss = None
    if evaluated and evaluated[0] == self.step:
      loss = evaluated[1]
    self.saver.finish(self.step, self.state, loss, hurry=hurry)
    return 'interrupted' if self.signals.received else 'stopped'

  def _next_batch(
    self, batches: Prefetch, pending: '_Pending | None'
  ) -> dict[str, jax.Array]:
    """The batch; counts how long the devices waited for it, at most."""
    start = time.monotonic()
    batch = self.feed(batches.next(self.step))
    if pending is None or pending.metrics['loss'].is_ready():
      self.waited += time.monotonic() - start
    return batch

  def _measure(self, batch: dict[str, jax.Array]) -> Any:
    """Norms by layer of the step about to be taken, where they are due."""
    if self.statistics and (self.step + 1) % self.watch.layer_statistics == 0:
      return self.statistics(self.state, batch)
    return None

  def _measure_noise(
    self, probe: noise.Probe, batch: dict[str, jax.Array]
  ) -> None:
    """Of the step about to be taken, while nothing else is under way."""
    begun = self.clock is not None
    if not self.noise_compiled:  # It may take minutes.
      self.noise_compiled = True
      self.monitor.say('compiling the program that measures noise')
    self.monitor.status('measuring noise')
    line = probe(self.step + 1, self.state.params, batch)
    distributed.progress(self.step)
    self.directory.log(line)
    self.monitor.noise(line)
    self.monitor.status('' if begun else 'compiling')
    gc.collect()
    if begun:
      self.clock, self.waited = time.monotonic(), 0.0

  def _log(self, pending: '_Pending | None') -> None:
    """Waits for a step's metrics and writes them down."""
    if pending is None:
      return
    step = pending.step
    numbers = {
      k: v.tolist() for k, v in jax.device_get(pending.metrics).items()
    }
    now = time.monotonic()
    bad_in_row = numbers.pop('bad_in_row')
    line = {
      'step': step,
      'split': 'train',
      'loss': numbers.pop('loss'),
      **numbers,
      # A step that changed nothing has not moved the schedule.
      'learning_rate': float(self.learning_rates[step - 1 - self.skipped]),
      'tokens': step * self.config.tokens_per_step,
      'data_seconds': round(self.waited, 6),
      'memory': hardware.memory(),
    }
    if self.clock is None:
      self.monitor.status('')
    else:  # The first step's time is compilation.
      rate = self.config.tokens_per_step / (now - self.clock)
      line['tokens_per_second'] = rate
      if (mfu := hardware.mfu(self.config, rate)) is not None:
        line['mfu'] = mfu
    self.clock, self.waited = now, 0.0
    self.directory.log(line)
    self.monitor.train(line)
    self._say_behind()
    if pending.norms is not None:
      layers = statistics.line(pending.norms, self.config.model)
      self._log_layers({'step': step, 'split': 'layers', 'layers': layers})
    if line['skipped'] > self.skipped:
      self._say_skipped(line, bad_in_row)

  def _say_behind(self) -> None:
    """Once, of lines that cannot be written and wait."""
    behind = self.directory.behind
    if behind and not self.behind:
      self.monitor.say(f'{behind}; training goes on')
    self.behind = bool(behind)

  def _log_layers(self, line: dict[str, Any]) -> None:
    self.directory.log(line)
    self.monitor.layers(line)

  def _say_skipped(self, line: dict[str, Any], bad_in_row: int) -> None:
    """Of a step that changed nothing; the end, where there are too many.

    Raises:
      DivergedError: in all processes alike.
    """
    self.skipped = line['skipped']
    step, limit = line['step'], self.config.guard.bad_steps
    self.tell(
      'skipped',
      step,
      reason='not finite' if bad_in_row else 'spike',
      loss=line['loss'],
      grad_norm=line['grad_norm'],
    )
    if bad_in_row < limit:
      return
    complete = self.saver.complete
    with distributed.together():
      raise DivergedError(
        f'the loss or a gradient was not finite {limit} steps in a row, '
        f'{step - limit + 1} to {step}: the last good state is that after step '
        f'{step - limit}, '
        + (
          f'the last checkpoint that of step {complete}'
          if complete
          else 'none is saved'
        )
        + ' (docs/cli.md, "Steps that change nothing")'
      )

  def _evaluate(self) -> float:
    """The mean loss on the held-out split, in nats; written down too."""
    self.monitor.status('evaluating')
    sums = [
      self.programs.eval_step(self.state.params, batch)
      for batch in self.held_out
    ]
    losses, weights = [], []
    for pair in sums:
      total, weight = jax.device_get(pair)
      losses.append(total)
      weights.append(weight)
      distributed.progress(self.step)
    loss = math.fsum(map(float, losses)) / math.fsum(map(float, weights))
    line = {
      'step': self.step,
      'split': 'validation',
      'loss': loss,
      'tokens': self.step * self.config.tokens_per_step,
    }
    self.directory.log(line)
    self.monitor.validation(line)
    self.monitor.status('')
    return loss

  def _finish(self) -> Result:
    """The final state is safe before the run says that it is done."""
    loss = self._evaluate()
    self.monitor.status('saving')
    self.saver.finish(self.step, self.state, loss)
    digest = params_digest(self.state.params, self.config.model)
    end = {'validation_loss': loss, 'params_digest': digest}
    self.directory.log({'event': 'done', 'step': self.step, **end})
    self.tell('done', self.step, **end)
    return Result('done', self.step, loss, digest)


@dataclasses.dataclass(frozen=True)
class _Pending:
  """A step that the devices may still be busy with."""

  step: int
  metrics: dict[str, Any]
  """Of it, as arrays."""
  norms: Any
  """Of `train/statistics.py`; or None."""
