"""How a run is watched: options that change nothing of what is trained."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class WatchOptions:
  """Of `python -m train run`; may differ whenever a run goes on."""

  tensorboard: bool = False
  """Also writes TensorBoard's files, to the run directory's `tensorboard/`."""
  wandb: str = ''
  """Weights & Biases' project to log to as well; empty for none."""
  layer_statistics: int = 0
  """Writes norms of every parameter and of its gradient, powered gradient and
  update each so many steps; 0 for never. Such a step takes about twice as
  long; what is trained stays the same to the bit."""
  noise: int = 0
  """Measures the noise of gradients each so many steps; 0 for never. It takes
  a few steps' time and, meanwhile, 15 float32 numbers for each parameter; what
  is trained stays the same to the bit."""
  profile: tuple[int, int] | None = None
  """First step and number of steps to trace, for xprof, into the run
  directory's `profile/`."""
  quiet: bool = False
  """Shows nothing."""
