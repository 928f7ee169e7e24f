import pytest

from train.aot import estimate as estimate_lib
from train.aot import hlo
from train.aot.chips import CHIPS
from train.aot.collectives import Collective

CHIP = CHIPS['v5p']

# Attention of 2 sequences, 4 heads of 128 and 1024 tokens; 512 rows for 8
# experts of 256 x 384. The names are the compiler's.
TEXT = """HloModule f

%product (p: bf16[8,8]) -> bf16[8,8] {
  %p = bf16[8,8]{1,0} parameter(0)
  ROOT %dot.1 = bf16[8,8]{1,0} convolution(%p, %p), dim_labels=bf_io->bf
}

%sum (p.1: bf16[8,8]) -> bf16[8,8] {
  %p.1 = bf16[8,8]{1,0} parameter(0)
  ROOT %add.1 = bf16[8,8]{1,0} add(%p.1, %p.1), backend_config={"estimated_cycles":"5000"}
}

ENTRY %main (a: bf16[8,8]) -> bf16[8,8] {
  %a = bf16[8,8]{1,0} parameter(0)
  %mask = s32[8,2]{1,0} constant(0)
  %q = bf16[2,4,1024,128]{3,2,1,0} broadcast(%a)
  %rows = bf16[512,256]{1,0} broadcast(%a)
  %outs = bf16[512,384]{1,0} broadcast(%a)
  %experts = bf16[8,256,384]{2,1,0} broadcast(%a)
  %splash_mha_fwd_residuals.2 = (f32[2,512,128]{2,1,0}, bf16[2,4,1024,128]{3,2,1,0}) custom-call(%mask, %q, %q), custom_call_target="tpu_custom_call"
  %splash_mha_dq_no_residuals.1 = bf16[2,4,1024,128]{3,2,1,0} custom-call(%mask, %q), custom_call_target="tpu_custom_call"
  %splash_mha_dkv_no_residuals = bf16[2,4,1024,128]{3,2,1,0} custom-call(%mask, %q), custom_call_target="tpu_custom_call"
  %ragged-dot-none.3 = bf16[512,384]{1,0} custom-call(%rows, %experts), custom_call_target="tpu_custom_call"
  %tgmm.1 = bf16[8,256,384]{2,1,0} custom-call(%rows, %outs), custom_call_target="tpu_custom_call"
  %mystery.12 = bf16[8]{0} custom-call(%a), custom_call_target="tpu_custom_call"
  %other = bf16[8]{0} custom-call(%a), custom_call_target="AllocateBuffer"
  %fusion.1 = bf16[8,8]{1,0} fusion(%a), kind=kOutput, calls=%product, backend_config={"estimated_cycles":"7000"}
  ROOT %fusion.2 = bf16[8,8]{1,0} fusion(%fusion.1), kind=kLoop, calls=%sum, backend_config={"estimated_cycles":"1750"}
}
"""  # noqa: E501


def collective(seconds, overlaps):
  return Collective('all-gather', 'fsdp', 1, 1, seconds, overlaps)


def test_kernels_are_found_and_counted():
  kernels = estimate_lib.find_kernels(hlo.parse(TEXT))
  product = 2 * 4 * 1024**2 * 128  # Of the causal half of the scores.
  grouped = 2 * 512 * 256 * 384
  assert {k.name: (k.count, k.flops) for k in kernels} == {
    'splash_mha_fwd': (1, 2 * product),
    'splash_mha_dq': (1, 3 * product),
    'splash_mha_dkv': (1, 4 * product),
    'ragged-dot-none': (1, grouped),
    'tgmm': (1, grouped),
    'mystery': (1, 0),
  }


def test_a_batch_of_one_may_have_no_axis():
  text = TEXT.replace('[2,4,1024,128]{3,2,1,0}', '[4,1024,128]{2,1,0}')
  [forward] = [
    kernel.flops
    for kernel in estimate_lib.find_kernels(hlo.parse(text))
    if kernel.name == 'splash_mha_fwd'
  ]
  assert forward == 2 * 4 * 1024**2 * 128


def test_time_of_products_kernels_and_the_rest():
  program = hlo.parse(TEXT)
  got = estimate_lib.estimate(program, [], CHIP)
  flops = sum(kernel.flops for kernel in got.kernels)
  assert got.cycles == 8750  # What is in a fusion is not counted again.
  assert got.compute == pytest.approx(
    7000 / CHIP.clock
    + flops / (estimate_lib.KERNEL_EFFICIENCY * CHIP.peak_flops)
  )
  assert got.memory == pytest.approx(1750 / CHIP.clock)
  assert got.seconds == pytest.approx(got.compute + got.memory)
  assert got.bound == 'compute'


@pytest.mark.parametrize(
  ('beside', 'blocking', 'seconds', 'bound'),
  [
    (2.0, 0.5, 3.5, 'compute'),
    (4.0, 0.5, 4.5, 'network'),
    (0.0, 2.5, 5.5, 'network'),
    (2.0, 0.0, 3.0, 'compute'),
  ],
)
def test_collectives_hide_behind_computation_or_do_not(
  beside, blocking, seconds, bound
):
  got = estimate_lib.Estimate(0, [], 0, 2.0, 1.0, blocking, beside)
  assert got.seconds == pytest.approx(seconds)
  assert got.bound == bound


def test_collectives_are_summed_by_whether_they_overlap():
  found = [collective(1, True), collective(2, True), collective(4, False)]
  got = estimate_lib.estimate(hlo.parse(TEXT), found, CHIP)
  assert (got.overlapping, got.blocking) == (3, 4)


@pytest.mark.parametrize('chip', CHIPS.values(), ids=list(CHIPS))
def test_the_chip_table_is_sane(chip):
  # Matrix units do a power of two operations a cycle, at 1 to 2.5 GHz.
  assert chip.flops_per_cycle & (chip.flops_per_cycle - 1) == 0
  assert 1e9 < chip.clock < 2.5e9
  assert 16e9 <= chip.hbm_bytes <= 2e11
  # The network is slower than memory, and the data centre's than that.
  assert chip.hbm_bandwidth > 10 * chip.link_bandwidth
  assert chip.link_bandwidth > 4 * chip.dcn_bandwidth


def test_published_clocks():
  clocks = {name: round(chip.clock / 1e9, 2) for name, chip in CHIPS.items()}
  assert (clocks['v4'], clocks['v5p']) == (1.05, 1.75)


@pytest.mark.parametrize(
  ('chip', 'shape', 'rings'),
  [
    ('v5p', (4, 4, 8), [True] * 3),
    ('v5p', (4, 4, 2), [False] * 3),
    ('v5e', (8, 16), [False, True]),
    ('v6e', (16, 16), [True, True]),
    ('v5e', (4, 4), [False, False]),
  ],
)
def test_rings_of_a_slice(chip, shape, rings):
  assert CHIPS[chip].rings(shape) == rings


def test_what_the_compiler_cannot_estimate_is_left_out_and_counted():
  largest = str(2**63 - 1)
  text = TEXT.replace(
    '"estimated_cycles":"7000"', f'"estimated_cycles":"{largest}"'
  )
  got = estimate_lib.estimate(hlo.parse(text), [], CHIP)
  assert got.cycles == 1750
  assert got.unknown == 1
  assert estimate_lib.estimate(hlo.parse(TEXT), [], CHIP).unknown == 0
