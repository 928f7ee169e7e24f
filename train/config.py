"""What a run is: frozen dataclasses, checked before anything is compiled.

A recipe (`train/recipes.py`) is a function that returns a `Config`; every
field is also a command-line option, `--path.to.field VALUE` (`train/cli.py`).
"""

import dataclasses
import typing
from typing import Any

from models import families
from models.config import DecoderConfig, LlamaConfig
from train import errors
from train.data import corpora, layouts

# 256 bytes and the end-of-text token.
_MIN_VOCAB_SIZE = 257
_MAX_VOCAB_SIZE = 2**24
_LARGEST_FLOAT32 = 3.4e38
_OPTIMIZERS = ('adamw', 'muon')
_MU_DTYPES = ('float32', 'bfloat16')


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Where the text comes from and how it becomes batches."""

  prepared: str = ''
  """What `python -m train prepare` has written, instead of text: a directory;
  or several with weights, 'A=3,B=1', which may change at a step,
  'A=3,B=1;1000:A=1,B=1'."""
  files: str = ''
  """Glob of .txt, .jsonl, .json or .parquet files ('**' recurses), the first
  three also as .gz, .zst or .xz; empty: the corpus. A .json file holds one
  object a line, as .jsonl does."""
  corpus: str = 'wikipedia_leads'
  """A corpus known by name (`train/data/corpora.py`), where files is empty."""
  text_field: str = 'text'
  """Key of the text in a line of JSON, or its column."""
  skip_bad: bool = False
  """Whether documents that cannot be used are left out, and not an error."""
  tokenizer: str = ''
  """A file, folder or hub id of a sentencepiece model, tiktoken ranks or a
  tokenizer.json; empty: one is trained."""
  vocab_size: int = 2048
  """Tokens in the byte-level BPE vocabulary trained on the train split, where
  tokenizer is empty: at least 257, the bytes and end-of-text."""
  layout: str = ''
  """How documents become sequences: 'stream', 'random', 'truncate' or 'packed'
  (docs/data.md); empty: as prepared, or else 'stream'."""
  sequence_length: int = 128
  """Tokens that the model sees at once."""
  batch_size: int = 16
  """Sequences in a global batch."""
  validation_fraction: float = 0.05
  """Share of documents, chosen by a hash of their text, held out; prepared data
  have their own."""
  validation_tokens: int = 65536
  """At most this many held-out tokens are scored at each evaluation."""
  repeat: bool = True
  """Whether training may read the text more than once."""

  def __post_init__(self):
    """Checks the range of each field.

    Raises:
      UserError: naming the option that is out of range.
    """
    _require_least(self, 'data.', 'vocab_size', _MIN_VOCAB_SIZE)
    for name in ('sequence_length', 'batch_size', 'validation_tokens'):
      _require_least(self, 'data.', name, 1)
    if self.vocab_size > _MAX_VOCAB_SIZE:
      raise errors.UserError(
        f'--data.vocab_size must be at most {_MAX_VOCAB_SIZE}, not'
        f' {self.vocab_size}'
      )
    if not 0 < self.validation_fraction < 1:
      raise errors.UserError(
        '--data.validation_fraction must be between 0 and 1, both excluded,'
        f' not {self.validation_fraction}'
      )
    if not self.text_field:
      raise errors.UserError('--data.text_field must not be empty')
    if self.corpus not in corpora.NAMES:
      raise errors.UserError(
        f'--data.corpus: there is no {self.corpus!r}, only'
        f' {", ".join(corpora.NAMES)}'
      )
    if self.layout not in ('', *layouts.LAYOUTS):
      raise errors.UserError(
        f'--data.layout must be one of {", ".join(layouts.LAYOUTS)}, not'
        f' {self.layout!r}'
      )
    for name in ('files', 'tokenizer'):
      if self.prepared and getattr(self, name):
        raise errors.UserError(
          f'--data.{name} does not go with --data.prepared, which holds text'
          ' and tokenizer'
        )


OF_TEXT = ('text_field', 'skip_bad', 'vocab_size', 'validation_fraction')
"""Fields of `DataConfig` that say how text is read, tokenized and held out."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """Clip, power, optimizer, in this order; the defaults are the paper's."""

  name: str = 'adamw'
  """'adamw', or 'muon': matrices by Muon as in Moonlight, the rest by AdamW."""
  power: float = 1.0
  """p of the gradient power; 1.0 is the plain optimizer, to the bit."""
  power_eps: float = 0.0
  """Added to |g| before the power; the authors' code has 1e-8."""
  learning_rate: float = 1e-3
  """Its maximum, after warm-up."""
  schedule: str = 'wsd'
  """'wsd': constant after warm-up, linear decay in the last third;
  'cos': cosine decay after warm-up; 'constant'."""
  warmup_steps: int = 1000
  """Steps of linear warm-up from zero."""
  final_lr_ratio: float = 0.1
  """Learning rate that the decay ends in, right after the last step, relative
  to its maximum."""
  b1: float = 0.9
  """Decay of AdamW's first moment."""
  b2: float = 0.95
  """Decay of AdamW's second moment."""
  eps: float = 1e-8
  """Added to the root of the second moment."""
  weight_decay: float = 0.1
  """Decoupled: times the learning rate, on every parameter."""
  clip_norm: float = 1.0
  """Global norm to clip gradients at, before the power; 0 for none."""
  mu_dtype: str = 'float32'
  """In which first moments are kept: 'float32' or 'bfloat16'."""
  per_head: bool = False
  """Whether Muon takes each attention head as a matrix by itself."""
  match_norm: bool = False
  """Whether the powered gradient is scaled back to the clipped one's global
  norm: a control, which for AdamW is nearly a change of eps alone."""
  blockwise: bool = False
  """Whether each block of the model has its own multiple of the learning rate,
  up to 10, as in Blockwise LR (arXiv 2502.19002)."""

  def __post_init__(self):
    """Checks the range of each field.

    Raises:
      UserError: naming the option that is out of range.
    """
    for name, choices in (('name', _OPTIMIZERS), ('mu_dtype', _MU_DTYPES)):
      if getattr(self, name) not in choices:
        raise errors.UserError(
          f'--optimizer.{name} must be {" or ".join(map(repr, choices))}, not '
          f'{getattr(self, name)!r}'
        )
    if self.per_head and self.name != 'muon':
      raise errors.UserError(
        '--optimizer.per_head goes with --optimizer.name muon'
      )
    _require(self, 'power', lambda v: 0 < v < 1e6, 'positive and below 1e6')
    for name in ('learning_rate', 'eps'):
      _require(self, name, lambda v: v > 0, 'positive')
    for name in ('power_eps', 'weight_decay', 'clip_norm'):
      _require(self, name, lambda v: v >= 0, 'zero or more')
    _require(self, 'final_lr_ratio', lambda v: 0 <= v <= 1, 'in [0, 1]')
    for name in ('b1', 'b2'):
      _require(self, name, lambda v: 0 <= v < 1, 'in [0, 1)')
    _require(self, 'warmup_steps', lambda v: v >= 0, 'zero or more')
    if self.schedule not in ('wsd', 'cos', 'constant'):
      raise errors.UserError(
        "--optimizer.schedule must be 'wsd', 'cos' or 'constant', not "
        f'{self.schedule!r}'
      )


def _require_least(config, prefix, name, least):
  value = getattr(config, name)
  if value < least:
    raise errors.UserError(
      f'--{prefix}{name} must be at least {least}, not {value}'
    )


def _require(config, name, holds, wanted):
  value = getattr(config, name)
  if not (abs(value) < _LARGEST_FLOAT32 and holds(value)):
    raise errors.UserError(f'--optimizer.{name} must be {wanted}, not {value}')


@dataclasses.dataclass(frozen=True)
class MeshConfig:
  """How the devices share the work: the sizes of the mesh's axes.

  Their product is the number of devices. `models/sharding.py` says what each
  axis splits.
  """

  data: int = 0
  """Copies of the parameters, each with a part of the batch; the only axis
  between slices. 0: as many as the other axes leave."""
  fsdp: int = 1
  """Parameters, their moments and the batch are split so many ways."""
  tensor: int = 1
  """Heads, hidden widths and the vocabulary are split so many ways."""
  expert: int = 1
  """Experts, other parameters and the batch are split so many ways."""

  def __post_init__(self):
    """Checks the range of each field.

    Raises:
      UserError: naming the option that is out of range.
    """
    _require_least(self, 'mesh.', 'data', 0)
    for name in ('fsdp', 'tensor', 'expert'):
      _require_least(self, 'mesh.', name, 1)


@dataclasses.dataclass(frozen=True)
class GuardConfig:
  """Which steps change nothing: `train/guard.py`."""

  bad_steps: int = 10
  """The run stops after so many steps in a row whose loss or gradient was not
  finite."""
  spike: float = 0.0
  """Skips a step whose loss or gradient norm lies so many standard deviations
  above its running mean; 0 for none."""

  def __post_init__(self):
    """Checks the range of each field.

    Raises:
      UserError: naming the option that is out of range.
    """
    _require_least(self, 'guard.', 'bad_steps', 1)
    if not 0 <= self.spike < _LARGEST_FLOAT32:
      raise errors.UserError(
        f'--guard.spike must be zero or more, not {self.spike}'
      )


@dataclasses.dataclass(frozen=True)
class KeepConfig:
  """Which checkpoints stay: the last, the best, and one every so often."""

  last: int = 2
  """The newest so many."""
  best: bool = True
  """Of those saved at a step that was evaluated, that of the lowest loss."""
  every: int = 0
  """Those of each multiple of so many steps; 0 for none."""

  def __post_init__(self):
    """Checks the range of each field.

    Raises:
      UserError: naming the option that is out of range.
    """
    _require_least(self, 'keep.', 'last', 1)
    _require_least(self, 'keep.', 'every', 0)


@dataclasses.dataclass(frozen=True)
class Config:
  """A run."""

  model: DecoderConfig = dataclasses.field(default_factory=LlamaConfig)
  """The decoder; see `models/config.py`."""
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  """The text."""
  optimizer: OptimizerConfig = dataclasses.field(
    default_factory=OptimizerConfig
  )
  """The optimizer and its schedule."""
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  """The devices."""
  accumulate: int = 1
  """Micro-batches that a step's batch is taken in, one after the other: less
  memory, the same gradient."""
  steps: int = 10000
  """Optimizer steps; the schedule depends on it."""
  seed: int = 0
  """Of the initial parameters and of the order of the data."""
  eval_every: int = 100
  """Steps between evaluations on the held-out split; also at the end."""
  save_every: int = 100
  """Steps between checkpoints; also at the end."""
  keep: KeepConfig = dataclasses.field(default_factory=KeepConfig)
  """The checkpoints."""
  guard: GuardConfig = dataclasses.field(default_factory=GuardConfig)
  """Against losses and gradients that are no use."""
  deterministic: bool = False
  """On a GPU: only operations, and one choice of kernels, that give the same
  bits each time. A CPU and a TPU do so anyway."""

  def __post_init__(self):
    """Checks the range of each field and what must fit together.

    Raises:
      UserError: naming the option to change.
    """
    for name in ('steps', 'eval_every', 'save_every', 'accumulate'):
      _require_least(self, '', name, 1)
    _require_least(self, '', 'seed', 0)
    if self.seed >= 2**32:
      raise errors.UserError(f'--seed must be below 2**32, not {self.seed}')
    if self.data.batch_size % self.accumulate:
      raise errors.UserError(
        f'--accumulate ({self.accumulate}) must divide --data.batch_size '
        f'({self.data.batch_size})'
      )
    if self.optimizer.warmup_steps >= self.steps:
      raise errors.UserError(
        f'--optimizer.warmup_steps ({self.optimizer.warmup_steps}) must be '
        f'below --steps ({self.steps})'
      )

  @property
  def tokens_per_step(self) -> int:
    """Target tokens in a global batch."""
    return self.data.batch_size * self.data.sequence_length


def to_dict(config: Config) -> dict[str, Any]:
  """A config as JSON holds it, with the model's family."""
  values = _plain(dataclasses.asdict(config))
  return values | {
    'model': {'family': families.family(config.model), **values['model']}
  }


def from_dict(values: dict[str, Any]) -> Config:
  """Reads what `to_dict` wrote, in this version or an older one.

  A field that is left out has its default, so that a new field leaves all that
  was written before readable. `model.family` alone must be there.

  Raises:
    ValueError: a field is unknown, out of range, or of the wrong type.
  """
  values = with_defaults(values)
  try:
    model = dict(values['model'])
    kind = families.CONFIGS[model.pop('family')]
    return _build(Config, values | {'model': _build(kind, model)})
  except (KeyError, TypeError, AttributeError, errors.UserError) as error:
    raise ValueError(f'not the configuration of a run: {error!r}') from error


def with_defaults(values: dict[str, Any]) -> dict[str, Any]:
  """Adds the fields that an older version did not write, at their defaults.

  Args:
    values: As `to_dict` returns it; a new field must do by default what all
      older versions did.

  Raises:
    ValueError: `model.family` is missing or unknown.
  """
  try:
    return _filled(values, defaults(values['model']['family']))
  except (KeyError, TypeError) as error:
    raise ValueError(f'not the configuration of a run: {error!r}') from error


def defaults(family: str) -> dict[str, Any]:
  """Returns the default configuration of a family of models, as JSON holds it.

  Raises:
    KeyError: there is no such family.
  """
  return to_dict(Config(model=families.CONFIGS[family]()))


def _filled(values: dict[str, Any], like: dict[str, Any]) -> dict[str, Any]:
  inner = {
    name: _filled(value, like[name])
    for name, value in values.items()
    if isinstance(value, dict) and isinstance(like.get(name), dict)
  }
  return like | values | inner


def _plain(value: Any) -> Any:
  if isinstance(value, dict):
    return {key: _plain(inner) for key, inner in value.items()}
  return list(value) if isinstance(value, tuple) else value


def _build(kind: type, values: dict[str, Any]) -> Any:
  hints = typing.get_type_hints(kind)
  if wrong := set(hints) ^ set(values):
    raise KeyError(min(wrong))

  def build(name: str, value: Any) -> Any:
    if dataclasses.is_dataclass(hints[name]):
      built = dataclasses.is_dataclass(value)
      return value if built else _build(hints[name], value)
    return tuple(value) if isinstance(value, list) else value

  return kind(**{name: build(name, value) for name, value in values.items()})
