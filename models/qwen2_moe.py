"""Qwen2-MoE: LLaMA's blocks with experts in the place of SwiGLU.

Shape suffixes: B batch, T tokens, D model width.
"""

from flax import nnx
from jax.sharding import Mesh

from models.config import Qwen2MoeConfig
from models.decoder import Decoder
from models.layers import Attention, RMSNorm
from models.llama import Block
from models.moe import Moe


class SparseBlock(Block):
  """One decoder block with experts in the place of its SwiGLU layer."""

  def __init__(
    self, config: Qwen2MoeConfig, *, rngs: nnx.Rngs, mesh: Mesh | None
  ):
    c = config
    self.attention_norm = RMSNorm(c.d_model, c.norm_eps)
    self.attention = Attention(c, rngs=rngs, mesh=mesh)
    self.mlp_norm = RMSNorm(c.d_model, c.norm_eps)
    self.moe = Moe(c, rngs=rngs, mesh=mesh)

  def feed_forward(self, x_BTD, mask_BT):
    """The experts, and what the router did."""
    return self.moe(x_BTD, mask_BT)


class Qwen2Moe(Decoder):
  """A Qwen2-MoE decoder, of a `Qwen2MoeConfig`."""

  config: Qwen2MoeConfig

  def make_block(self, sparse: bool, rngs: nnx.Rngs) -> nnx.Module:
    """Sparse layers have experts, others are LLaMA's."""
    if sparse:
      return SparseBlock(self.config, rngs=rngs, mesh=self.mesh)
    return Block(self.config, rngs=rngs, mesh=self.mesh)
