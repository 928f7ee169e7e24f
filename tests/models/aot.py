"""Compiling for TPUs that are not there."""

import importlib.util
import os

import jax
import numpy as np
import pytest
from jax.experimental import topologies

AXES = ('data', 'fsdp', 'tensor', 'expert')


def topology_mesh(name: str, **axis_sizes: int) -> jax.sharding.Mesh:
  """A mesh over a described TPU slice; skips the test without libtpu.

  Args:
    name: A topology such as 'v5e:2x4'.
    **axis_sizes: Sizes by axis name, 1 if left out; their product is at most
      the number of the topology's devices, of which it takes the first.

  Returns:
    A mesh of axes data, fsdp, tensor, expert; programs lowered for it can be
    compiled but not run.
  """
  if importlib.util.find_spec('libtpu') is None:
    pytest.skip('libtpu, which compiles for a TPU, is not installed')
  # The compiler only describes a machine: it needs neither a lock on its
  # devices nor a metadata server.
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  topology = topologies.get_topology_desc(platform='tpu', topology_name=name)
  sizes = [axis_sizes.pop(axis, 1) for axis in AXES]
  assert not axis_sizes, f'unknown axes {sorted(axis_sizes)}'
  devices = np.array(topology.devices[: np.prod(sizes)]).reshape(sizes)
  auto = (jax.sharding.AxisType.Auto,) * len(AXES)
  return jax.sharding.Mesh(devices, AXES, axis_types=auto)
