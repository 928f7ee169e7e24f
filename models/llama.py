"""LLaMA: pre-norm decoder blocks of attention and SwiGLU.

Shape suffixes: B batch, T tokens, D model width, V vocabulary.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from models.config import LlamaConfig
from models.layers import (
  Attention,
  RMSNorm,
  SwiGLU,
  normal_param,
  rotary_angles,
)


class Block(nnx.Module):
  """One decoder block."""

  def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
    c = config
    self.attention_norm = RMSNorm(c.d_model, c.norm_eps)
    self.attention = Attention(c, rngs=rngs)
    self.mlp_norm = RMSNorm(c.d_model, c.norm_eps)
    self.mlp = SwiGLU(c.d_model, c.d_ff, c.init_std, rngs=rngs)

  def __call__(self, x_BTD, cos, sin):
    x_BTD = x_BTD + self.attention(self.attention_norm(x_BTD), cos, sin)
    return x_BTD + self.mlp(self.mlp_norm(x_BTD))


class Llama(nnx.Module):
  """A LLaMA-style decoder.

  Args:
    config: Its shapes; `vocab_size` must be set.
    rngs: The `params` stream draws the initial parameters. They do not depend
      on `scan_layers`.
  """

  def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs):
    if not config.vocab_size:
      raise ValueError('model.vocab_size is 0: set the vocabulary first')
    c = self.config = config
    self.embedding = normal_param(rngs, (c.vocab_size, c.d_model), c.init_std)
    keys = jax.random.split(rngs.params(), c.n_layers)

    def block(key):
      return Block(c, rngs=nnx.Rngs(params=key))

    self.layers = (
      nnx.vmap(block)(keys) if c.scan_layers else nnx.List(map(block, keys))
    )
    self.norm = RMSNorm(c.d_model, c.norm_eps)
    self.head = (
      None
      if c.tie_embeddings
      else normal_param(rngs, (c.d_model, c.vocab_size), c.init_std)
    )

  def __call__(self, tokens_BT):
    """Scores every next token.

    Args:
      tokens_BT: int32 token ids (batch, length).

    Returns:
      float32 logits (batch, length, vocabulary); position t sees tokens up
      to t.
    """
    c = self.config
    cos, sin = rotary_angles(
      tokens_BT.shape[1], c.head_dim, c.rope_theta, c.rope_scaling
    )
    x_BTD = self.embedding[...].astype(c.dtype)[tokens_BT]
    if c.scan_layers:
      graph, stacked = nnx.split(self.layers)

      def step(x_BTD, layer):
        return nnx.merge(graph, layer)(x_BTD, cos, sin), None

      x_BTD, _ = jax.lax.scan(step, x_BTD, stacked)
    else:
      for block in self.layers:
        x_BTD = block(x_BTD, cos, sin)
    x_BTD = self.norm(x_BTD)
    head = self.embedding[...].T if self.head is None else self.head[...]
    return jnp.matmul(
      x_BTD, head.astype(c.dtype), preferred_element_type=jnp.float32
    )
