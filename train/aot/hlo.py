"""A compiled program as text: its instructions, and how often each runs.

XLA prints a program as computations of one instruction a line. `parse` reads
that much of it as an estimate needs: names, shapes, operands, attributes, and
which computation calls which. Loops keep their trip count in the text, or show
it in their condition.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) .*\{$')
_END = re.compile(r'^\}(, execution_thread=.*)?$')
_NAME = re.compile(r'^\s+(ROOT )?%?([^\s=]+) = ')
_OPERAND = re.compile(r'%([\w.\-]+)')
_ARRAY = re.compile(r'\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]')
_KNOWN_TRIPS = re.compile(r'known_trip_count"?:?\s*\{"?n"?:\s*"?(\d+)')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NO_ESTIMATE = 2**63 - 1
# Values that pass through these unchanged.
_TRANSPARENT = ('copy', 'bitcast', 'convert')


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation."""

  name: str
  """Unique in the program."""
  shape: str
  """Of its result, as printed: 'bf16[4,128]{1,0}', or a tuple of such."""
  opcode: str
  """'fusion', 'all-gather', ..."""
  arguments: str
  """What stands in its parentheses: operands, a literal, a number."""
  attributes: str
  """The rest of the line."""
  is_root: bool
  """Whether its value is the computation's."""

  @property
  def operands(self) -> list[str]:
    """Names of the instructions that it takes."""
    return _OPERAND.findall(self.arguments)

  @property
  def cycles(self) -> int:
    """The compiler's estimate, 0 where it made none."""
    found = _CYCLES.search(self.attributes)
    return 0 if found is None or self.is_unknown else int(found[1])

  @property
  def is_unknown(self) -> bool:
    """Whether the compiler says that it cannot estimate it."""
    found = _CYCLES.search(self.attributes)
    return found is not None and int(found[1]) == _NO_ESTIMATE

  def called(self, attribute: str) -> str:
    """Name of the computation in an attribute such as 'body'; '' if none."""
    found = re.search(rf'\b{attribute}=%?([\w.\-]+)', self.attributes)
    return found[1] if found else ''


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Run:
  """An instruction, and how often the program runs it."""

  instruction: Instruction
  computation: Computation
  """Where it stands: its operands are there as well."""
  where: str
  """The name of that computation."""
  times: int
  """The product of the trip counts of the loops around it."""
  fused: bool
  """Whether it is part of a fusion, which has one estimate as a whole."""
  is_async: bool
  """Whether it runs beside what stands where it is started."""


@dataclasses.dataclass(frozen=True)
class Program:
  """All computations of a compiled program."""

  computations: dict[str, Computation]
  entry: str
  """Name of the computation that runs first."""

  def runs(self) -> Iterator[Run]:
    """Every instruction that runs, those of all branches of a conditional."""
    yield from self._runs(self.entry, 1, False, False)

  def _runs(
    self, name: str, times: int, fused: bool, is_async: bool
  ) -> Iterator[Run]:
    computation = self.computations.get(name, {})
    for instruction in computation.values():
      yield Run(instruction, computation, name, times, fused, is_async)
      for callee, trips in self._callees(instruction, computation):
        yield from self._runs(
          callee,
          times * trips,
          fused or instruction.opcode == 'fusion',
          is_async or instruction.opcode in ('async-start', 'call-start'),
        )

  def _callees(
    self, instruction: Instruction, computation: Computation
  ) -> list[tuple[str, int]]:
    """Computations that it runs, without the scalar ones of reductions."""
    match instruction.opcode:
      case 'while':
        trips = self.trip_count(instruction, computation)
        return [(instruction.called('body'), trips)]
      case 'fusion' | 'async-start':
        return [(instruction.called('calls'), 1)]
      case 'call' | 'call-start':
        return [(instruction.called('to_apply'), 1)]
      case 'conditional':
        branches = re.search(
          r'branch_computations=\{([^}]*)\}', instruction.attributes
        )
        names = (
          _OPERAND.findall(branches[1])
          if branches
          else map(
            instruction.called, ('true_computation', 'false_computation')
          )
        )
        return [(name, 1) for name in names]
    return []

  def trip_count(self, loop: Instruction, computation: Computation) -> int:
    """How often a `while` runs its body; 1 where the text does not tell."""
    known = _KNOWN_TRIPS.search(loop.attributes)
    if known:
      return int(known[1])
    body = self.computations.get(loop.called('body'), {})
    condition = self.computations.get(loop.called('condition'), {})
    test = _root(condition)
    if test is None or test.opcode != 'compare':
      return 1
    if 'direction=LT' not in test.attributes:
      return 1
    counter, limit = (_resolve(condition, name) for name in test.operands)
    index = _element(counter)
    last = _constant(limit)
    start = _resolve(computation, loop.operands[0])
    if index is None or last is None or start is None:
      return 1
    first = _constant(_resolve(computation, start.operands[index]))
    step = _step(body, index, start, computation)
    if first is None or step is None or step < 1:
      return 1
    return max(0, math.ceil((last - first) / step))


def _step(body, index, start, computation) -> int | None:
  """What a loop adds to the element of its tuple that counts."""
  result = _root(body)
  if result is None or result.opcode != 'tuple':
    return None
  add = _resolve(body, result.operands[index])
  if add is None or add.opcode != 'add':
    return None
  operands = [_resolve(body, name) for name in add.operands]
  if index not in map(_element, operands):
    return None
  other = operands[_element(operands[0]) == index]
  carried = _element(other)
  if carried is not None:  # A constant that the loop carries along.
    return _constant(_resolve(computation, start.operands[carried]))
  return _constant(other)


def _root(computation: Computation) -> Instruction | None:
  return next((i for i in computation.values() if i.is_root), None)


def _resolve(computation: Computation, name: str) -> Instruction | None:
  """The instruction that makes a value, behind copies of it."""
  instruction = computation.get(name)
  while instruction is not None and instruction.opcode in _TRANSPARENT:
    instruction = computation.get(instruction.operands[0])
  return instruction


def _element(instruction: Instruction | None) -> int | None:
  """The index of a `get-tuple-element`."""
  if instruction is None or instruction.opcode != 'get-tuple-element':
    return None
  found = re.search(r'\bindex=(\d+)', instruction.attributes)
  return int(found[1]) if found else None


def _constant(instruction: Instruction | None) -> int | None:
  if instruction is None or instruction.opcode != 'constant':
    return None
  try:
    return int(instruction.arguments)
  except ValueError:
    return None


def parse(text: str) -> Program:
  """Reads `jax.stages.Compiled.as_text()`.

  Raises:
    ValueError: there is no entry computation.
  """
  computations: dict[str, Computation] = {}
  entry = ''
  current: list[str] | None = None
  for line in text.splitlines():
    if current is None:
      found = _COMPUTATION.match(line)
      if found:
        current, name = [], found[2]
        entry = name if found[1] else entry
    elif _END.match(line):
      computations[name] = {i.name: i for i in map(_instruction, current)}
      current = None
    elif _NAME.match(line):
      current.append(line)
    elif current:  # A literal of more than one line.
      current[-1] += line
  if not entry:
    raise ValueError('not the text of a compiled program: no ENTRY')
  return Program(computations, entry)


def _instruction(line: str) -> Instruction:
  found = _NAME.match(line)
  assert found
  at = found.end()
  end = _closing(line, at) + 1 if line[at] == '(' else line.index(' ', at)
  open_ = line.index('(', end)
  close = _closing(line, open_)
  return Instruction(
    name=found[2],
    shape=line[at:end],
    opcode=line[end:open_].strip(),
    arguments=line[open_ + 1 : close],
    attributes=line[close + 1 :],
    is_root=bool(found[1]),
  )


def _closing(line: str, at: int) -> int:
  """Index of the parenthesis that closes the one at an index."""
  depth = 0
  for found in re.compile(r'[()]').finditer(line, at):
    depth += 1 if found[0] == '(' else -1
    if not depth:
      return found.start()
  raise ValueError(f'parentheses do not match: {line[:80]}')


def byte_size(shape: str) -> int:
  """Bytes of an array, or of all arrays of a tuple, without padding."""
  return sum(
    math.ceil(
      _bits(kind) * math.prod(map(int, filter(None, dims.split(',')))) / 8
    )
    for kind, dims in _ARRAY.findall(shape)
  )


@functools.cache
def _bits(kind: str) -> int:
  if kind == 'pred':
    return 8
  found = re.match(r'[a-z]+(\d+)', kind)  # bf16, f8e4m3fn, s4, ...
  return int(found[1]) if found else 0
