"""The ragged all-to-all where XLA has none."""

import functools

import jax.numpy as jnp
from jax import lax


def emulated(operand, output, starts, sizes, places, arriving, *, axis_name):
  """`jax.lax.ragged_all_to_all` from its documentation, by an all-gather."""
  gather = functools.partial(lax.all_gather, axis_name=axis_name)
  operands, starts, sizes, places = map(
    gather, (operand, starts, sizes, places)
  )
  ranks, slices = sizes.shape
  each = slices // ranks
  mine = lax.axis_index(axis_name) * each + jnp.arange(each)
  row = jnp.arange(len(output))
  for source in range(ranks):
    for j in range(each):
      start, size, place = (a[source, mine[j]] for a in (starts, sizes, places))
      inside = (row >= place) & (row < place + size)
      sent = operands[source].at[start + row - place].get(mode='clip')
      output = jnp.where(inside[:, None], sent, output)
      # The receiver must expect what the source sends.
      right = arriving[source * each + j] == size
      output = jnp.where(right, output, jnp.nan)
  return output
