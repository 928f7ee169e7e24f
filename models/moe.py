"""Mixture of experts as in Qwen2-MoE: router, experts, shared expert, losses.

Shape suffixes: B batch, T tokens, D model width, E experts, k experts of a
token, F hidden width of an expert, L sparse layers.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from models.config import Qwen2MoeConfig
from models.experts import experts
from models.layers import SwiGLU, normal_param, product
from models.sharding import constrain, divided, island, spec


class RouterSums(NamedTuple):
  """What a router did: sums over the tokens of each sequence.

  Sums of several layers are stacked along a first axis L.
  """

  chosen_BE: jax.Array
  """How many tokens chose each expert, float32."""
  probability_BE: jax.Array
  """Of the probabilities; differentiable."""
  squared_log_z_B: jax.Array
  """Of the squared log-normalisers of the logits; differentiable."""
  entropy_B: jax.Array
  """Of the entropies of the probabilities, in nats."""


class Moe(nnx.Module):
  """Routed experts, and one that every token passes through a sigmoid gate."""

  def __init__(
    self, config: Qwen2MoeConfig, *, rngs: nnx.Rngs, mesh: Mesh | None
  ):
    c, std = config, config.init_std
    wide = (c.n_experts, c.d_model, c.d_expert)
    narrow = (c.n_experts, c.d_expert, c.d_model)
    into = ('experts', 'expert_embed', 'expert_mlp')
    out = ('experts', 'expert_mlp', 'expert_embed')
    self.router = normal_param(
      rngs, (c.d_model, c.n_experts), std, 'embed', 'router', is_cast=False
    )
    self.gate = normal_param(rngs, wide, std, *into)
    self.up = normal_param(rngs, wide, std, *into)
    self.down = normal_param(rngs, narrow, std, *out)
    self.shared = SwiGLU(c.d_model, c.d_shared, std, rngs=rngs, mesh=mesh)
    self.shared_gate = normal_param(
      rngs, (c.d_model, 1), std, 'embed', 'router'
    )
    self.config = config
    self.mesh = mesh

  def __call__(self, x_BTD, mask_BT) -> tuple[jax.Array, RouterSums]:
    """Sends every token through its experts.

    Args:
      x_BTD: The tokens.
      mask_BT: float32, 0 on padding, which the sums leave out.

    Returns:
      The sum of what the experts made of each token; and what the router did.
    """
    dtype = x_BTD.dtype
    weights_BTk, chosen_BTk, sums = self._route(self._logits(x_BTD), mask_BT)
    y_BTD = experts(
      x_BTD,
      chosen_BTk,
      weights_BTk,
      *(w[...].astype(dtype) for w in (self.gate, self.up, self.down)),
      mesh=self.mesh,
    )
    if self.config.d_shared:
      gate_BT1 = product(
        x_BTD, self.shared_gate[...], self.mesh, 'embed', 'router'
      )
      gate_BT1, shared_BTD = checkpoint_name(
        (gate_BT1, self.shared(x_BTD)), 'shared'
      )
      y_BTD += jax.nn.sigmoid(gate_BT1) * shared_BTD
    return y_BTD, sums

  def _route(self, logits_BTE, mask_BT):
    """`route` by each device for its own tokens.

    The compiler would gather the logits of all for `jax.lax.top_k`.
    """
    mesh = self.mesh
    local = functools.partial(route, config=self.config)
    if mesh is None or mesh.size == 1:
      return local(logits_BTE, mask_BT)
    tokens = spec(divided(mesh, len(logits_BTE), 'batch'), mesh=mesh)
    return island(local, mesh, in_specs=(tokens, tokens), out_specs=tokens)(
      logits_BTE, mask_BT
    )

  def _logits(self, x_BTD):
    """In float32 whatever the rest: a choice must not hang on rounding."""
    logits_BTE = jnp.matmul(
      x_BTD.astype(jnp.float32),
      self.router[...],
      precision=jax.lax.Precision.HIGHEST,
    )
    logits_BTE = constrain(logits_BTE, self.mesh, 'batch', 'length', 'router')
    return checkpoint_name(logits_BTE, 'router')


def route(logits_BTE, mask_BT, config: Qwen2MoeConfig):
  """Chooses the experts of each token.

  Softmax over all experts, then the largest of them, not renormalised unless
  the config says so.

  Args:
    logits_BTE: float32.
    mask_BT: float32, 0 on padding.
    config: The model.

  Returns:
    float32 weights (batch, length, k), int32 experts of that shape, and
    `RouterSums`.
  """
  probability_BTE = jax.nn.softmax(logits_BTE, axis=-1)
  weights_BTk, chosen_BTk = jax.lax.top_k(
    probability_BTE, config.experts_per_token
  )
  if config.renormalize:
    weights_BTk /= jnp.sum(weights_BTk, axis=-1, keepdims=True)
  log_z_BT = jax.nn.logsumexp(logits_BTE, axis=-1)
  entropy_BT = log_z_BT - jnp.sum(probability_BTE * logits_BTE, axis=-1)
  choices_BTE = jnp.sum(
    jax.nn.one_hot(chosen_BTk, config.n_experts, dtype=jnp.float32), axis=-2
  )
  sums = RouterSums(
    chosen_BE=jnp.einsum('bte,bt->be', choices_BTE, mask_BT),
    probability_BE=jnp.einsum('bte,bt->be', probability_BTE, mask_BT),
    squared_log_z_B=jnp.sum(jnp.square(log_z_BT) * mask_BT, axis=1),
    entropy_B=jax.lax.stop_gradient(jnp.sum(entropy_BT * mask_BT, axis=1)),
  )
  return weights_BTk, chosen_BTk, sums


def balance_loss(sums: RouterSums, tokens_B: jax.Array) -> jax.Array:
  """Switch Transformer's load-balancing loss (arXiv 2101.03961, equation 4).

  As transformers has it for Qwen2-MoE, on one sequence: fractions of tokens
  and mean probabilities are taken over all layers together, then multiplied,
  and summed over experts and the k choices. Sequences are then summed, so that
  splitting a batch into micro-batches changes nothing.

  Args:
    sums: Of all sparse layers: a first axis L.
    tokens_B: Tokens of each sequence that count.

  Returns:
    float32 scalar: the sum over sequences; 1 k each when all is balanced.
  """
  n_layers, _, n_experts = sums.chosen_BE.shape
  seen_B1 = jnp.maximum(tokens_B[:, None], 1) * max(n_layers, 1)
  fraction_BE = jnp.sum(sums.chosen_BE, axis=0) / seen_B1
  probability_BE = jnp.sum(sums.probability_BE, axis=0) / seen_B1
  return n_experts * jnp.sum(fraction_BE * probability_BE)


def z_loss(sums: RouterSums) -> jax.Array:
  """The router z-loss (arXiv 2202.08906, equation 5), mean of the layers.

  Args:
    sums: Of all sparse layers: a first axis L.

  Returns:
    float32 scalar: the sum over tokens.
  """
  n_layers = max(sums.squared_log_z_B.shape[0], 1)
  return jnp.sum(sums.squared_log_z_B) / n_layers
