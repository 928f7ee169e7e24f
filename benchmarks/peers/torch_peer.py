"""transformers on torch, as a peer."""

import json
import pathlib
import re
import time
from typing import Any

from benchmarks.peers.process import PeerError, Process, environment
from models import accounting
from models.config import DecoderConfig
from models.huggingface_config import to_hugging_face

_PROGRAM = pathlib.Path(__file__).with_name('torch_program.py')
_ANSWER = re.compile(r'^@step (\{.*\})$')
# torch.compile of a deep model takes minutes; so do blocks on a slow machine.
_SECONDS = 1200.0


class TorchPeer:
  """Starts `torch_program.py` and waits until it has taken steps.

  Args:
    python: An interpreter that has torch and transformers.
    config: The model.
    batch: Sequences.
    length: Tokens of each.
    device: 'cpu' or 'cuda'.
    threads: Of torch, on a CPU.
    compiled: Whether to use `torch.compile`.

  Raises:
    PeerError: it does not run, or its model has not as many parameters.
  """

  def __init__(
    self,
    python: str,
    config: DecoderConfig,
    batch: int,
    length: int,
    *,
    device: str,
    threads: int,
    compiled: bool,
  ):
    self.name = f'transformers, {"torch.compile" if compiled else "eager"}'
    settings = {
      'model': to_hugging_face(config) | {'initializer_range': config.init_std},
      'dtype': config.dtype,
      'batch': batch,
      'length': length,
      'device': device,
      'threads': threads,
      'compiled': compiled,
    }
    start = time.perf_counter()
    self._process = Process(
      self.name,
      [python, '-u', str(_PROGRAM), json.dumps(settings)],
      environment(),
    )
    try:
      self.facts: dict[str, Any] = self._answer()
      expected = accounting.parameters(config).total
      if self.facts['parameters'] != expected:
        raise PeerError(
          f'{self.name}: {self.facts["parameters"]:,} parameters, not '
          f'{expected:,}'
        )
    except BaseException:
      self.close()
      raise
    self.facts['start_seconds'] = time.perf_counter() - start

  def block(self, steps: int) -> float:
    """See `benchmarks.peers.process.Peer`."""
    self._process.send(str(steps))
    return self._answer()['seconds']

  def _answer(self) -> dict[str, Any]:
    return json.loads(self._process.wait_for(_ANSWER, _SECONDS)[0][1])

  def close(self) -> None:
    """Ends the process."""
    self._process.close()
