"""One run, whatever the mesh and the number of micro-batches."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import optax
import pytest

from train import recipes, step
from train.aot import chips, collectives, hlo
from train.config import MeshConfig
from train.mesh import make_mesh

LENGTH, ROWS, VOCAB = 16, 32, 256
COMMON = {
  'vocab_size': VOCAB, 'd_model': 64, 'n_layers': 2, 'n_heads': 8, 'd_ff': 128,
}  # fmt: skip
SMALL = {
  'demo': COMMON,
  'demo_moe': COMMON
  | {'n_experts': 8, 'experts_per_token': 2, 'd_expert': 32, 'd_shared': 64},
}
ALL = [
  dict(zip(('data', 'fsdp', 'tensor', 'expert'), sizes, strict=True))
  for sizes in itertools.product((1, 2, 4, 8), repeat=4)
  if np.prod(sizes) == 8
]


def name_of(sizes):
  return '-'.join(f'{k}{v}' for k, v in sizes.items() if v > 1)


def case(family, sizes):
  return pytest.param(family, sizes, id=f'{name_of(sizes)}-{family}')


def config_of(family, sizes=None, accumulate=1, **others):
  recipe = recipes.get(family)
  model = dataclasses.replace(
    recipe.model, **SMALL[family], **others.pop('model', {})
  )
  data = dataclasses.replace(
    recipe.data, batch_size=ROWS, sequence_length=LENGTH
  )
  optimizer = dataclasses.replace(
    recipe.optimizer, warmup_steps=2, **others.pop('optimizer', {})
  )
  return dataclasses.replace(
    recipe,
    model=model,
    data=data,
    optimizer=optimizer,
    mesh=MeshConfig(**sizes or {}),
    accumulate=accumulate,
    **others,
  )


# What the other family does is no other question, and takes minutes.
FIRST = ['demo', pytest.param('demo_moe', marks=pytest.mark.slow)]


@functools.cache
def tokens():
  # Text of a kind, so that there is something to learn.
  rng = np.random.default_rng(0)
  rows = np.cumsum(rng.integers(0, 3, (20, ROWS, LENGTH + 1)), axis=-1)
  return (rows % VOCAB).astype(np.int32)


def curve(config, devices=None, steps=20):
  """Losses of the first steps."""
  programs = step.programs(config, make_mesh(config.mesh, devices))
  place = programs.batch['tokens'].sharding
  state, losses = programs.init(), []
  for rows in tokens()[:steps]:
    batch = {'tokens': jax.device_put(rows, place)}
    state, metrics = programs.train_step(state, batch)
    losses.append(metrics['loss'])
  return np.asarray(jax.device_get(losses))


@functools.cache
def alone(family):
  losses = curve(config_of(family), jax.devices()[:1])
  assert losses[-1] < losses[0] - 0.1
  return losses


SPLIT = [
  {'data': 8},
  {'fsdp': 8},
  {'data': 2, 'fsdp': 4},
  {'data': 2, 'tensor': 2, 'expert': 2},
  {'fsdp': 2, 'tensor': 4},
]
# Every mesh once: experts where they have an axis; on some of the others they
# are in SPLIT, and both families' models on all in tests/models.
LOSSES = [
  case('demo' if sizes['expert'] == 1 else 'demo_moe', sizes) for sizes in ALL
]


@pytest.mark.slow
@pytest.mark.parametrize(('family', 'sizes'), LOSSES)
def test_every_mesh_has_the_same_losses(family, sizes):
  # Scanned layers compile in less time; tests/models has unrolled ones.
  config = config_of(family, sizes, model={'scan_layers': True})
  np.testing.assert_allclose(curve(config), alone(family), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('family', 'sizes'),
  [case('demo_moe', sizes) for sizes in SPLIT] + [case('demo', SPLIT[-1])],
)
def test_micro_batches_have_the_same_losses(family, sizes):
  losses = curve(config_of(family, sizes, accumulate=4))
  np.testing.assert_allclose(losses, alone(family), rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('family', FIRST)
def test_a_mesh_of_three_axes_and_micro_batches(family):
  sizes = {'data': 2, 'fsdp': 2, 'expert': 2}
  losses = curve(config_of(family, sizes, accumulate=2), steps=3)
  np.testing.assert_allclose(losses, alone(family)[:3], rtol=1e-5)


@functools.cache
def collectives_of(family, sizes, accumulate, power=1.2, scan=True):
  """What moves between devices: (kind, mesh axis) to bytes of a device."""
  config = config_of(
    family,
    dict(sizes),
    accumulate,
    optimizer={'power': power},
    model={'scan_layers': scan},
  )
  mesh = make_mesh(config.mesh)
  programs = step.programs(config, mesh)
  text = programs.train_step.lower(programs.state, programs.batch).compile()
  found = collectives.find(hlo.parse(text.as_text()), mesh, chips.CHIPS['v5p'])
  return {
    (one['kind'], one['axis']): one['bytes']
    for one in collectives.totals(found)
  }


def parameter_bytes(family, sizes):
  """Of one device."""
  config = config_of(family, sizes)
  state = step.programs(config, make_mesh(config.mesh)).state
  return sum(
    4 * np.prod(x.sharding.shard_shape(x.shape))
    for x in jax.tree.leaves(state.params)
  )


SCALARS = 4096  # Bytes of losses, norms and what routers count, at most.


@pytest.mark.parametrize('family', FIRST)
@pytest.mark.parametrize('accumulate', [1, 4])
def test_copies_reduce_their_gradients_once(family, accumulate):
  found = collectives_of(family, (('data', 8),), accumulate)
  assert found.keys() == {('all-reduce', 'data')}
  gradients = parameter_bytes(family, {'data': 8})
  moved = found['all-reduce', 'data']
  assert gradients <= moved < gradients + SCALARS


@pytest.mark.parametrize('family', FIRST)
def test_copies_of_split_models_reduce_their_gradients_once(family):
  sizes = {'data': 2, 'fsdp': 4}
  found = collectives_of(family, tuple(sizes.items()), 4)
  gradients = parameter_bytes(family, sizes)
  moved = {
    (kind, axis): size for (kind, axis), size in found.items() if 'data' in axis
  }
  assert moved.keys() <= {('all-reduce', 'data'), ('all-reduce', 'data+fsdp')}
  assert gradients <= moved['all-reduce', 'data'] < gradients + SCALARS
  # Of the norm.
  assert moved.get(('all-reduce', 'data+fsdp'), 0) < SCALARS


@pytest.mark.parametrize('family', FIRST)
@pytest.mark.parametrize(
  'sizes', [{'data': 8}, {'fsdp': 4, 'tensor': 2}], ids=name_of
)
def test_the_power_moves_nothing(family, sizes):
  sizes = tuple(sizes.items())
  with_power = collectives_of(family, sizes, 1)
  without = collectives_of(family, sizes, 1, power=1.0)
  bytes_with, bytes_without = (sum(f.values()) for f in (with_power, without))
  assert with_power.keys() == without.keys()
  # One more number is summed: the powered norm.
  assert bytes_without <= bytes_with <= bytes_without + 256


ALL_TO_ALL = {'all-gather', 'all-reduce', 'reduce-scatter', 'all-to-all'}
EXPECTED = {
  # Weights are gathered, gradients reduced to parts (on a CPU an all-reduce and
  # a slice); rows of the embedding travel.
  ('demo', 'fsdp'): ALL_TO_ALL,
  # Each half layer adds up its parts; the head's are those of a softmax.
  ('demo', 'tensor'): {'all-reduce'},
  ('demo', 'expert'): ALL_TO_ALL,
  ('demo_moe', 'fsdp'): ALL_TO_ALL,
  ('demo_moe', 'tensor'): {'all-reduce'},
  # Tokens travel to their experts and back.
  ('demo_moe', 'expert'): ALL_TO_ALL,
}


@pytest.mark.slow
@pytest.mark.parametrize(('family', 'axis'), EXPECTED)
def test_a_mesh_has_the_collectives_of_its_axis(family, axis):
  found = collectives_of(family, ((axis, 8),), 1)
  assert {name for _, name in found} == {axis}
  assert {kind for kind, _ in found} == EXPECTED[family, axis]


@pytest.mark.slow
@pytest.mark.parametrize('accumulate', [1, 2])
@pytest.mark.parametrize(
  'sizes',
  [{'fsdp': 8}, {'data': 2, 'fsdp': 4}, {'fsdp': 2, 'expert': 4}],
  ids=name_of,
)
def test_weights_and_rows_move_and_nothing_else(sizes, accumulate):
  found = collectives_of('demo', tuple(sizes.items()), accumulate)
  split = {key: size for key, size in found.items() if key[1] != 'data'}
  gathered = sum(size for (kind, _), size in split.items() if 'gather' in kind)
  reduced = sum(size for (kind, _), size in split.items() if 'reduc' in kind)
  sent = sum(size for (kind, _), size in split.items() if 'to-all' in kind)
  model = SMALL['demo']
  weights = parameter_bytes('demo', {'tensor': 1})
  # Forwards and backwards, for each micro-batch; at most all of them.
  assert gathered <= 2 * accumulate * weights + SCALARS
  assert reduced <= accumulate * weights + SCALARS * (1 + accumulate)
  ways = sizes.get('fsdp', 1) * sizes.get('expert', 1)
  rows = 4 * ROWS * LENGTH * model['d_model'] // (8 // ways) // ways
  assert sent <= 2 * rows + SCALARS


@pytest.mark.slow
@pytest.mark.parametrize('family', SMALL)
def test_bfloat16_gradients_of_micro_batches_are_the_batchs(family):
  # Scanned, rematerialised, tied, with all losses: the paths that cast.
  model = {'dtype': 'bfloat16', 'scan_layers': True, 'remat': 'minimal',
           'tie_embeddings': True, 'z_loss': 1e-3}  # fmt: skip
  if family == 'demo_moe':
    model |= {'router_z_loss': 1e-3}
  sizes = {'data': 2, 'fsdp': 2, 'expert': 2}
  one = config_of(family, model=model, steps=400)
  many = config_of(family, sizes, accumulate=2, model=model, steps=400)
  moments = [
    first_moment(one, jax.devices()[:1]), first_moment(many, None)
  ]  # fmt: skip
  for alone, split in zip(*map(jax.tree.leaves, moments), strict=True):
    assert alone.dtype == split.dtype == np.float32
    gap = np.abs(alone - split).max() / np.abs(alone).max()
    assert gap < 0.03, gap  # Five roundings to bfloat16.


def first_moment(config, devices):
  """AdamW's after one step without the power: a tenth of the gradient."""
  config = dataclasses.replace(
    config,
    optimizer=dataclasses.replace(config.optimizer, power=1.0, clip_norm=0.0),
  )
  programs = step.programs(config, make_mesh(config.mesh, devices))
  place = programs.batch['tokens'].sharding
  batch = {'tokens': jax.device_put(tokens()[0], place)}
  state, _ = programs.train_step(programs.init(), batch)
  return jax.device_get(optax.tree.get(state.opt_state, 'mu'))
