"""A folder onto a mesh: each device's part is read once, and nothing else."""

import collections
import dataclasses
import importlib.util
import itertools
import os
import pathlib
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from models import huggingface
from models.huggingface_files import Tensors
from models.huggingface_names import Layout, places
from models.sharding import make_mesh, param_shardings

_spec = importlib.util.spec_from_file_location(
  'huggingface_reference',
  pathlib.Path(__file__).with_name('huggingface_reference.py'),
)
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)

# Everything is divided by 8 at least along one axis.
WIDE = {
  'vocab_size': 40, 'hidden_size': 32, 'intermediate_size': 16,
  'num_experts': 8, 'moe_intermediate_size': 8,
  'shared_expert_intermediate_size': 24, 'num_hidden_layers': 4,
  'num_attention_heads': 8, 'num_key_value_heads': 8,
}  # fmt: skip
LLAMA = {**reference.BASE, **WIDE}
for _name in [name for name in WIDE if 'expert' in name or 'moe' in name]:
  del LLAMA[_name]
MOE = {**reference.MOE, **WIDE, 'decoder_sparse_step': 2}
MESHES = [
  {'fsdp': 8},
  {'tensor': 8},
  {'expert': 8},
  {'data': 2, 'fsdp': 2, 'tensor': 2},
  {'fsdp': 2, 'tensor': 2, 'expert': 2},
  {'data': 4, 'expert': 2},
]


def parameters(model):
  """By path: every parameter."""
  state = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  return dict(jax.tree_util.tree_leaves_with_path(state))


class Reads:
  """Counts how often each element of each tensor is read."""

  def __init__(self, patch):
    self.counts, self.largest = {}, collections.Counter()
    original = Tensors.read

    def read(tensors, name, slices):
      block = original(tensors, name, slices)
      header = tensors._file[name][1].get_slice(name)
      count = self.counts.setdefault(
        name, np.zeros(header.get_shape(), np.int32)
      )
      count[slices] += 1
      self.largest[name] = max(self.largest[name], block.size)
      return block

    patch.setattr(Tensors, 'read', read)


@pytest.mark.parametrize('mesh', MESHES, ids=str)
@pytest.mark.parametrize('scan_layers', [False, True])
@pytest.mark.parametrize('layout', ['llama', 'published', 'fused'])
def test_each_part_is_read_once(mesh, scan_layers, layout, tmp_path):
  options = LLAMA if layout == 'llama' else MOE
  tensors = reference.weights(options)
  if layout == 'fused':
    tensors = reference.fused(tensors)
  folder = reference.write(tmp_path, options, tensors)
  config = dataclasses.replace(
    huggingface.load_config(folder), scan_layers=scan_layers
  )
  alone = parameters(huggingface.load(folder, config=config))
  mesh = make_mesh(**mesh)
  with pytest.MonkeyPatch.context() as patch:
    reads = Reads(patch)
    model = huggingface.load(folder, config=config, mesh=mesh)
  # The bytes of one model, whatever the copies on devices.
  assert set(reads.counts) == set(tensors)
  for name, count in reads.counts.items():
    assert (count == 1).all(), name
  shardings = dict(
    jax.tree_util.tree_leaves_with_path(param_shardings(model, mesh))
  )
  ours = parameters(model)
  assert set(ours) == set(alone) == set(shardings)
  for path, param in ours.items():
    assert param.sharding.is_equivalent_to(shardings[path], param.ndim)
    assert param.dtype == np.float32
    assert np.array_equal(param, alone[path]), path
  # At no time was more read than a part.
  table = places(config, fused=layout == 'fused')
  for path, param in ours.items():
    place = table['.'.join(str(key.key) for key in path)]
    assert place.shape == param.shape
    part = param.sharding.shard_shape(param.shape)[place.names.ndim :]
    for name in place.names.flat:
      assert reads.largest[str(name)] <= np.prod(part), path


def test_a_model_on_a_mesh_computes_and_is_saved(tmp_path):
  folder = reference.write(tmp_path / 'theirs', MOE)
  tokens = jnp.asarray(
    np.random.default_rng(0).integers(0, 40, (8, 6)), jnp.int32
  )
  alone = huggingface.load(folder)
  model = huggingface.load(folder, mesh=make_mesh(fsdp=2, tensor=2, expert=2))
  logits = jax.jit(lambda model: model(tokens))(model)
  np.testing.assert_allclose(
    logits, jax.jit(lambda model: model(tokens))(alone), atol=1e-4
  )
  huggingface.save(model, tmp_path / 'ours')
  again = safetensors.numpy.load_file(tmp_path / 'ours' / 'model.safetensors')
  for name, tensor in reference.weights(MOE).items():
    assert np.array_equal(again[name], tensor), name


def test_a_mesh_that_does_not_divide_the_model_is_refused(tmp_path):
  folder = reference.write(tmp_path, {**LLAMA, 'vocab_size': 37})
  with pytest.raises(ValueError, match=r'model\.vocab_size \(37\)'):
    huggingface.load(folder, mesh=make_mesh(tensor=8))


@st.composite
def layouts(draw):
  """A layout, and a part of its array."""
  ours = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=4)))
  order = draw(st.permutations(range(len(ours))))
  cuts = draw(st.sets(st.integers(1, len(ours) - 1))) if len(ours) > 1 else ()
  ends = [0, *sorted(cuts), len(ours)]
  axes = tuple(tuple(order[a:b]) for a, b in itertools.pairwise(ends))
  index = []
  for size in ours:
    start = draw(st.integers(0, size - 1))
    index.append(slice(start, draw(st.integers(start + 1, size))))
  return Layout(ours, axes), tuple(index)


@given(layouts(), st.data())
def test_parts_of_any_layout(layout_and_index, data):
  layout, index = layout_and_index
  array = np.arange(np.prod(layout.ours), dtype=np.float32)
  array = array.reshape(layout.ours)
  stored = layout.to_stored(array)
  assert stored.shape == layout.stored
  part = layout.to_ours(stored[layout.cut(index)], index)
  assert np.array_equal(part, array[index])
  # Within a larger array.
  offset = tuple(data.draw(st.integers(0, 3)) for _ in stored.shape)
  larger = np.full([n + 3 for n in stored.shape], -1, np.float32)
  larger[
    tuple(slice(o, o + n) for o, n in zip(offset, stored.shape, strict=True))
  ] = stored
  within = dataclasses.replace(layout, offset=offset, whole=larger.shape)
  part = within.to_ours(larger[within.cut(index)], index)
  assert np.array_equal(part, array[index])


_PROCESS = """
import sys
import jax
port, rank, folder, copy = sys.argv[1:]
jax.distributed.initialize(f'localhost:{port}', 2, int(rank))
from models import huggingface, huggingface_files
from models.sharding import make_mesh
read, bytes_read = huggingface_files.Tensors.read, 0
def counted(*args):
  global bytes_read
  block = read(*args)
  bytes_read += block.nbytes
  return block
huggingface_files.Tensors.read = counted
model = huggingface.load(folder, mesh=make_mesh(fsdp=2, expert=2))
huggingface.save(model, copy, max_bytes=20_000)
print(bytes_read)
"""


@pytest.mark.slow
def test_two_processes_read_a_half_each_and_write_the_whole(tmp_path):
  folder = reference.write(tmp_path / 'theirs', MOE)
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = str(free.getsockname()[1])
  copy = tmp_path / 'ours'
  two_devices = '--xla_force_host_platform_device_count=2'
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', _PROCESS, port, str(rank), folder, copy],
      cwd=pathlib.Path(__file__).parents[2],
      env={**os.environ, 'XLA_FLAGS': two_devices},
      stdout=subprocess.PIPE,
      text=True,
    )
    for rank in range(2)
  ]
  try:
    outputs = [process.communicate(timeout=240)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert [process.returncode for process in processes] == [0, 0]
  tensors = reference.weights(MOE)
  total = sum(tensor.nbytes for tensor in tensors.values())
  for output in outputs:
    assert int(output.split()[-1]) < 0.52 * total  # Norms are on both.
  assert len(list(copy.glob('*.safetensors'))) > 2
  again = huggingface.load(copy)
  huggingface.save(again, tmp_path / 'whole')
  whole = safetensors.numpy.load_file(tmp_path / 'whole' / 'model.safetensors')
  for name, tensor in tensors.items():
    assert np.array_equal(whole[name], tensor), name
