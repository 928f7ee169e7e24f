"""LLaMA against transformers: recorded values, and live where it is there."""

import dataclasses
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from flax import nnx

from models import huggingface
from models.config import LlamaConfig, RopeScaling
from models.llama import Llama

_spec = importlib.util.spec_from_file_location(
  'huggingface_reference',
  pathlib.Path(__file__).with_name('huggingface_reference.py'),
)
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)
RECORDED = json.loads(reference.RECORD.read_text())


def write(folder, config, tensors=None, shards=1):
  """A folder as transformers leaves one."""
  folder.mkdir(parents=True, exist_ok=True)
  tensors = reference.weights(config) if tensors is None else tensors
  (folder / 'config.json').write_text(json.dumps(config))
  if shards == 1:
    safetensors.numpy.save_file(tensors, folder / 'model.safetensors')
    return folder
  names, weight_map = sorted(tensors), {}
  for i in range(shards):
    file = f'model-{i + 1:05}-of-{shards:05}.safetensors'
    part = {name: tensors[name] for name in names[i::shards]}
    safetensors.numpy.save_file(part, folder / file)
    weight_map |= dict.fromkeys(part, file)
  index = {'metadata': {}, 'weight_map': weight_map}
  (folder / 'model.safetensors.index.json').write_text(json.dumps(index))
  return folder


def our_results(folder, config):
  """Logits, loss and gradients, those in Hugging Face's names and layouts."""
  model = huggingface.load(folder)
  graph, params = nnx.split(model)
  tokens = jnp.asarray(reference.TOKENS, jnp.int32)

  def loss(params):
    logits = nnx.merge(graph, params)(tokens)
    return optax.softmax_cross_entropy_with_integer_labels(
      logits[:, :-1], tokens[:, 1:]
    ).mean()

  value, grads = jax.value_and_grad(loss)(params)
  # A gradient has its parameter's layout: saved, it has theirs.
  huggingface.save(nnx.merge(graph, grads), folder / 'gradients')
  gradients = safetensors.numpy.load_file(
    folder / 'gradients' / 'model.safetensors'
  )
  return np.asarray(model(tokens)), float(value), gradients


def close(ours, theirs):
  scale = np.abs(theirs).max()
  np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * scale)


@pytest.mark.parametrize('case', reference.CASES)
def test_recorded_parity(case, tmp_path):
  folder = write(tmp_path / 'model', reference.CASES[case])
  logits, loss, gradients = our_results(folder, reference.CASES[case])
  recorded = RECORDED[case]
  close(logits, np.array(recorded['logits']))
  assert loss == pytest.approx(recorded['loss'], rel=1e-5)
  assert set(gradients) == set(recorded['gradients'])
  for name, theirs in recorded['gradients'].items():
    ours = gradients[name]
    assert np.linalg.norm(ours) == pytest.approx(theirs['norm'], rel=1e-4)
    scale = theirs['norm'] / np.sqrt(ours.size)
    np.testing.assert_allclose(
      ours.ravel()[:3], theirs['first'], rtol=1e-4, atol=1e-4 * scale
    )


@pytest.mark.slow
@pytest.mark.parametrize('case', reference.CASES)
def test_live_parity(case, tmp_path):
  reason = 'parity with transformers needs torch and transformers; CI has them'
  pytest.importorskip('torch', reason=reason)
  transformers = pytest.importorskip('transformers', reason=reason)
  config = reference.CASES[case]
  folder = write(tmp_path / 'model', config)
  logits, loss, gradients = our_results(folder, config)
  theirs = reference.transformers_results(config)
  close(logits, theirs['logits'])
  assert loss == pytest.approx(theirs['loss'], rel=1e-5)
  for name, gradient in theirs['gradients'].items():
    close(gradients[name], gradient)
  # And what we write, transformers loads.
  huggingface.save(huggingface.load(folder), tmp_path / 'ours')
  loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / 'ours')
  state = loaded.state_dict()
  for name, tensor in reference.weights(config).items():
    assert np.array_equal(state[name].numpy(), tensor), name


@pytest.mark.parametrize('shards', [1, 3])
@pytest.mark.parametrize('scan_layers', [False, True])
def test_round_trip_to_the_bit(shards, scan_layers, tmp_path):
  for case, config in reference.CASES.items():
    folder = write(tmp_path / case, config, shards=shards)
    ours = dataclasses.replace(
      huggingface.load_config(folder), scan_layers=scan_layers
    )
    huggingface.save(
      huggingface.load(folder, config=ours), tmp_path / f'{case}-again'
    )
    again = safetensors.numpy.load_file(
      tmp_path / f'{case}-again' / 'model.safetensors'
    )
    tensors = reference.weights(config)
    assert set(again) == set(tensors)
    for name, tensor in tensors.items():
      assert np.array_equal(again[name], tensor), name
    assert huggingface.load_config(tmp_path / f'{case}-again') == (
      dataclasses.replace(ours, scan_layers=False)
    )


def test_older_spellings(tmp_path):
  old = {k: v for k, v in reference.BASE.items() if k != 'rope_parameters'}
  del old['num_key_value_heads']
  scaling = {k: v for k, v in reference.LLAMA3.items() if k != 'rope_theta'}
  config = {**old, 'rope_theta': 500000.0, 'rope_scaling': scaling}
  folder = write(tmp_path, config, tensors={})
  config = huggingface.load_config(folder)
  assert config.rope_theta == 500000.0
  assert config.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8)
  assert config.kv_heads == 4
  old['rope_scaling'] = None
  assert (
    huggingface.load_config(write(tmp_path, old, tensors={})).rope_theta
    == 10000.0
  )


def test_low_precision_is_widened(tmp_path):
  tensors = {
    name: tensor.astype(jnp.bfloat16)
    for name, tensor in reference.weights(reference.BASE).items()
  }
  model = huggingface.load(write(tmp_path, reference.BASE, tensors))
  embedding = np.asarray(model.embedding[...])
  assert embedding.dtype == np.float32
  assert np.array_equal(
    embedding, tensors['model.embed_tokens.weight'].astype(np.float32)
  )


def test_parameters_go_where_they_are_sent(tmp_path):
  mesh = jax.make_mesh(
    (2,), ('fsdp',), axis_types=(jax.sharding.AxisType.Auto,)
  )
  spec = jax.sharding.PartitionSpec

  def sharding(path):
    axes = spec('fsdp') if path == 'layers.0.mlp.up' else spec()
    return jax.sharding.NamedSharding(mesh, axes)

  model = huggingface.load(write(tmp_path, reference.BASE), sharding=sharding)
  assert model.layers[0].mlp.up[...].sharding.spec == spec('fsdp')
  assert model.layers[1].mlp.up[...].sharding.spec == spec()


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    ({'model_type': 'gemma'}, "model_type = 'gemma' is not supported"),
    ({'hidden_act': 'gelu'}, "hidden_act = 'gelu' is not supported"),
    ({'attention_bias': True}, 'attention_bias = True is not supported'),
    ({'head_dim': 8}, 'head_dim = 8 is not supported, only 6'),
    ({'sliding_window': 64}, 'unknown options: sliding_window'),
    ({'hidden_size': None}, 'lacks hidden_size'),
    (
      {'rope_parameters': {'rope_type': 'yarn', 'rope_theta': 1e4}},
      "rope_type 'yarn' is not supported",
    ),
    (
      {'rope_parameters': {'rope_type': 'llama3', 'beta': 1}},
      'rope scaling: .*beta',
    ),
  ],
)
def test_refuses_what_it_cannot_do(change, words, tmp_path):
  folder = write(tmp_path, {**reference.BASE, **change}, tensors={})
  with pytest.raises(ValueError, match=words):
    huggingface.load(folder)


def test_names_what_is_wrong_with_tensors(tmp_path):
  tensors = reference.weights(reference.BASE)
  name = 'model.layers.1.mlp.up_proj.weight'
  for change, words in (
    ({name: None}, f'lacks {name}'),
    ({'extra': np.zeros(2, np.float32)}, 'unknown tensors: extra'),
    ({name: np.zeros((3, 2), np.float32)}, rf'{name} has shape \(3, 2\)'),
  ):
    changed = {k: v for k, v in {**tensors, **change}.items() if v is not None}
    with pytest.raises(ValueError, match=words):
      huggingface.load(write(tmp_path, reference.BASE, changed))
  with pytest.raises(FileNotFoundError, match=r'neither model\.safetensors'):
    (tmp_path / 'model.safetensors').unlink()
    huggingface.load(tmp_path)


def test_qkv_bias_has_no_place_in_a_llama_folder(tmp_path):
  config = LlamaConfig(
    vocab_size=9, d_model=8, n_layers=1, n_heads=2, d_ff=8, qkv_bias=True
  )
  model = Llama(config, rngs=nnx.Rngs(params=0))
  with pytest.raises(ValueError, match='qkv_bias'):
    huggingface.save(model, tmp_path / 'model')
  assert not (tmp_path / 'model').exists()
