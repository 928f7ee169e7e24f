"""How long a compiled step would take: a model of the machine, no measurement.

What the step's one core does one after the other adds up: matrix products and
kernels ('compute'), and all other operations, which move bytes ('memory'). Its
time is the compiler's own estimate of cycles, except for kernels, whose FLOPs
are counted here. Collectives between a start and an end run beside that, the
others stop it:

  seconds = max(compute + memory, overlapping network) + blocking network
"""

import dataclasses
import math
import re

from train.aot import hlo
from train.aot.chips import Chip
from train.aot.collectives import Collective

KERNEL_EFFICIENCY = 0.5
"""Of the chip's peak, assumed of kernels: the compiler does not estimate them.
An assumption, not a measurement."""

_PRODUCTS = ('convolution', 'dot', 'ragged-dot')

# Matrix products of an attention kernel over the scores: the forward pass has
# two, the backward pass computes the scores again in both of its kernels.
_ATTENTION = {
  'splash_mha_fwd': 2, 'splash_mha_dq': 3, 'splash_mha_dkv': 4,
}  # fmt: skip
# Products of rows with the matrix of their group, and of rows with rows.
_GROUPED = ('ragged-dot-none', 'tgmm')
_ARRAY = re.compile(r'(?:bf16|f32|f16)\[([\d,]+)\]')


@dataclasses.dataclass(frozen=True)
class Kernel:
  """All runs of the kernels of a kind."""

  name: str
  """'splash_mha_fwd', ...; an unknown one's own."""
  count: int
  """How often a step runs it."""
  flops: int
  """Of all its runs, on one device; 0 where the kernel is not known."""


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A predicted step."""

  cycles: int
  """Of all operations that the compiler made an estimate of."""
  kernels: list[Kernel]
  """Those it could not."""
  unknown: int
  """How often the step runs others that it could not: left out."""
  compute: float
  """Seconds of matrix products and kernels."""
  memory: float
  """Seconds of everything else on the core."""
  blocking: float
  """Seconds of collectives that the step waits for."""
  overlapping: float
  """Seconds of those that it computes beside."""

  @property
  def seconds(self) -> float:
    """The whole step."""
    return max(self.compute + self.memory, self.overlapping) + self.blocking

  @property
  def bound(self) -> str:
    """The largest part: 'compute', 'memory' or 'network'."""
    hidden = self.overlapping <= self.compute + self.memory
    network = self.blocking + (0 if hidden else self.overlapping)
    parts = {
      'compute': self.compute, 'memory': self.memory, 'network': network,
    }  # fmt: skip
    return max(parts, key=lambda name: parts[name])


def estimate(
  program: hlo.Program, collectives: list[Collective], chip: Chip
) -> Estimate:
  """Adds up what a program's instructions take.

  Args:
    program: A train step.
    collectives: Its own, from `train.aot.collectives`.
    chip: That it was compiled for.
  """
  products = others = unknown = 0
  for run in program.runs():
    if run.fused or run.is_async:
      continue
    unknown += run.times * run.instruction.is_unknown
    cycles = run.times * run.instruction.cycles
    if has_product(program, run.instruction):
      products += cycles
    else:
      others += cycles
  kernels = find_kernels(program)
  kernel_flops = sum(kernel.flops for kernel in kernels)
  return Estimate(
    cycles=products + others,
    kernels=kernels,
    unknown=unknown,
    compute=products / chip.clock
    + kernel_flops / (KERNEL_EFFICIENCY * chip.peak_flops),
    memory=others / chip.clock,
    blocking=sum(one.seconds for one in collectives if not one.overlaps),
    overlapping=sum(one.seconds for one in collectives if one.overlaps),
  )


def has_product(program: hlo.Program, instruction: hlo.Instruction) -> bool:
  """Whether it is a matrix product, or a fusion with one."""
  if instruction.opcode in _PRODUCTS:
    return True
  if instruction.opcode != 'fusion':
    return False
  inside = program.computations.get(instruction.called('calls'), {})
  return any(has_product(program, one) for one in inside.values())


def find_kernels(program: hlo.Program) -> list[Kernel]:
  """Lists Pallas kernels, by name.

  Causal attention is counted at half of its scores, which is what the kernel
  computes but for blocks on the diagonal: a product over B sequences, H heads
  of width D and T tokens has B H T^2 D operations. A grouped product of M rows
  and matrices of K x N has 2 M K N; rows that stay empty are counted as well.
  """
  found: dict[str, list[int]] = {}
  for run in program.runs():
    instruction = run.instruction
    if 'custom_call_target="tpu_custom_call"' not in instruction.attributes:
      continue
    name, flops = _kernel(instruction, run.computation)
    sums = found.setdefault(name, [0, 0])
    sums[0] += run.times
    sums[1] += run.times * flops
  return [Kernel(name, *sums) for name, sums in sorted(found.items())]


def _kernel(
  instruction: hlo.Instruction, computation: hlo.Computation
) -> tuple[str, int]:
  """A kernel's name, and its FLOPs from the shapes that it takes and makes."""
  shapes = [computation[name].shape for name in instruction.operands]
  arrays = [
    [int(n) for n in dims.split(',')]
    for shape in (*shapes, instruction.shape)
    for dims in _ARRAY.findall(shape)
  ]
  for name, products in _ATTENTION.items():
    if name in instruction.name:
      # Queries come first; a batch of one may have lost its axis.
      queries = next((array for array in arrays if len(array) >= 3), [0, 0, 0])
      *batch_and_heads, length, width = queries
      return name, products * math.prod(batch_and_heads) * length**2 * width
  for name in _GROUPED:
    if name in instruction.name:
      groups = next((array for array in arrays if len(array) == 3), [0, 1, 0])
      _, inner, outer = groups
      rows = next(
        (
          math.prod(array) // inner
          for array in arrays
          if len(array) == 2 and inner in array
        ),
        0,
      )
      return name, 2 * rows * inner * outer
  return instruction.name.rstrip('.0123456789'), 0
