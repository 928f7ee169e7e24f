import jax
import jax.numpy as jnp
import optax
import pytest

from benchmarks import traffic

# Lines as XLA prints them: layouts with tiles, a comment inside a tuple, a
# fusion of two outputs, a parenthesis in a string, an asynchronous copy to a
# TPU's on-chip memory and a command buffer.
_HLO = """\
HloModule jit_update, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

FileNames
1 "a (file"

%fused (param_0: f32[8], param_1: f32[]) -> (f32[8], bf16[8]) {
  %param_0 = f32[8]{0} parameter(0)
  %param_1 = f32[] parameter(1)
  %negate = f32[8]{0} negate(%param_0), metadata={op_name=":("}
  %convert = bf16[8]{0} convert(%negate)
  ROOT %both = (f32[8]{0}, bf16[8]{0}) tuple(%negate, %convert)
}

%command_buffer (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  %first.1 = f32[8]{0} negate(%p)
  ROOT %second.1 = f32[8]{0} add(%first.1, %p)
}

ENTRY %main.7 (x.1: f32[8], s: f32[]) -> f32[8] {
  %x.1 = f32[8]{0:T(1024)} parameter(0), metadata={op_name="x"}
  %s = f32[] parameter(1)
  %pair = (f32[8]{0:T(1024)}, /*index=1*/bf16[8]{0}) fusion(%x.1, %s), kind=kLoop, calls=%fused
  %part = f32[8]{0} get-tuple-element(%pair), index=0
  %start = (f32[8]{0:T(1024)S(1)}, f32[8]{0}, u32[]{:S(2)}) copy-start(%part)
  %called = f32[8]{0} call(%part), to_apply=%command_buffer
  %done = f32[8]{0:T(1024)S(1)} copy-done(%start)
  ROOT %out = f32[8]{0} add(%done, %called)
}
"""  # noqa: E501


def test_counts_a_known_text():
  moved = traffic.count(_HLO)
  # The fusion 32 + 4, the copy 32, in the call 32 and 64, the sum 32.
  assert moved.read == 36 + 32 + 96 + 32
  # The fusion 32 + 16, in the call 32 twice, the sum 32.
  assert moved.written == 48 + 64 + 32


@pytest.mark.parametrize('array, size', [
  (('f32', '', ''), 4),
  (('f32', '2,3', '{1,0:T(8,128)}'), 24),
  (('f32', '2,3', '{1,0:T(8,128)S(1)}'), 0),
  (('f32', '2,3', '{1,0:S(5)}'), 24),
  (('f32', '0', '{0}'), 0),
  (('bf16', '5', '{0}'), 10),
  (('f8e4m3fn', '5', '{0}'), 5),
  (('s4', '5', '{0:E(4)}'), 3),
  (('pred', '5', '{0}'), 5),
  (('token', '', ''), 0),
])  # fmt: skip
def test_sizes_of_types(array, size):
  assert traffic._bytes(array) == size


def test_text_without_an_entry_is_refused():
  with pytest.raises(ValueError, match='compiled program'):
    traffic.count('HloModule nothing')


def _words(function, *arguments, **options):
  compiled = jax.jit(function, **options).lower(*arguments).compile()
  moved = traffic.count(compiled.as_text())
  bytes_ = arguments[0].nbytes
  return round(moved.read / bytes_, 2), round(moved.written / bytes_, 2)


def test_counts_elementwise_programs():
  x = jnp.ones(4096)
  assert _words(lambda a: 2 * a + 1, x) == (1, 1)
  assert _words(lambda a, b: a * b + a, x, x) == (2, 1)
  # The sum must be known before it can be divided by: two passes.
  assert _words(lambda a: a / a.sum(), x) == (2, 1)


def test_a_branch_counts_as_the_one_that_moves_most():
  def branch(a, b):
    return jax.lax.cond(a[0] > 0, lambda a, b: a / b.sum(), jnp.add, a, b)

  x = jnp.ones(4096)
  read, written = _words(branch, x, x)
  # The one reads both and then a again or both in one: not the sum of the two.
  assert 2 <= read < 3.1
  assert 1 <= written < 1.1


def test_adamw_reads_seven_words_and_writes_three():
  """Or, where one fusion writes all three, four and three."""
  tx = optax.adamw(1e-3)
  x = jnp.ones(4096)

  def update(params, state, grads):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  words = _words(update, x, tx.init(x), x, donate_argnums=(0, 1))
  assert words in ((7, 3), (4, 3))
