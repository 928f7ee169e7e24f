"""Where a training step's time goes, against the machine's matrix products.

Each part of the model (embedding, attention, MLP or experts, head and loss) is
a jitted program of its own, forward and backward, of all its layers; so is the
optimizer's update, and the trainer's whole step. The limit is a square product
of the same dtype. All run in turn on one device, on synthetic tokens, every
other round in the opposite order.

    python -m benchmarks.model
    python -m benchmarks.model --preset llama_66m --batch 16 --json FILE
    python -m benchmarks.model --model.n_layers 12 --model.dtype bfloat16

Without a preset the model is the one that other frameworks were timed on:
float32, vocabulary 8192, d_model 384, d_ff 1024, 6 layers, 6 heads.
"""

import dataclasses
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from benchmarks import shapes, timing
from models import accounting, families, sharding
from models.config import DecoderConfig
from models.decoder import Decoder
from models.loss import cross_entropy
from train import hardware, step
from train.config import Config, DataConfig, OptimizerConfig
from train.optimizer import make_optimizer

WHOLE, LIMIT = 'whole step', 'limit'


class Programs:
  """The programs of a model, compiled, and the arrays that they work on."""

  def __init__(self, config: DecoderConfig, batch: int, length: int, side: int):
    run = Config(
      model=config,
      data=DataConfig(batch_size=batch, sequence_length=length),
      optimizer=OptimizerConfig(power=1.2, schedule='constant'),
    )
    mesh = sharding.make_mesh(jax.devices()[:1])
    self.optimizer = make_optimizer(run)
    self.graph = nnx.graphdef(
      nnx.eval_shape(
        lambda: families.build(config, rngs=nnx.Rngs(params=0), mesh=mesh)
      )
    )
    programs = step.programs(run, mesh)
    self.state = programs.init()
    # The parts do not see the updates. Parameters do for gradients, too.
    self.params = jax.tree.map(jnp.copy, self.state.params)
    keys = iter(jax.random.split(jax.random.key(0), 8))
    self.tokens_BU = jax.random.randint(
      next(keys), (batch, length + 1), 0, config.vocab_size
    )
    shape = (batch, length, config.d_model)
    self.x_BTD, self.dy_BTD = (
      jax.random.normal(next(keys), shape, config.dtype) for _ in range(2)
    )
    self.square = jax.random.normal(next(keys), (side, side), config.dtype)
    self.runs: dict[str, Callable[[], Any]] = {}
    self.compile_seconds: dict[str, float] = {}
    self.temporary_bytes: dict[str, int] = {}
    for name, part in _parts(config, mesh).items():
      self._add_part(name, part)
    self._add_optimizer()
    self._add_whole(programs.train_step)
    product = self._compile(LIMIT, jnp.matmul, (self.square, self.square))
    self.runs[LIMIT] = lambda: product(self.square, self.square)

  def _compile(self, name, function, arguments, donate=()):
    start = time.perf_counter()
    if not hasattr(function, 'lower'):
      function = jax.jit(function, donate_argnums=donate)
    compiled: Any = function.lower(*arguments).compile()
    self.compile_seconds[name] = time.perf_counter() - start
    memory = compiled.memory_analysis()
    self.temporary_bytes[name] = memory.temp_size_in_bytes
    return compiled

  def _add_part(self, name, part):
    model = nnx.merge(self.graph, self.params)
    graph, *split = nnx.split(model, lambda path, _: part.owns(path), ...)
    inputs = (self.x_BTD,) if part.takes_x else ()

    def both(own, others, tokens_BU, inputs, dy_BTD):
      def forward(own, *inputs):
        return part.call(nnx.merge(graph, own, others), tokens_BU, *inputs)

      outputs, pull = jax.vjp(forward, own, *inputs)
      dy = [dy_BTD if y.ndim else jnp.ones_like(y) for y in outputs]
      return outputs, pull(tuple(dy))

    arguments = (*split, self.tokens_BU, inputs, self.dy_BTD)
    program = self._compile(name, both, arguments)
    self.runs[name] = lambda: program(*arguments)

  def _add_optimizer(self):
    def update(params, opt_state, grads):
      updates, opt_state, _ = self.optimizer.update(grads, opt_state, params)
      return optax.apply_updates(params, updates), opt_state

    program = self._compile(
      'optimizer', update, (*self.state[:2], self.params), donate=(0, 1)
    )

    def run():
      params, opt_state = program(*self.state[:2], self.params)
      self.state = self.state._replace(params=params, opt_state=opt_state)
      return self.state

    self.runs['optimizer'] = run

  def _add_whole(self, train_step):
    batch = {'tokens': self.tokens_BU}
    program = self._compile(WHOLE, train_step, (self.state, batch))

    def run():
      self.state, metrics = program(self.state, batch)
      return metrics

    self.runs[WHOLE] = run


class _Half(nnx.Module):
  """Attention, or what follows it, with the interface of a block."""

  def __init__(self, block: Any, attention: bool):
    self.is_attention = attention
    self.is_sparse = not attention and hasattr(block, 'moe')
    if attention:
      self.norm, self.inner = block.attention_norm, block.attention
    else:
      self.norm = block.mlp_norm
      self.inner = block.moe if self.is_sparse else block.mlp

  def __call__(self, x_BTD, angles, segments_BT, mask_BT):
    y_BTD, sums = self.norm(x_BTD), None
    if self.is_attention:
      y_BTD = self.inner(y_BTD, angles, segments_BT)
    elif self.is_sparse:
      y_BTD, sums = self.inner(y_BTD, mask_BT)
    else:
      y_BTD = self.inner(y_BTD)
    return x_BTD + y_BTD, sums


class _Part(NamedTuple):
  """A part of a model as a function of the model."""

  owns: Callable[[tuple[Any, ...]], bool]
  """Whether the parameter at a path gets its gradient here."""
  call: Callable[..., tuple[jax.Array, ...]]
  """Takes the model and tokens (batch, length + 1) to (batch, length, width)
  and scalars, which all get a gradient."""
  takes_x: bool = True
  """Whether it has another argument, of (batch, length, width)."""


def _parts(config: DecoderConfig, mesh: Mesh | None) -> dict[str, _Part]:
  """The parts by name, in the order of the forward pass."""

  def embedding(model: Decoder, tokens_BU):
    return (model._embed(tokens_BU[:, :-1]),)

  def layers(attention: bool):
    def call(model: Decoder, tokens_BU, x_BTD):
      del tokens_BU
      positions_BT = jnp.arange(x_BTD.shape[1])[None, :]
      mask_BT = jnp.ones(x_BTD.shape[:2], jnp.float32)
      context = model._angles(positions_BT), None, mask_BT
      sums: list[Any] = []
      if config.scan_layers:
        for group in model.layers:
          halves = [_Half(slot, attention) for slot in group]
          x_BTD, own = model._scan(halves, x_BTD, context)
          sums.append(own)
      else:
        for block in model.layers:
          graph, params = nnx.split(_Half(block, attention))
          x_BTD, own = model._remat(graph)(params, x_BTD, context)
          sums.append(own)
      return x_BTD, *(jnp.sum(leaf) for leaf in jax.tree.leaves(sums))

    return call

  def head(model: Decoder, tokens_BU, x_BTD):
    mask_BT = jnp.ones(x_BTD.shape[:2], jnp.float32)
    loss, *_ = cross_entropy(
      model.norm(x_BTD),
      model._head(x_BTD.dtype),
      tokens_BU[:, 1:],
      mask_BT,
      z_weight=config.z_loss,
      mesh=mesh,
    )
    return (loss / mask_BT.size,)

  def is_attention(path):
    return not {'attention', 'attention_norm'}.isdisjoint(path)

  table = 'embedding' if config.tie_embeddings else 'head'
  return {
    'embedding': _Part(
      lambda path: path[0] == 'embedding', embedding, takes_x=False
    ),
    'attention': _Part(is_attention, layers(True)),
    _mlp(config): _Part(
      lambda path: path[0] == 'layers' and not is_attention(path),
      layers(False),
    ),
    'head and loss': _Part(lambda path: path[0] in ('norm', table), head),
  }


def _mlp(config: DecoderConfig) -> str:
  sparse = [config.is_sparse(layer) for layer in range(config.n_layers)]
  if all(sparse):
    return 'experts'
  return 'MLP and experts' if any(sparse) else 'MLP'


def measure(
  config: DecoderConfig, batch: int, length: int, rounds: int, side: int
) -> dict[str, Any]:
  """Measures every program; see the module's docstring.

  Args:
    config: The model.
    batch: Sequences.
    length: Tokens of each.
    rounds: How many timings of each program.
    side: Of the square product.

  Returns:
    Facts of the machine and settings; and

    - `limit`: the product's median `flops_per_second`;
    - `programs`: of each part and of the whole step `ms` (median) and
      `ms_quartiles`, `flops` (of matrix products, by `models.accounting`),
      `of_limit` (median over rounds of its operations a second over the
      product's), `compile_seconds` and `temporary_bytes`;
    - `sum_ms` of the parts, and `sum_over_whole`, both medians over rounds;
    - `tokens_per_second`, `flops_per_token` and `flops_per_token_causal`;
    - `mfu` and `mfu_causal`, None where `mfu_missing` says why.
  """
  facts = timing.machine_facts()
  programs = Programs(config, batch, length, side)
  seconds = timing.time_rounds(programs.runs, rounds)
  limits = [2 * side**3 / taken for taken in seconds.pop(LIMIT)]
  tokens = batch * length
  by_part = accounting.flops_by_part(config, length)
  flops = {
    'attention': by_part['attention'] * tokens,
    _mlp(config): by_part['mlp'] * tokens,
    'head and loss': by_part['head'] * tokens,
    WHOLE: sum(by_part.values()) * tokens,
  }
  entries = []
  for name, taken in seconds.items():
    low, middle, high = timing.quartiles(taken)
    reached = [
      flops.get(name, 0) / s / limit
      for s, limit in zip(taken, limits, strict=True)
    ]
    entries.append({
      'program': name,
      'ms': 1e3 * middle,
      'ms_quartiles': [1e3 * low, 1e3 * high],
      'flops': flops.get(name, 0),
      'of_limit': statistics.median(reached),
      'compile_seconds': programs.compile_seconds[name],
      'temporary_bytes': programs.temporary_bytes[name],
    })  # fmt: skip
  whole = seconds.pop(WHOLE)
  sums = [sum(parts) for parts in zip(*seconds.values(), strict=True)]
  step_seconds = statistics.median(whole)
  counts = {
    'flops_per_token': accounting.flops_per_token(config, length),
    'flops_per_token_causal': accounting.flops_per_token(
      config, length, causal=True
    ),
  }
  peak, missing = hardware.peak(
    facts['platform'], facts['device'], config.dtype
  )
  rate = tokens / step_seconds
  return {
    'benchmark': 'model',
    'machine': facts,
    'settings': {
      'model': {'type': type(config).__name__, **dataclasses.asdict(config)},
      'parameters': accounting.parameters(config).total,
      'batch': batch,
      'length': length,
      'rounds': rounds,
    },
    'limit': {
      'side': side,
      'dtype': config.dtype,
      'flops_per_second': statistics.median(limits),
    },
    'programs': entries,
    'sum_ms': 1e3 * statistics.median(sums),
    'sum_over_whole': statistics.median(
      together / s for together, s in zip(sums, whole, strict=True)
    ),
    'tokens_per_second': rate,
    **counts,
    'mfu': peak and counts['flops_per_token'] * rate / peak,
    'mfu_causal': peak and counts['flops_per_token_causal'] * rate / peak,
    'mfu_missing': missing,
  }


def format_result(result: dict[str, Any]) -> str:
  """Returns a measurement as text: the machine, a table, and what it means."""
  settings, limit = result['settings'], result['limit']
  model = settings['model']
  *parts, whole = result['programs']
  rows = [_row(entry, result['sum_ms']) for entry in parts]
  rows.append(('sum', f'{result["sum_ms"]:.2f}', '', '', '', ''))
  rows.append(_row(whole, None))
  header = ('forward and backward', 'ms', 'quartiles', 'of sum', 'GFLOP',
            'of limit')  # fmt: skip
  ideal = whole['flops'] / limit['flops_per_second']
  if result['mfu'] is None:
    mfu = f'MFU: left out, {result["mfu_missing"]}.'
  else:
    peak = hardware.PEAKS[result['machine']['device']]
    mfu = (
      f'MFU {100 * result["mfu"]:.1f} %: FLOPs a token x tokens a second / '
      f"the device's published {peak:.3g} in "
      f'bfloat16; {100 * result["mfu_causal"]:.1f} % with half the scores.'
    )
  return '\n'.join((
    timing.format_facts(result['machine']),
    f'{model["type"]}, {settings["parameters"]:,} parameters: '
    f'{model["n_layers"]} layers, d_model {model["d_model"]}, '
    f'{model["n_heads"]} heads',
    f'vocabulary {model["vocab_size"]}, {model["dtype"]}, '
    f'{settings["batch"]} x {settings["length"]} tokens; medians of '
    f'{settings["rounds"]} rounds',
    '',
    timing.format_table(header, rows),
    '',
    f'limit: a product of {limit["side"]}-squares in {limit["dtype"]}, '
    f'{limit["flops_per_second"] / 1e9:.1f} GFLOP/s;',
    f'  at that rate the step would take {1e3 * ideal:.1f} ms.',
    f'sum / whole step: {result["sum_over_whole"]:.2f}. '
    f'{result["tokens_per_second"]:.0f} tokens a second.',
    f'the step compiled in {whole["compile_seconds"]:.1f} s; temporaries: '
    f'{whole["temporary_bytes"] / 1e6:.0f} MB.',
    f'GFLOP: {result["flops_per_token"] / 1e9:.4g} a token = 6 x active matrix '
    'parameters (the head, not the',
    '  embedding) + 12 x layers x d_model x length; masked scores count,',
    '  recomputation does not.',
    mfu,
  ))  # fmt: skip


def _row(entry: dict[str, Any], sum_ms: float | None) -> tuple[str, ...]:
  low, high = entry['ms_quartiles']
  flops = entry['flops']
  return (
    entry['program'],
    f'{entry["ms"]:.2f}',
    f'{low:.2f}-{high:.2f}',
    f'{100 * entry["ms"] / sum_ms:.0f} %' if sum_ms else '',
    f'{flops / 1e9:.1f}' if flops else '',
    f'{entry["of_limit"]:.2f}' if flops else '',
  )


def main(argv: list[str] | None = None) -> None:
  """Measures, prints, and writes the result as JSON if asked to."""
  parser = timing.Parser(
    prog='python -m benchmarks.model',
    description="Times a training step's parts against a matrix product.",
    allow_abbrev=False,
  )
  shapes.add_options(parser)
  parser.add_argument('--batch', type=timing.positive, default=8)
  parser.add_argument('--length', type=timing.positive, default=256)
  parser.add_argument('--rounds', type=timing.positive, default=10)
  parser.add_argument(
    '--side', type=timing.positive,
    help='of the square product; 2048 on a CPU, else 8192',
  )  # fmt: skip
  parser.add_argument('--json', metavar='FILE', help='write the result here')
  options = parser.parse_args(argv)
  config = shapes.from_options(parser, options)
  side = options.side or (2048 if jax.default_backend() == 'cpu' else 8192)
  if options.json:
    timing.check_writable(parser, options.json)
  try:
    result = measure(
      config, options.batch, options.length, options.rounds, side
    )
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    parser.error('no memory for this model and batch')
  print(format_result(result))
  if options.json:
    timing.write_json(options.json, result)
    print(f'written to {options.json}', file=sys.stderr)


if __name__ == '__main__':
  main()
