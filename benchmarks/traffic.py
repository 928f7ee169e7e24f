"""Memory traffic of a compiled program, read off its optimized HLO text.

On every backend the instructions of the entry computation run one by one, and
what passes between two of them goes through memory: an instruction, be it one
operation or a fusion of many, reads each operand once and writes each output
once. An elementwise program lives by that number. Arrays that a TPU keeps on
the chip count nothing. What the text does not show: caches, and which operand
of a choice is needed. A fusion that selects between two arrays by a scalar
predicate, as clipping does, counts as reading both, though LLVM may turn it
into a branch that reads one.
"""

import dataclasses
import math
import re

# Bookkeeping: no data moves.
_FREE = frozenset((
  'after-all', 'bitcast', 'constant', 'get-tuple-element', 'parameter', 'tuple',
))  # fmt: skip

# A type such as f32[8,128]{1,0:T(8,128)S(1)}: the layout ends in the memory
# space, absent for main memory; 5 is the host's.
_ARRAY = re.compile(r'\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?')
_ON_CHIP = re.compile(r'S\((?!5\))\d+\)')
# Of a scalar predicate, or of an index.
_BRANCHES = re.compile(
  r'(?:true|false)_computation=%[\w.\-]+|branch_computations=\{[^}]*\}'
)
_NAME = re.compile(r'%([\w.\-]+)')


@dataclasses.dataclass(frozen=True)
class Traffic:
  """Bytes that the instructions of a program read and write."""

  read: int
  written: int


@dataclasses.dataclass(frozen=True)
class _Instruction:
  name: str
  bytes: int
  opcode: str
  operands: tuple[str, ...]
  attributes: str


def count(hlo_text: str) -> Traffic:
  """Counts the bytes read and written by a compiled program.

  Args:
    hlo_text: What `compiled.as_text()` returns.

  Returns:
    The bytes of all operands and of all outputs of the entry computation's
    instructions; a call counts as the instructions of what it calls, a branch
    as those of the one that moves most.
  """
  computations, entry = _parse(hlo_text)
  return _count(computations, entry)


def _count(computations, name) -> Traffic:
  read = written = 0
  sizes: dict[str, int] = {}
  for line in computations[name]:
    instruction = _parse_instruction(line)
    sizes[instruction.name] = instruction.bytes
    opcode = instruction.opcode
    if opcode in _FREE:
      continue
    if opcode == 'call':  # A GPU's command buffer is one.
      called = re.search(r'to_apply=%([\w.\-]+)', instruction.attributes)
      assert called, instruction
      inner = _count(computations, called.group(1))
      read, written = read + inner.read, written + inner.written
      continue
    if opcode == 'conditional':
      names = re.findall(
        r'%([\w.\-]+)',
        ' '.join(_BRANCHES.findall(instruction.attributes)),
      )
      assert names, instruction
      branches = [_count(computations, name) for name in names]
      inner = max(branches, key=lambda moved: moved.read + moved.written)
      read, written = read + inner.read, written + inner.written
      continue
    # An asynchronous copy reads at its start and has written when done.
    if not opcode.endswith('-done'):
      read += sum(sizes[operand] for operand in instruction.operands)
    if not opcode.endswith('-start'):
      written += instruction.bytes
  return Traffic(read, written)


def _parse(hlo_text: str):
  """Returns the lines of every computation, and the entry's name."""
  computations: dict[str, list[str]] = {}
  entry = current = None
  for line in hlo_text.splitlines():
    header = re.match(r'(ENTRY )?%([\w.\-]+) \(.*\{$', line)
    if header:
      current = header.group(2)
      computations[current] = []
      if header.group(1):
        entry = current
    elif line.startswith('}'):
      current = None
    elif current is not None:
      computations[current].append(line)
  if entry is None:
    raise ValueError('this is not the text of a compiled program')
  return computations, entry


def _parse_instruction(line: str) -> _Instruction:
  """Parses `%name = type opcode(operands), attributes`."""
  name, _, rest = line.strip().removeprefix('ROOT ').partition(' = ')
  end = _closing(rest, 0) + 1 if rest.startswith('(') else rest.index(' ')
  opcode, _, _ = rest[end:].partition('(')
  start = end + len(opcode)
  stop = _closing(rest, start)
  return _Instruction(
    name=name.removeprefix('%'),
    bytes=sum(map(_bytes, _ARRAY.findall(rest[:end]))),
    opcode=opcode.strip(),
    operands=tuple(_NAME.findall(rest[start:stop])),
    attributes=rest[stop:],
  )


def _closing(text: str, start: int) -> int:
  """Returns where the parenthesis that opens at start closes."""
  depth = 0
  for i in range(start, len(text)):
    depth += {'(': 1, ')': -1}.get(text[i], 0)
    if depth == 0:
      return i
  raise ValueError(f'unbalanced parentheses: {text}')


def _bytes(array: tuple[str, str, str]) -> int:
  """Bytes in memory of a type such as ('f32', '8,128', '{1,0}')."""
  dtype, shape, layout = array
  if dtype == 'token' or _ON_CHIP.search(layout):
    return 0
  digits = re.search(r'\d+', dtype)
  bits = int(digits.group()) if digits else 8  # pred takes a byte.
  elements = math.prod(map(int, filter(None, shape.split(','))))
  return -(-elements * bits // 8)
