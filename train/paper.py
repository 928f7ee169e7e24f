"""The paper's runs (arXiv 2505.24275): what it fixes, and what it leaves open.

Marks, as in `models/presets.py`: [P] printed in the paper, [C] read in the
authors' code, [?] not known, chosen here.

- Shapes have marks of their own, `presets.PRESETS[name].marks`.
- AdamW: b1 0.9, b2 0.95, weight decay 0.1 on every parameter, eps 1e-8, clip
  1.0 [P][C]; p = 1.2 [P].
- Learning rate: of the grid below [P]; 1e-3 for 0.2B on C4 at batch 512 [P];
  else [?] the grid's value nearest, in ratio, to 1e-3 times 768 / d_model.
- Warm-up: 1,000 steps [P].
- Tokens: about 20 a parameter [P], of all that the model has; whether of a
  mixture of experts all or the active ones [?].
- Evaluation: every 200 steps, on 100 micro-batches [C]; they have 32 x 256
  tokens, and come from 0.5 % of the documents [?].

- Sequences: of C4, each document cut at 257 tokens, not packed, padding ignored
  in the loss; of OpenWebText, random windows of the token stream [C]. Tokens
  are counted with the padding [?].
"""

import math
from collections.abc import Callable
from typing import NamedTuple

from models import accounting, presets
from train.config import Config, DataConfig, OptimizerConfig

TOKENS_PER_PARAMETER = 20
LEARNING_RATES = (1e-4, 2e-4, 3e-4, 6e-4, 1e-3, 1.5e-3)
# Of the shape that one is known of.
_KNOWN_RATE, _ITS_WIDTH = 1e-3, 768


class _Corpus(NamedTuple):
  vocabulary: str
  """Key of `presets.VOCABULARIES`, which has marks."""
  tokenizer: int
  """Tokens without padding."""
  batch_size: int
  cos_ratio: float
  """Of the learning rate, after a cosine."""
  layout: str
  """How documents become sequences."""


CORPORA = {
  # Batch [P][C], ratio and layout [C].
  'c4': _Corpus('t5', 32100, 512, 1 / 10, 'truncate'),
  # Batch [?], as many tokens as on C4; ratio and layout [C].
  'openwebtext': _Corpus('gpt2', 50257, 128, 1 / 20, 'random'),
}
# All but the one that is there for laptops.
NAMES = tuple(name for name in presets.PRESETS if 'laptop' not in name)


def config(name: str, corpus: str = 'c4', schedule: str = 'cos') -> Config:
  """Returns a run of the paper.

  Args:
    name: One of `NAMES`.
    corpus: One of `CORPORA`; any other text is treated as C4 is.
    schedule: 'cos' or 'wsd'; see `OptimizerConfig`.

  Raises:
    UserError: there is no such schedule.
  """
  text = CORPORA.get(corpus, CORPORA['c4'])
  vocabulary = presets.VOCABULARIES[text.vocabulary]
  model = presets.get(name, text.vocabulary)
  tokens = TOKENS_PER_PARAMETER * accounting.parameters(model).total
  return Config(
    model=model,
    data=DataConfig(
      corpus=corpus,
      vocab_size=text.tokenizer,
      layout=text.layout,
      sequence_length=vocabulary.length,
      batch_size=text.batch_size,
      validation_fraction=0.005,
      validation_tokens=100 * 32 * 256,
      repeat=False,
    ),
    optimizer=OptimizerConfig(
      power=1.2,
      learning_rate=_learning_rate(model.d_model),
      schedule=schedule,
      final_lr_ratio=text.cos_ratio if schedule == 'cos' else 1 / 10,  # [C]
      warmup_steps=1000,
      b1=0.9,
      b2=0.95,
      eps=1e-8,
      weight_decay=0.1,
      clip_norm=1.0,
    ),
    steps=math.ceil(tokens / (text.batch_size * vocabulary.length)),
    eval_every=200,
    save_every=1000,
  )


def _learning_rate(d_model: int) -> float:
  wanted = _KNOWN_RATE * _ITS_WIDTH / d_model
  return min(LEARNING_RATES, key=lambda rate: abs(math.log(rate / wanted)))


def _recipe(name: str) -> Callable[..., Config]:
  def recipe(corpus: str = 'c4', schedule: str = 'cos') -> Config:
    return config(name, corpus, schedule)

  preset = presets.PRESETS[name]
  recipe.__name__ = recipe.__qualname__ = name
  recipe.__doc__ = f"""The paper's protocol at a shape [{preset.mark}].

  {preset.note}

  Args:
    corpus: 'c4' or 'openwebtext'.
    schedule: 'cos' or 'wsd'.
  """
  return recipe


RECIPES = {name: _recipe(name) for name in NAMES}
