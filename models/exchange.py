"""The all-to-all of expert parallelism: tokens to their experts and back.

Shape suffixes: R ranks of the mesh axis, E experts of all ranks, L = E / R of
one rank, M rows of a rank's own tokens, S rows that a rank may receive, C rows
that one rank may send another, D width of a row.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Route(NamedTuple):
  """Which rows go where, as one rank of the axis sees it.

  A rank's own rows are sorted by expert. What it receives is sorted by expert
  as well, and within an expert by the rank that sent it: a slice of rows has
  one source and one expert.
  """

  own_RE: jax.Array
  """Where a slice begins among the rows of its source."""
  sent_RE: jax.Array
  """Where it begins among the rows that the expert's rank receives."""
  sizes_RE: jax.Array
  """Its rows."""

  @property
  def received(self) -> jax.Array:
    """Rows of each expert of this rank, (L,)."""
    return jnp.sum(_mine(self.sizes_RE), axis=0)


def plan(sizes_E: jax.Array) -> Route:
  """Agrees on the route; to be called inside `jax.shard_map`.

  Args:
    sizes_E: int32, rows of this rank for each expert of all ranks.
  """
  sizes_RE = lax.all_gather(sizes_E, 'expert')
  ranks, experts = sizes_RE.shape
  # Rows reach a rank in the order of (expert, source).
  sizes_RLR = sizes_RE.T.reshape(ranks, -1)
  sent_RLR = jnp.cumsum(sizes_RLR, axis=1) - sizes_RLR
  return Route(
    own_RE=jnp.cumsum(sizes_RE, axis=1) - sizes_RE,
    sent_RE=sent_RLR.reshape(experts, ranks).T,
    sizes_RE=sizes_RE,
  )


def dispatch(
  x_MD: jax.Array, route: Route, *, most: int, platform: str
) -> jax.Array:
  """Sends rows to the ranks of their experts; differentiable in the rows.

  On 'tpu' and 'gpu' by `jax.lax.ragged_all_to_all`: only rows that exist
  travel. It is compiled ahead of time for a TPU by a test, and `not run` on a
  device. XLA's CPU backend does not implement it: there every pair of ranks
  exchanges the most rows that it may have, by `jax.lax.all_to_all`.

  Args:
    x_MD: This rank's rows, sorted by expert; those beyond the sizes of the
      route stay.
    route: From `plan`.
    most: C, the most rows that one rank may have for another. More are lost.
    platform: 'cpu', 'gpu' or 'tpu'.

  Returns:
    (R * C, D): the rows for this rank's experts, sorted by expert, then zeros.
  """
  return _move(x_MD, route, False, x_MD.shape[0], most, platform)


def combine(
  y_SD: jax.Array, route: Route, *, rows: int, most: int, platform: str
) -> jax.Array:
  """The way back: what `dispatch` received returns to the ranks it came from.

  Args:
    y_SD: Rows in the order of `dispatch`'s result.
    route: As in `dispatch`.
    rows: M, of `dispatch`'s argument.
    most: As in `dispatch`.
    platform: As in `dispatch`.

  Returns:
    (M, D): rows in the order of `dispatch`'s argument, then zeros.
  """
  return _move(y_SD, route, True, rows, most, platform)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def _move(x, route, back, rows, most, platform):
  if platform != 'cpu':
    length = rows if back else route.sizes_RE.shape[0] * most
    return _ragged(x, route, back, length)
  if back:
    return _padded_combine(x, route, rows, most)
  return _padded_dispatch(x, route, most)


def _move_fwd(x, route, *static):
  return _move(x, route, *static), route


def _move_bwd(back, rows, most, platform, route, dy):
  # Every row moves to one place, so the way back is the transpose.
  return _move(dy, route, not back, rows, most, platform), None


_move.defvjp(_move_fwd, _move_bwd)


def _mine(a_RE):
  """The columns of this rank's experts, (R, L)."""
  own = a_RE.shape[1] // a_RE.shape[0]
  start = lax.axis_index('expert') * own
  return lax.dynamic_slice_in_dim(a_RE, start, own, axis=1)


def _own(a_RE):
  """The row of this rank, (E,)."""
  rank = lax.axis_index('expert')
  return lax.dynamic_index_in_dim(a_RE, rank, keepdims=False)


def _ragged(x, route, back, length):
  # One slice of each expert of all ranks, and of each source of own experts.
  here = _own(route.own_RE), _own(route.sizes_RE), _own(route.sent_RE)
  there = (
    _mine(a_RE).reshape(-1)
    for a_RE in (route.sent_RE, route.sizes_RE, route.own_RE)
  )
  (starts, sizes, places), (_, arriving, _) = (
    (tuple(there), here) if back else (here, tuple(there))
  )
  zeros = jnp.zeros((length, x.shape[1]), x.dtype)
  return lax.ragged_all_to_all(
    x, zeros, starts, sizes, places, arriving, axis_name='expert'
  )


def _chunks(route):
  """Where this rank's rows for each rank begin, and their number."""
  ranks = route.sizes_RE.shape[0]
  starts_R = _own(route.own_RE).reshape(ranks, -1)[:, 0]
  return starts_R, jnp.sum(_own(route.sizes_RE).reshape(ranks, -1), axis=1)


def _all_to_all(chunks_RCD):
  return lax.all_to_all(chunks_RCD, 'expert', 0, 0, tiled=True)


def _places(route, most):
  """For each row of the chunks received, its place among the rows, (R, C).

  Rows that pad a chunk have the place after the last.
  """
  ranks = route.sizes_RE.shape[0]
  sizes_RL, starts_RL = _mine(route.sizes_RE), _mine(route.sent_RE)
  ends_RL = jnp.cumsum(sizes_RL, axis=1)
  row_C = jnp.arange(most)
  expert_RC = jax.vmap(
    lambda ends: jnp.searchsorted(ends, row_C, side='right')
  )(ends_RL)
  shift_RL = starts_RL - (ends_RL - sizes_RL)
  place_RC = row_C + jnp.take_along_axis(
    shift_RL, expert_RC, axis=1, mode='clip'
  )
  return jnp.where(row_C < ends_RL[:, -1:], place_RC, ranks * most)


def _padded_dispatch(x_MD, route, most):
  row_RC = _chunks(route)[0][:, None] + jnp.arange(most)
  chunks_RCD = _all_to_all(x_MD.at[row_RC].get(mode='clip'))
  # Scattering the indices and gathering the rows beats scattering rows.
  place_P = _places(route, most).reshape(-1)
  source_S = jnp.full_like(place_P, place_P.size)
  source_S = source_S.at[place_P].set(jnp.arange(place_P.size), mode='drop')
  x_PD = chunks_RCD.reshape(-1, x_MD.shape[1])
  return x_PD.at[source_S].get(mode='fill', fill_value=0)


def _padded_combine(y_SD, route, rows, most):
  chunks_RCD = _all_to_all(y_SD.at[_places(route, most)].get(mode='clip'))
  starts_R, sizes_R = _chunks(route)
  row_M = jnp.arange(rows)
  rank_M = jnp.searchsorted(starts_R + sizes_R, row_M, side='right')
  column_M = row_M - starts_R.at[rank_M].get(mode='clip')
  # A row beyond the sizes has the rank after the last.
  return chunks_RCD.at[rank_M, column_M].get(mode='fill', fill_value=0)
