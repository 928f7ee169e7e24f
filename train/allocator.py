"""Has the C library keep the memory that a step on a CPU frees.

XLA's CPU backend takes a step's temporaries from malloc and frees them again.
glibc hands large ones back to the system each time, and the next step pays for
every page anew: a third of a small model's time (docs/lab-log.md).

From about 0.5M parameters on, memory comes from heaps of XLA's threads, which
go back whole whatever is set here: MALLOC_ARENA_MAX=1 in the environment keeps
that too. It counts before threads begin, and all threads then share one heap.
"""

import ctypes
import sys

import jax

# Parameters of glibc's mallopt (malloc.h).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_KEPT = 2**31 - 1  # Bytes free at a heap's end before any goes back.
_GROWTH = 2**26  # Bytes that a heap grows by.


def keep_memory() -> bool:
  """Keeps freed memory in this process, where it computes on a CPU.

  Returns:
    Whether it does: not on an accelerator, nor without glibc.
  """
  if jax.default_backend() != 'cpu' or not sys.platform.startswith('linux'):
    return False
  mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
  if mallopt is None:  # musl has none.
    return False
  settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _KEPT), (_TOP_PAD, _GROWTH))
  taken = [mallopt(name, value) for name, value in settings]
  return all(taken)
