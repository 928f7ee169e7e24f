"""Compiled programs are kept on disk: a run that goes on starts in seconds."""

import hashlib
import pathlib
import platform

import jax

from train.data.cache import default_directory

_LEAST_SECONDS = 0.5  # Shorter compilations are not worth a file.


def keep() -> None:
  """Has JAX keep the programs of this process in the cache.

  A directory that the user has set, by JAX_COMPILATION_CACHE_DIR for one, stays
  as it is.
  """
  if jax.config.values['jax_compilation_cache_dir']:
    return
  directory = default_directory().expanduser().absolute() / 'programs'
  for name, value in (
    ('jax_compilation_cache_dir', str(directory / _processor())),
    ('jax_persistent_cache_min_compile_time_secs', _LEAST_SECONDS),
  ):
    jax.config.update(name, value)


def _processor() -> str:
  """Names what a program for this CPU relies on: machines may share a cache."""
  lines = {platform.machine(), platform.processor()}
  cpu_info = pathlib.Path('/proc/cpuinfo')
  if cpu_info.exists():
    kinds = ('model name', 'flags', 'Features')
    lines |= {
      line
      for line in cpu_info.read_text(errors='replace').splitlines()
      if line.startswith(kinds)
    }
  return hashlib.sha256('\n'.join(sorted(lines)).encode()).hexdigest()[:16]
