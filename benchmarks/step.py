r"""A training step against other trainers, and against its own parts.

All programs run in one go and in turn, in blocks of some steps, every other
round in the opposite order: our step with and without the power, the same
within a loop that does the trainer's work on the host, a square product as the
machine's limit, and peers, each a process in an environment of its own.

    python -m benchmarks.step
    python -m benchmarks.step --torch PYTHON --torch-compile PYTHON \
      --maxtext PYTHON --first-step --json FILE
    python -m benchmarks.step --preset llama_0.2b --batch 64 --length 1024 \
      --torch-compile PYTHON

PYTHON is an interpreter that has transformers and torch, or maxtext (on a CPU
alone). Without a preset the model is float32, vocabulary 8192, d_model 384,
d_ff 1024, 6 layers, 6 heads; any field is an option, `--model.FIELD`.
"""

import contextlib
import os
import pathlib
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import jax

from benchmarks import first_step, shapes, step_result, timing
from benchmarks.own_step import POWER, OwnStep
from benchmarks.peers.maxtext_peer import MaxTextPeer
from benchmarks.peers.process import Peer, PeerError
from benchmarks.peers.torch_peer import TorchPeer
from models.config import DecoderConfig

# On a GPU the peers have memory of the same card.
_SHARED_MEMORY = {'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'}


def time_blocks(
  programs: dict[str, Callable[[], float]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, str]]:
  """Runs programs in turn.

  Args:
    programs: Each runs one block and returns seconds a step.
    rounds: Blocks of each, after one that does not count.

  Returns:
    Seconds by name, equal indices of the same round; and what went wrong with
    those peers that failed, which are left out.
  """
  seconds: dict[str, list[float]] = {name: [] for name in programs}
  failed: dict[str, str] = {}
  for number in range(-1, rounds):
    for name in programs if number % 2 == 0 else reversed(programs):
      if name in failed:
        continue
      try:
        taken = programs[name]()
      except PeerError as error:
        failed[name] = str(error)
        continue
      if number >= 0:
        seconds[name].append(taken)
  return {k: v for k, v in seconds.items() if k not in failed}, failed


def measure(
  config: DecoderConfig,
  batch: int,
  length: int,
  *,
  steps: int,
  rounds: int,
  side: int,
  peers: list[Callable[[], Peer]],
) -> dict[str, Any]:
  """Measures everything but the time to the first step.

  Args:
    config: The model.
    batch: Sequences of a step.
    length: Tokens of each.
    steps: Of a block.
    rounds: Blocks of each program.
    side: Of the square product.
    peers: Each starts one.

  Returns:
    See `benchmarks.step_result.result`.
  """
  facts = timing.machine_facts()
  failed: dict[str, str] = {}
  started: dict[str, Peer] = {}
  with contextlib.ExitStack() as stack:
    folder = stack.enter_context(tempfile.TemporaryDirectory())
    own = OwnStep(config, batch, length, side, pathlib.Path(folder) / 'log')
    programs: dict[str, Callable[[], float]] = {
      step_result.LIMIT: own.limit,
      step_result.PLAIN: lambda: own.device(1.0, steps),
      step_result.POWERED: lambda: own.device(POWER, steps),
      step_result.LOOP: lambda: own.loop(steps),
    }
    for start in peers:
      try:
        peer = start()
      except PeerError as error:
        failed[str(error).partition(':')[0]] = str(error)
        continue
      stack.callback(peer.close)
      started[peer.name] = peer
      programs[peer.name] = lambda peer=peer: peer.block(steps)  # type: ignore
    seconds, stopped = time_blocks(programs, rounds)
    dispatch = own.idle_dispatch(2 * steps)
    loss = own.once(POWER)
  return step_result.result(
    facts,
    config,
    {
      'batch': batch, 'length': length, 'steps': steps, 'rounds': rounds,
      'side': side, 'devices': jax.local_device_count(),
    },
    seconds,
    host=own.host[1:],
    idle_dispatch=dispatch,
    first_call_seconds=own.first_call_seconds[POWER],
    loss=loss,
    peers={name: peer.facts for name, peer in started.items()},
    failed=failed | stopped,
  )  # fmt: skip


def _peers(parser, options, config, blocks) -> list[Callable[[], Peer]]:
  """How to start those that were asked for; refuses what cannot be."""
  cpu = jax.default_backend() == 'cpu'
  shape = config, options.batch, options.length
  if options.maxtext and not cpu:
    parser.error('--maxtext is for a CPU')
  peers: list[Callable[[], Peer]] = []

  def torch(python, compiled):
    return lambda: TorchPeer(
      python, *shape, device='cpu' if cpu else 'cuda',
      threads=timing.cores(), compiled=compiled,
    )  # fmt: skip

  def maxtext(python, scan_layers):
    steps = MaxTextPeer.steps_for(blocks, options.steps)
    return lambda: MaxTextPeer(
      python, *shape, steps=steps, scan_layers=scan_layers
    )

  for name in ('torch', 'torch_compile', 'maxtext'):
    python = getattr(options, name)
    if not python:
      continue
    if not (found := shutil.which(python)):
      parser.error(f'--{name.replace("_", "-")}: {python} is no program')
    if not cpu and jax.local_device_count() > 1:
      parser.error(f'--{name.replace("_", "-")}: a peer has one device, we have'
                   f' {jax.local_device_count()}')  # fmt: skip
    # Not resolved: a link is how an environment's interpreter knows its place.
    if name == 'maxtext':
      peers += [maxtext(found, True), maxtext(found, False)]
    else:
      peers.append(torch(found, name == 'torch_compile'))
  return peers


def main(argv: list[str] | None = None) -> None:
  """Measures, prints, and writes the result as JSON if asked to."""
  parser = timing.Parser(
    prog='python -m benchmarks.step',
    description='Times a training step, ours and of other trainers.',
    allow_abbrev=False,
  )
  shapes.add_options(parser)
  parser.add_argument('--batch', type=timing.positive, default=8)
  parser.add_argument('--length', type=timing.positive, default=256)
  parser.add_argument(
    '--steps', type=timing.positive, help='of a block; 3 on a CPU, else 20'
  )
  parser.add_argument('--rounds', type=timing.positive, default=10)
  parser.add_argument(
    '--side', type=timing.positive,
    help='of the square product; 2048 on a CPU, else 8192',
  )  # fmt: skip
  for name in ('torch', 'torch-compile', 'maxtext'):
    parser.add_argument(f'--{name}', metavar='PYTHON', help='adds this peer')
  parser.add_argument(
    '--first-step', action='store_true',
    help='also time `python -m train run` until its first step',
  )  # fmt: skip
  parser.add_argument('--json', metavar='FILE', help='write the result here')
  options = parser.parse_args(argv)
  config = shapes.from_options(parser, options)
  if options.torch or options.torch_compile:
    for name, value in _SHARED_MEMORY.items():
      os.environ.setdefault(name, value)
  on_cpu = jax.default_backend() == 'cpu'
  options.steps = options.steps or (3 if on_cpu else 20)
  if options.batch % jax.local_device_count():
    parser.error(
      f'--batch ({options.batch}) must be a multiple of the '
      f'{jax.local_device_count()} devices'
    )
  peers = _peers(parser, options, config, options.rounds + 1)
  if options.json:
    timing.check_writable(parser, options.json)
  # So that peers are ended, too.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
  try:
    result = measure(
      config,
      options.batch,
      options.length,
      steps=options.steps,
      rounds=options.rounds,
      side=options.side or (2048 if on_cpu else 8192),
      peers=peers,
    )
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    parser.error('no memory for this model and batch')
  if options.first_step:
    try:
      result['first_step'] = first_step.measure(
        config, options.batch, options.length
      )
    except first_step.RunError as error:
      result['failed']['first step'] = str(error)
  result['targets'] = step_result.targets(result)
  print(step_result.text(result))
  if options.json:
    timing.write_json(options.json, result)
    print(f'written to {options.json}', file=sys.stderr)
  if result['failed']:
    sys.exit(1)


if __name__ == '__main__':
  main()
