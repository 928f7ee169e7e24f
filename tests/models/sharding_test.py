import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, PartitionSpec

from models import families, sharding
from models.config import LlamaConfig, Qwen2MoeConfig


def test_a_mesh_names_its_axes_and_their_types():
  mesh = sharding.make_mesh(fsdp=4, expert=2)
  assert mesh.axis_names == sharding.AXES
  assert mesh.devices.shape == (1, 4, 1, 2)
  assert mesh.axis_types == (AxisType.Auto,) * 4
  assert sharding.make_mesh(jax.devices()[:1]).size == 1


@pytest.mark.parametrize(
  ('sizes', 'words'),
  [
    ({'fsdp': 3}, 'does not fit 8 devices'),
    ({'fsdp': 0}, 'does not fit 8 devices'),
    ({'model': 8}, r'mesh\.model: the axes are data'),
  ],
)
def test_a_wrong_mesh_is_refused(sizes, words):
  with pytest.raises(ValueError, match=words):
    sharding.make_mesh(**sizes)


class Device:
  def __init__(self, platform):
    self.platform = platform


@pytest.mark.parametrize(
  ('found', 'wanted'),
  [
    ('cpu', 'cpu'),
    ('gpu', 'gpu'),
    ('cuda', 'gpu'),
    ('tpu', 'tpu'),
    ('rocm', 'cpu'),
  ],
)
def test_the_platform_is_the_meshs(found, wanted):
  class Fake:
    devices = np.array([[Device(found)]])  # A Mesh takes real ones only.

  assert sharding.platform(Fake) == wanted
  assert sharding.platform(None) == 'cpu'


def test_every_rule_is_an_axis_of_the_mesh():
  for name, axes in sharding.RULES.items():
    assert set(axes) <= set(sharding.AXES), name
  assert sharding.RULES['batch'] == sharding.BATCH
  assert sharding.spec('batch', None, 'heads') == PartitionSpec(
    ('data', 'fsdp', 'expert'), (), 'tensor'
  )


@pytest.mark.parametrize('scan', [False, True])
def test_every_parameter_has_a_place(scan):
  config = Qwen2MoeConfig(
    vocab_size=16, n_layers=4, sparse_step=2, scan_layers=scan
  )
  mesh = sharding.make_mesh(fsdp=2, tensor=2, expert=2)
  model = nnx.eval_shape(
    lambda: families.build(config, rngs=nnx.Rngs(params=0))
  )
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  placed = sharding.param_shardings(model, mesh)
  assert jax.tree.structure(params) == jax.tree.structure(placed)

  def ways(leaf, place):
    return leaf.size // jnp.prod(jnp.array(place.shard_shape(leaf.shape)))

  split = {
    jax.tree_util.keystr(path): int(ways(leaf, place))
    for (path, leaf), place in zip(
      jax.tree_util.tree_leaves_with_path(params),
      jax.tree.leaves(placed),
      strict=True,
    )
  }
  for path, n in split.items():
    if 'norm' in path:
      assert n == 1, path
    elif 'bias' in path:
      assert n == 2, path
    elif 'router' in path or 'shared_gate' in path:
      assert n == 4, path
    else:
      assert n == 8, path


def test_a_parameter_must_name_all_its_axes():
  with pytest.raises(ValueError, match='2 axes have the names'):
    sharding.param(jnp.zeros((2, 3)), 'embed')


def test_constraints_need_a_mesh():
  x = jnp.ones((8, 2))
  assert sharding.constrain(x, None, 'batch', 'width') is x
  mesh = sharding.make_mesh(data=8)
  y = jax.jit(lambda x: sharding.constrain(x, mesh, 'batch', 'width'))(x)
  assert y.sharding.shard_shape(y.shape) == (1, 2)


def test_families():
  for name, kind in families.CONFIGS.items():
    config = kind(vocab_size=7)
    assert families.family(config) == name
    model = nnx.eval_shape(
      lambda c=config: families.build(c, rngs=nnx.Rngs(params=0))
    )
    assert model.config == config
  assert isinstance(families.CONFIGS['llama'](), LlamaConfig)
