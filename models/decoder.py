"""A decoder: embedding, pre-norm blocks unrolled or scanned, head, losses.

Shape suffixes: B batch, T tokens, D model width, V vocabulary, E experts, L
layers.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from models import moe
from models.config import DecoderConfig, Qwen2MoeConfig
from models.layers import Cache, RMSNorm, normal_param, rotary_angles
from models.loss import cross_entropy
from models.sharding import constrain, pinned


class Group(NamedTuple):
  """Consecutive layers that repeat a pattern of dense and sparse ones."""

  pattern: tuple[bool, ...]
  """Whether each layer of the pattern is sparse."""
  repeats: int
  """How often the pattern comes."""


class LossSums(NamedTuple):
  """A batch's losses as sums: those of micro-batches add up."""

  loss: jax.Array
  """Cross-entropy and z-loss, weighted, over tokens, in nats; float32 as all
  here. This and the losses of routers are differentiable, the rest is not."""
  cross_entropy: jax.Array
  """The first of these alone."""
  squared_log_z: jax.Array
  """Of the logits' squared log-normalisers, weighted, over tokens."""
  weight: jax.Array
  """Of all tokens."""
  sequences: jax.Array
  """How many have a token of weight."""
  tokens: jax.Array
  """How many have weight."""
  balance: jax.Array
  """`models.moe.balance_loss`, over sequences; 0 without experts, as below."""
  router_squared_log_z: jax.Array
  """Over tokens, the mean of layers."""
  expert_choices_LE: jax.Array
  """How many tokens chose each expert of each sparse layer."""
  router_entropy_L: jax.Array
  """Over tokens, in nats."""


class Decoder(nnx.Module):
  """What LLaMA and Qwen2-MoE share; they differ in their blocks.

  Args:
    config: Its shapes; `vocab_size` must be set.
    rngs: The `params` stream draws the initial parameters. They do not depend
      on `scan_layers`.
    mesh: Where it will run, which chooses kernels and how activations are
      split; None for one device and kernels that run anywhere.
  """

  def __init__(
    self, config: DecoderConfig, *, rngs: nnx.Rngs, mesh: Mesh | None = None
  ):
    if not config.vocab_size:
      raise ValueError('model.vocab_size is 0: set the vocabulary first')
    c = self.config = config
    self.mesh = mesh
    # `models.huggingface.load` puts here what its `save` writes back.
    self.facts: Any = None
    table = c.vocab_size, c.d_model
    self.embedding = normal_param(
      rngs, table, c.init_std, 'vocab', 'embed', is_cast=False
    )
    keys = jax.random.split(rngs.params(), c.n_layers)

    def block(sparse: bool):
      return lambda key: self.make_block(sparse, nnx.Rngs(params=key))

    if c.scan_layers:
      groups, first = [], 0
      for pattern, repeats in layer_groups(c):
        last = first + len(pattern) * repeats
        groups.append(
          nnx.List(
            nnx.vmap(block(sparse))(keys[first + slot : last : len(pattern)])
            for slot, sparse in enumerate(pattern)
          )
        )
        first = last
      self.layers = nnx.List(groups)
    else:
      self.layers = nnx.List(
        block(c.is_sparse(layer))(key) for layer, key in enumerate(keys)
      )
    self.norm = RMSNorm(c.d_model, c.norm_eps)
    self.head = (
      None
      if c.tie_embeddings
      else normal_param(
        rngs, (c.d_model, c.vocab_size), c.init_std, 'embed', 'vocab'
      )
    )

  def make_block(self, sparse: bool, rngs: nnx.Rngs) -> nnx.Module:
    """A block: (x_BTD, angles, segments_BT, mask_BT) to (x_BTD, RouterSums)."""
    raise NotImplementedError

  def __call__(self, tokens_BT, positions_BT=None, segments_BT=None):
    """Scores every next token.

    Args:
      tokens_BT: int32 token ids (batch, length), in [0, vocabulary).
      positions_BT: int32 positions of the rotary embedding; 0, 1, ... if left
        out.
      segments_BT: int32 ids of packed documents: a token sees only those of
        its own. Left out, each sequence is one document.

    Returns:
      float32 logits (batch, length, vocabulary); position t sees tokens up
      to t.
    """
    mask_BT = jnp.ones(tokens_BT.shape, jnp.float32)
    x_BTD, _ = self._hidden(tokens_BT, positions_BT, segments_BT, mask_BT)
    return self._logits(x_BTD)

  def loss_sums(
    self,
    tokens_BT,
    targets_BT,
    weights_BT=None,
    positions_BT=None,
    segments_BT=None,
  ) -> LossSums:
    """All losses of a batch, without ever holding its logits.

    Args:
      tokens_BT: int32 token ids (batch, length).
      targets_BT: int32, the token after each.
      weights_BT: float32 weight of each target in the loss, 0 on padding; 1 if
        left out. Routers count the tokens whose weight is not 0.
      positions_BT: As in `__call__`.
      segments_BT: As in `__call__`.

    Returns:
      Sums, which `total_loss` makes a loss of.
    """
    if weights_BT is None:
      weights_BT = jnp.ones(tokens_BT.shape, jnp.float32)
    mask_BT = (weights_BT != 0).astype(jnp.float32)
    x_BTD, router = self._hidden(tokens_BT, positions_BT, segments_BT, mask_BT)
    loss, nll, squared_log_z = cross_entropy(
      x_BTD,
      self._head(x_BTD.dtype),
      targets_BT,
      weights_BT,
      z_weight=self.config.z_loss,
      mesh=self.mesh,
    )
    counts = count_targets(weights_BT)
    if router is None:
      empty_LBE = jnp.zeros((0, tokens_BT.shape[0], 0), jnp.float32)
      empty_LB = empty_LBE.sum(axis=-1)
      router = moe.RouterSums(empty_LBE, empty_LBE, empty_LB, empty_LB)
    return LossSums(
      loss=loss,
      cross_entropy=nll,
      squared_log_z=squared_log_z,
      **counts,
      balance=moe.balance_loss(router, jnp.sum(mask_BT, axis=1)),
      router_squared_log_z=moe.z_loss(router),
      expert_choices_LE=jnp.sum(router.chosen_BE, axis=1),
      router_entropy_L=jnp.sum(router.entropy_B, axis=1),
    )

  def init_cache(self, batch: int, length: int) -> Cache:
    """An empty cache.

    Args:
      batch: Sequences.
      length: Tokens that it has room for.
    """
    c = self.config
    shape = (c.n_layers, batch, length, c.kv_heads, c.head_dim)
    keys, values = (jnp.zeros(shape, c.dtype) for _ in range(2))
    return Cache(keys, values, jnp.zeros((), jnp.int32))

  def decode(self, tokens_BT, cache: Cache) -> tuple[jax.Array, Cache]:
    """Scores the tokens after new ones, which may be a prompt or a single one.

    Args:
      tokens_BT: int32 token ids (batch, length), which follow those cached.
      cache: From `init_cache`, with room for them, or from the call before.

    Returns:
      float32 logits (batch, length, vocabulary), as `__call__` gives for all
      tokens so far, NaN where the cache had no room; and the cache with the
      new tokens.

    Raises:
      ValueError: the cache is shorter than the new tokens.
    """
    room = cache.keys_LBSKH.shape[2]
    if tokens_BT.shape[1] > room:
      raise ValueError(
        f'{tokens_BT.shape[1]} tokens for a cache that has room for {room}'
      )
    positions = cache.length + jnp.arange(tokens_BT.shape[1])
    angles = self._angles(positions[None, :])
    x_BTD = self._embed(tokens_BT)
    for layer, block in enumerate(self._blocks()):
      x_BTD, cache = block.decode(x_BTD, angles, cache, layer)
    cache = cache._replace(length=cache.length + tokens_BT.shape[1])
    logits_BTV = self._logits(self.norm(x_BTD))
    return jnp.where(cache.length <= room, logits_BTV, jnp.nan), cache

  def _embed(self, tokens_BT):
    table_VD = constrain(self.embedding[...], self.mesh, 'vocab', 'embed')
    # A device looks up its part of the width for the tokens of all that have
    # the other parts; then rows travel, and so do their gradients. Gathering
    # the table, and reducing its whole gradient, would move more.
    tokens_BT = constrain(tokens_BT, self.mesh, 'rows', 'length')
    # Rows are cast, not the table: the gradient of a frequent token's row is a
    # sum that bfloat16 would lose.
    x_BTD = table_VD[tokens_BT].astype(self.config.dtype)
    x_BTD = constrain(x_BTD, self.mesh, 'rows', 'length', 'embed')
    return constrain(x_BTD, self.mesh, 'batch', 'length', 'width')

  def _angles(self, positions_BT):
    c = self.config
    return rotary_angles(positions_BT, c.head_dim, c.rope_theta, c.rope_scaling)

  def _hidden(self, tokens_BT, positions_BT, segments_BT, mask_BT):
    """What the head sees; and the routers' sums, None if there are none."""
    if positions_BT is None:
      positions_BT = jnp.arange(tokens_BT.shape[1])[None, :]
    context = self._angles(positions_BT), segments_BT, mask_BT
    x_BTD = self._embed(tokens_BT)
    sums = []
    if self.config.scan_layers:
      for group in self.layers:
        x_BTD, sums_of_slots = self._scan(group, x_BTD, context)
        if sums_of_slots:  # (repeats, ...) each: back to the layers' order.
          sums.append(
            jax.tree.map(
              lambda *s: jnp.stack(s, axis=1).reshape(-1, *s[0].shape[1:]),
              *sums_of_slots,
            )
          )
    else:
      for block in self.layers:
        graph, params = nnx.split(block)
        x_BTD, own = self._remat(graph)(params, x_BTD, context)
        if own is not None:
          sums.append(jax.tree.map(lambda s: s[None], own))
    router = (
      jax.tree.map(lambda *s: jnp.concatenate(s), *sums) if sums else None
    )
    return self.norm(x_BTD), router

  def _scan(self, group, x_BTD, context):
    graphs, stacked = zip(*(nnx.split(slot) for slot in group), strict=True)

    def step(x_BTD, params_of_slots):
      sums = []
      for graph, params in zip(graphs, params_of_slots, strict=True):
        x_BTD, own = self._remat(graph)(params, x_BTD, context)
        if own is not None:
          sums.append(own)
      return x_BTD, sums

    return jax.lax.scan(step, x_BTD, stacked)

  def _remat(self, graph):
    """A block as a function of its parameters, by the config's policy."""
    c = self.config

    def apply(params, x_BTD, context):
      block = pinned(nnx.merge(graph, params), self.mesh)
      x_BTD, sums = block(x_BTD, *context)
      return constrain(x_BTD, self.mesh, 'batch', 'length', 'width'), sums

    if c.remat == 'none':
      return apply
    policy = jax.checkpoint_policies.save_only_these_names(*c.saved_names)
    return jax.checkpoint(apply, policy=policy, prevent_cse=not c.scan_layers)

  def _blocks(self) -> Iterator[Any]:
    """The blocks, one by one."""
    if not self.config.scan_layers:
      yield from self.layers
      return
    for group, slot, index in layer_places(self.config):
      graph, stacked = nnx.split(self.layers[group][slot])
      yield nnx.merge(graph, jax.tree.map(lambda x, i=index: x[i], stacked))

  def _head(self, dtype):
    head = self.embedding[...].T if self.head is None else self.head[...]
    return head.astype(dtype)

  def _logits(self, x_BTD):
    logits_BTV = jnp.matmul(
      x_BTD, self._head(x_BTD.dtype), preferred_element_type=jnp.float32
    )
    return constrain(logits_BTV, self.mesh, 'batch', 'length', 'vocab')


def count_targets(weights_BT: jax.Array) -> dict[str, jax.Array]:
  """What the losses of a batch are divided by, from its weights alone.

  Args:
    weights_BT: As in `Decoder.loss_sums`.

  Returns:
    'weight', 'sequences' and 'tokens' of `LossSums`.
  """
  tokens_B = jnp.sum((weights_BT != 0).astype(jnp.float32), axis=1)
  return {
    'weight': jnp.sum(weights_BT),
    'sequences': jnp.sum(tokens_B > 0).astype(jnp.float32),
    'tokens': jnp.sum(tokens_B),
  }


def total_loss(sums: LossSums, config: DecoderConfig) -> jax.Array:
  """What training minimises, from the sums of a whole batch.

  Args:
    sums: Of the batch, or of its micro-batches added up.
    config: Holds the weights of the auxiliary losses.

  Returns:
    float32 scalar, nats a token.
  """
  total = sums.loss / _at_least_one(sums.weight)
  if isinstance(config, Qwen2MoeConfig):
    losses = mean_losses(sums, config)
    total += config.balance_loss * losses['balance_loss']
    total += config.router_z_loss * losses['router_z_loss']
  return total


def mean_losses(sums: LossSums, config: DecoderConfig) -> dict[str, jax.Array]:
  """Each loss by itself, and what the routers did.

  Args:
    sums: Of the batch, or of its micro-batches added up.
    config: The model's.

  Returns:
    'loss', the cross-entropy in nats a token; with `z_loss`, 'z_loss', the
    mean squared log-normaliser, not weighted; with experts, likewise
    'balance_loss' and 'router_z_loss', and by sparse layer 'expert_load'
    (L, E), how many tokens chose an expert over how many would if all were
    chosen alike, and 'router_entropy' (L,) in nats a token. All float32.
  """
  weight = _at_least_one(sums.weight)
  losses = {'loss': sums.cross_entropy / weight}
  if config.z_loss:
    losses['z_loss'] = sums.squared_log_z / weight
  if isinstance(config, Qwen2MoeConfig):
    choices_LE = sums.expert_choices_LE
    mean_L1 = jnp.mean(choices_LE, axis=1, keepdims=True)
    tokens = _at_least_one(sums.tokens)
    losses |= {
      'balance_loss': sums.balance / _at_least_one(sums.sequences),
      'router_z_loss': sums.router_squared_log_z / tokens,
      'expert_load': choices_LE / _at_least_one(mean_L1),
      'router_entropy': sums.router_entropy_L / tokens,
    }
  return losses


def _at_least_one(count):
  """Of nothing, the mean is 0."""
  return jnp.where(count == 0, 1, count)


def layer_groups(config: DecoderConfig) -> list[Group]:
  """The layers as few scans: the longest repetition, from the first layer on.

  Dense and sparse layers in turn are one group of two; a dense layer before
  sparse ones is a group of its own.
  """
  kinds = [config.is_sparse(layer) for layer in range(config.n_layers)]
  groups, first = [], 0
  while first < len(kinds):
    best = Group((kinds[first],), 1)
    for period in range(1, (len(kinds) - first) // 2 + 1):
      pattern = kinds[first : first + period]
      repeats = 1
      while pattern == kinds[(at := first + period * repeats) : at + period]:
        repeats += 1
      if repeats > 1 and period * repeats > len(best.pattern) * best.repeats:
        best = Group(tuple(pattern), repeats)
    groups.append(best)
    first += len(best.pattern) * best.repeats
  return groups


def layer_places(config: DecoderConfig) -> list[tuple[int, int, int]]:
  """Where each layer lies when scanned: group, slot, index in the stack."""
  return [
    (number, slot, index)
    for number, group in enumerate(layer_groups(config))
    for index in range(group.repeats)
    for slot in range(len(group.pattern))
  ]


def unstacked(layers: Any, config: DecoderConfig) -> dict[int, Any]:
  """The parameters of each layer by its number.

  Args:
    layers: The 'layers' of a model's nested dict of parameters, stacked if the
      config says so.
    config: The model's.
  """
  if not config.scan_layers:
    return {i: layers[i] for i in range(config.n_layers)}
  return {
    i: jax.tree.map(lambda x, at=index: x[at], layers[group][slot])
    for i, (group, slot, index) in enumerate(layer_places(config))
  }
