"""What transformers computes for small LLaMAs; records it for the tests.

    python tests/models/huggingface_reference.py

needs transformers and torch (CPU) and rewrites huggingface_reference.json,
which `make test` compares with. The weights come from a numpy generator, so
that only results are recorded.
"""

import json
import pathlib
from typing import Any

import numpy as np

RECORD = pathlib.Path(__file__).with_suffix('.json')
BASE = {
  'model_type': 'llama', 'hidden_act': 'silu', 'vocab_size': 37,
  'hidden_size': 24, 'intermediate_size': 40, 'num_hidden_layers': 2,
  'num_attention_heads': 4, 'num_key_value_heads': 4, 'rms_norm_eps': 1e-6,
  'max_position_embeddings': 64, 'tie_word_embeddings': False,
  'rope_parameters': {'rope_type': 'default', 'rope_theta': 10000.0},
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
}
TOKENS = np.random.default_rng(1).integers(0, BASE['vocab_size'], (2, 11))


def weights(config: dict[str, Any]) -> dict[str, np.ndarray]:
  """The tensors of a folder, in Hugging Face's names and layouts."""
  d, f = config['hidden_size'], config['intermediate_size']
  v, h = config['vocab_size'], d // config['num_attention_heads']
  kv = h * config['num_key_value_heads']
  shapes = {'model.embed_tokens.weight': (v, d), 'model.norm.weight': (d,)}
  if not config['tie_word_embeddings']:
    shapes['lm_head.weight'] = (v, d)
  for i in range(config['num_hidden_layers']):
    shapes |= {
      f'model.layers.{i}.{name}.weight': shape
      for name, shape in {
        'input_layernorm': (d,),
        'post_attention_layernorm': (d,),
        'self_attn.q_proj': (d, d),
        'self_attn.k_proj': (kv, d),
        'self_attn.v_proj': (kv, d),
        'self_attn.o_proj': (d, d),
        'mlp.gate_proj': (f, d),
        'mlp.up_proj': (f, d),
        'mlp.down_proj': (d, f),
      }.items()
    }
  rng = np.random.default_rng(0)
  return {
    name: (
      (len(shape) == 1) + 0.2 * rng.standard_normal(shape)
    ).astype(np.float32)
    for name, shape in sorted(shapes.items())
  }  # fmt: skip


def transformers_results(config: dict[str, Any]) -> dict[str, Any]:
  """Logits, loss and the gradient of every parameter, from transformers."""
  import torch
  import transformers

  options = {k: v for k, v in config.items() if k != 'model_type'}
  model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options))
  tensors = {k: torch.from_numpy(v) for k, v in weights(config).items()}
  tied = {'lm_head.weight'} if config['tie_word_embeddings'] else set()
  result = model.load_state_dict(tensors, strict=False)
  if set(result.missing_keys) - tied or result.unexpected_keys:
    raise ValueError(f'these weights do not fit: {result}')
  tokens = torch.from_numpy(TOKENS)
  out = model(input_ids=tokens, labels=tokens)
  out.loss.backward()
  return {
    'logits': out.logits.detach().numpy(),
    'loss': float(out.loss.detach()),
    'gradients': {n: p.grad.numpy() for n, p in model.named_parameters()},
  }


def main() -> None:
  """Records every case, with five digits more than the tests ask for."""
  record = {}
  for name, config in CASES.items():
    results = transformers_results(config)
    record[name] = {
      'logits': results['logits'].round(6).tolist(),
      'loss': results['loss'],
      'gradients': {
        n: {
          'norm': float(np.linalg.norm(g)),
          'first': [float(x) for x in g.ravel()[:3]],
        }
        for n, g in results['gradients'].items()
      },
    }
  RECORD.write_text(json.dumps(record) + '\n')


if __name__ == '__main__':
  main()
