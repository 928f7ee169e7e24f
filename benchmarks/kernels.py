"""The kernels that carry a model, against those that others would use.

Attention against jax's own in plain matrix products; the head and loss against
optax's on whole logits; the experts' grouped product, and the whole experts,
against batched products of equal sizes: the useful work, with nothing sorted.
A kernel and its peers run in turn on one device, every other round in the
opposite order; a ratio is of two samples of one round.

    python -m benchmarks.kernels
    python -m benchmarks.kernels --only attention --rounds 40 --json FILE

Shape suffixes: B batch, T tokens, N query heads, K key and value heads, H head
width, D model width, V vocabulary, k experts of a token, E experts, F their
hidden width, M rows of all experts, C rows of each.
"""

import math
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh

from benchmarks import timing
from models import attention, sharding
from models.experts import experts
from models.grouped import grouped_matmul
from models.loss import cross_entropy

Shape = dict[str, int]

SHAPES: dict[str, list[Shape]] = {
  'attention': [
    {'B': 8, 'T': 256, 'N': 6, 'K': 6, 'H': 64},
    {'B': 16, 'T': 128, 'N': 4, 'K': 4, 'H': 32},
    {'B': 2, 'T': 1024, 'N': 8, 'K': 8, 'H': 64},
    {'B': 4, 'T': 512, 'N': 8, 'K': 2, 'H': 64},
  ],
  'loss': [
    {'B': 8, 'T': 256, 'D': 384, 'V': 8192},
    {'B': 8, 'T': 256, 'D': 384, 'V': 32100},
  ],
  'grouped': [
    {'M': 8192, 'E': 16, 'D': 128, 'F': 64},
    {'M': 2048, 'E': 8, 'D': 256, 'F': 128},
  ],
  # B T k is the M above.
  'experts': [
    {'B': 8, 'T': 256, 'k': 4, 'E': 16, 'D': 128, 'F': 64},
    {'B': 2, 'T': 256, 'k': 4, 'E': 8, 'D': 256, 'F': 128},
  ],
}
"""Of each kernel. M and B T k are multiples of E: equal sizes must exist."""

USEFUL = 'useful work'
TARGET = 2.0
"""The grouped product's time over that of the useful work, at most."""


class Program(NamedTuple):
  """A function of arrays, of which only the first ones get a gradient."""

  function: Callable[..., jax.Array]
  arrays: tuple[jax.Array, ...]
  others: tuple[jax.Array, ...] = ()


class Case(NamedTuple):
  """A kernel at one shape, and what it is compared with."""

  shape: Shape
  ours: Program
  peers: dict[str, Program]
  dtype: str = 'float32'
  routing: str | None = None
  """How the rows are spread over the experts."""


def _draw(*shapes: Sequence[int], dtype: str = 'float32', seed: int = 0):
  """Standard normal arrays."""
  rng = np.random.default_rng(seed)
  return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def _attention(shape: Shape, mesh: Mesh) -> Iterator[Case]:
  def ours(q_BTNH, k_BTKH, v_BTKH):
    return attention.attend(q_BTNH, k_BTKH, v_BTKH, mesh=mesh)

  def xla(q_BTNH, k_BTKH, v_BTKH):
    return jax.nn.dot_product_attention(
      q_BTNH, k_BTKH, v_BTKH, is_causal=True, implementation='xla'
    )

  batch, length, heads, kv_heads, width = shape.values()
  on_gpu = sharding.platform(mesh) == 'gpu'
  for dtype in ('float32', 'bfloat16') if on_gpu else ('float32',):
    qkv = _draw(
      *((batch, length, n, width) for n in (heads, kv_heads, kv_heads)),
      dtype=dtype,
    )
    yield Case(shape, Program(ours, qkv), {'xla': Program(xla, qkv)}, dtype)


def _loss(shape: Shape, mesh: Mesh) -> Iterator[Case]:
  def ours(x_BTD, head_DV, targets_BT, weights_BT):
    return cross_entropy(x_BTD, head_DV, targets_BT, weights_BT, mesh=mesh)[0]

  def whole(x_BTD, head_DV, targets_BT, weights_BT):
    losses_BT = optax.softmax_cross_entropy_with_integer_labels(
      x_BTD @ head_DV, targets_BT
    )
    return jnp.sum(weights_BT * losses_BT)

  batch, length, width, vocab = shape.values()
  x_BTD, head_DV = _draw((batch, length, width), (width, vocab))
  rng = np.random.default_rng(1)
  targets_BT = jnp.asarray(rng.integers(0, vocab, (batch, length)), jnp.int32)
  arrays = x_BTD, head_DV / width**0.5
  others = targets_BT, jnp.ones((batch, length))
  yield Case(
    shape,
    Program(ours, arrays, others),
    {'optax': Program(whole, arrays, others)},
  )


def _grouped(shape: Shape, mesh: Mesh) -> Iterator[Case]:
  platform = sharding.platform(mesh)

  def ours(x_MD, w_EDF, sizes_E):
    return grouped_matmul(x_MD, w_EDF, sizes_E, platform)

  rows, count, width, hidden = shape.values()
  x_MD, w_EDF = _draw((rows, width), (count, width, hidden))
  x_ECD = x_MD.reshape(count, -1, width)
  equal_E = np.full(count, rows // count)
  rng = np.random.default_rng(1)
  for routing, sizes in {
    'equal': equal_E,
    'random': rng.multinomial(rows, rng.dirichlet(np.ones(count))),
    'all-to-one': rows * (np.arange(count) == count // 2),
  }.items():
    sizes_E = jnp.asarray(sizes, jnp.int32)
    yield Case(
      shape,
      Program(ours, (x_MD, w_EDF), (sizes_E,)),
      {
        USEFUL: Program(jnp.matmul, (x_ECD, w_EDF)),
        'ragged_dot': Program(lax.ragged_dot, (x_MD, w_EDF), (sizes_E,)),
      },
      routing=routing,
    )


def _experts(shape: Shape, mesh: Mesh) -> Iterator[Case]:
  def ours(x_BTD, weights_BTk, gate_EDF, up_EDF, down_EFD, chosen_BTk):
    return experts(
      x_BTD, chosen_BTk, weights_BTk, gate_EDF, up_EDF, down_EFD, mesh=mesh
    )

  def useful(x_ECD, gate_EDF, up_EDF, down_EFD):
    h_ECF = jax.nn.silu(jnp.einsum('ecd,edf->ecf', x_ECD, gate_EDF))
    h_ECF *= jnp.einsum('ecd,edf->ecf', x_ECD, up_EDF)
    return jnp.einsum('ecf,efd->ecd', h_ECF, down_EFD)

  batch, length, chosen, count, width, hidden = shape.values()
  x_BTD, x_ECD, gate_EDF, up_EDF, down_EFD = _draw(
    (batch, length, width),
    (count, batch * length * chosen // count, width),
    *[(count, width, hidden)] * 2,
    (count, hidden, width),
  )
  matrices = gate_EDF / width**0.5, up_EDF / width**0.5, down_EFD / hidden**0.5
  weights_BTk = jnp.full((batch, length, chosen), 1 / chosen)
  rng = np.random.default_rng(1)
  # Experts of uneven popularity, and different ones for each token.
  score_BTE = rng.normal(size=(batch, length, count)) + rng.normal(size=count)
  turn_BTk = np.arange(batch * length * chosen).reshape(weights_BTk.shape)
  for routing, choice in {
    'equal': turn_BTk % count,
    'random': np.argsort(score_BTE)[..., -chosen:],
    'all-to-k': turn_BTk % chosen,
  }.items():
    chosen_BTk = jnp.asarray(choice, jnp.int32)
    yield Case(
      shape,
      Program(ours, (x_BTD, weights_BTk, *matrices), (chosen_BTk,)),
      {USEFUL: Program(useful, (x_ECD, *matrices))},
      routing=routing,
    )


_CASES: dict[str, Callable[[Shape, Mesh], Iterator[Case]]] = {
  'attention': _attention,
  'loss': _loss,
  'grouped': _grouped,
  'experts': _experts,
}


def make_cases(kernel: str) -> Iterator[Case]:
  """Returns the cases of a kernel, for the default backend's first device."""
  mesh = sharding.make_mesh(jax.devices()[:1])
  for shape in SHAPES[kernel]:
    yield from _CASES[kernel](shape, mesh)


def compile_program(program: Program, gradient: bool) -> Callable[[], Any]:
  """Returns a call that starts a compiled run.

  Args:
    program: The function and its arrays.
    gradient: Whether to run backward, too, from a random cotangent.
  """
  function, arrays, others = program
  if not gradient:
    run = jax.jit(function).lower(*arrays, *others).compile()
    return lambda: run(*arrays, *others)
  y = jax.eval_shape(function, *arrays, *others)
  (dy,) = _draw(y.shape, dtype=y.dtype, seed=2)

  def both(arrays, others, dy):
    y, pull = jax.vjp(lambda *arrays: function(*arrays, *others), *arrays)
    return y, *pull(dy)

  run = jax.jit(both).lower(arrays, others, dy).compile()
  return lambda: run(arrays, others, dy)


def measure(rounds: int, only: str | None = None) -> dict[str, Any]:
  """Measures the kernels; see the module's docstring.

  Args:
    rounds: How many timings of each program.
    only: The name of one kernel; all if None.

  Returns:
    Facts of the machine, settings, and `rows`: for each `kernel`, `shape`,
    `dtype`, `routing` (None but of experts) and `pass` ('forward', or
    'gradient': forward and backward) the median milliseconds `ms` and the
    `peers`. Of each peer, by `name`, `ms`, and `ratio` (median over rounds of
    the kernel's time over the peer's) and `ratio_quartiles`.
  """
  facts = timing.machine_facts()
  rows = [
    {'kernel': kernel, **row}
    for kernel in _CASES
    if only in (None, kernel)
    for case in make_cases(kernel)
    for row in _measure_case(case, rounds)
  ]
  return {
    'benchmark': 'kernels',
    'machine': facts,
    'settings': {'rounds': rounds, 'only': only},
    'target': TARGET,
    'rows': rows,
  }


def _measure_case(case: Case, rounds: int) -> Iterator[dict[str, Any]]:
  first, *rest = case.peers
  # In the middle, ours is next to two peers.
  programs = {
    first: case.peers[first],
    'ours': case.ours,
    **{name: case.peers[name] for name in rest},
  }
  for gradient in (False, True):
    seconds = timing.time_rounds(
      {
        name: compile_program(program, gradient)
        for name, program in programs.items()
      },
      rounds,
    )
    ours = seconds.pop('ours')
    yield {
      'shape': case.shape,
      'dtype': case.dtype,
      'routing': case.routing,
      'pass': 'gradient' if gradient else 'forward',
      'ms': 1e3 * statistics.median(ours),
      'peers': [_peer(name, ours, theirs) for name, theirs in seconds.items()],
    }


def _peer(
  name: str, ours: Sequence[float], theirs: Sequence[float]
) -> dict[str, Any]:
  low, middle, high = timing.quartiles(
    [a / b for a, b in zip(ours, theirs, strict=True)]
  )
  return {
    'name': name,
    'ms': 1e3 * statistics.median(theirs),
    'ratio': middle,
    'ratio_quartiles': [low, high],
  }


_TITLES = {
  'attention': "attention against jax.nn.dot_product_attention, 'xla'",
  'loss': 'head and loss against optax on whole logits',
  'grouped': "grouped product against the useful work and jax's ragged_dot",
  'experts': 'experts against the useful work: three products, SwiGLU',
}


def format_result(result: dict[str, Any]) -> str:
  """Returns a measurement as text: the machine, and a table of each kernel."""
  settings = result['settings']
  paragraphs = [
    f'{timing.format_facts(result["machine"])}\n'
    f'milliseconds, medians of {settings["rounds"]} rounds; ratio: our time '
    "over the peer's, round by round,\n"
    'and its quartiles; gradient: forward and backward; float32 where no dtype '
    'stands'
  ]
  for kernel, title in _TITLES.items():
    rows = [row for row in result['rows'] if row['kernel'] == kernel]
    if rows:
      paragraphs.append(f'{title}\n{_format_rows(rows)}')
  over = [
    peer['ratio'] > result['target']
    for row in result['rows']
    if row['kernel'] == 'grouped'
    for peer in row['peers']
    if peer['name'] == USEFUL
  ]
  if over:
    paragraphs.append(
      f'target: the grouped product takes at most {result["target"]:g} times '
      'the useful work (one batched\n'
      f'product of equal sizes); {sum(over)} of {len(over)} rows take more'
    )
  return '\n\n'.join(paragraphs)


def _format_rows(rows: Sequence[dict[str, Any]]) -> str:
  first = rows[0]
  header = ['x'.join(first['shape'])]
  header += ['routing' if first['routing'] else 'dtype', 'pass', 'ours']
  for peer in first['peers']:
    header += [peer['name'].split()[0], 'ratio', 'quartiles']
  lines = []
  for row in rows:
    line = ['x'.join(map(str, row['shape'].values()))]
    line += [row['routing'] or row['dtype'], row['pass'], _ms(row['ms'])]
    for peer in row['peers']:
      low, high = peer['ratio_quartiles']
      line += [_ms(peer['ms']), f'{peer["ratio"]:.2f}', f'{low:.2f}-{high:.2f}']
    lines.append(line)
  return timing.format_table(header, lines)


def _ms(value: float) -> str:
  """Three digits, or all before the point."""
  return f'{value:.{max(0, 2 - math.floor(math.log10(value)))}f}'


def main(argv: list[str] | None = None) -> None:
  """Measures, prints, and writes the result as JSON if asked to."""
  parser = timing.Parser(
    prog='python -m benchmarks.kernels',
    description='Times the kernels against what others would use.',
    allow_abbrev=False,
  )
  parser.add_argument('--rounds', type=timing.positive, default=20)
  parser.add_argument(
    '--only', choices=_CASES, metavar='NAME', help=' or '.join(_CASES)
  )
  parser.add_argument('--json', metavar='FILE', help='write the result here')
  options = parser.parse_args(argv)
  if options.json is not None:
    timing.check_writable(parser, options.json)
  try:
    result = measure(options.rounds, options.only)
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    parser.error('no memory for these shapes')
  print(format_result(result))
  if options.json is not None:
    timing.write_json(options.json, result)
    print(f'written to {options.json}', file=sys.stderr)


if __name__ == '__main__':
  main()
