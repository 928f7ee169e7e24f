import dataclasses
import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.config import LlamaConfig, Qwen2MoeConfig
from train.config import MeshConfig
from train.digest import canonical_parameters, params_digest
from train.mesh import make_mesh

LAYERS = 12  # 'layers.10' sorts before 'layers.2'.
UNROLLED = LlamaConfig(n_layers=LAYERS)
SCANNED = LlamaConfig(n_layers=LAYERS, scan_layers=True)


def draw():
  """Parameters in the unrolled layout, with two dtypes."""
  rng = np.random.default_rng(0)

  def array(*shape, dtype=np.float32):
    return rng.normal(size=shape).astype(dtype)

  return {
    'norm': {'scale': array(16)},
    'embedding': array(8, 16, dtype=jnp.bfloat16),
    'layers': {
      i: {'mlp': {'up': array(16, 3), 'down': array(3, 16)}}
      for i in range(LAYERS)
    },
  }


def by_the_book(params):
  """docs/cli.md, word for word: PATH \\0 DTYPE \\0 SHAPE \\0 BYTES."""
  named = {}

  def walk(value, path):
    if isinstance(value, dict):
      for key, inner in value.items():
        walk(inner, [*path, str(key)])
    else:
      named['.'.join(path)] = np.asarray(value)

  walk(params, [])
  text = b''
  for path in sorted(named):
    array = named[path]
    text += path.encode('utf-8') + b'\0' + str(array.dtype).encode() + b'\0'
    text += ','.join(str(n) for n in array.shape).encode() + b'\0'
    for element in array.ravel(order='C'):
      text += element.tobytes()  # Little-endian machines only.
  return hashlib.sha256(text).hexdigest()


def stacked(params):
  blocks = [params['layers'][i] for i in range(LAYERS)]
  block = jax.tree.map(lambda *x: np.stack(x), *blocks)
  return {**params, 'layers': {0: {0: block}}}


def test_it_is_what_the_contract_says():
  assert params_digest(draw(), UNROLLED) == by_the_book(draw())


def test_paths_are_dotted_unstacked_and_sorted_as_strings():
  paths = list(canonical_parameters(stacked(draw()), SCANNED))
  assert paths == sorted(paths)
  assert len(paths) == 2 + 2 * LAYERS
  assert {'embedding', 'layers.11.mlp.up', 'norm.scale'} <= set(paths)
  assert paths.index('layers.10.mlp.up') < paths.index('layers.2.mlp.up')


def test_the_layout_of_layers_does_not_matter():
  assert params_digest(stacked(draw()), SCANNED) == params_digest(
    draw(), UNROLLED
  )


def test_dense_and_sparse_layers_in_turn_are_unstacked_in_order():
  config = Qwen2MoeConfig(n_layers=5, sparse_step=2)
  layers = {
    i: {('moe' if i % 2 else 'mlp'): {'up': np.full(3, i, np.float32)}}
    for i in range(5)
  }
  pairs = {
    slot: jax.tree.map(lambda *x: np.stack(x), layers[slot], layers[slot + 2])
    for slot in (0, 1)
  }
  last = jax.tree.map(lambda x: x[None], layers[4])
  scanned = dataclasses.replace(config, scan_layers=True)
  stacked = {'layers': {0: pairs, 1: {0: last}}}
  assert params_digest(stacked, scanned) == params_digest(
    {'layers': layers}, config
  )


def test_sharding_and_memory_order_do_not_matter():
  mesh = make_mesh(MeshConfig())
  rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
  params = draw()
  wanted = params_digest(params, UNROLLED)
  split = {**params, 'embedding': jax.device_put(params['embedding'], rows)}
  assert not split['embedding'].is_fully_replicated
  assert params_digest(split, UNROLLED) == wanted
  fortran = jax.tree.map(np.asfortranarray, params)
  assert params_digest(fortran, UNROLLED) == wanted


def test_the_byte_order_of_the_machine_does_not_matter():
  params = draw()
  swapped = params['norm']['scale'].astype('>f4')
  other = {**params, 'norm': {'scale': swapped}}
  assert params_digest(other, UNROLLED) == params_digest(params, UNROLLED)


@pytest.mark.parametrize('layer', [0, LAYERS - 1])
def test_one_bit_changes_it(layer):
  params = draw()
  params['layers'][layer]['mlp']['up'].view(np.uint32)[2, 1] ^= 1
  assert params_digest(params, UNROLLED) != params_digest(draw(), UNROLLED)


def test_a_minus_zero_changes_it():
  params, other = draw(), draw()
  params['norm']['scale'][0], other['norm']['scale'][0] = 0.0, -0.0
  assert params_digest(params, UNROLLED) != params_digest(other, UNROLLED)


def test_swapped_paths_change_it():
  params = draw()
  params['layers'][3], params['layers'][4] = (
    params['layers'][4],
    params['layers'][3],
  )
  assert params_digest(params, UNROLLED) != params_digest(draw(), UNROLLED)


def test_shape_and_dtype_change_it():
  params = draw()
  bent = {**params, 'embedding': params['embedding'].reshape(16, 8)}
  assert params_digest(bent, UNROLLED) != params_digest(params, UNROLLED)
  zeros = [
    {'norm': {'scale': np.zeros(4, dtype)}, 'layers': {0: {}}}
    for dtype in (np.float32, np.int32)
  ]
  one = LlamaConfig(n_layers=1)
  assert params_digest(zeros[0], one) != params_digest(zeros[1], one)
