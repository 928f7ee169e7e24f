"""The results of `benchmarks.optimizer` as text."""

from typing import Any

from benchmarks import optimizer_tpu, timing
from benchmarks.optimizer_work import FORMULA
from train import hardware
from train.aot.report import WARNING

_OTHER = 'other'
_SHARED = ('data', 'fsdp')
_KINDS = {
  'all-to-all': 'to all', 'all-gather': 'gather', 'all-reduce': 'reduce',
  _OTHER: 'other',
}  # fmt: skip


def text(result: dict[str, Any]) -> str:
  """A measurement: the machine, programs, shares, and sharded updates."""
  settings = result['settings']
  model, rounds = settings['model'], settings['rounds']
  fewest = result['fewest']
  return '\n'.join((
    timing.format_facts(result['machine']),
    f'{model["type"]}: {settings["layers"]} of {model["n_layers"]} layers, '
    f'd_model {model["d_model"]}, {model["dtype"]};',
    f'vocabulary {model["vocab_size"]}, {settings["tokens"]} tokens in '
    f'sequences of {settings["length"]}; medians over {rounds} rounds',
    '',
    _programs(result['programs']),
    '',
    f"Muon's GFLOP: {FORMULA};",
    'its rate counts all of its time. Others: 6 x active matrix parameters +',
    '12 x layers x d_model x length a token. Limit: '
    f'{settings["side"]}-squares in float32.',
    f"Our Muon's time over optax's, on one device: {result['ratio']:.3f} "
    f'({_range(result["ratio_quartiles"], "{:.3f}")}).',
    _mfu(result),
    '',
    f'What Muon adds to a step of {settings["tokens"]} tokens a device, all '
    f'{model["n_layers"]} layers',
    _shares(result['shares']),
    '',
    'computed: from the times on one device, without the network. sent: bytes',
    "of a device's matrices, to other devices and back.",
    f'At most {result["target"]:.0%} of a step: '
    + (f'from {fewest} device{"s" * (fewest > 1)} on.' if fewest else 'never.'),
    *_sharded(result['sharded']),
  ))  # fmt: skip


def _range(quartiles: list[float], form: str) -> str:
  low, high = quartiles
  return f'{form.format(low)}-{form.format(high)}'


def _ms(value: float) -> str:
  return f'{value:.0f}' if value >= 1000 else f'{value:.2f}'


def _programs(entries: list[dict[str, Any]]) -> str:
  rows = [
    (
      entry['program'],
      _ms(entry['ms']),
      '-'.join(map(_ms, entry['ms_quartiles'])),
      *(
        (
          f'{entry["flops"] / 1e9:.1f}',
          f'{entry["flops"] / 1e6 / entry["ms"]:.1f}',
          f'{entry["of_limit"]:.2f}',
        )
        if entry['flops']
        else ('', '', '')
      ),
    )
    for entry in entries
  ]
  header = ('', 'ms', 'quartiles', 'GFLOP', 'GFLOP/s', 'of limit')
  return timing.format_table(header, rows)


def _mfu(result: dict[str, Any]) -> str:
  if result['mfu'] is None:
    return f'Share of the published peak: left out, {result["mfu_missing"]}.'
  peak = hardware.PEAKS[result['machine']['device']]
  return (
    f"Muon's GFLOP / its time / the device's published {peak:.3g} in "
    f'bfloat16: {result["mfu"]:.1%}.'
  )


def _shares(entries: list[dict[str, Any]]) -> str:
  rows = []
  for entry in entries:
    mesh = ' x '.join(str(entry['mesh'].get(axis, 1)) for axis in _SHARED)
    how = 'measured' if entry['devices'] == 1 else 'computed'
    rows.append((
      f'{entry["devices"]} {how}',
      mesh,
      f'{entry["flops"] / 1e9:.1f}',
      f'{entry["sent"] / 1e6:.1f}',
      _ms(entry['added_ms']),
      f'{entry["share"]:.1%}',
      _range(entry['share_quartiles'], '{:.1%}'),
    ))  # fmt: skip
  header = (
    'devices', ' x '.join(_SHARED), 'GFLOP', 'sent, MB', 'adds, ms', 'of step',
    'quartiles',
  )  # fmt: skip
  return timing.format_table(header, rows)


def _sharded(entries: list[dict[str, Any]] | None) -> list[str]:
  """A small model's updates on eight fake devices."""
  if entries is None:
    return []
  rows = []
  for entry in entries:
    mesh = ' x '.join(f'{axis} {n}' for axis, n in entry['mesh'].items())
    rows.append((mesh, *[''] * 8))
    for name in ('ours', 'optax'):
      one = entry[name]
      counts = dict.fromkeys(_KINDS, 0)
      for found in one['collectives']:
        kind = found['kind'] if found['kind'] in counts else _OTHER
        counts[kind] += found['count']
      ratio = ('', '')
      if name == 'optax':
        ratio = (
          f'{entry["ratio"]:.2f}',
          _range(entry['ratio_quartiles'], '{:.2f}'),
        )
      rows.append((
        f'  {name}', f'{one["ms"]:.0f}', *ratio,
        f'{one["bytes"] / entry["least_bytes"]:.2f}',
        *(str(count) for count in counts.values()),
      ))  # fmt: skip
  header = ('mesh', 'ms', 'ratio', 'quartiles', 'least',
            *_KINDS.values())  # fmt: skip
  return [
    '',
    'A small model on eight fake CPU devices, which share the cores; Auto axes',
    timing.format_table(header, rows),
    '',
    "ratio: optax's time over ours. least: bytes of collectives over those",
    'of each matrix out and back once.',
  ]


def tpu_text(result: dict[str, Any]) -> str:
  """Predictions for TPUs."""
  settings = result['settings']
  header, *rows = optimizer_tpu.rows(result['points'])
  return '\n'.join((
    f'{settings["model"]["type"]}, d_model {settings["model"]["d_model"]}, '
    f'{settings["model"]["n_layers"]} layers; {settings["tokens"]} tokens a '
    f'device in sequences of {settings["length"]}',
    timing.format_table(header, rows),
    '',
    'ms of compute, of memory, of the network that stops the step and of that',
    "beside it; moved: by a step's collectives; adds: to AdamW's step.",
    WARNING,
  ))  # fmt: skip
