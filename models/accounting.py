"""What a model costs, from its config alone: parameters, operations, bytes.

Exact integers, equal to those of the model's arrays, without making them.
"""

import dataclasses

from models.config import DecoderConfig, Qwen2MoeConfig

# Of a float32 parameter, its two moments in AdamW and its gradient.
_BYTES_WITH_ADAMW = 4 * (1 + 2 + 1)


@dataclasses.dataclass(frozen=True)
class Parameters:
  """How many parameters a model has, counted in four ways."""

  total: int
  """All of them. A tied head is the embedding and counts once."""
  active: int
  """Those of one token: of the routed experts only `experts_per_token` a layer;
  everything else whole, the embedding and the head as well."""
  non_embedding: int
  """The total without the embedding and without the head."""
  matmul: int
  """Those that multiply a token's activations: the active ones without norms
  and biases, and without the embedding, which is looked up. The head is among
  them, tied or not."""


def parameters(config: DecoderConfig) -> Parameters:
  """Counts parameters.

  Raises:
    ValueError: the vocabulary is not set.
  """
  c = config
  if not c.vocab_size:
    raise ValueError('model.vocab_size is 0: set the vocabulary first')
  table = c.vocab_size * c.d_model
  tables = table if c.tie_embeddings else 2 * table
  query, key = c.n_heads * c.head_dim, c.kv_heads * c.head_dim
  bias = query + 2 * key if c.qkv_bias else 0
  norms = (2 * c.n_layers + 1) * c.d_model
  blocks = c.n_layers * (_attention_matrices(c) + bias) + norms
  idle = unmultiplied = 0
  for layer in range(c.n_layers):
    if isinstance(c, Qwen2MoeConfig) and c.is_sparse(layer):
      expert = 3 * c.d_model * c.d_expert
      router_and_gate = c.d_model * (c.n_experts + 1)
      blocks += c.n_experts * expert + router_and_gate
      blocks += 3 * c.d_model * c.d_shared
      idle += (c.n_experts - c.experts_per_token) * expert
      unmultiplied += 0 if c.d_shared else c.d_model  # A gate of nothing.
    else:
      blocks += 3 * c.d_model * c.d_ff
  unmultiplied += c.n_layers * bias + norms
  return Parameters(
    total=tables + blocks,
    active=tables + blocks - idle,
    non_embedding=blocks,
    matmul=table + blocks - idle - unmultiplied,
  )


def _attention_matrices(config: DecoderConfig) -> int:
  """Parameters of a layer's four projections."""
  heads = 2 * (config.n_heads + config.kv_heads)
  return config.d_model * heads * config.head_dim


def flops_per_token(
  config: DecoderConfig,
  length: int,
  *,
  backward: bool = True,
  causal: bool = False,
) -> int:
  """Floating-point operations of matrix products, a token.

  6 x matmul parameters + 12 x layers x d_model x length: of the first term a
  multiplication and an addition for each in the forward pass and twice that in
  the backward pass; of the second the same for scores and for the weighted sum
  of values over `length` keys. The forward pass alone is a third, 2 and 4. This
  is the convention of llm-foundry (there `6 x parameters` of a tied model):
  masked keys count, though a kernel may skip them. `causal` halves the second
  term, as MaxText does. Recomputation does not count, nor do norms, the softmax
  and other elementwise work.

  Args:
    config: The model.
    length: Tokens of a sequence.
    backward: Whether to count the backward pass as well.
    causal: Whether to count half of the attention scores.

  Raises:
    ValueError: the vocabulary is not set, or `length` is not positive.
  """
  by_part = flops_by_part(config, length, backward=backward, causal=causal)
  return sum(by_part.values())


def flops_by_part(
  config: DecoderConfig,
  length: int,
  *,
  backward: bool = True,
  causal: bool = False,
) -> dict[str, int]:
  """The terms of `flops_per_token`, by where in the model they are.

  Returns:
    Of all layers 'attention' (projections and scores) and 'mlp' (a dense
    layer's, or router, routed and shared experts); and 'head'.
  """
  if length < 1:
    raise ValueError(f'length must be at least 1, got {length}')
  c = config
  scores = 2 * c.n_layers * c.d_model * length
  head = c.vocab_size * c.d_model
  projections = c.n_layers * _attention_matrices(c)
  times = 6 if backward else 2
  return {
    'attention': times * (projections + (scores // 2 if causal else scores)),
    'mlp': times * (parameters(c).matmul - projections - head),
    'head': times * head,
  }


def training_bytes(config: DecoderConfig) -> int:
  """Bytes that training with AdamW keeps, over all devices.

  16 a parameter: its float32 value, two float32 moments and a float32
  gradient. Not in it: activations, the bfloat16 copies of the weights that a
  bfloat16 model computes with, and what the compiler sets aside.

  Raises:
    ValueError: the vocabulary is not set.
  """
  return _BYTES_WITH_ADAMW * parameters(config).total
