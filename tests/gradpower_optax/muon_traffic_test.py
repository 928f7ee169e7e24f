"""What muon sends: collectives and bytes of its compiled update."""

import importlib.util
import pathlib

import optax.contrib
import pytest
from optax.contrib import MuonDimensionNumbers

from gradpower_optax import muon

_spec = importlib.util.spec_from_file_location(
  'muon_case', pathlib.Path(__file__).with_name('muon_case.py')
)
case = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(case)

STACK = MuonDimensionNumbers(1, 2)
# 16 matrices of one class and 16 of another.
EVEN = {
  'up': case.Param((8, 16, 32), STACK, (None, 'fsdp', 'tensor')),
  'down': case.Param((8, 32, 16), STACK, (None, 'tensor', 'fsdp')),
  'out': case.Param((16, 16, 24), STACK, (None, 'fsdp', 'tensor')),
  'norm': case.Param((8, 16), None, ()),
}
BYTES = 4 * 16 * 16 * (32 + 24)


def collectives(build, params, sizes, kind='Auto', **arguments):
  mesh = case.mesh_of(sizes, kind)
  # One iteration: five send nothing more in ours, and five times it in optax's.
  program = case.compiled_update(
    build, params, mesh, case.UNOPTIMIZED, ns_steps=1, **arguments
  )
  return case.collectives(program.as_text())


def of_ours(params, sizes, kind):
  where = case.shardings(case.mesh_of(sizes), params)
  known = {'param_shardings': where} if kind == 'Auto' else {}
  return collectives(muon, params, sizes, kind, **known)


def by_kind(found, kind):
  return [collective for collective in found if collective.kind == kind]


@pytest.mark.parametrize('kind', ['Auto', 'Explicit'])
@pytest.mark.parametrize('sizes', [(1, 8, 1, 1), (1, 4, 2, 1)])
def test_stacks_that_divide_send_the_least(sizes, kind):
  found = of_ours(EVEN, sizes, kind)
  assert case.counts(found) == {'all-to-all': 4}
  # Each device's parts, out and back, but for what it keeps.
  assert case.bytes_sent(found) == 2 * BYTES // 8 * 7 // 8
  case.check_traffic(found, EVEN, sizes)


def test_copies_share_the_work():
  found = of_ours(EVEN, (2, 4, 1, 1), 'Auto')
  assert case.counts(found) == {'all-to-all': 4, 'all-gather': 2}
  travelled = by_kind(found, 'all-to-all')
  assert case.bytes_sent(travelled) == 2 * (BYTES // 4 // 2) * 3 // 4
  # The other copy's half of its own parts.
  gathered = by_kind(found, 'all-gather')
  assert case.bytes_sent(gathered) == BYTES // 4 // 2


def test_copies_of_too_few_matrices_send_nothing_more():
  params = {'alone': case.PARAMS['alone'], 'norm': EVEN['norm']}
  found = of_ours(params, (2, 4, 1, 1), 'Auto')
  assert case.counts(found) == {'all-to-all': 2}
  found = of_ours(params, (8, 1, 1, 1), 'Auto')
  assert not found


def test_uneven_stacks_send_one_matrix_more_at_most():
  names = ('up', 'down', 'alone', 'query', 'norm')
  params = {name: case.PARAMS[name] for name in names}
  for sizes in [(1, 4, 2, 1), (4, 2, 1, 1)]:
    found = of_ours(params, sizes, 'Auto')
    case.check_traffic(found, params, sizes)
    travelled = case.counts(found)['all-to-all']
    assert travelled == 4


def test_optax_sends_in_every_product():
  """So that the counting can fail, and why this one exists."""
  found = collectives(optax.contrib.muon, EVEN, (1, 8, 1, 1))
  assert len(found) >= 9, case.counts(found)
  assert case.bytes_sent(found) > 2 * case.bytes_sent(
    of_ours(EVEN, (1, 8, 1, 1), 'Auto')
  )
  with pytest.raises((AssertionError, KeyError)):
    case.check_traffic(found, EVEN, (1, 8, 1, 1))


def test_collectives_are_read():
  """In each form that compilers write."""
  text = """
  %a.1 = f32[8,2]{1,0} all-to-all(%p), replica_groups={{0,1},{2,3}}
  %b = (f32[2]{0}, f32[2]{0}) all-to-all(%p, %q), replica_groups=[1,2]<=[2]
  %c = bf16[4,2]{1,0:T(8,128)(2,1)} all-gather(%p), replica_groups=[2,4]<=[8]
  %d = (f32[2]{0}, f32[8]{0}) all-gather-start(%p), replica_groups={{0,1,2,3}}
  %e = f32[8]{0} all-gather-done(%d)
  %f = f32[2]{0} add(%p, %all-to-all.1)
  %g = f32[9]{0} all-to-all(%p), replica_groups=mesh['x'=2,'y'=4] {'y'}
  %h = f32[9]{0} all-reduce(%p), replica_groups=mesh['x'=2,'y'=4] {'y':(1)2,'x'}
  """
  assert case.collectives(text) == [
    ('all-to-all', 64, 2),
    ('all-to-all', 16, 2),
    ('all-gather', 16, 4),
    ('all-gather', 32, 4),
    ('all-to-all', 36, 4),
    ('all-reduce', 36, 4),
  ]
