"""Named runs: functions that return a config. Copy one to make your own.

A recipe may take `corpus` and `schedule`, where other settings depend on them:
the command line then passes `--data.corpus` and `--optimizer.schedule` to it.
All other options change a field of what it returns, and nothing else.
"""

import dataclasses
import inspect
from collections.abc import Callable

from models.config import LlamaConfig, Qwen2MoeConfig
from train import ladder, paper
from train.config import Config, DataConfig, OptimizerConfig
from train.errors import UserError


def demo() -> Config:
  """1.3M parameters on Wikipedia's lead sections: minutes on two CPU cores."""
  return Config(
    model=LlamaConfig(d_model=128, n_layers=3, n_heads=4, d_ff=512),
    data=DataConfig(vocab_size=2048, sequence_length=128, batch_size=16),
    optimizer=OptimizerConfig(
      power=1.2, learning_rate=3e-3, schedule='wsd', warmup_steps=40
    ),
    steps=400,
    eval_every=40,
    save_every=40,
  )


def demo_moe() -> Config:
  """The demo with 16 small experts a layer, of which each token uses 4."""
  return dataclasses.replace(
    demo(),
    model=Qwen2MoeConfig(
      d_model=128,
      n_layers=3,
      n_heads=4,
      n_experts=16,
      experts_per_token=4,
      d_expert=96,
      d_shared=384,
    ),
  )


RECIPES: dict[str, Callable[..., Config]] = {
  'demo': demo,
  'demo_moe': demo_moe,
  **ladder.RECIPES,
  **paper.RECIPES,
}


def get(name: str, **choices: str | None) -> Config:
  """Returns the config of a recipe.

  Args:
    name: One of `RECIPES`.
    **choices: What a recipe may take: its corpus, its schedule. It gets those
      that it takes and that are not None.

  Raises:
    UserError: there is no such recipe, or it refuses a choice.
  """
  if name not in RECIPES:
    raise UserError(f'no recipe {name!r}; there are: {", ".join(RECIPES)}')
  recipe = RECIPES[name]
  taken = inspect.signature(recipe).parameters
  return recipe(
    **{
      choice: value
      for choice, value in choices.items()
      if choice in taken and value is not None
    }
  )
