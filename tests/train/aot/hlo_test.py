import jax
import jax.numpy as jnp
import pytest

from train.aot import hlo

# As libtpu prints a ring of matrix products: no trip count, steps of two, the
# step carried along, copies in between.
TEXT = """HloModule jit_f, is_scheduled=true

%body (param: (u32[], bf16[8,128], u32[])) -> (u32[], bf16[8,128], u32[]) {
  %param = (u32[]{:T(128)}, bf16[8,128]{1,0:T(8,128)(2,1)S(1)}, /*index=2*/u32[]) parameter(0)
  %at = u32[]{:T(128)} get-tuple-element(%param), index=0
  %copy.1 = u32[]{:T(128)S(6)} copy(%at)
  %x = bf16[8,128]{1,0} get-tuple-element(%param), index=1
  %two = u32[] get-tuple-element(%param), index=2
  %next = u32[]{:T(128)} add(%copy.1, %two)
  %y = bf16[8,128]{1,0} fusion(%x), kind=kOutput, calls=%fused, backend_config={"window_config":{"estimated_cycles":"100"}}
  ROOT %result = (u32[], bf16[8,128], u32[]) tuple(%next, %y, %two)
}

%condition (param.1: (u32[], bf16[8,128], u32[])) -> pred[] {
  %limit = u32[]{:T(128)} constant(15)
  %param.1 = (u32[], bf16[8,128], u32[]) parameter(0)
  %at.1 = u32[] get-tuple-element(%param.1), index=0
  ROOT %less = pred[] compare(%at.1, %limit), direction=LT
}

%fused (p: bf16[8,128]) -> bf16[8,128] {
  %p = bf16[8,128]{1,0} parameter(0)
  %table = s8[2,2]{1,0} constant({
{ 1, 0 }, /*i0=0*/
{ 0, 1 }
}), metadata={op_name="}"}
  ROOT %dot.1 = bf16[8,128]{1,0} convolution(%p, %p), dim_labels=bf_io->bf, backend_config={"estimated_cycles":"77"}
}, execution_thread="sparsecore"

ENTRY %main (q: bf16[8,128]) -> bf16[8,128] {
  %q = bf16[8,128]{1,0} parameter(0)
  %zero = u32[] constant(0)
  %step = u32[] constant(2)
  %start = (u32[], bf16[8,128], u32[]) tuple(%zero, %q, %step)
  %while.1 = (u32[], bf16[8,128], u32[]) while(%start), condition=%condition, body=%body
  ROOT %out = bf16[8,128]{1,0} get-tuple-element(%while.1), index=1
}
"""  # noqa: E501


def runs_of(program, name):
  return [run for run in program.runs() if run.instruction.name == name]


def test_instructions_are_read():
  program = hlo.parse(TEXT)
  assert set(program.computations) == {'body', 'condition', 'fused', 'main'}
  body = program.computations['body']
  assert len(body) == 8
  fusion = body['y']
  assert (fusion.opcode, fusion.operands, fusion.cycles) == (
    'fusion', ['x'], 100,
  )  # fmt: skip
  assert fusion.called('calls') == 'fused'
  assert body['result'].is_root
  assert body['param'].shape.endswith('/*index=2*/u32[])')
  # A literal over several lines is one instruction.
  assert list(program.computations['fused']) == ['p', 'table', 'dot.1']


def test_a_loop_without_a_trip_count_is_counted_by_its_condition():
  program = hlo.parse(TEXT)
  [run] = runs_of(program, 'y')
  assert run.times == 8  # 0, 2, ..., 14 are below 15.
  [inside] = runs_of(program, 'dot.1')
  assert (inside.times, inside.fused, run.fused) == (8, True, False)
  assert runs_of(program, 'out')[0].times == 1


@pytest.mark.parametrize(
  ('old', 'new', 'trips'),
  [
    ('constant(15)', 'constant(16)', 8),
    ('constant(2)', 'constant(5)', 3),
    ('%zero = u32[] constant(0)', '%zero = u32[] constant(9)', 3),
    ('body=%body', 'body=%body, "known_trip_count":{"n":"3"}', 3),
    ('direction=LT', 'direction=NE', 1),
    ('%zero = u32[] constant(0)', '%zero = u32[] constant(99)', 0),
  ],
)
def test_trip_counts(old, new, trips):
  program = hlo.parse(TEXT.replace(old, new))
  assert runs_of(program, 'y')[0].times == trips


def test_what_is_no_program():
  with pytest.raises(ValueError, match='no ENTRY'):
    hlo.parse('HloModule nothing')


@pytest.mark.parametrize(
  ('shape', 'size'),
  [
    ('bf16[4,128]{1,0:T(8,128)(2,1)S(1)}', 1024),
    ('f32[]', 4),
    ('pred[3]', 3),
    ('s4[3]', 2),
    ('f8e4m3fn[2,2]', 4),
    ('(f32[2]{0}, /*index=1*/u32[]{:S(2)})', 12),
    ('token[]', 0),
    ('f32[0,5]', 0),
  ],
)
def test_bytes_of_shapes(shape, size):
  assert hlo.byte_size(shape) == size


def test_nested_loops_of_a_compiled_program():
  def inner(x, _):
    return jnp.sin(x) * 2, None

  def outer(x, _):
    x, _ = jax.lax.scan(inner, x, None, length=3)
    return x + 1, None

  def f(x):
    return jax.lax.scan(outer, x, None, length=5)[0]

  text = jax.jit(f).lower(jnp.ones((64, 64))).compile().as_text()
  sines = [
    run.times
    for run in hlo.parse(text).runs()
    if run.instruction.opcode == 'sine'
  ]
  assert sines == [15]


@pytest.mark.parametrize(
  'branches',
  ['branch_computations={%yes, %no}', 'true_computation=%yes, '
   'false_computation=%no'],
)  # fmt: skip
def test_all_branches_of_a_conditional_run(branches):
  text = f"""HloModule f

%yes (p: f32[]) -> f32[] {{
  ROOT %p = f32[] parameter(0)
}}

%no (p.1: f32[]) -> f32[] {{
  ROOT %p.1 = f32[] parameter(0)
}}

ENTRY %main (q: pred[], x: f32[]) -> f32[] {{
  %q = pred[] parameter(0)
  %x = f32[] parameter(1)
  ROOT %out = f32[] conditional(%q, %x, %x), {branches}
}}
"""
  program = hlo.parse(text)
  assert runs_of(program, 'p') and runs_of(program, 'p.1')
