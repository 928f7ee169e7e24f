"""Generates tokens one by one, keys and values of those before in a cache.

Shape suffixes: B batch, T tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from models.decoder import Decoder
from train.errors import UserError

# Of a long prompt so many tokens are read at once: a decoder returns the
# logits of all of them.
_CHUNK = 256
_NEVER = -jnp.inf
_DIVERGED = -1


def generate(
  model: Decoder,
  prompt: Sequence[int],
  tokens: int,
  *,
  temperature: float = 1.0,
  top_p: float = 1.0,
  seed: int = 0,
  allowed_V: np.ndarray | None = None,
) -> Iterator[int]:
  """Continues a prompt. Programs are compiled before this returns.

  Args:
    model: Scores the tokens; its layers should not be stacked, or every step
      unstacks them.
    prompt: Token ids, at least one.
    tokens: How many to generate, at least one.
    temperature: See `next_token`.
    top_p: See `next_token`.
    seed: In [0, 2**32). The token at a position depends on it, the position
      and the logits.
    allowed_V: bool, the ids that may be generated; all if left out.

  Returns:
    An iterator over the generated ids.

  Raises:
    UserError: from the iterator, where the logits are not finite; at once,
      where the memory does not suffice.
  """
  graph, params = nnx.split(model)
  if allowed_V is None:
    allowed_V = np.ones(model.config.vocab_size, bool)

  def advance(params, key, tokens_T, cache):
    """Reads tokens; returns the one after them as an array of length 1."""
    logits_BTV, cache = nnx.merge(graph, params).decode(tokens_T[None], cache)
    token = next_token(
      jnp.where(allowed_V, logits_BTV[0, -1], _NEVER),
      jax.random.fold_in(key, cache.length),
      temperature=temperature,
      top_p=top_p,
    )
    finite = jnp.isfinite(jnp.max(logits_BTV[0, -1]))
    return jnp.where(finite, token, _DIVERGED)[None], cache

  key = jax.random.key(seed)
  prompt_T = jnp.asarray(prompt, jnp.int32)
  chunks = [prompt_T[at : at + _CHUNK] for at in range(0, len(prompt), _CHUNK)]
  # The last token generated is read by nobody.
  room = len(prompt) + tokens - 1
  try:
    cache = jax.jit(lambda: model.init_cache(1, room))()
    program = jax.jit(advance, donate_argnames='cache')
    programs = {
      length: program.lower(
        params, key, jax.ShapeDtypeStruct((length,), jnp.int32), cache
      ).compile()
      for length in {*map(len, chunks), 1}
    }
    for chunk_T in chunks:
      token_T, cache = programs[len(chunk_T)](params, key, chunk_T, cache)
    jax.block_until_ready(token_T)
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    raise UserError(
      f'not enough memory for {room + 1:,} tokens: lower --tokens or shorten '
      'the prompt'
    ) from error

  def steps(token_T, cache):
    for count in range(1, tokens + 1):
      if (token := int(token_T[0])) == _DIVERGED:
        raise UserError(
          "the model's logits are not finite: its training has diverged"
        )
      yield token
      if count < tokens:
        token_T, cache = programs[1](params, key, token_T, cache)

  return steps(token_T, cache)


def next_token(
  logits_V: jax.Array, key: jax.Array, *, temperature: float, top_p: float
) -> jax.Array:
  """Draws a token.

  Args:
    logits_V: float32; -inf for what must not be drawn.
    key: Of `jax.random`.
    temperature: Logits are divided by it; 0 takes the likeliest token.
    top_p: In (0, 1]. Only the nucleus is drawn from: the fewest likeliest
      tokens whose probability, at this temperature, reaches top_p.

  Returns:
    int32 scalar.
  """
  if temperature == 0:
    return jnp.argmax(logits_V).astype(jnp.int32)
  # It and its inverse are normal float32: no 0 / 0, no inf / inf.
  divisor = min(max(temperature, 1e-37), 1e37)
  scaled_V = (logits_V - jnp.max(logits_V)) / divisor
  if top_p < 1:
    scaled_V = jnp.where(nucleus(scaled_V, top_p), scaled_V, _NEVER)
  return jax.random.categorical(key, scaled_V).astype(jnp.int32)


def nucleus(logits_V: jax.Array, top_p: float) -> jax.Array:
  """Marks the fewest likeliest tokens whose probability reaches top_p.

  Args:
    logits_V: float32.
    top_p: In (0, 1).

  Returns:
    bool (V,), at least one true; of equally likely tokens the first come first.
  """
  order_V = jnp.argsort(-logits_V, stable=True)
  probabilities_V = jax.nn.softmax(logits_V[order_V])
  before_V = jnp.cumsum(probabilities_V)[:-1]  # Of a token but the first.
  kept_V = jnp.concatenate([jnp.ones(1, bool), before_V < top_p])
  return jnp.zeros_like(kept_V).at[order_V].set(kept_V)
