"""Memory that a step frees is there for the next one."""

import ctypes
import platform
import resource

import jax
import numpy as np
import pytest

from train import allocator

glibc = pytest.mark.skipif(
  platform.libc_ver()[0] != 'glibc', reason='mallopt is of glibc'
)


def faults(rounds):
  """Pages that the system had to give while 8 MB came and went."""
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  for _ in range(rounds):
    np.empty(2**20).fill(1.0)
  return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@glibc
def test_freed_memory_is_kept():
  assert allocator.keep_memory()
  faults(1)
  pages = 50 * 2**23 // resource.getpagesize()
  assert faults(50) < pages / 10


def test_an_accelerators_process_is_left_alone(monkeypatch):
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  assert not allocator.keep_memory()


def test_another_c_library_is_left_alone(monkeypatch):
  monkeypatch.setattr(ctypes, 'CDLL', lambda name: object())
  assert not allocator.keep_memory()
