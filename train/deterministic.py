"""Programs that give the same bits each time, on a GPU too.

There, XLA adds up some scatters and products in whatever order threads come,
and times kernels against each other to choose one, which need not come out the
same twice. CPUs and TPUs do neither.
"""

import pathlib

from train.config import Config

Options = dict[str, bool | int | float | str]


def options(
  config: Config, platform: str, directory: pathlib.Path | None
) -> Options | None:
  """Compiler options of a run's programs.

  Args:
    config: Says whether it is to be deterministic.
    platform: As `models.sharding.platform` names it.
    directory: Where the chosen kernels are kept, in `autotune/`, which is made;
      None for nowhere.

  Returns:
    For `jax.jit`; None where none are needed.
  """
  if not config.deterministic or platform != 'gpu':
    return None
  found: Options = {'xla_gpu_exclude_nondeterministic_ops': True}
  if directory is not None:
    kept = directory / 'autotune'
    kept.mkdir(parents=True, exist_ok=True)  # XLA does not make it.
    found['xla_gpu_per_fusion_autotune_cache_dir'] = str(kept)
  return found
