"""A report as the terminal shows it."""

from collections.abc import Iterable

from train.aot import collectives as collectives_lib
from train.aot.estimate import KERNEL_EFFICIENCY
from train.aot.report import WARNING, Report


def table(report: Report) -> str:
  """All of one compiled recipe, in a few dozen lines."""
  r, e, b = report, report.estimate, report.bytes
  config = r.config
  where = f'{r.slices} x {r.topology}' if r.slices > 1 else r.topology
  mesh = ' x '.join(f'{axis} {size}' for axis, size in r.mesh.items())
  tokens = config.tokens_per_step // r.devices
  lines = [
    f'{where}: {r.devices} devices, mesh {mesh}',
    f'batch {config.data.batch_size} x {config.data.sequence_length} tokens, '
    f'{tokens:,} a device; remat {config.model.remat}, layers '
    f'{"scanned" if config.model.scan_layers else "unrolled"}, '
    f'{config.model.dtype}; compiled in {r.compile_seconds:.0f} s',
    '',
    *_rows(
      'bytes a device',
      [
        ('arguments', size(b.arguments), 'what the step is given'),
        ('  parameters', size(b.parameters), 'float32'),
        ('  moments', size(b.moments), "the optimizer's state"),
        ('temporary', size(b.temporary), 'what the step sets aside'),
        (
          'peak',
          size(b.peak),
          f'in use at one time: {"fits" if r.fits else "DOES NOT FIT"}, there '
          f'are {size(r.chip.hbm_bytes)}',
        ),
        (
          '  activations',
          size(b.activations),
          'of the peak, without arguments and float32 gradients',
        ),
      ],
    ),
    '',
    *_rows(
      'collectives a step',
      [
        (
          f'{one["kind"]} over {one["axis"]}',
          size(one['bytes']),
          f'{one["count"]:,} times',
        )
        for one in collectives_lib.totals(r.collectives)
      ]
      or [('none', '', '')],
    ),
    '',
    *_rows(
      'kernels a step',
      [
        (
          kernel.name,
          flops(kernel.flops) if kernel.flops else 'not counted',
          f'{kernel.count:,} times',
        )
        for kernel in e.kernels
      ]
      or [('none', '', '')],
    ),
    '',
    *_rows(
      'predicted time',
      [
        (
          'compute',
          time(e.compute),
          'matrix products, by estimated cycles, and kernels, at '
          f'{KERNEL_EFFICIENCY:.0%} of the peak (assumed)',
        ),
        ('memory', time(e.memory), 'all other operations, likewise'),
        ('network', time(e.blocking), 'collectives that stop the step'),
        ('', time(e.overlapping), 'those beside computation'),
        (
          'step',
          time(e.seconds),
          f'max(compute + memory, beside) + network; bound: {e.bound}',
        ),
      ],
    ),
    '',
    f'{e.cycles / 1e6:,.0f}M estimated cycles at {r.chip.clock / 1e9:.2f} GHz; '
    f'{r.tokens_per_second:,.0f} tokens/s a device; MFU {r.mfu:.1%} of '
    f'{r.chip.peak_flops / 1e12:,.0f} TFLOP/s,',
    'by 6 x matmul parameters + 12 x layers x width x length a token.',
    *(
      [f'Left out: {e.unknown:,} operations that the compiler cannot estimate.']
      if e.unknown
      else []
    ),
    WARNING,
  ]
  return '\n'.join(lines)


def _rows(title: str, rows: Iterable[tuple[str, str, str]]) -> list[str]:
  return [title] + [
    f'  {name:<32}{value:>14}  {note}'.rstrip() for name, value, note in rows
  ]


def size(count: float) -> str:
  """Bytes in decimal units."""
  for unit in ('B', 'kB', 'MB', 'GB'):
    if count < 1000 or unit == 'GB':
      return f'{count:.0f} B' if unit == 'B' else f'{count:.2f} {unit}'
    count /= 1000
  raise AssertionError


def flops(count: float) -> str:
  """Operations, in billions."""
  return f'{count / 1e9:,.1f} GFLOP'


def time(seconds: float) -> str:
  """Milliseconds."""
  return f'{1e3 * seconds:,.2f} ms'
