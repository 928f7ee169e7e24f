"""Trains a decoder of transformers, so many steps at a time.

Run by an interpreter with torch and transformers, and nothing of ours:

    python torch_program.py '{"model": {...}, ...}'

prints `@step {...}` once it has taken steps, and then for every line of its
standard input, a number of steps, `@step {"seconds": ...}`: seconds a step,
after one more that is not timed. Ends with its input.
"""

import json
import sys
import time

import torch
import transformers


def main() -> None:
  """Builds the model, then takes steps as told."""
  settings = json.loads(sys.argv[1])
  step, model = _make(settings)
  for _ in range(3):
    step()
  _wait(settings)
  _say({
    'versions': {
      'torch': torch.__version__,
      'transformers': transformers.__version__,
    },
    'parameters': sum(p.numel() for p in model.parameters()),
  })  # fmt: skip
  for line in sys.stdin:
    step()
    _wait(settings)
    start = time.perf_counter()
    for _ in range(int(line)):
      step()
    _wait(settings)
    _say({'seconds': (time.perf_counter() - start) / int(line)})


def _make(settings):
  """Returns a function that takes a step, and the model that it trains."""
  torch.manual_seed(0)
  torch.set_num_threads(settings['threads'])
  torch.set_float32_matmul_precision('high')  # Of a GPU; a CPU has no other.
  fields = dict(settings['model'])
  config = transformers.AutoConfig.for_model(
    fields.pop('model_type'), **fields, use_cache=False
  )
  sparse = getattr(config, 'num_experts', 0)
  half = settings['dtype'] == 'bfloat16'
  device = settings['device']
  # Grouped products know no autocast: a sparse model is held in bfloat16, which
  # is less work than the float32 parameters that ours has.
  model = transformers.AutoModelForCausalLM.from_config(
    config,
    attn_implementation='sdpa',
    dtype=torch.bfloat16 if half and sparse else torch.float32,
  ).to(device)
  model.train()
  forward = torch.compile(model) if settings['compiled'] else model
  optimizer = torch.optim.AdamW(
    model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
  )
  tokens = torch.randint(
    config.vocab_size, (settings['batch'], settings['length']), device=device
  )
  options = {'output_router_logits': True} if sparse else {}

  def step():
    with torch.autocast(device, torch.bfloat16, enabled=half and not sparse):
      loss = forward(input_ids=tokens, labels=tokens, **options).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)

  return step, model


def _wait(settings) -> None:
  if settings['device'] == 'cuda':
    torch.cuda.synchronize()


def _say(answer) -> None:
  print('@step ' + json.dumps(answer), flush=True)


if __name__ == '__main__':
  main()
