"""What Muon's update of a LLaMA sends on a TPU: compiled, `not run`."""

import importlib.util
import pathlib

import pytest
from optax.contrib import MuonDimensionNumbers

from gradpower_optax import muon


def _load(path):
  spec = importlib.util.spec_from_file_location(path.stem, path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


_HERE = pathlib.Path(__file__).parent
aot = _load(_HERE / 'aot.py')
case = _load(_HERE.parent / 'gradpower_optax' / 'muon_case.py')

L, D, N, K, H, F, V = 8, 512, 8, 4, 64, 1408, 4096
ACROSS, BACK = MuonDimensionNumbers(1, (2, 3)), MuonDimensionNumbers((1, 2), 3)
STACK = MuonDimensionNumbers(1, 2)
LLAMA = {
  'query': case.Param((L, D, N, H), ACROSS, (None, 'fsdp', 'tensor')),
  'key': case.Param((L, D, K, H), ACROSS, (None, 'fsdp', 'tensor')),
  'value': case.Param((L, D, K, H), ACROSS, (None, 'fsdp', 'tensor')),
  'out': case.Param((L, N, H, D), BACK, (None, 'tensor', None, 'fsdp')),
  'gate': case.Param((L, D, F), STACK, (None, 'fsdp', 'tensor')),
  'up': case.Param((L, D, F), STACK, (None, 'fsdp', 'tensor')),
  'down': case.Param((L, F, D), STACK, (None, 'tensor', 'fsdp')),
  'embedding': case.Param((V, D), None, ('tensor', 'fsdp')),
  'norm': case.Param((L, D), None, ()),
}


@pytest.mark.slow
@pytest.mark.parametrize(
  ('topology', 'sizes'),
  [
    ('v5e:2x4', (1, 8, 1, 1)),
    ('v5e:2x4', (1, 4, 2, 1)),
    ('v5p:2x2x2', (1, 4, 2, 1)),
  ],
)
def test_a_tpu_sends_each_matrix_twice(topology, sizes):
  axes = dict(zip(aot.AXES, sizes, strict=True))
  mesh = aot.topology_mesh(topology, **axes)
  where = case.shardings(mesh, LLAMA)
  # Iterations in a loop, none of which sends.
  program = case.compiled_update(
    muon, LLAMA, mesh, ns_coeffs=case.LOOPED, param_shardings=where
  )
  found = case.collectives(program.as_text())
  case.check_traffic(found, LLAMA, sizes)
  # All stacks divide: not a byte more than the parts.
  matrices = sum(
    4 * L * x * y for x, y in [(D, N * H)] * 2 + [(D, K * H)] * 2 + [(D, F)] * 3
  )
  assert case.bytes_sent(found) == 2 * matrices // 8 * 7 // 8
