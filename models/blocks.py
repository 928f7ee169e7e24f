"""Which block of a decoder each parameter belongs to, for learning rates."""

from typing import Any

import jax
from flax import nnx

# By the parameter's name and, for some, that of the module that holds it.
_BLOCKS = {
  'embedding': 'embedding',  # A tied head too.
  'head': 'lm_head',
  'scale': 'norm',
  'attention.query': 'qk',
  'attention.key': 'qk',
  'attention.value': 'vo',
  'attention.out': 'vo',
  # [?] The paper's models have no biases: each goes with its matrix.
  'attention.query_bias': 'qk',
  'attention.key_bias': 'qk',
  'attention.value_bias': 'vo',
  'mlp.gate': 'ffn',
  'mlp.up': 'ffn',
  'mlp.down': 'ffn',
  'moe.gate': 'ffn',
  'moe.up': 'ffn',
  'moe.down': 'ffn',
  'shared.gate': 'ffn',
  'shared.up': 'ffn',
  'shared.down': 'ffn',
  # [?] The ratios were found on dense models: what steers experts goes with
  # them.
  'moe.router': 'ffn',
  'moe.shared_gate': 'ffn',
}


def blocks(model: nnx.Module) -> Any:
  """The block of each parameter.

  Args:
    model: Real, or abstract from `nnx.eval_shape`.

  Returns:
    A nested dict of 'norm', 'vo', 'ffn', 'qk', 'embedding' or 'lm_head', like
    `nnx.to_pure_dict` of the model's parameters.

  Raises:
    ValueError: a parameter is of no known block.
  """
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  return jax.tree_util.tree_map_with_path(lambda path, _: _find(path), params)


def _find(path: tuple[Any, ...]) -> str:
  *modules, name = (str(key.key) for key in path)
  held = '.'.join([*modules[-1:], name])
  for known in (held, name):
    if known in _BLOCKS:
      return _BLOCKS[known]
  raise ValueError(f'{".".join([*modules, name])} is of no known block')
