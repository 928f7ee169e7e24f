"""Both families against transformers: recorded values, and live where it is."""

import dataclasses
import importlib.util
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from models import decoder, huggingface

_spec = importlib.util.spec_from_file_location(
  'huggingface_reference',
  pathlib.Path(__file__).with_name('huggingface_reference.py'),
)
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)
RECORDED = json.loads(reference.RECORD.read_text())
AGAIN = 'multi_head', 'grouped_query', 'moe', 'moe_llama3_multi_head_no_bias'


def our_results(folder):
  """Logits, losses and gradients, those in Hugging Face's names and layouts."""
  model = huggingface.load(folder)
  graph, params = nnx.split(model)
  inputs, targets = (
    jnp.asarray(x, jnp.int32) for x in (reference.INPUTS, reference.TARGETS)
  )

  @jax.jit
  def results(params):
    def loss(params):
      sums = nnx.merge(graph, params).loss_sums(inputs, targets)
      losses = decoder.mean_losses(sums, model.config)
      balance_loss = losses.get('balance_loss', jnp.zeros(()))
      return decoder.total_loss(sums, model.config), balance_loss

    logits = nnx.merge(graph, params)(inputs)
    return logits, *jax.value_and_grad(loss, has_aux=True)(params)

  logits, (loss, balance), grads = results(params)
  assert logits.dtype == np.float32
  # A gradient has its parameter's layout: saved, it has theirs.
  huggingface.save(nnx.merge(graph, grads), folder / 'gradients')
  gradients = safetensors.numpy.load_file(
    folder / 'gradients' / 'model.safetensors'
  )
  return {
    'logits': np.asarray(logits),
    'loss': float(loss),
    'balance_loss': float(balance),
    'gradients': gradients,
  }


def error(ours, theirs):
  """The largest difference, over the root mean square of theirs."""
  assert ours.shape == theirs.shape
  if not theirs.any():  # Of a gate to nothing, or of nothing.
    return np.abs(ours).max(initial=0)
  return np.abs(ours - theirs).max() / np.sqrt(np.mean(theirs**2))


def check_balance_loss(ours, recorded):
  """It takes one softmax of the logits, ours and that of transformers."""
  if recorded:
    theirs, once, twice = recorded
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert theirs == pytest.approx(once, rel=1e-5)
    assert abs(theirs - twice) > 0.1
  else:
    assert ours == 0


@pytest.mark.parametrize(
  'case',
  [
    # What is in AGAIN is in others too, but for the combination.
    pytest.param(case, marks=pytest.mark.slow) if case in AGAIN else case
    for case in reference.CASES
  ],
)
def test_recorded_parity(case, tmp_path):
  ours = our_results(reference.write(tmp_path, reference.CASES[case]))
  recorded = RECORDED[case]
  assert error(ours['logits'], np.array(recorded['logits'])) < 1e-4
  assert ours['loss'] == pytest.approx(recorded['loss'], rel=1e-5)
  check_balance_loss(ours['balance_loss'], recorded['balance_losses'])
  assert set(ours['gradients']) == set(recorded['gradients'])
  for name, (norm, *first) in recorded['gradients'].items():
    gradient = ours['gradients'][name]
    assert np.linalg.norm(gradient) == pytest.approx(norm, rel=1e-4), name
    scale = norm / max(1, gradient.size) ** 0.5
    np.testing.assert_allclose(
      gradient.ravel()[:3], first, rtol=1e-4, atol=1e-4 * scale, err_msg=name
    )


@pytest.mark.slow
@pytest.mark.parametrize('case', reference.CASES)
@pytest.mark.filterwarnings('ignore:Initializing zero-element tensors')
def test_live_parity(case, tmp_path):
  reason = 'parity with transformers needs torch and transformers; CI has them'
  torch = pytest.importorskip('torch', reason=reason)
  transformers = pytest.importorskip('transformers', reason=reason)
  config = reference.CASES[case]
  folder = reference.write(tmp_path / 'model', config)
  ours = our_results(folder)
  theirs = reference.transformers_results(config)
  assert error(ours['logits'], theirs['logits']) < 1e-4
  assert ours['loss'] == pytest.approx(theirs['loss'], rel=1e-5)
  check_balance_loss(ours['balance_loss'], theirs['balance_losses'])
  assert set(ours['gradients']) == set(theirs['gradients'])
  worst = max(
    (error(ours['gradients'][name], gradient), name)
    for name, gradient in theirs['gradients'].items()
  )
  print(f'{case}: {worst[0]:.1e} at {worst[1]}')
  assert worst[0] < 1e-4, worst
  # And what we write, in one file or many, transformers loads.
  for shards, size in ((1, 10**9), (2, 10**4)):
    huggingface.save(
      huggingface.load(folder), tmp_path / f'{shards}', max_bytes=size
    )
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
      tmp_path / f'{shards}', experts_implementation='eager'
    )
    inputs = torch.from_numpy(reference.INPUTS)
    with torch.no_grad():
      logits = loaded(input_ids=inputs).logits.numpy()
    assert error(logits, theirs['logits']) < 1e-5
    state = {name: x.numpy() for name, x in loaded.state_dict().items()}
    state = reference.per_expert(state)
    tensors = reference.weights(config)
    if config['tie_word_embeddings']:
      tensors['lm_head.weight'] = tensors['model.embed_tokens.weight']
    assert set(state) == set(tensors)
    for name, tensor in tensors.items():
      assert np.array_equal(state[name], tensor), name


@pytest.mark.slow
@pytest.mark.parametrize('layout', ['published', 'fused'])
def test_live_loads_what_transformers_writes(layout, tmp_path):
  reason = 'needs torch and transformers; CI has them'
  pytest.importorskip('torch', reason=reason)
  pytest.importorskip('transformers', reason=reason)
  for case in ('moe_sparse_step', 'tied'):
    theirs = reference.transformers_model(reference.CASES[case])
    theirs.save_pretrained(
      tmp_path / case, save_original_format=layout == 'published'
    )
    names = safetensors.numpy.load_file(tmp_path / case / 'model.safetensors')
    if case != 'tied':
      assert layout == 'fused' or any('experts.0.' in name for name in names)
      assert layout != 'fused' or any('gate_up_proj' in name for name in names)
    huggingface.save(huggingface.load(tmp_path / case), tmp_path / 'ours')
    again = safetensors.numpy.load_file(tmp_path / 'ours' / 'model.safetensors')
    for name, tensor in reference.weights(reference.CASES[case]).items():
      assert np.array_equal(again[name], tensor), name


@pytest.mark.slow
def test_live_keeps_how_text_is_generated(tmp_path):
  reason = 'needs torch and transformers; CI has them'
  torch = pytest.importorskip('torch', reason=reason)
  transformers = pytest.importorskip('transformers', reason=reason)

  def loaded(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(
      folder, experts_implementation='eager'
    )

  facts = {
    'bos_token_id': 5, 'eos_token_id': [7, 9], 'pad_token_id': 3,
    'max_position_embeddings': 77,
  }  # fmt: skip
  drawn = {'do_sample': True, 'temperature': 0.6, 'top_p': 0.9}
  for case in ('llama3_rope', 'qwen2', 'moe'):
    folder = tmp_path / case
    theirs = reference.transformers_model(reference.CASES[case] | facts)
    theirs.generation_config.update(**drawn)
    theirs.save_pretrained(folder)
    before = loaded(folder)
    for target in (tmp_path / 'ours', folder):
      huggingface.save(huggingface.load(folder), target)
      after = loaded(target)
      for name, value in facts.items():
        assert getattr(after.config, name) == value, name
      ids = {k: v for k, v in facts.items() if k.endswith('_id')}
      for name, value in {**ids, **drawn}.items():
        assert getattr(after.generation_config, name) == value, name
      a, b = (x.generation_config.to_dict() for x in (before, after))
      assert a == b
      a, b = (x.config.to_dict() for x in (before, after))
      assert a | {'_name_or_path': str(target), 'head_dim': 6} == b

  # A model trained here ends its texts, where its vocabulary does.
  model = huggingface.load(folder)
  options = {'max_new_tokens': 20, 'do_sample': False}
  prompt = torch.tensor([[1, 2]])
  end = None
  for length in (22, 3):
    facts = huggingface.Facts.of(
      eos_token_id=end, pad_token_id=0, max_position_embeddings=64
    )
    huggingface.save(model, tmp_path / 'trained', facts=facts)
    trained = loaded(tmp_path / 'trained')
    assert trained.config.max_position_embeddings == 64
    texts = trained.generate(prompt, **options)
    assert texts.shape == (1, length)
    end = texts[0, 2].item()


@pytest.mark.slow
def test_live_a_tied_head_that_differs(tmp_path):
  """Transformers computes with it and warns; the advice of ours is right."""
  reason = 'needs torch and transformers; CI has them'
  torch = pytest.importorskip('torch', reason=reason)
  transformers = pytest.importorskip('transformers', reason=reason)
  tied = reference.CASES['tied']
  tensors = reference.weights({**tied, 'tie_word_embeddings': False})
  folder = reference.write(tmp_path, tied, tensors)
  theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
  with pytest.raises(ValueError, match='set tie_word_embeddings to false'):
    huggingface.load(folder)
  reference.write(tmp_path, {**tied, 'tie_word_embeddings': False}, tensors)
  with torch.no_grad():
    logits = theirs(input_ids=torch.from_numpy(reference.INPUTS)).logits
  ours = huggingface.load(folder)(jnp.asarray(reference.INPUTS, jnp.int32))
  assert error(np.asarray(ours), logits.numpy()) < 1e-4


@pytest.mark.parametrize('case', reference.CASES)
@pytest.mark.parametrize('scan_layers', [False, True])
def test_round_trip_to_the_bit(case, scan_layers, tmp_path):
  config = reference.CASES[case]
  tensors = reference.weights(config)
  for layout, shards in ((tensors, 1), (reference.fused(tensors), 3)):
    folder = reference.write(tmp_path / 'theirs', config, layout, shards)
    ours = dataclasses.replace(
      huggingface.load_config(folder), scan_layers=scan_layers
    )
    model = huggingface.load(folder, config=ours)
    huggingface.save(model, tmp_path / 'ours')
    again = safetensors.numpy.load_file(tmp_path / 'ours' / 'model.safetensors')
    assert set(again) == set(tensors)
    for name, tensor in tensors.items():
      assert again[name].dtype == np.float32
      assert np.array_equal(again[name], tensor), name
    assert huggingface.load_config(tmp_path / 'ours') == (
      dataclasses.replace(ours, scan_layers=False)
    )
    (folder / 'model.safetensors').unlink(missing_ok=True)


def test_low_precision_is_widened(tmp_path):
  for case in ('grouped_query', 'moe'):
    tensors = {
      name: tensor.astype(jnp.bfloat16)
      for name, tensor in reference.weights(reference.CASES[case]).items()
    }
    model = huggingface.load(
      reference.write(tmp_path, reference.CASES[case], tensors)
    )
    huggingface.save(model, tmp_path / 'ours')
    again = safetensors.numpy.load_file(tmp_path / 'ours' / 'model.safetensors')
    for name, tensor in tensors.items():
      assert again[name].dtype == np.float32
      assert np.array_equal(again[name], tensor.astype(np.float32)), name
