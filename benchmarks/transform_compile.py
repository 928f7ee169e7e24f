"""How long an update of many leaves compiles, for `benchmarks.transform`."""

import resource
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks import timing
from gradpower_optax import power, sign_power

POWERS = (1.1, 1.2)
_SHAPE = (64, 64)


def _programs() -> dict[str, optax.GradientTransformation]:
  """Chains by name; before each `sign_power` the formula of its p."""
  adamw = optax.adamw(1e-3, weight_decay=0.1)
  found = {'adamw': adamw}
  for p in POWERS:
    formula = optax.stateless(
      lambda grads, _, p=p: jax.tree.map(lambda g: power.reference(g, p), grads)
    )
    for name, form in (('formula', formula), ('sign_power', sign_power(p))):
      found[f'{name}, p = {p}'] = optax.chain(form, adamw)
  return found


def measure(leaves: int, rounds: int) -> dict[str, Any]:
  """Compiles each chain in turn, every other round in the opposite order.

  Args:
    leaves: How many float32 leaves of shape [64, 64] the parameters have.
    rounds: How many times each is compiled, after a warm-up with one leaf.

  Returns:
    Facts of the machine, settings, and one entry for each program: `name`,
    `seconds` (median processor time of all threads, from tracing to the
    compiled program: neighbours hardly change it), `ratio` (median over rounds
    of its time to the formula's of the same p, None where there is none) and
    `text_bytes` of the lowered program.
  """
  chains = _programs()
  taken: dict[str, list[float]] = {name: [] for name in chains}
  size = {}
  for number in range(rounds):
    for name in chains if number % 2 == 0 else reversed(chains):
      _compile(chains[name], 1)
      seconds, size[name] = _compile(chains[name], leaves)
      taken[name].append(seconds)
  entries = []
  for name in chains:
    ratio = None
    if name.startswith('sign_power'):
      formula = taken[name.replace('sign_power', 'formula')]
      pairs = zip(taken[name], formula, strict=True)
      ratio = timing.quartiles([ours / theirs for ours, theirs in pairs])[1]
    entries.append({
      'name': name,
      'seconds': timing.quartiles(taken[name])[1],
      'ratio': ratio,
      'text_bytes': size[name],
    })  # fmt: skip
  return {
    'benchmark': 'transform_compile',
    'machine': timing.machine_facts(),
    'settings': {'leaves': leaves, 'shape': [*_SHAPE], 'rounds': rounds},
    'programs': entries,
  }


def _compile(
  chain: optax.GradientTransformation, leaves: int
) -> tuple[float, int]:
  """Processor seconds, and the bytes of the program's text."""

  def update(params, state, grads):
    updates, state = chain.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  params = [jax.ShapeDtypeStruct(_SHAPE, jnp.float32)] * leaves
  state = jax.eval_shape(chain.init, params)
  jax.clear_caches()
  start = _processor_seconds()
  lowered = jax.jit(update, donate_argnums=(0, 1)).lower(params, state, params)
  lowered.compile()
  return _processor_seconds() - start, len(lowered.as_text())


def _processor_seconds() -> float:
  usage = resource.getrusage(resource.RUSAGE_SELF)
  return usage.ru_utime + usage.ru_stime


def format_result(result: dict[str, Any]) -> str:
  """Returns a measurement as text: the machine, then a table."""
  settings = result['settings']
  rows = [
    (
      entry['name'],
      f'{entry["seconds"]:.2f}',
      '' if entry['ratio'] is None else f'{entry["ratio"]:.2f}',
      f'{entry["text_bytes"] / 1e3:.0f}',
    )
    for entry in result['programs']
  ]
  header = ('update', 'seconds', 'ratio', 'text kB')
  return '\n'.join((
    timing.format_facts(result['machine']),
    f'{settings["leaves"]} float32 leaves of shape {settings["shape"]}, medians'
    f' of {settings["rounds"]} compilations in alternating order',
    '',
    timing.format_table(header, rows),
    '',
    'seconds: of processor time. ratio: to the time of the formula with the',
    'same p; AdamW follows both.',
  ))  # fmt: skip
