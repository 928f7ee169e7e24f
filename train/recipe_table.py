"""The recipes as a table: what each costs, on paper."""

import dataclasses
import textwrap

from models import accounting, presets
from models.config import Qwen2MoeConfig
from train import paper, recipes
from train.aot.chips import CHIPS
from train.config import Config
from train.gpus import GPUS

_WIDTH = 80
# Published operations a second of dense bfloat16 products, and how a device is
# called.
DEVICES = {
  **{name: (gpu.label, gpu.peak_flops) for name, gpu in GPUS.items()},
  **{name: (f'TPU {name}', chip.peak_flops) for name, chip in CHIPS.items()},
  'tpu7x': ('core of a TPU7x', CHIPS['tpu7x'].peak_flops),  # As JAX counts.
}
DENSE_MFU, SPARSE_MFU = 0.4, 0.25


@dataclasses.dataclass(frozen=True)
class Cost:
  """What a run takes."""

  parameters: accounting.Parameters
  """Of its model."""
  tokens: int
  """Target tokens, over all steps."""
  flops: int
  """By `models.accounting.flops_per_token`."""

  def hours(self, peak: float, mfu: float) -> float:
    """Estimates device-hours.

    Args:
      peak: The device's operations a second.
      mfu: The share of it that the run is assumed to reach.
    """
    return self.flops / (peak * mfu) / 3600


def cost(config: Config) -> Cost:
  """Counts what a run takes."""
  model = config.model
  if not model.vocab_size:  # The tokenizer's.
    model = dataclasses.replace(model, vocab_size=config.data.vocab_size)
  tokens = config.steps * config.tokens_per_step
  a_token = accounting.flops_per_token(model, config.data.sequence_length)
  return Cost(accounting.parameters(model), tokens, tokens * a_token)


_HEADER = ('recipe', 'family', 'params', 'active', 'tokens', 'steps', 'batch',
           'FLOPs', 'hours', 'mark')  # fmt: skip


def table(configs: dict[str, Config], device: str, mfu: float | None) -> str:
  """Writes the table, and what its numbers mean.

  Args:
    configs: By name.
    device: Key of `DEVICES`.
    mfu: None for `DENSE_MFU` or, with experts, `SPARSE_MFU`.
  """
  name, peak = DEVICES[device]
  rows = [
    _HEADER,
    *(_row(recipe, config, peak, mfu) for recipe, config in configs.items()),
  ]
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  last = len(_HEADER) - 1
  lines = [
    ' '.join(
      cell.ljust(width) if i in (0, 1, last) else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    ).rstrip()
    for row in rows
  ]
  assumed = (
    f'{100 * mfu:g} %'
    if mfu
    else f'{100 * DENSE_MFU:g} %, with experts {100 * SPARSE_MFU:g} %'
  )
  marks = '; '.join(f'{m}, {text}' for m, text in presets.MARKS.items())
  paragraphs = (
    *_abouts(configs),
    'params: all parameters; active: those of one token.',
    'tokens: in a run of the paper '
    f'{paper.TOKENS_PER_PARAMETER} a parameter, all counted: "about 20" [P]; '
    'of which parameters of a mixture of experts [?].',
    'batch: sequences x length; on C4 [P][C]. On OpenWebText its sequences are '
    '[?], here as many tokens as on C4.',
    'FLOPs: of the run, tokens x (6 x active matrix parameters, the head among '
    'them, not the embedding, + 12 x layers x d_model x length). Masked scores '
    'count; recomputation does not.',
    f'hours: an estimate, not a measurement, of device-hours: one {name}, '
    f'{peak / 1e12:g} TFLOP/s in bfloat16, at an assumed MFU of {assumed}.',
    'learning rate: of llama_0.2b on C4 1e-3 [P]; of the others [?], here the '
    "value in the paper's grid nearest to 1e-3 x 768 / d_model.",
    f'mark: of the shape; {marks}.',
    'options of run: --data.corpus c4 or openwebtext (of this listing, too), '
    '--optimizer.schedule cos or wsd, and every field of the config; '
    '--optimizer.power 1 is the baseline.',
  )  # fmt: skip
  return '\n'.join(
    [
      *lines,
      '',
      *(
        textwrap.fill(
          text, _WIDTH, subsequent_indent='  ', break_on_hyphens=False
        )
        for text in paragraphs
      ),
    ]
  )


def _abouts(configs: dict[str, Config]) -> list[str]:
  """What the recipes are that are not the paper's, in a line each."""
  return [
    f'{name}: {(recipes.RECIPES[name].__doc__ or "").splitlines()[0]}'
    for name in configs
    if name not in paper.RECIPES
  ]


def _row(
  name: str, config: Config, peak: float, mfu: float | None
) -> tuple[str, ...]:
  of = cost(config)
  sparse = isinstance(config.model, Qwen2MoeConfig)
  assumed = mfu or (SPARSE_MFU if sparse else DENSE_MFU)
  return (
    name,
    'qwen2_moe' if sparse else 'llama',
    _short(of.parameters.total),
    _short(of.parameters.active) if sparse else '=',
    _short(of.tokens),
    str(config.steps),
    f'{config.data.batch_size}x{config.data.sequence_length}',
    f'{of.flops:.2e}'.replace('e+', 'e'),
    _hours(of.hours(peak, assumed)),
    presets.PRESETS[name].mark if name in presets.PRESETS else '-',
  )


def _short(number: int) -> str:
  """Three digits: '66.4M', '40.2B'."""
  value, unit = number / 1e6, 'M'
  if value >= 999.5:
    value, unit = value / 1000, 'B'
  digits = 2 if value < 9.995 else 1 if value < 99.95 else 0
  return f'{value:.{digits}f}{unit}'


def _hours(hours: float) -> str:
  if hours < 0.01:
    return '<0.01'
  return f'{hours:.2f}' if hours < 1 else f'{hours:.{int(hours < 100)}f}'
