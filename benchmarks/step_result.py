"""What the timings of `benchmarks.step` say: as a dictionary and as text."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import shapes, timing
from benchmarks.own_step import POWER
from models import accounting
from models.config import DecoderConfig, Qwen2MoeConfig
from train import hardware

LIMIT = 'limit'
PLAIN = 'step, power 1'
POWERED = f'step, power {POWER}'
LOOP = f'loop, power {POWER}'
"""What peers are compared with."""


def result(
  facts: dict[str, Any],
  config: DecoderConfig,
  settings: dict[str, Any],
  seconds: Mapping[str, Sequence[float]],
  *,
  host: Sequence[Mapping[str, float]],
  idle_dispatch: float,
  first_call_seconds: float,
  loss: float,
  peers: Mapping[str, dict[str, Any]],
  failed: Mapping[str, str],
) -> dict[str, Any]:
  """Works out rates, ratios and shares.

  Args:
    facts: Of the machine.
    config: The model.
    settings: 'batch', 'length', 'steps' of a block, 'rounds', 'side' of the
      product, 'devices'.
    seconds: A step by program, or a product; of equal index, the same round.
    host: Of each block of the loop, seconds of the host a step by kind.
    idle_dispatch: Seconds of a call with the devices at rest.
    first_call_seconds: Of our step, compilation in it.
    loss: Ours at the end.
    peers: Facts of those that ran.
    failed: Why others did not.

  Returns:
    Facts and settings; and

    - `limit`: the product's median `flops_per_second`;
    - `programs`: of each `ms` and `ms_quartiles` of a step,
      `tokens_per_second`, `of_limit` (its operations a second over the
      product's), `mfu` or None, and of a peer `ours_is`, our loop's tokens a
      second over the peer's, with quartiles, `versions` and `start_seconds`;
    - `power`: `share` of a step that the power adds, with quartiles;
    - `host`: `overhead`, by how much the loop is slower than bare steps, with
      quartiles; `ms` a step of `batch`, `dispatch`, `log`, and of the host's
      thread as a whole (processor time), and its `thread_share` of a step;
      `idle_dispatch_ms`;
    - `flops_per_token`, `flops_per_token_causal`, and `mfu_missing`, why there
      is no MFU;
    - `failed`.

    All are medians over rounds of the same round's ratio.
  """
  tokens = settings['batch'] * settings['length']
  per_token = accounting.flops_per_token(config, settings['length'])
  limits = [2 * settings['side'] ** 3 / s for s in seconds[LIMIT]]
  peak, missing = hardware.peak(
    facts['platform'], facts['device'], config.dtype
  )
  programs = []
  for name, taken in seconds.items():
    if name == LIMIT:
      continue
    middle = statistics.median(taken)
    devices = 1 if name in peers else settings['devices']
    entry = {
      'program': name,
      'ms': 1e3 * middle,
      'ms_quartiles': _quartiles([1e3 * s for s in taken]),
      'tokens_per_second': tokens / middle,
      'of_limit': statistics.median(
        tokens * per_token / s / (devices * limit)
        for s, limit in zip(taken, limits, strict=True)
      ),
      'mfu': peak and tokens * per_token / middle / (devices * peak),
    }
    if name in peers:
      ratios = _ratios(taken, seconds[LOOP])
      entry['ours_is'] = statistics.median(ratios)
      entry['ours_is_quartiles'] = _quartiles(ratios)
      entry |= peers[name]
    programs.append(entry)
  power = [r - 1 for r in _ratios(seconds[POWERED], seconds[PLAIN])]
  overhead = [r - 1 for r in _ratios(seconds[LOOP], seconds[POWERED])]
  kinds = {k: statistics.median(h[k] for h in host) for k in host[0]}
  return {
    'benchmark': 'step',
    'machine': facts,
    'settings': {
      'model': {'type': type(config).__name__, **dataclasses.asdict(config)},
      'parameters': accounting.parameters(config).total,
      **settings,
    },
    'limit': {
      'side': settings['side'],
      'dtype': config.dtype,
      'flops_per_second': statistics.median(limits),
    },
    'programs': programs,
    'power': {
      'share': statistics.median(power),
      'share_quartiles': _quartiles(power),
    },
    'host': {
      'overhead': statistics.median(overhead),
      'overhead_quartiles': _quartiles(overhead),
      'ms': {kind: 1e3 * s for kind, s in kinds.items()},
      'thread_share': kinds['thread'] / statistics.median(seconds[LOOP]),
      'idle_dispatch_ms': 1e3 * idle_dispatch,
    },
    'first_call_seconds': first_call_seconds,
    'loss': loss,
    'flops_per_token': per_token,
    'flops_per_token_causal': accounting.flops_per_token(
      config, settings['length'], causal=True
    ),
    'mfu_missing': missing,
    'failed': dict(failed),
  }


def _ratios(first: Sequence[float], second: Sequence[float]) -> list[float]:
  return [a / b for a, b in zip(first, second, strict=True)]


def _quartiles(values: Sequence[float]) -> list[float]:
  low, _, high = timing.quartiles(values)
  return [low, high]


def targets(document: Mapping[str, Any]) -> list[dict[str, Any]]:
  """What the project promises of this measurement.

  Args:
    document: What `result` returned, with 'first_step' if that was measured.

  Returns:
    Of each 'name', 'value', 'bound' and 'met'; none on a CPU at another shape
    than the stated one.
  """
  settings, model = document['settings'], document['settings']['model']
  on_cpu = document['machine']['platform'] == 'cpu'
  stated = {'type': 'LlamaConfig', **dataclasses.asdict(shapes.DEFAULT)}
  if on_cpu and (model, settings['batch'], settings['length']) != (
    stated, 8, 256,
  ):  # fmt: skip
    return []
  at_least, below = [], []
  for entry in document['programs']:
    if on_cpu and 'ours_is' in entry:
      bound = 1.3 if entry['program'].startswith('MaxText') else 1.0
      name = f'tokens a second over those of {entry["program"]}'
      at_least.append((name, entry['ours_is'], bound))
    if entry['program'] == LOOP and entry['mfu'] is not None:
      sparse = model['type'] == Qwen2MoeConfig.__name__
      at_least.append(('MFU', entry['mfu'], 0.25 if sparse else 0.45))
  below.append(('host overhead', document['host']['overhead'], 0.01))
  if not on_cpu:
    below.append(('share of the power', document['power']['share'], 0.01))
  if 'first_step' in document:
    below.append(
      ('seconds to the first step', document['first_step']['cold'], 20.0)
    )
  return [
    {'name': name, 'value': value, 'bound': bound, 'met': value >= bound}
    for name, value, bound in at_least
  ] + [
    {'name': name, 'value': value, 'bound': bound, 'met': value < bound}
    for name, value, bound in below
  ]


def text(document: Mapping[str, Any]) -> str:
  """Returns a measurement as text: the machine, a table, and what it means."""
  settings, limit = document['settings'], document['limit']
  model, host = settings['model'], document['host']
  header = ('program', 'ms a step', 'tokens/s', 'of limit', 'MFU', 'ours is')
  kinds = host['ms']
  lines = [
    timing.format_facts(document['machine']),
    f'{model["type"]}, {settings["parameters"]:,} parameters: '
    f'{model["n_layers"]} layers, d_model {model["d_model"]}, '
    f'{model["n_heads"]} heads',
    f'vocabulary {model["vocab_size"]}, {model["dtype"]}, '
    f'{settings["batch"]} x {settings["length"]} tokens on '
    f'{settings["devices"]} device{"s" if settings["devices"] > 1 else ""};',
    f'medians of {settings["rounds"]} rounds of {settings["steps"]} steps of '
    'each program, in both orders',
    '',
    timing.format_table(header, [_row(e) for e in document['programs']]),
    '',
    'ours is: tokens a second of our loop over those of the peer; quartiles',
    f'limit: a product of {limit["side"]}-squares in {limit["dtype"]}, '
    f'{limit["flops_per_second"] / 1e9:.1f} GFLOP/s',
    _mfu(document),
    f'the power adds {_percent(document["power"], "share")} to a step',
    f'the loop adds {_percent(host, "overhead")} to bare steps; of each step',
    f'  batches take the host {kinds["batch"]:.2f} ms, dispatch '
    f'{kinds["dispatch"]:.2f} ({host["idle_dispatch_ms"]:.2f} at rest), log '
    f'{kinds["log"]:.2f};',
    f'  its thread is at work {kinds["thread"]:.2f} ms, '
    f'{100 * host["thread_share"]:.2f} % of a step',
    f'our first call took {document["first_call_seconds"]:.1f} s, tracing and '
    'compilation',
  ]
  for entry in document['programs']:
    if 'versions' in entry:
      versions = [f'{k} {v}' for k, v in entry['versions'].items()]
      lines.append(
        f'{entry["program"]}: {", ".join(versions)}; '
        f'{entry["start_seconds"]:.0f} s until it had taken steps'
      )
  if 'first_step' in document:
    first = document['first_step']
    lines.append(
      f'from command to first step: {first["cold"]:.1f} s, with compiled '
      f'programs kept {first["warm"]:.1f} s'
    )
  for name, why in document['failed'].items():
    lines.append(f'{name}: not measured ({why})')
  for target in document['targets']:
    lines.append(
      f'target: {target["name"]} {target["value"]:.4g}, bound '
      f'{target["bound"]:g}: {"met" if target["met"] else "MISSED"}'
    )
  return '\n'.join(lines)


def _row(entry: Mapping[str, Any]) -> tuple[str, ...]:
  ours = ''
  if 'ours_is' in entry:
    first, third = entry['ours_is_quartiles']
    ours = f'{entry["ours_is"]:.2f} ({first:.2f}-{third:.2f})'
  return (
    entry['program'],
    f'{entry["ms"]:.1f}',
    f'{entry["tokens_per_second"]:.0f}',
    f'{entry["of_limit"]:.2f}',
    '' if entry['mfu'] is None else f'{100 * entry["mfu"]:.1f} %',
    ours,
  )


def _percent(values: Mapping[str, Any], name: str) -> str:
  low, high = values[f'{name}_quartiles']
  return f'{100 * values[name]:.2f} % ({100 * low:.2f} to {100 * high:.2f})'


def _mfu(document: Mapping[str, Any]) -> str:
  if document['mfu_missing']:
    return f'MFU: left out, {document["mfu_missing"]}'
  causal = document['flops_per_token_causal'] / document['flops_per_token']
  return (
    f'MFU: {document["flops_per_token"] / 1e9:.4g} GFLOP a token x tokens a '
    'second / published bfloat16 peak\n'
    f'  ({hardware.PEAKS[document["machine"]["device"]]:.3g} a device); '
    'a token: 6 x active matrix parameters (the head, not\n'
    '  the embedding) + 12 x layers x d_model x length; recomputation does '
    f'not\n  count; with half the scores, {causal:.3f} of it'
  )
