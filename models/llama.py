"""LLaMA: pre-norm decoder blocks of attention and SwiGLU.

Shape suffixes: B batch, T tokens, D model width.
"""

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from models.config import DecoderConfig
from models.decoder import Decoder
from models.layers import Attention, RMSNorm, SwiGLU


class Block(nnx.Module):
  """One decoder block."""

  def __init__(
    self, config: DecoderConfig, *, rngs: nnx.Rngs, mesh: Mesh | None
  ):
    c = config
    self.attention_norm = RMSNorm(c.d_model, c.norm_eps)
    self.attention = Attention(c, rngs=rngs, mesh=mesh)
    self.mlp_norm = RMSNorm(c.d_model, c.norm_eps)
    self.mlp = SwiGLU(c.d_model, c.d_ff, c.init_std, rngs=rngs, mesh=mesh)

  def __call__(self, x_BTD, angles, segments_BT, mask_BT):
    x_BTD += self.attention(self.attention_norm(x_BTD), angles, segments_BT)
    y_BTD, sums = self.feed_forward(self.mlp_norm(x_BTD), mask_BT)
    return x_BTD + y_BTD, sums

  def decode(self, x_BTD, angles, cache, layer):
    """As `__call__`, behind the tokens of a cache; see `Attention.decode`."""
    y_BTD, cache = self.attention.decode(
      self.attention_norm(x_BTD), angles, cache, layer
    )
    x_BTD += y_BTD
    everything_BT = jnp.ones(x_BTD.shape[:2], jnp.float32)
    y_BTD, _ = self.feed_forward(self.mlp_norm(x_BTD), everything_BT)
    return x_BTD + y_BTD, cache

  def feed_forward(self, x_BTD, mask_BT):
    """What follows attention, and a router's sums, if there is one."""
    del mask_BT  # Only routers count tokens.
    return self.mlp(x_BTD), None


class Llama(Decoder):
  """A LLaMA-style decoder, of a `LlamaConfig`."""

  def make_block(self, sparse: bool, rngs: nnx.Rngs) -> Block:
    """Every block is dense."""
    del sparse
    return Block(self.config, rngs=rngs, mesh=self.mesh)
