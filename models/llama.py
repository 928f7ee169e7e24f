"""LLaMA: pre-norm decoder blocks of attention and SwiGLU.

Shape suffixes: B batch, T tokens, D model width.
"""

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
    del mask_BT  # Only routers count tokens.
    x_BTD += self.attention(self.attention_norm(x_BTD), angles, segments_BT)
    return x_BTD + self.mlp(self.mlp_norm(x_BTD)), None

  def decode(self, x_BTD, angles, cache, layer):
    """As `__call__`, behind the tokens of a cache; see `Attention.decode`."""
    y_BTD, cache = self.attention.decode(
      self.attention_norm(x_BTD), angles, cache, layer
    )
    x_BTD += y_BTD
    return x_BTD + self.mlp(self.mlp_norm(x_BTD)), cache


class Llama(Decoder):
  """A LLaMA-style decoder, of a `LlamaConfig`."""

  def make_block(self, sparse: bool, rngs: nnx.Rngs) -> Block:
    """Every block is dense."""
    del sparse
    return Block(self.config, rngs=rngs, mesh=self.mesh)
