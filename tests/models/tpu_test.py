"""Losses and gradients compiled for TPUs that are not there: `not run`."""

import importlib.util
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from models import decoder, families, sharding
from models.config import LlamaConfig, Qwen2MoeConfig

_spec = importlib.util.spec_from_file_location(
  'aot', pathlib.Path(__file__).with_name('aot.py')
)
aot = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(aot)

COMMON = {
  'vocab_size': 4096, 'd_model': 512, 'n_layers': 4, 'n_heads': 8,
  'd_ff': 2048, 'dtype': 'bfloat16', 'scan_layers': True, 'remat': 'minimal',
}  # fmt: skip
LLAMA = LlamaConfig(**COMMON)
MOE = Qwen2MoeConfig(
  **COMMON, n_experts=16, experts_per_token=4, d_expert=256, d_shared=1024
)
BATCH, LENGTH = 16, 512


@pytest.mark.slow
@pytest.mark.parametrize(
  ('config', 'sizes', 'experts'),
  [
    (LLAMA, {'fsdp': 4, 'tensor': 2}, 0),
    (MOE, {'fsdp': 2, 'expert': 4}, 1),
  ],
  ids=['llama', 'qwen2_moe'],
)
def test_a_tpu_gets_its_kernels_once(config, sizes, experts):
  mesh = aot.topology_mesh('v5e:2x4', **sizes)
  model = nnx.eval_shape(
    lambda: families.build(config, rngs=nnx.Rngs(params=0), mesh=mesh)
  )
  graph, abstract = nnx.split(model, nnx.Param)
  params = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    nnx.to_pure_dict(abstract),
    sharding.param_shardings(model, mesh),
  )
  place = NamedSharding(mesh, sharding.spec('batch', 'length'))
  tokens = jax.ShapeDtypeStruct((BATCH, LENGTH), jnp.int32, sharding=place)

  def loss(params, tokens, targets):
    sums = nnx.merge(graph, params).loss_sums(tokens, targets)
    return decoder.total_loss(sums, config)

  gradient = jax.jit(jax.value_and_grad(loss))
  compiled = gradient.lower(params, tokens, tokens).compile()
  text = compiled.as_text()
  # Layers are scanned, so each kernel stands once: with `minimal` the forward
  # ones are not in the backward pass again.
  kernels = re.findall(r'%(\S+) = [^\n]* custom_call_target="tpu_', text)
  counts = {
    name: sum(name in kernel for kernel in kernels)
    for name in ('splash_mha_fwd', 'splash_mha_dq', 'splash_mha_dkv')
  }
  assert set(counts.values()) == {1}, counts
  assert sum('tgmm' in kernel for kernel in kernels) == 3 * experts
  assert len(re.findall(r' ragged-all-to-all\(', text)) == 4 * experts
  # Neither the logits nor a layer's activations of a whole batch exist.
  whole = BATCH * LENGTH
  shapes = re.findall(r'(?:f32|bf16)\[([\d,]+)\]', text)
  sizes = [[int(n) for n in shape.split(',')] for shape in shapes]
  share = whole * config.d_model // sharding.ways(mesh, 'batch')
  for shape in sizes:
    assert not (whole in shape and config.d_model in shape), shape
    # Rows of the embedding, before they travel, are of the whole batch but of
    # a part of the width.
    if shape[:2] == [BATCH, LENGTH]:
      assert math.prod(shape) <= share, shape
  # Gradients leave where the parameters are: no more bytes than those.
  memory = compiled.memory_analysis()
  assert memory.output_size_in_bytes < 1.1 * memory.argument_size_in_bytes
