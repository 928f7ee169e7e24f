"""What the power costs: one AdamW update with it against the same without.

Each program is one jitted update, parameters and optimizer state donated, of a
single float32 array: (power, AdamW) against AdamW, and (clip, power, AdamW)
against (clip, AdamW). Beside `sign_power` stand the two ways that one would
write the power by hand. All programs work on the same buffers in turn.

    python -m benchmarks.transform
    python -m benchmarks.transform --json benchmarks/results/transform-cpu.json
"""

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import timing, traffic
from gradpower_optax import sign_power

_ACCURACY_SAMPLE = 2**20

# A form makes a transformation from the power as a Python number and, for the
# one that is given it at run time, as a scalar array.
Form = Callable[[float, jax.Array], optax.GradientTransformation]

FORMS: dict[str, Form] = {
  'sign_power': lambda p, traced_p: sign_power(p),
  'sign_power, traced p': lambda p, traced_p: sign_power(traced_p),
  'sign(g) * abs(g)**p': lambda p, traced_p: _elementwise(
    lambda g: jnp.sign(g) * jnp.abs(g) ** p
  ),
  'g * exp2((p-1) * log2|g|)': lambda p, traced_p: _elementwise(
    lambda g: g * jnp.exp2((p - 1) * jnp.log2(jnp.abs(g)))
  ),
}


def _elementwise(function):
  return optax.stateless(lambda grads, _: jax.tree.map(function, grads))


class Arrays:
  """One parameter array, AdamW's state for it and a gradient.

  The programs take turns in updating it, so that none is lucky with its memory.
  """

  def __init__(self, elements: int, p: float):
    self.params = jnp.ones(elements, jnp.float32)
    self.state = jax.tree.leaves(_chain(False, None).init(self.params))
    # At 16M elements of norm 4: clipped at 1.
    self.grads = 1e-3 * jax.random.normal(jax.random.key(0), (elements,))
    self.p = jnp.float32(p)

  def compile(self, clip: bool, form: Form | None, p: float) -> Any:
    """Compiles the update through an optional clip and form of the power."""

    def update(params, state, grads, traced_p):
      power = None if form is None else form(p, traced_p)
      chain = _chain(clip, power)
      # Every chain keeps AdamW's state alone; only the tuples around it differ.
      structure = jax.tree.structure(chain.init(params))
      state = jax.tree.unflatten(structure, state)
      updates, state = chain.update(grads, state, params)
      return optax.apply_updates(params, updates), jax.tree.leaves(state)

    arguments = (self.params, self.state, self.grads, self.p)
    return jax.jit(update, donate_argnums=(0, 1)).lower(*arguments).compile()

  def runner(self, compiled: Any) -> Callable[[], Any]:
    """Returns a call that starts one update in place."""

    def run():
      self.params, self.state = compiled(
        self.params, self.state, self.grads, self.p
      )
      return self.params, self.state

    return run


def _chain(clip: bool, power: optax.GradientTransformation | None):
  parts = [optax.clip_by_global_norm(1.0)] if clip else []
  parts += [] if power is None else [power]
  return optax.chain(*parts, optax.adamw(1e-3, b2=0.95, weight_decay=0.1))


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
    pairs: How many pairs of timings per form of the power.
    p: The power.

  Returns:
    Facts of the machine, settings, and one entry for each program: `ms` (median
    milliseconds of an update), `ratio` (median over pairs of its time to that
    of the same program without the power) and `ratio_quartiles`, `temporaries`
    (bytes of temporary memory over those of the array), `words_read` and
    `words_written` per element, 4 bytes each, and `worst_ulp`. In the entry of
    a program without the power, what concerns the power is None.
  """
  facts = timing.machine_facts()
  arrays = Arrays(elements, p)
  exact_p = {'sign_power, traced p': float(np.float32(p))}
  ulp = {
    name: worst_ulp(form, p, exact_p.get(name, p))
    for name, form in FORMS.items()
  }
  programs = []
  for clip in (False, True):
    base = arrays.compile(clip, None, p)
    base_seconds: list[float] = []
    powered = []
    for name, form in FORMS.items():
      program = arrays.compile(clip, form, p)
      taken = timing.time_pairs(
        arrays.runner(base), arrays.runner(program), pairs
      )
      base_seconds += taken.first
      low, middle, high = timing.quartiles(taken.ratios)
      powered.append(_entry(
        clip, name, taken.second, _memory(program, elements),
        ratio=middle, ratio_quartiles=[low, high], worst_ulp=ulp[name],
      ))  # fmt: skip
    programs.append(_entry(clip, None, base_seconds, _memory(base, elements)))
    programs += powered
  return {
    'benchmark': 'transform',
    'machine': facts,
    'settings': {'elements': elements, 'pairs': pairs, 'p': p},
    'programs': programs,
  }


def _entry(
  clip: bool,
  power: str | None,
  seconds: Sequence[float],
  memory: dict[str, float],
  ratio: float | None = None,
  ratio_quartiles: list[float] | None = None,
  worst_ulp: float | None = None,
) -> dict[str, Any]:
  return {
    'clip': clip,
    'power': power,
    'ms': 1e3 * timing.quartiles(seconds)[1],
    'ratio': ratio,
    'ratio_quartiles': ratio_quartiles,
    **memory,
    'worst_ulp': worst_ulp,
  }


def _memory(compiled: Any, elements: int) -> dict[str, float]:
  array_bytes = 4 * elements
  moved = traffic.count(compiled.as_text())
  temporary = compiled.memory_analysis().temp_size_in_bytes
  return {
    'temporaries': temporary / array_bytes,
    'words_read': moved.read / array_bytes,
    'words_written': moved.written / array_bytes,
  }


def format_result(result: dict[str, Any]) -> str:
  """Returns a measurement as text: the machine, then a table."""
  settings = result['settings']
  header = ('update', 'ms', 'ratio', 'quartiles', 'temporaries', 'read',
            'written', 'worst ulp')  # fmt: skip
  rows = []
  for program in result['programs']:
    base = 'clip, adamw' if program['clip'] else 'adamw'
    power = program['power']
    timed = ('1', '', '')
    if power is not None:
      low, high = program['ratio_quartiles']
      timed = (f'{program["ratio"]:.3f}', f'{low:.3f}-{high:.3f}',
               f'{program["worst_ulp"]:.2f}')  # fmt: skip
    rows.append((
      base if power is None else f'  with {power}',
      f'{program["ms"]:.3f}',
      *timed[:2],
      f'{program["temporaries"]:.2f}',
      f'{program["words_read"]:.2f}',
      f'{program["words_written"]:.2f}',
      timed[2],
    ))  # fmt: skip
  return '\n'.join((
    timing.format_facts(result['machine']),
    f'{settings["elements"]:,} float32 elements, p = {settings["p"]}, medians '
    f'of {settings["pairs"]} pairs in alternating order',
    '',
    timing.format_table(header, rows),
    '',
    'ratio: time to the same update without the power. temporaries: in arrays',
    'of full size. read, written: 32-bit words per element. worst ulp: of the',
    'power alone, on a log-uniform sample.',
  ))  # fmt: skip


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
  parser.add_argument('--elements', type=timing.positive, default=2**24)
  parser.add_argument('--pairs', type=timing.positive, default=21)
  parser.add_argument('--p', type=_power, default=1.2)
  parser.add_argument('--json', metavar='FILE', help='write the result here')
  options = parser.parse_args(argv)
  if options.json:
    timing.check_writable(parser, options.json)
  try:
    result = measure(options.elements, options.pairs, options.p)
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    parser.error(f'no memory for --elements {options.elements}')
  print(format_result(result))
  if options.json:
    timing.write_json(options.json, result)
    print(f'written to {options.json}', file=sys.stderr)


if __name__ == '__main__':
  main()
