"""The paper's protocol at sizes that a laptop can train: the ladder.

What the paper fixes is kept (`train/paper.py`): AdamW's constants, 20 tokens a
parameter, warm-up over a thirtieth of the steps, the final learning rate, a
SwiGLU of 4 d_model, cosine for dense models and 'wsd' for experts. What has to
shrink is ours: vocabulary, length, batch, width of a head, and with them the
learning rate, for AdamW alone the best of a grid at `dense_0.25m`
(docs/lab-log.md) and else that over the width. Without the power: arms of a
comparison add it.
"""

import math
from collections.abc import Callable

from models import accounting
from models.config import DecoderConfig, LlamaConfig, Qwen2MoeConfig
from train import paper
from train.config import Config, DataConfig, OptimizerConfig

VOCABULARY = 512
"""Tokens of a byte-level BPE, trained on the text."""
_WARMUP = 1 / 30  # 1,000 of about 30,000 steps: 0.2B at batch 512 [P].
_EVALUATIONS = 8
_KNOWN_RATE, _ITS_WIDTH = 8e-3, 64


def _dense(d_model: int, n_layers: int) -> LlamaConfig:
  return LlamaConfig(
    vocab_size=VOCABULARY,
    d_model=d_model,
    n_layers=n_layers,
    n_heads=d_model // 32,
    d_ff=4 * d_model,
  )


def _sparse(d_model: int, n_layers: int) -> Qwen2MoeConfig:
  return Qwen2MoeConfig(
    vocab_size=VOCABULARY,
    d_model=d_model,
    n_layers=n_layers,
    n_heads=d_model // 32,
    n_experts=8,
    experts_per_token=2,
    d_expert=d_model,
    d_shared=2 * d_model,
  )


_MODELS: dict[str, Callable[[], DecoderConfig]] = {
  'dense_0.1m': lambda: _dense(32, 4),
  'dense_0.25m': lambda: _dense(64, 3),
  'dense_0.5m': lambda: _dense(96, 3),
  'dense_1m': lambda: _dense(128, 4),
  'moe_0.2m': lambda: _sparse(32, 4),
  'moe_0.35m': lambda: _sparse(64, 2),
  'moe_0.8m': lambda: _sparse(96, 2),
}
NAMES = tuple(_MODELS)
DENSE = tuple(name for name in NAMES if name.startswith('dense'))
SPARSE = tuple(name for name in NAMES if name.startswith('moe'))


def config(name: str, schedule: str | None = None) -> Config:
  """Returns a run of the ladder, on the demo's corpus unless told otherwise.

  Args:
    name: One of `NAMES`.
    schedule: 'cos' or 'wsd'; None for 'cos' without and 'wsd' with experts.

  Raises:
    UserError: there is no such schedule.
  """
  model = _MODELS[name]()
  batch, length = 16, 128
  tokens = paper.TOKENS_PER_PARAMETER * accounting.parameters(model).total
  steps = math.ceil(tokens / (batch * length))
  return Config(
    model=model,
    data=DataConfig(
      vocab_size=VOCABULARY,
      sequence_length=length,
      batch_size=batch,
      validation_fraction=0.05,
      validation_tokens=2**18,
    ),
    optimizer=OptimizerConfig(
      power=1.0,
      learning_rate=_KNOWN_RATE * _ITS_WIDTH / model.d_model,
      schedule=schedule or ('cos' if name in DENSE else 'wsd'),
      final_lr_ratio=1 / 10,
      warmup_steps=round(_WARMUP * steps),
      b1=0.9,
      b2=0.95,
      eps=1e-8,
      weight_decay=0.1,
      clip_norm=1.0,
    ),
    steps=steps,
    eval_every=math.ceil(steps / _EVALUATIONS),
    save_every=math.ceil(steps / _EVALUATIONS),
  )


def _recipe(name: str) -> Callable[..., Config]:
  def recipe(schedule: str | None = None) -> Config:
    return config(name, schedule)

  kind = 'LLaMA' if name in DENSE else 'Qwen2-MoE'
  recipe.__name__ = recipe.__qualname__ = name
  recipe.__doc__ = f"""The paper's protocol at a laptop's size: a {kind}, AdamW.

  Args:
    schedule: 'cos' or 'wsd'.
  """
  return recipe


RECIPES = {name: _recipe(name) for name in NAMES}
