"""The shapes of the paper's models, each with a mark of certainty.

The paper (arXiv 2505.24275) names its models by size; its tables of shapes were
not found. The LLaMA shapes here have the right count of parameters with the T5
vocabulary; what they share was read in the authors' code: d_ff of 4 d_model,
heads of 64, no biases, an untied head, RMSNorm with eps 1e-6, rotary base
10000, matrices from normal(0, 0.02), bfloat16 computation over float32
parameters.

The Qwen2-MoE shapes are ours, the paper's being unknown. They keep the
proportions of the published Qwen1.5-MoE-A2.7B: an expert 11/16 as wide as the
model, 4 experts a token, the shared expert as wide as those 4, every layer
sparse, biases on queries, keys and values, a balance loss of 0.001, weights not
renormalised. Two things differ: heads of 64, as in the paper's LLaMA, and 64
experts where the published model has 60, so that 8 devices, or any power of two
up to 64, can share them.
"""

import dataclasses
from typing import Any, NamedTuple

from models.config import DecoderConfig, LlamaConfig, Qwen2MoeConfig

MARKS = {
  'P': 'printed in the paper',
  'C': "read in the authors' code",
  'I': 'inferred here from the count of parameters',
  '?': 'not known: the shape is ours',
}


class Vocabulary(NamedTuple):
  """A tokenizer's vocabulary in the paper, and its data set's sequences."""

  size: int
  """Tokens, padding included."""
  length: int
  """Tokens of a training sequence."""


VOCABULARIES = {
  't5': Vocabulary(32100, 256),  # C4. Size [P], length [C].
  'gpt2': Vocabulary(50304, 1024),  # OpenWebText. Size [P], length [C].
}


@dataclasses.dataclass(frozen=True)
class Preset:
  """A shape and how sure it is."""

  config: DecoderConfig
  """Its `vocab_size` is 0: any tokenizer's."""
  marks: tuple[str, ...]
  """Keys of `MARKS`: of the shape and, where it differs, of its being the one
  that the paper's name means."""
  note: str
  """Where the shape comes from."""

  @property
  def mark(self) -> str:
    """Its marks as they are written: 'C, I'."""
    return ', '.join(self.marks)


def _llama(d_model: int, n_layers: int, **others) -> LlamaConfig:
  return LlamaConfig(
    d_model=d_model,
    n_layers=n_layers,
    n_heads=d_model // 64,
    d_ff=4 * d_model,
    dtype='bfloat16',
    **others,
  )


def _qwen2_moe(
  d_model: int,
  n_layers: int,
  n_experts: int = 64,
  dtype: str = 'bfloat16',
  **others,
) -> Qwen2MoeConfig:
  d_expert = d_model * 11 // 16
  return Qwen2MoeConfig(
    d_model=d_model,
    n_layers=n_layers,
    n_heads=d_model // 64,
    n_experts=n_experts,
    experts_per_token=4,
    d_expert=d_expert,
    d_shared=4 * d_expert,
    d_ff=4 * d_expert,  # Of a dense layer, of which there is none.
    dtype=dtype,
    **others,
  )


# Deep models are scanned: their compile time would grow with their depth. From
# 1B up what is cheap to compute again is not kept for the backward pass.
_DEEP: dict[str, Any] = {'scan_layers': True}
_LARGE = _DEEP | {'remat': 'minimal'}

_COUNT = 'gives the count of the name with the T5 vocabulary'
_OURS = "the published architecture's proportions at a size of ours"

PRESETS: dict[str, Preset] = {
  'llama_66m': Preset(_llama(512, 8), ('I',), _COUNT),
  'llama_0.2b': Preset(
    _llama(768, 16, **_DEEP),
    ('C', 'I'),
    "a shape in the authors' code that gives the count; d_model 1024 with 8 "
    'layers, also there, gives 200.0M',
  ),
  'llama_0.4b': Preset(_llama(1280, 12, **_DEEP), ('I',), _COUNT),
  'llama_1b': Preset(
    _llama(1600, 22, **_LARGE),
    ('I',),
    f'{_COUNT}; so does d_model 1664 with 20 layers',
  ),
  'llama_2b': Preset(_llama(2048, 28, **_LARGE), ('I',), _COUNT),
  'qwen2_moe_laptop': Preset(
    _qwen2_moe(128, 4, n_experts=16, dtype='float32'),
    ('?',),
    f'{_OURS}, with 16 experts in float32 for a CPU',
  ),
  'qwen2_moe_0.2b': Preset(_qwen2_moe(384, 8, **_DEEP), ('?',), _OURS),
  'qwen2_moe_0.5b': Preset(_qwen2_moe(512, 12, **_DEEP), ('?',), _OURS),
  'qwen2_moe_1b': Preset(_qwen2_moe(768, 11, **_LARGE), ('?',), _OURS),
  'qwen2_moe_2b': Preset(_qwen2_moe(1024, 13, **_LARGE), ('?',), _OURS),
}


def get(name: str, vocab: str = 't5') -> DecoderConfig:
  """Returns a preset's config.

  Args:
    name: One of `PRESETS`.
    vocab: One of `VOCABULARIES`. For another vocabulary, take
      `PRESETS[name].config`, whose `vocab_size` is unset.

  Raises:
    ValueError: a name is unknown; the message lists the known ones.
  """
  if name not in PRESETS:
    raise ValueError(
      f'there is no model {name!r}; the models are {", ".join(PRESETS)}'
    )
  if vocab not in VOCABULARIES:
    raise ValueError(
      f'there is no vocabulary {vocab!r}; the vocabularies are '
      f'{", ".join(VOCABULARIES)}'
    )
  return dataclasses.replace(
    PRESETS[name].config, vocab_size=VOCABULARIES[vocab].size
  )
