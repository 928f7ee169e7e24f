"""Shapes and numerics of a model: frozen dataclasses, checked when made."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Llama 3's stretch of the rotary embedding to longer texts."""

  factor: float = 1.0
  """Slowest frequencies are divided by this; 1 for no scaling."""
  low_freq_factor: float = 1.0
  """Frequencies with fewer turns than this over original_length are slow."""
  high_freq_factor: float = 4.0
  """Frequencies with more turns than this stay as they are."""
  original_length: int = 8192
  """Tokens that the model was first trained on."""

  def __post_init__(self):
    """Checks the range of each field.

    Raises:
      ValueError: naming the field that is out of range.
    """
    if not 1 <= self.factor < math.inf:
      raise ValueError('model.rope_scaling.factor must be 1 or more')
    if not 0 < self.low_freq_factor < self.high_freq_factor < math.inf:
      raise ValueError(
        'model.rope_scaling.low_freq_factor must be positive and below '
        'model.rope_scaling.high_freq_factor'
      )
    if self.original_length < 1:
      raise ValueError('model.rope_scaling.original_length must be at least 1')


REMAT_NAMES = (
  'query', 'key', 'value', 'attention', 'out', 'gate', 'up', 'router',
  'dispatch', 'combine', 'shared',
)  # fmt: skip
"""Activations of a block that a rematerialisation policy can save.

Rotated queries and keys; what attention makes of values, and its projection;
the hidden products of SwiGLU and of experts; the router's logits; tokens that
have travelled to their experts, and back; what the shared expert makes, and its
gate.
"""


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
  """What every decoder here has; not a model by itself."""

  vocab_size: int = 0
  """Tokens in the vocabulary; 0 takes the tokenizer's."""
  d_model: int = 128
  """Width of the residual stream."""
  n_layers: int = 4
  """Decoder blocks."""
  n_heads: int = 4
  """Query heads; their width is d_model / n_heads."""
  n_kv_heads: int = 0
  """Key and value heads, a divisor of n_heads; 0 for as many as those."""
  d_ff: int = 512
  """Width of the SwiGLU hidden layer; the paper uses 4 d_model."""
  norm_eps: float = 1e-6
  """Added to the mean square in RMSNorm."""
  rope_theta: float = 10000.0
  """Base of the rotary embedding's wavelengths."""
  rope_scaling: RopeScaling = dataclasses.field(default_factory=RopeScaling)
  """Of the rotary embedding's frequencies."""
  qkv_bias: bool = False
  """Whether queries, keys and values have biases, which start at 0."""
  init_std: float = 0.02
  """Standard deviation of every initial matrix; norms start at 1."""
  tie_embeddings: bool = False
  """Whether the head is the embedding transposed."""
  scan_layers: bool = False
  """Stack the layers and scan them: compile time flat in depth, though slower
  than unrolled on a CPU. The numbers are the same."""
  remat: str = 'none'
  """What of a block the backward pass computes again: 'none'; 'full', all of
  it; 'minimal', all but attention, matrix products (not its projection) and
  experts' exchange; or names to save, of `REMAT_NAMES`, joined by commas."""
  z_loss: float = 0.0
  """Weight of the mean squared log-normaliser of the logits in the loss."""
  dtype: str = 'float32'
  """Of the computation, 'float32' or 'bfloat16'; parameters are float32."""

  def __post_init__(self):
    """Checks the range of each field and what must fit together.

    Raises:
      ValueError: naming the field that is wrong, as 'model.field'.
    """
    for name in ('d_model', 'n_layers', 'n_heads', 'd_ff'):
      _require_least(self, name, 1)
    for name in ('vocab_size', 'n_kv_heads'):
      if getattr(self, name) < 0:
        raise ValueError(
          f'model.{name} must be positive, or 0, not {getattr(self, name)}'
        )
    if self.d_model % self.n_heads:
      raise ValueError(
        f'model.n_heads ({self.n_heads}) must divide model.d_model '
        f'({self.d_model})'
      )
    if self.head_dim % 2:
      raise ValueError(
        f'model.d_model / model.n_heads is {self.head_dim}; the rotary '
        'embedding needs an even head width'
      )
    if self.n_heads % self.kv_heads:
      raise ValueError(
        f'model.n_kv_heads ({self.n_kv_heads}) must divide model.n_heads '
        f'({self.n_heads})'
      )
    for name in ('norm_eps', 'rope_theta', 'init_std'):
      if not 0 < getattr(self, name) < math.inf:
        raise ValueError(f'model.{name} must be positive and finite')
    _require_weight(self, 'z_loss')
    if self.remat not in ('none', 'minimal', 'full'):
      unknown = set(self.saved_names) - set(REMAT_NAMES)
      if unknown:
        raise ValueError(
          "model.remat must be 'none', 'minimal', 'full' or names among "
          f'{",".join(REMAT_NAMES)}, not {self.remat!r}'
        )
    if self.dtype not in ('float32', 'bfloat16'):
      raise ValueError(
        f"model.dtype must be 'float32' or 'bfloat16', got {self.dtype!r}"
      )

  @property
  def head_dim(self) -> int:
    """Width of one attention head."""
    return self.d_model // self.n_heads

  @property
  def kv_heads(self) -> int:
    """Key and value heads."""
    return self.n_kv_heads or self.n_heads

  @property
  def saved_names(self) -> tuple[str, ...]:
    """What `remat` saves of a block, by name."""
    if self.remat == 'minimal':  # The projection is as large, and cheap.
      return tuple(name for name in REMAT_NAMES if name != 'out')
    if self.remat in ('none', 'full'):
      return ()
    return tuple(self.remat.split(','))

  def is_sparse(self, layer: int) -> bool:
    """Whether a layer, counted from 0, has experts."""
    del layer
    return False


@dataclasses.dataclass(frozen=True)
class LlamaConfig(DecoderConfig):
  """A LLaMA-style decoder."""


@dataclasses.dataclass(frozen=True)
class Qwen2MoeConfig(DecoderConfig):
  """A Qwen2-MoE decoder: experts in the place of the SwiGLU layer."""

  qkv_bias: bool = True
  """Whether queries, keys and values have biases, which start at 0."""
  n_experts: int = 16
  """Routed experts of a sparse layer."""
  experts_per_token: int = 4
  """Experts that each token is sent to."""
  d_expert: int = 96
  """Width of an expert's SwiGLU hidden layer."""
  d_shared: int = 384
  """Width of the shared expert, which every token passes; 0 for none."""
  renormalize: bool = False
  """Whether a token's expert weights are divided by their sum."""
  sparse_step: int = 1
  """One layer in so many is sparse, the last of them; the others are dense, of
  width d_ff."""
  dense_layers: tuple[int, ...] = ()
  """Layers, from 0, that are dense whatever sparse_step says."""
  balance_loss: float = 0.001
  """Weight of the load-balancing loss."""
  router_z_loss: float = 0.0
  """Weight of the mean squared log-normaliser of the router's logits."""

  def __post_init__(self):
    super().__post_init__()
    for name in ('n_experts', 'experts_per_token', 'd_expert', 'sparse_step'):
      _require_least(self, name, 1)
    if self.d_shared < 0:
      raise ValueError(
        f'model.d_shared must be positive, or 0, not {self.d_shared}'
      )
    if self.experts_per_token > self.n_experts:
      raise ValueError(
        f'model.experts_per_token ({self.experts_per_token}) must be at most '
        f'model.n_experts ({self.n_experts})'
      )
    for layer in self.dense_layers:
      if not 0 <= layer < self.n_layers:
        raise ValueError(
          f'model.dense_layers: there is no layer {layer}; the first is 0 and '
          f'the last {self.n_layers - 1}'
        )
    for name in ('balance_loss', 'router_z_loss'):
      _require_weight(self, name)

  def is_sparse(self, layer: int) -> bool:
    """Whether a layer, counted from 0, has experts."""
    return (
      layer not in self.dense_layers and (layer + 1) % self.sparse_step == 0
    )


def _require_least(config, name: str, least: int) -> None:
  if getattr(config, name) < least:
    raise ValueError(
      f'model.{name} must be at least {least}, not {getattr(config, name)}'
    )


def _require_weight(config, name: str) -> None:
  if not 0 <= getattr(config, name) < math.inf:
    raise ValueError(
      f'model.{name} must be zero or more, and finite, not '
      f'{getattr(config, name)}'
    )
