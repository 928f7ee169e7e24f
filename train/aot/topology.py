"""TPU slices that are not there, described by libtpu."""

import importlib.util
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from train.aot.chips import CHIPS, Chip
from train.errors import UserError

_NAME = re.compile(r'(\w+):(\d+(?:x\d+){1,2})')
_EXAMPLES = 'v5e:2x4, v6e:4x4, v4:2x2x4, v5p:4x4x2, tpu7x:2x2x2'


def chip_of(name: str) -> Chip:
  """The chip of a topology, from its name.

  Args:
    name: The generation and the shape of a slice: 'v5p:4x4x2'.

  Raises:
    UserError: it is not of that form, or the generation is not known.
  """
  found = _NAME.fullmatch(name)
  chip = CHIPS.get(found[1]) if found else None
  if not found or not chip:
    raise UserError(
      f'--topology {name!r} is not known: it is one of {", ".join(CHIPS)} and '
      f'the shape of a slice, as {_EXAMPLES}'
    )
  shape = found[2].split('x')
  if len(shape) != chip.dimensions:
    raise UserError(
      f'--topology {name}: a {chip.name} slice has {chip.dimensions} '
      f'dimensions, not {len(shape)}'
    )
  return chip


def devices_of(name: str, slices: int = 1) -> list[Any]:
  """The devices of a topology, for programs that are compiled but not run.

  Any number of processes may compile at once.

  Args:
    name: As of `chip_of`.
    slices: How many such slices there are, joined by the data-centre network.

  Raises:
    UserError: there is no libtpu, or no such topology.
  """
  chip = chip_of(name)
  if importlib.util.find_spec('libtpu') is None:
    raise UserError(
      'compiling for a TPU needs libtpu, though no TPU: '
      "pip install -e '.[train,tpu]'"
    )
  # libtpu is one process's, guarded by a lock file that a killed one leaves
  # behind; and it looks for the machine's metadata. A compiler needs neither.
  os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('TPU_ACCELERATOR_TYPE', f'{chip.name}-8')
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  if not os.environ.get('JAX_PLATFORMS'):  # Else JAX would look for a TPU.
    jax.config.update('jax_platforms', 'cpu')
  shape = [int(size) for size in name.partition(':')[2].split('x')]
  # As slices are wired.
  rings = (*chip.rings(shape), *(False,) * (3 - chip.dimensions))
  more: dict[str, Any] = {'wrap': rings}
  if slices > 1:
    more['num_slices'] = slices
  if chip.config != 'default':
    more['chip_config_name'] = chip.config
  try:
    return topologies.get_topology_desc(
      platform='tpu', topology_name=name, **more
    ).devices
  except (jax.errors.JaxRuntimeError, RuntimeError) as error:
    line = str(error).splitlines()[0]
    raise UserError(f'--topology {name}: {line}') from error
