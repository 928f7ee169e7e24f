import dataclasses

import jax
import pytest

from models.config import Qwen2MoeConfig
from models.sharding import AXES
from train import recipes
from train.config import Config, DataConfig, MeshConfig
from train.errors import UserError
from train.mesh import batch_sharding, check, make_mesh


@pytest.mark.parametrize(
  ('sizes', 'shape'),
  [
    ({}, (8, 1, 1, 1)),
    ({'fsdp': 4}, (2, 4, 1, 1)),
    ({'data': 2, 'tensor': 2, 'expert': 2}, (2, 1, 2, 2)),
  ],
)
def test_what_the_other_axes_leave_is_data(sizes, shape):
  mesh = make_mesh(MeshConfig(**sizes))
  assert mesh.axis_names == AXES
  assert mesh.devices.shape == shape


def test_the_batch_is_split_by_all_axes_but_tensor():
  mesh = make_mesh(MeshConfig(data=2, tensor=2, expert=2))
  batch = jax.device_put(jax.numpy.zeros((8, 3)), batch_sharding(mesh))
  assert {s.data.shape for s in batch.addressable_shards} == {(2, 3)}


@pytest.mark.parametrize(
  ('sizes', 'message'),
  [
    ({'fsdp': 3}, r'--mesh.fsdp x .* \(3\) must divide .* devices \(8\)'),
    ({'data': 3}, r'--mesh.data \(3\) times the other axes \(1\)'),
    ({'data': 2, 'fsdp': 2}, r'--mesh.data \(2\) times .* \(2\).* \(8\)'),
    ({'fsdp': 16}, r'\(16\) must divide'),
  ],
)
def test_sizes_must_fit_the_devices(sizes, message):
  with pytest.raises(UserError, match=message):
    make_mesh(MeshConfig(**sizes))


@pytest.mark.parametrize(
  'sizes', [{'data': -1}, {'fsdp': 0}, {'tensor': 0}, {'expert': -2}]
)
def test_sizes_must_be_in_range(sizes):
  (name,) = sizes
  with pytest.raises(UserError, match=f'--mesh.{name} must be at least'):
    MeshConfig(**sizes)


def sized(config: Config, **model) -> Config:
  model = {'vocab_size': 512} | model
  return dataclasses.replace(
    config, model=dataclasses.replace(config.model, **model)
  )


DEMO, MOE = recipes.get('demo'), recipes.get('demo_moe')


@pytest.mark.parametrize(
  ('config', 'sizes', 'message'),
  [
    (sized(DEMO, d_model=6, n_heads=1), {'fsdp': 4},
     r'--model.d_model \(6\) .* 4.* fsdp x expert'),
    (sized(DEMO, n_heads=2), {'tensor': 4}, r'--model.n_heads \(2\)'),
    (sized(DEMO, n_kv_heads=2), {'tensor': 4}, r'--model.n_kv_heads \(2\)'),
    (sized(DEMO, d_ff=510), {'tensor': 4}, r'--model.d_ff \(510\)'),
    (sized(DEMO, vocab_size=511), {'tensor': 2}, r'--model.vocab_size'),
    (sized(MOE, n_experts=6), {'expert': 4}, r'--model.n_experts \(6\)'),
    (sized(MOE, d_expert=97), {'tensor': 2}, r'--model.d_expert \(97\)'),
    (sized(MOE, d_shared=97), {'tensor': 2}, r'--model.d_shared \(97\)'),
  ],
)  # fmt: skip
def test_the_mesh_must_divide_the_model(config, sizes, message):
  assert isinstance(MOE.model, Qwen2MoeConfig)
  with pytest.raises(UserError, match=message):
    check(config, make_mesh(MeshConfig(**sizes)))


@pytest.mark.parametrize('batch_size', [1, 4, 9])
def test_devices_must_divide_the_batch(batch_size):
  config = Config(data=DataConfig(batch_size=batch_size))
  with pytest.raises(
    UserError, match=rf'--data.batch_size \({batch_size}\).*8 devices'
  ):
    check(config, make_mesh(config.mesh))


def test_devices_must_divide_each_micro_batch():
  config = Config(data=DataConfig(batch_size=24), accumulate=2)
  with pytest.raises(UserError, match=r'batch_size \(24\).*--accumulate \(2\)'):
    check(config, make_mesh(config.mesh))
  whole = dataclasses.replace(config, accumulate=3)
  check(sized(whole), make_mesh(whole.mesh))


def test_accumulate_must_divide_the_batch():
  with pytest.raises(UserError, match=r'--accumulate \(5\) must divide'):
    Config(data=DataConfig(batch_size=16), accumulate=5)
