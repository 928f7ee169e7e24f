"""MaxText, as a peer.

It is a whole program, which takes step after step and logs each: it is stopped
(SIGSTOP) while others run, and its steps are timed by when their lines come.
"""

import re
import subprocess
import tempfile
import time
from typing import Any

from benchmarks.peers.process import PeerError, Process, environment
from models.config import DecoderConfig, LlamaConfig

_STEP = re.compile(r'completed step: \d+,')
_MODULE = 'maxtext.trainers.pre_train.train'
_WARM = 4
# Lines of a block that are not timed: one can be of a step from before the
# pause, the next of the step that the pause cut in two.
_LEFT_OUT = 2
_START_SECONDS = 1200.0
_STEP_SECONDS = 300.0


class MaxTextPeer:
  """Starts MaxText on the CPU, lets it take steps, and stops it.

  Args:
    python: An interpreter that has maxtext.
    config: A LLaMA in float32.
    batch: Sequences.
    length: Tokens of each.
    steps: That all blocks together can ask for.
    scan_layers: MaxText's own default is true.

  Raises:
    PeerError: it does not run, or not this model.
  """

  def __init__(
    self,
    python: str,
    config: DecoderConfig,
    batch: int,
    length: int,
    *,
    steps: int,
    scan_layers: bool,
  ):
    self.name = f'MaxText, {"scanned" if scan_layers else "unrolled"}'
    if not isinstance(config, LlamaConfig) or config.dtype != 'float32':
      raise PeerError(f'{self.name}: run with a LLaMA in float32 alone')
    versions = _versions(self.name, python)
    self._output = tempfile.TemporaryDirectory()
    arguments = _arguments(config, batch, length) | {
      'scan_layers': str(scan_layers).lower(),
      'steps': str(steps + _WARM),
      'base_output_directory': self._output.name,
    }
    start = time.perf_counter()
    try:
      self._process = Process(
        self.name,
        [python, '-u', '-m', _MODULE]
        + [f'{name}={value}' for name, value in arguments.items()],
        environment(JAX_PLATFORMS='cpu'),
      )
    except BaseException:
      self._output.cleanup()
      raise
    try:
      for _ in range(_WARM):
        self._process.wait_for(_STEP, _START_SECONDS)
      self._process.pause()
    except BaseException:
      self.close()
      raise
    self.facts: dict[str, Any] = {
      'versions': versions,
      'start_seconds': time.perf_counter() - start,
    }

  @staticmethod
  def steps_for(blocks: int, steps: int) -> int:
    """Steps that so many blocks use, with those that are not timed."""
    return blocks * (steps + _LEFT_OUT + 2) + _LEFT_OUT

  def block(self, steps: int) -> float:
    """See `benchmarks.peers.process.Peer`."""
    self._process.discard()
    self._process.resume()
    came = []
    for _ in range(_LEFT_OUT + steps):
      came.append(self._process.wait_for(_STEP, _STEP_SECONDS)[1])
    self._process.pause()
    return (came[-1] - came[_LEFT_OUT - 1]) / steps

  def close(self) -> None:
    """Ends the process."""
    self._process.close()
    self._output.cleanup()


def _arguments(
  config: LlamaConfig, batch: int, length: int
) -> dict[str, str | int | float]:
  """The model, synthetic data, and nothing else switched on."""
  return {
    'hardware': 'cpu',
    'skip_jax_distributed_system': 'true',
    'model_name': 'default',
    'decoder_block': 'llama2',
    'base_emb_dim': config.d_model,
    'base_num_query_heads': config.n_heads,
    'base_num_kv_heads': config.kv_heads,
    'head_dim': config.head_dim,
    'base_mlp_dim': config.d_ff,
    'base_num_decoder_layers': config.n_layers,
    'vocab_size': config.vocab_size,
    'mlp_activations': "['silu','linear']",
    'logits_via_embedding': str(config.tie_embeddings).lower(),
    'dtype': 'float32',
    'attention': 'dot_product',
    'remat_policy': 'minimal',
    'dataset_type': 'synthetic',
    'per_device_batch_size': batch,
    'max_target_length': length,
    'gradient_clipping_threshold': 1.0,
    'enable_checkpointing': 'false',
    'enable_goodput_recording': 'false',
    'run_name': 'step',
  }


def _versions(name: str, python: str) -> dict[str, str]:
  program = (
    "from importlib.metadata import version as v; print(v('maxtext'), v('jax'))"
  )
  try:
    result = subprocess.run(
      [python, '-c', program], capture_output=True, text=True, check=True
    )
  except OSError as error:
    raise PeerError(f'{name}: {python}: {error.strerror}') from error
  except subprocess.CalledProcessError as error:
    last = error.stderr.strip().splitlines()[-1:]
    raise PeerError(f'{name}: {python}: {"".join(last)}') from error
  return dict(zip(('maxtext', 'jax'), result.stdout.split(), strict=True))
