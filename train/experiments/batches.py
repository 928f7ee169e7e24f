"""Another batch size, and as many tokens."""

import dataclasses
import math

from train.config import Config


def with_batch(config: Config, batch: int) -> Config:
  """Returns a run on as many tokens in batches of another size.

  Steps, and with them warm-up, evaluations and checkpoints, scale inversely, so
  that all of them come after as many tokens as before.

  Args:
    config: The run.
    batch: Sequences in a batch, at least 1.

  Raises:
    UserError: the values do not go together.
  """
  factor = config.data.batch_size / batch

  def scaled(count: int) -> int:
    return max(1, round(count * factor))

  steps = max(1, math.ceil(config.steps * factor))
  warmup = config.optimizer.warmup_steps
  return dataclasses.replace(
    config,
    data=dataclasses.replace(config.data, batch_size=batch),
    optimizer=dataclasses.replace(
      config.optimizer,
      warmup_steps=min(scaled(warmup) if warmup else 0, steps - 1),
    ),
    steps=steps,
    eval_every=scaled(config.eval_every),
    save_every=scaled(config.save_every),
  )
