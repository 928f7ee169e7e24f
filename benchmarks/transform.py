"""What the power costs: one AdamW update with it against the same without.

Each program is one jitted update, parameters and optimizer state donated, of a
single float32 array: (power, AdamW) against AdamW, and (clip, power, AdamW)
against (clip, AdamW). Beside `sign_power` stand the two ways that one would
write the power by hand, and three other ways to the whole update: the clip as
one factor, one pass in blocks that fit the cache, and the trainer's own with
its norms. All programs work on the same buffers in turn.

Of each, the words read and written per element, counted in the compiled text,
stand beside the least that any program needs. With `--topology` they are those
of a TPU that is not there: nothing runs.

    python -m benchmarks.transform
    python -m benchmarks.transform --json benchmarks/results/transform-cpu.json
    python -m benchmarks.transform --topology v5e:2x2
    python -m benchmarks.transform --compile

The last one says how long an update of many leaves compiles.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import timing, traffic, transform_compile
from benchmarks.transform_programs import (
  FORMS,
  Arrays,
  Form,
  Program,
  compile_update,
  programs,
  shapes,
)
from train.aot import hlo
from train.aot import topology as tpu
from train.aot.estimate import estimate
from train.errors import UserError

_ACCURACY_SAMPLE = 2**20


def worst_ulp(form: Form, p: float, exact_p: float) -> float:
  """Returns a form's worst error on a log-uniform sample.

  Args:
    form: The form of the power.
    p: The power that it is given.
    exact_p: The power in the reference, computed in `np.longdouble`: p, or p
      rounded to float32 where that is what the form receives.

  Returns:
    The error in units in the last place of the exact float32 result. Input and
    result are normal numbers.
  """
  rng = np.random.default_rng(0)
  tiny, huge = -125.9 / max(1.0, p), 127.9 / max(1.0, p)
  size = 2.0 ** rng.uniform(tiny, huge, _ACCURACY_SAMPLE)
  x = (size * rng.choice([-1.0, 1.0], size.shape)).astype(np.float32)
  transform = jax.jit(lambda g, q: form(p, q).update(g, optax.EmptyState())[0])
  y = np.asarray(transform(x, jnp.float32(p)), np.longdouble)
  exact = np.abs(x.astype(np.longdouble)) ** np.longdouble(exact_p)
  exact = np.copysign(exact, x)
  unit = np.spacing(np.abs(exact).astype(np.float32)).astype(np.longdouble)
  return float(np.max(np.abs(y - exact) / unit))


def measure(elements: int, pairs: int, p: float) -> dict[str, Any]:
  """Measures every program; see the module's docstring.

  Args:
    elements: Size of the parameter array.
    pairs: How many pairs of timings per program.
    p: The power.

  Returns:
    Facts of the machine, settings, and one entry for each program: `clip`,
    `power` (the form or None), `whole` (None, or which way other than optax's
    chain), `ms` (median milliseconds of an update), `ratio` (median over pairs
    of its time to that of the same chain without the power) and
    `ratio_quartiles`, `temporaries` (bytes of temporary memory over those of
    the array), `words_read` and `words_written` per element, 4 bytes each (None
    where the text does not show them), `least_read` and `least_written` of any
    program, and `worst_ulp`. In the entry of a program without the power, what
    concerns the power is None.
  """
  facts = timing.machine_facts()
  arrays = Arrays(elements, p)
  exact_p = {'sign_power, traced p': float(np.float32(p))}
  ulp = {
    name: worst_ulp(form, p, exact_p.get(name, p))
    for name, form in FORMS.items()
  }
  entries: list[dict[str, Any]] = []
  base = base_entry = None
  base_seconds: list[float] = []
  for program in programs(p, elements):
    compiled = arrays.compile(program.update)
    entry = _entry(program, compiled, elements)
    entries.append(entry)
    if program.power is None:
      base, base_entry, base_seconds = compiled, entry, []
      continue
    taken = timing.time_pairs(
      arrays.runner(base), arrays.runner(compiled), pairs
    )
    base_seconds += taken.first
    low, middle, high = timing.quartiles(taken.ratios)
    entry |= {
      'ms': 1e3 * timing.quartiles(taken.second)[1],
      'ratio': middle,
      'ratio_quartiles': [low, high],
      'worst_ulp': ulp[program.power],
    }
    assert base_entry is not None
    base_entry['ms'] = 1e3 * timing.quartiles(base_seconds)[1]
  return {
    'benchmark': 'transform',
    'machine': facts,
    'settings': {'elements': elements, 'pairs': pairs, 'p': p},
    'programs': entries,
  }


def count_on_tpu(elements: int, p: float, name: str) -> dict[str, Any]:
  """Counts what every program moves on one chip of a TPU that is not there.

  Args:
    elements: Size of the parameter array.
    p: The power.
    name: A topology such as 'v5e:2x2'.

  Returns:
    As `measure`, with the compiler's facts under `compiler` in place of the
    machine's, and None for whatever has to be run; and of each program the
    compiler's own estimate in `cycles`, and in `cycles_ratio` what that is of
    the same chain's without the power.

  Raises:
    UserError: there is no libtpu, or no such topology.
  """
  device = tpu.devices_of(name)[0]
  arguments = shapes(elements, jax.sharding.SingleDeviceSharding(device))
  entries = []
  for program in programs(p, elements):
    compiled = compile_update(program.update, arguments)
    # On one device there is no collective.
    parsed = hlo.parse(compiled.as_text())
    cycles = estimate(parsed, [], tpu.chip_of(name)).cycles
    entry = _entry(program, compiled, elements) | {'cycles': cycles}
    if not program.power:
      alone = cycles
    entries.append(entry | {'cycles_ratio': cycles / alone})
  return {
    'benchmark': 'transform',
    'compiler': {
      'topology': name,
      'device': device.device_kind,
      **{
        package: metadata.version(package)
        for package in ('jax', 'jaxlib', 'optax', 'libtpu')
      },
    },
    'settings': {'elements': elements, 'p': p},
    'programs': entries,
  }


def _entry(program: Program, compiled: Any, elements: int) -> dict[str, Any]:
  """What is known of a program before it runs."""
  array_bytes = 4 * elements
  read = written = None
  if program.in_text:
    moved = traffic.count(compiled.as_text())
    read, written = moved.read / array_bytes, moved.written / array_bytes
  temporary = compiled.memory_analysis().temp_size_in_bytes
  return {
    'clip': program.clip,
    'power': program.power,
    'whole': program.whole,
    'ms': None,
    'ratio': None,
    'ratio_quartiles': None,
    'temporaries': temporary / array_bytes,
    'words_read': read,
    'words_written': written,
    'least_read': program.least[0],
    'least_written': program.least[1],
    'worst_ulp': None,
  }


_HEADER = ('update', 'ms', 'ratio', 'quartiles', 'temporaries', 'read',
           'written', 'least', 'worst ulp', 'cycles')  # fmt: skip
_WHOLE = {
  'one factor': 'clip as one factor',
  'blocks': 'one pass in blocks',
  'trainer': "the trainer's",
}


def format_result(result: dict[str, Any]) -> str:
  """Returns a measurement as text: the machine, then a table."""
  settings = result['settings']
  rows: list[Sequence[str]] = []
  for entry in result['programs']:
    name = 'clip, adamw' if entry['clip'] else 'adamw'
    if entry['whole']:
      name = f'  {_WHOLE[entry["whole"]]}'
    elif entry['power']:
      name = f'  with {entry["power"]}'
    low, high = entry['ratio_quartiles'] or (None, None)
    rows.append((
      name,
      _number(entry['ms'], 3),
      _number(entry['ratio'] if entry['power'] else 1, 3 if low else 0),
      f'{low:.3f}-{high:.3f}' if low else '',
      _number(entry['temporaries'], 2),
      _number(entry['words_read'], 2),
      _number(entry['words_written'], 2),
      f'{entry["least_read"]} + {entry["least_written"]}',
      _number(entry['worst_ulp'], 2),
      _number(entry.get('cycles_ratio'), 3),
    ))  # fmt: skip
  array = f'{settings["elements"]:,} float32 elements, p = {settings["p"]}'
  if 'machine' in result:
    facts = timing.format_facts(result['machine'])
    array += f', medians of {settings["pairs"]} pairs in alternating order'
    shown: tuple[int, ...] = tuple(range(9))
  else:  # Nothing ran: without the columns of what has to.
    compiler = result['compiler']
    facts = (
      f'one chip of {compiler["topology"]} ({compiler["device"]}), compiled '
      'ahead of time\n'
      + ', '.join(
        f'{name} {compiler[name]}'
        for name in ('jax', 'jaxlib', 'optax', 'libtpu')
      )
    )
    shown = 0, 4, 5, 6, 7, 9
  header = [_HEADER[i] for i in shown]
  rows = [[row[i] for i in shown] for row in rows]
  return '\n'.join((
    facts,
    array,
    '',
    timing.format_table(header, rows),
    '',
    'ratio: time to the same chain without the power. temporaries: in arrays',
    'of full size. read, written: 32-bit words per element; least: that any',
    'program reads and writes; none of a loop, which runs in the cache. worst',
    'ulp: of the power alone, on a log-uniform sample. cycles: the estimate of',
    'the compiler, to that of the same chain without the power.',
  ))  # fmt: skip


def _number(value: float | None, digits: int) -> str:
  return '' if value is None else f'{value:.{digits}f}'


def _power(text: str) -> float:
  value = float(text)
  if not 0 < value < math.inf:
    raise argparse.ArgumentTypeError(f'{text} is not a positive number')
  return value


_power.__name__ = 'float'  # argparse names it where float fails.


def main(argv: list[str] | None = None) -> None:
  """Measures, prints, and writes the result as JSON if asked to."""
  parser = timing.Parser(
    prog='python -m benchmarks.transform',
    description='Times an AdamW update with the power against one without.',
  )
  parser.add_argument(
    '--elements', type=timing.positive, help=f'default: {2**24:,}'
  )
  parser.add_argument(
    '--pairs', type=timing.positive, help='21, or 3 with --compile'
  )
  parser.add_argument('--p', type=_power, help='default: 1.2')
  parser.add_argument(
    '--topology', metavar='NAME',
    help='count for a TPU such as v5e:2x2, compiled ahead of time; no timing',
  )  # fmt: skip
  parser.add_argument(
    '--compile', action='store_true',
    help=f'time compilation instead, at p of {transform_compile.POWERS}',
  )  # fmt: skip
  parser.add_argument(
    '--leaves', type=timing.positive, help='with --compile; default: 500'
  )
  parser.add_argument('--json', metavar='FILE', help='write the result here')
  options = parser.parse_args(argv)
  if options.compile and (options.elements or options.p or options.topology):
    parser.error('--compile goes with --leaves, --pairs and --json alone')
  if options.leaves and not options.compile:
    parser.error('--leaves goes with --compile')
  elements, p = options.elements or 2**24, options.p or 1.2
  if options.json:
    timing.check_writable(parser, options.json)
  show = format_result
  try:
    if options.compile:
      result = transform_compile.measure(
        options.leaves or 500, options.pairs or 3
      )
      show = transform_compile.format_result
    elif options.topology is None:
      result = measure(elements, options.pairs or 21, p)
    else:
      result = count_on_tpu(elements, p, options.topology)
  except UserError as error:
    parser.error(str(error))
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    parser.error(f'no memory for --elements {elements}')
  print(show(result))
  if options.json:
    timing.write_json(options.json, result)
    print(f'written to {options.json}', file=sys.stderr)


if __name__ == '__main__':
  main()
