"""Qwen2-MoE: LLaMA's blocks with experts in the place of SwiGLU.

Shape suffixes: B batch, T tokens, D model width.
"""

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from models.config import Qwen2MoeConfig
from models.decoder import Decoder
from models.layers import Attention, RMSNorm
from models.llama import Block
from models.moe import Moe


class SparseBlock(nnx.Module):
  """One decoder block with experts."""

  def __init__(
    self, config: Qwen2MoeConfig, *, rngs: nnx.Rngs, mesh: Mesh | None
  ):
    c = config
    self.attention_norm = RMSNorm(c.d_model, c.norm_eps)
    self.attention = Attention(c, rngs=rngs, mesh=mesh)
    self.mlp_norm = RMSNorm(c.d_model, c.norm_eps)
    self.moe = Moe(c, rngs=rngs, mesh=mesh)

  def __call__(self, x_BTD, angles, segments_BT, mask_BT):
    x_BTD += self.attention(self.attention_norm(x_BTD), angles, segments_BT)
    y_BTD, sums = self.moe(self.mlp_norm(x_BTD), mask_BT)
    return x_BTD + y_BTD, sums

  def decode(self, x_BTD, angles, cache, layer):
    """As `__call__`, behind the tokens of a cache; see `Attention.decode`."""
    y_BTD, cache = self.attention.decode(
      self.attention_norm(x_BTD), angles, cache, layer
    )
    x_BTD += y_BTD
    everything = jnp.ones(x_BTD.shape[:2], jnp.float32)
    y_BTD, _ = self.moe(self.mlp_norm(x_BTD), everything)
    return x_BTD + y_BTD, cache


class Qwen2Moe(Decoder):
  """A Qwen2-MoE decoder, of a `Qwen2MoeConfig`."""

  config: Qwen2MoeConfig

  def make_block(self, sparse: bool, rngs: nnx.Rngs) -> nnx.Module:
    """Sparse layers have experts, others are LLaMA's."""
    if sparse:
      return SparseBlock(self.config, rngs=rngs, mesh=self.mesh)
    return Block(self.config, rngs=rngs, mesh=self.mesh)
