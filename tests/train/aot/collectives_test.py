"""On programs compiled for eight fake CPU devices."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from models.sharding import make_mesh
from train.aot import collectives, hlo
from train.aot.chips import CHIPS

CHIP = CHIPS['v5p']


def mesh_of(**sizes):
  return make_mesh(jax.devices()[:8], **sizes)


def compiled(f, mesh, in_spec, out_spec, shape):
  f = jax.shard_map(
    f, mesh=mesh, in_specs=in_spec, out_specs=out_spec, check_vma=False
  )
  x = jax.ShapeDtypeStruct(
    shape, jnp.float32, sharding=NamedSharding(mesh, in_spec)
  )
  return hlo.parse(jax.jit(f).lower(x).compile().as_text())


def found(program, mesh):
  totals = collectives.totals(collectives.find(program, mesh, CHIP))
  return {
    (one['kind'], one['axis']): (one['count'], one['bytes']) for one in totals
  }


def test_kinds_axes_loops_and_bytes():
  mesh = mesh_of(data=2, fsdp=2, tensor=2)
  spec = PartitionSpec('fsdp')

  def f(x):
    def step(c, _):
      c = lax.psum(c, 'data') * 0.5
      c = lax.ppermute(c, 'tensor', [(0, 1), (1, 0)])
      g = lax.all_gather(c, 'fsdp', axis=0, tiled=True)
      c += lax.psum_scatter(jnp.sin(g), 'fsdp', tiled=True)
      return c, None

    x, _ = lax.scan(step, x, None, length=5)
    return lax.psum(jnp.sum(x), ('data', 'fsdp'))

  program = compiled(f, mesh, spec, PartitionSpec(), (32, 128))
  part = 16 * 128 * 4
  assert found(program, mesh) == {
    ('all-reduce', 'data'): (5, 5 * part),
    ('collective-permute', 'tensor'): (5, 5 * part),
    ('all-gather', 'fsdp'): (5, 5 * 2 * part),
    ('reduce-scatter', 'fsdp'): (5, 5 * 2 * part),
    ('all-reduce', 'data+fsdp'): (1, 4),
  }


def test_what_the_compiler_splits():
  mesh = mesh_of(data=2, fsdp=4)

  def place(*axes):
    return NamedSharding(mesh, PartitionSpec(*axes))

  x = jax.ShapeDtypeStruct((64, 32), jnp.float32, sharding=place('data'))
  w = jax.ShapeDtypeStruct((32, 16), jnp.float32, sharding=place('fsdp'))
  gradient = jax.jit(
    jax.grad(lambda w, x: jnp.sum(jnp.tanh(x @ w))),
    out_shardings=place('fsdp'),
  )
  program = hlo.parse(gradient.lower(w, x).compile().as_text())
  axes = {axis for _, axis in found(program, mesh)}
  assert 'data' in axes and 'fsdp' in axes


def test_an_asynchronous_pair_counts_once_and_overlaps():
  text = """HloModule f

ENTRY %main (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %start = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%p), source_target_pairs={{0,1},{1,2},{2,3},{3,4},{4,5},{5,6},{6,7},{7,0}}
  %done = f32[8]{0} collective-permute-done(%start)
  ROOT %all = f32[8]{0} all-reduce(%done), replica_groups={}
}
"""  # noqa: E501
  mesh = mesh_of(fsdp=8)
  permute, reduce = collectives.find(hlo.parse(text), mesh, CHIP)
  assert (permute.kind, permute.count, permute.bytes) == (
    'collective-permute', 1, 32,
  )  # fmt: skip
  assert permute.overlaps and not reduce.overlaps


def test_an_all_reduce_fused_with_a_slice_is_a_reduce_scatter():
  text = """HloModule f

%all-reduce-scatter.3.clone (p: f32[64]) -> f32[8] {
  %p = f32[64]{0} parameter(0)
  %sum = f32[64]{0} all-reduce(%p), channel_id=1, replica_groups={}
  %at = u32[] constant(0)
  ROOT %part = f32[8]{0} dynamic-slice(%sum, %at), dynamic_slice_sizes={8}
}

ENTRY %main (q: f32[64]) -> (f32[8], f32[8]) {
  %q = f32[64]{0} parameter(0)
  %a = f32[8]{0} fusion(%q), kind=kCustom, calls=%all-reduce-scatter.3.clone
  %b = f32[8]{0} fusion(%q), kind=kCustom, calls=%all-reduce-scatter.3.clone
  ROOT %both = (f32[8]{0}, f32[8]{0}) tuple(%a, %b)
}
"""
  mesh = mesh_of(fsdp=8)
  assert found(hlo.parse(text), mesh) == {('reduce-scatter', 'fsdp'): (2, 512)}
  assert not collectives.find(hlo.parse(text), mesh, CHIP)[0].overlaps


def test_an_asynchronous_fusion_counts_where_it_begins():
  text = """HloModule f

%fused.1 (p: f32[8]) -> (f32[8], f32[64]) {
  %p = f32[8]{0} parameter(0)
  %all-gather.1 = f32[64]{0} all-gather(%p), replica_groups={}, dimensions={0}
  ROOT %go = (f32[8]{0}, f32[64]{0}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%async_collective_fusion.7 (p.1: f32[8]) -> f32[64] {
  %p.1 = f32[8]{0} parameter(0)
  ROOT %all-gather.2 = f32[64]{0} all-gather(%p.1), replica_groups={}, dimensions={0}
}

%fused.2 (p.2: f32[8]) -> f32[64] {
  %p.2 = f32[8]{0} parameter(0)
  %all-gather.3 = f32[64]{0} all-gather(%p.2), replica_groups={}, dimensions={0}
  ROOT %end = f32[64]{0} custom-call(%all-gather.3), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (q: f32[8]) -> f32[64] {
  %q = f32[8]{0} parameter(0)
  %a = (f32[8]{0}, f32[64]{0}) fusion(%q), kind=kCustom, calls=%fused.1
  %b = f32[64]{0} fusion(%q), kind=kOutput, calls=%async_collective_fusion.7
  ROOT %c = f32[64]{0} fusion(%q), kind=kCustom, calls=%fused.2
}
"""  # noqa: E501
  [gather] = collectives.find(hlo.parse(text), mesh_of(fsdp=8), CHIP)
  assert (gather.count, gather.bytes, gather.overlaps) == (1, 256, True)


def test_what_slices_send_each_other_is_a_collective_over_data():
  text = """HloModule f

ENTRY %main (q: f32[64]) -> f32[64] {
  %q = f32[64]{0} parameter(0)
  %token = token[] after-all()
  %send = (f32[64]{0}, u32[], token[]) send(%q, %token), is_host_transfer=true, frontend_attributes={_xla_megascale_target="{1,2}x{0:7}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %to-host = (f32[64]{0}, u32[], token[]) send(%q, %token), is_host_transfer=true
  ROOT %x = f32[64]{0} copy(%q)
}
"""  # noqa: E501
  [one] = collectives.find(hlo.parse(text), mesh_of(data=2, fsdp=4), CHIP)
  assert (one.kind, one.axis, one.bytes) == ('all-reduce', 'data', 256)
  assert one.overlaps
