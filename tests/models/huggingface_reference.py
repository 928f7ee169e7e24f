"""Small models, and what transformers computes for them, for the tests.

    python tests/models/huggingface_reference.py

needs transformers and torch (CPU) and rewrites huggingface_reference.json,
which `make test` compares with. The weights come from a numpy generator, so
that only results are recorded.
"""

import json
import pathlib
import re
from typing import Any

import numpy as np
import safetensors.numpy

RECORD = pathlib.Path(__file__).with_suffix('.json')
BASE = {
  'model_type': 'llama', 'hidden_act': 'silu', 'vocab_size': 37,
  'hidden_size': 24, 'intermediate_size': 40, 'num_hidden_layers': 2,
  'num_attention_heads': 4, 'num_key_value_heads': 4, 'rms_norm_eps': 1e-6,
  'max_position_embeddings': 64, 'tie_word_embeddings': False,
  'rope_parameters': {'rope_type': 'default', 'rope_theta': 10000.0},
}  # fmt: skip
MOE = {
  **BASE, 'model_type': 'qwen2_moe', 'num_key_value_heads': 2,
  'num_experts': 6, 'num_experts_per_tok': 2, 'moe_intermediate_size': 10,
  'shared_expert_intermediate_size': 14, 'norm_topk_prob': False,
  'decoder_sparse_step': 1, 'mlp_only_layers': [], 'qkv_bias': True,
  'router_aux_loss_coef': 0.1, 'use_sliding_window': False,
}  # fmt: skip
LLAMA3 = {
  'rope_type': 'llama3', 'rope_theta': 500000.0, 'factor': 8.0,
  'low_freq_factor': 1.0, 'high_freq_factor': 4.0,
  'original_max_position_embeddings': 8,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
  'multi_head': BASE,
  'grouped_query': {**BASE, 'num_key_value_heads': 2},
  'tied': {**BASE, 'tie_word_embeddings': True},
  'llama3_rope': {**BASE, 'rope_parameters': LLAMA3},
  'qwen2': {**BASE, 'model_type': 'qwen2', 'num_key_value_heads': 1},
  'moe': MOE,
  'moe_renormalized_tied': {
    **MOE, 'norm_topk_prob': True, 'tie_word_embeddings': True,
  },
  'moe_sparse_step': {
    **MOE, 'num_hidden_layers': 4, 'decoder_sparse_step': 2,
  },
  'moe_dense_layer_no_shared': {
    **MOE, 'num_hidden_layers': 3, 'mlp_only_layers': [0],
    'shared_expert_intermediate_size': 0,
  },
  'moe_llama3_multi_head_no_bias': {
    **MOE, 'rope_parameters': LLAMA3, 'num_key_value_heads': 4,
    'qkv_bias': False,
  },
}  # fmt: skip
TOKENS = np.random.default_rng(1).integers(0, BASE['vocab_size'], (2, 11))
INPUTS, TARGETS = TOKENS[:, :-1], TOKENS[:, 1:]


def is_sparse(config: dict[str, Any], layer: int) -> bool:
  """Whether a layer has experts, by transformers' rule."""
  return (
    config['model_type'] == 'qwen2_moe'
    and layer not in config['mlp_only_layers']
    and (layer + 1) % config['decoder_sparse_step'] == 0
  )


def _swiglu(name: str, d: int, f: int) -> dict[str, tuple[int, ...]]:
  return {
    f'{name}.gate_proj.weight': (f, d),
    f'{name}.up_proj.weight': (f, d),
    f'{name}.down_proj.weight': (d, f),
  }


def _layer(config: dict[str, Any], layer: int) -> dict[str, tuple[int, ...]]:
  c, d = config, config['hidden_size']
  kv = d // c['num_attention_heads'] * c['num_key_value_heads']
  shapes: dict[str, tuple[int, ...]] = {
    'input_layernorm.weight': (d,),
    'post_attention_layernorm.weight': (d,),
    'self_attn.o_proj.weight': (d, d),
  }
  for name, width in ('q', d), ('k', kv), ('v', kv):
    shapes[f'self_attn.{name}_proj.weight'] = (width, d)
    if c['model_type'] == 'qwen2' or c.get('qkv_bias'):
      shapes[f'self_attn.{name}_proj.bias'] = (width,)
  if not is_sparse(c, layer):
    return shapes | _swiglu('mlp', d, c['intermediate_size'])
  for i in range(c['num_experts']):
    shapes |= _swiglu(f'mlp.experts.{i}', d, c['moe_intermediate_size'])
  return {
    **shapes,
    **_swiglu('mlp.shared_expert', d, c['shared_expert_intermediate_size']),
    'mlp.gate.weight': (c['num_experts'], d),
    'mlp.shared_expert_gate.weight': (1, d),
  }


def weights(config: dict[str, Any]) -> dict[str, np.ndarray]:
  """The tensors of a folder, as published: experts each for itself."""
  v, d = config['vocab_size'], config['hidden_size']
  shapes = {'model.embed_tokens.weight': (v, d), 'model.norm.weight': (d,)}
  if not config['tie_word_embeddings']:
    shapes['lm_head.weight'] = (v, d)
  for i in range(config['num_hidden_layers']):
    shapes |= {f'model.layers.{i}.{n}': s for n, s in _layer(config, i).items()}
  rng = np.random.default_rng(0)
  return {
    name: (
      ('norm' in name) + 0.2 * rng.standard_normal(shape)
    ).astype(np.float32)
    for name, shape in sorted(shapes.items())
  }  # fmt: skip


def fused(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Experts as transformers 5 holds them: gate and up in one tensor."""
  result, experts = {}, {}
  for name, tensor in tensors.items():
    if match := re.fullmatch(
      r'(.*\.mlp\.experts)\.(\d+)\.(gate|up|down)_proj\.weight', name
    ):
      layer, number, part = match.groups()
      experts.setdefault(layer, {})[int(number), part] = tensor
    else:
      result[name] = tensor
  for layer, of in experts.items():
    n = range(len(of) // 3)
    result[f'{layer}.gate_up_proj'] = np.stack(
      [np.concatenate([of[i, 'gate'], of[i, 'up']]) for i in n]
    )
    result[f'{layer}.down_proj'] = np.stack([of[i, 'down'] for i in n])
  return result


def per_expert(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
  """The inverse of `fused`."""
  result = {}
  for name, tensor in tensors.items():
    layer, _, part = name.rpartition('.')
    if not layer.endswith('.mlp.experts'):
      result[name] = tensor
      continue
    parts = {'down': tensor}
    if part == 'gate_up_proj':
      gate, up = np.split(tensor, 2, axis=1)
      parts = {'gate': gate, 'up': up}
    for key, stack in parts.items():
      for i, expert in enumerate(stack):
        result[f'{layer}.{i}.{key}_proj.weight'] = expert
  return result


def write(
  folder: pathlib.Path,
  config: dict[str, Any],
  tensors: dict[str, np.ndarray] | None = None,
  shards: int = 1,
) -> pathlib.Path:
  """Makes a folder as transformers leaves one; returns it."""
  folder.mkdir(parents=True, exist_ok=True)
  tensors = weights(config) if tensors is None else tensors
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


def transformers_model(config: dict[str, Any]):
  """The model of transformers with these weights."""
  import torch
  import transformers

  options = {k: v for k, v in config.items() if k != 'model_type'}
  kind = {
    'llama': transformers.LlamaForCausalLM,
    'qwen2': transformers.Qwen2ForCausalLM,
    'qwen2_moe': transformers.Qwen2MoeForCausalLM,
  }[config['model_type']]
  # The plain experts: the faster ones ask for widths that suit them.
  model = kind(kind.config_class(**options, experts_implementation='eager'))
  tensors = {k: torch.from_numpy(v) for k, v in fused(weights(config)).items()}
  tied = {'lm_head.weight'} if config['tie_word_embeddings'] else set()
  result = model.load_state_dict(tensors, strict=False)
  if set(result.missing_keys) - tied or result.unexpected_keys:
    raise ValueError(f'these weights do not fit: {result}')
  return model


def balance_loss(
  router_logits: list[np.ndarray], config: dict[str, Any], softmaxes: int = 1
) -> float:
  """The balance loss of a row by its formula.

  Args:
    router_logits: Of each sparse layer, (tokens, experts).
    config: The model's.
    softmaxes: 2 for the trap, which older versions of transformers fell into:
      what the router returned as logits were probabilities already.
  """
  e, k = config['num_experts'], config['num_experts_per_tok']
  probabilities = np.concatenate(router_logits).astype(np.float64)
  for _ in range(softmaxes):
    probabilities = np.exp(probabilities)
    probabilities /= probabilities.sum(axis=-1, keepdims=True)
  chosen = np.argsort(-probabilities, axis=-1)[:, :k]
  fraction = np.bincount(chosen.ravel(), minlength=e) / len(chosen)
  return e * float(np.sum(fraction * probabilities.mean(axis=0)))


def transformers_results(config: dict[str, Any]) -> dict[str, Any]:
  """Logits, losses and the gradient of every parameter, from transformers.

  Losses are those of each row by itself, averaged: its balance loss mixes the
  rows of a batch. `balance_losses` are its own and those of `balance_loss`
  here, with one softmax and with two; none without experts.
  """
  import torch

  model = transformers_model(config)
  inputs, targets = torch.from_numpy(INPUTS), torch.from_numpy(TARGETS)
  is_moe = config['model_type'] == 'qwen2_moe'
  options = {'output_router_logits': True} if is_moe else {}
  losses, balance, once, twice = [], [], [], []
  for row in range(len(inputs)):
    one = slice(row, row + 1)
    out = model(
      input_ids=inputs[one],
      labels=inputs[one],  # Asks for the loss of these:
      shift_labels=targets[one].contiguous(),
      **options,
    )
    losses.append(out.loss)
    if is_moe:
      balance.append(float(out.aux_loss.detach()))
      logits = [x.detach().numpy() for x in out.router_logits]
      once.append(balance_loss(logits, config))
      twice.append(balance_loss(logits, config, softmaxes=2))
  loss = sum(losses) / len(losses)
  loss.backward()
  return {
    'logits': model(input_ids=inputs).logits.detach().numpy(),
    'loss': float(loss.detach()),
    'balance_losses': [
      float(np.mean(x)) for x in (balance, once, twice) if is_moe
    ],
    'gradients': per_expert(
      {n: p.grad.numpy() for n, p in model.named_parameters()}
    ),
  }


def main() -> None:
  """Records every case, with more digits than the tests ask for."""

  def short(x) -> float:
    return float(f'{x:.7g}')

  record = {}
  for name, config in CASES.items():
    results = transformers_results(config)
    record[name] = {
      'logits': results['logits'].round(6).astype(float).tolist(),
      'loss': results['loss'],
      'balance_losses': results['balance_losses'],
      'gradients': {
        n: [short(np.linalg.norm(g)), *map(short, g.ravel()[:3])]
        for n, g in results['gradients'].items()
      },
    }
    record[name]['logits'] = [
      [[short(x) for x in token] for token in row]
      for row in record[name]['logits']
    ]
  RECORD.write_text(json.dumps(record, separators=(',', ':')) + '\n')


if __name__ == '__main__':
  main()
