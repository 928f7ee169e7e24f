"""A run's directory: its configuration, vocabulary, metrics and checkpoints.

It is the interface between tools; `docs/cli.md` describes its files.
"""

import importlib.metadata
import json
import math
import os
import pathlib
import platform
from typing import Any

import jax

from train.checkpoint import one_line_errors
from train.config import Config, to_dict
from train.errors import UserError

_PACKAGES = (
  'jax', 'jaxlib', 'optax', 'flax', 'orbax-checkpoint', 'grain',
  'tensorflow-datasets', 'tokenizers', 'numpy',
)  # fmt: skip

# Of the configuration: how the work is laid out, equal up to rounding.
_LAYOUT = ('mesh', 'accumulate')

# What a directory holds before it is a run's, if it was cut off at birth.
_BORN: tuple[set[str], ...] = (
  set(),
  {'run.json'},
  {'run.json', 'tokenizer.json'},
)


class RunDir:
  """Opens or makes the directory of a run.

  Args:
    path: The directory.
    config: The resolved configuration.
    source_hash: Of the text, vocabulary and split.
    tokenizer: The vocabulary, in the `tokenizers` JSON format.
    writes: Whether this process makes and writes the directory; another has
      opened it before if not, and this one then only reads.

  Raises:
    UserError: the directory holds another run, or cannot be written.
  """

  def __init__(
    self,
    path: pathlib.Path,
    config: Config,
    source_hash: str,
    tokenizer: str,
    *,
    writes: bool = True,
  ):
    self.path = path
    self.moved: dict[str, Any] = {}
    """What has changed of where the run is done since it began: 'devices',
    'mesh', 'accumulate'."""
    self._writes = writes
    self._metrics = path / 'metrics.jsonl'
    wanted = to_dict(config)
    devices = f'{jax.device_count()} {jax.devices()[0].device_kind}'
    if not writes:
      if not (path / 'config.json').exists():
        raise UserError(
          f'process {jax.process_index()} does not see {path}: --run-dir must '
          'be on a disk that all processes share'
        )
      _check_same(path, wanted, source_hash)
      return
    with one_line_errors(path):
      path.mkdir(parents=True, exist_ok=True)
      if (path / 'config.json').exists():
        self.moved = _check_same(path, wanted, source_hash, devices)
        # An older version wrote no vocabulary.
        if not (path / 'tokenizer.json').exists():
          write_atomically(path / 'tokenizer.json', tokenizer)
      elif _names(path) not in _BORN:
        raise UserError(
          f'{path} is not empty and holds no config.json: name another '
          '--run-dir'
        )
      else:
        facts = {
          'source_hash': source_hash,
          'versions': _versions(),
          'devices': devices,
        }
        # config.json last: it marks a run directory as one.
        write_atomically(path / 'run.json', _dumps(facts))
        write_atomically(path / 'tokenizer.json', tokenizer)
        write_atomically(path / 'config.json', _dumps(wanted))

  @property
  def checkpoints(self) -> pathlib.Path:
    """Where Orbax writes."""
    return self.path / 'checkpoints'

  def log(self, *lines: dict[str, Any]) -> None:
    """Appends to metrics.jsonl."""
    if not self._writes:
      return
    text = ''.join(
      json.dumps({k: plain(v) for k, v in line.items()}) + '\n'
      for line in lines
    )
    with one_line_errors(self.path), self._metrics.open('a') as file:
      file.write(text)

  def sync(self) -> None:
    """Makes what was logged durable: a checkpoint is about to rely on it."""
    if not self._writes:
      return
    with one_line_errors(self.path), self._metrics.open('a') as file:
      os.fsync(file.fileno())

  def rewind(self, step: int) -> None:
    """Drops what was logged after a step: it is about to be done again."""
    if not self._writes or not self._metrics.exists():
      return
    kept = [
      line for line in self.lines() if line['step'] <= step and not _ends(line)
    ]
    with one_line_errors(self.path):
      write_atomically(
        self._metrics, ''.join(json.dumps(line) + '\n' for line in kept)
      )

  def done(self) -> dict[str, Any] | None:
    """The line that ends a finished run; None where it has not finished."""
    for line in self.lines():
      if line.get('event') == 'done':
        return line
    return None

  def lines(self) -> list[dict[str, Any]]:
    """Every whole line of metrics.jsonl; a run that died may cut one off."""
    if not self._metrics.exists():
      return []
    lines = []
    # A crash of the machine can leave bytes that are no text.
    for text in self._metrics.read_bytes().decode(errors='replace').split('\n'):
      try:
        line = json.loads(text)
      except ValueError:
        continue
      if isinstance(line, dict) and 'step' in line:
        lines.append(line)
    return lines


def write_atomically(path: pathlib.Path, text: str) -> None:
  """Writes a file that is never seen half-written."""
  temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
  try:
    with temporary.open('w', encoding='utf-8') as file:
      file.write(text)
      file.flush()
      os.fsync(file.fileno())
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)


def _names(path: pathlib.Path) -> set[str]:
  return {entry.name for entry in path.iterdir() if entry.suffix != '.tmp'}


def _ends(line: dict[str, Any]) -> bool:
  return line.get('event') in ('done', 'stopped')


def plain(value: Any) -> Any:
  """JSON has no words for non-finite numbers."""
  if isinstance(value, list):
    return [plain(inner) for inner in value]
  if isinstance(value, float) and not math.isfinite(value):
    return str(value)
  return value


def _dumps(value: Any) -> str:
  return json.dumps(value, indent=2) + '\n'


def _versions() -> dict[str, str]:
  versions = {'python': platform.python_version()}
  for name in _PACKAGES:
    versions[name] = importlib.metadata.version(name)
  return versions


def _check_same(
  path: pathlib.Path,
  wanted: dict[str, Any],
  source_hash: str,
  devices: str = '',
) -> dict[str, Any]:
  """Refuses another run; returns what is laid out in another way."""
  try:
    found = json.loads((path / 'config.json').read_text())
    facts = json.loads((path / 'run.json').read_text())
    if not (isinstance(found, dict) and isinstance(facts, dict)):
      raise ValueError('config.json or run.json is not a JSON object')
  except (OSError, ValueError) as error:
    raise UserError(
      f'{path} holds a damaged run ({error}): name another --run-dir'
    ) from error
  layout = {key: found.get(key, wanted[key]) for key in _LAYOUT}
  differences = _differences(found | layout, wanted | layout)
  if facts.get('source_hash') != source_hash and not differences:
    differences = ['the text or vocabulary has changed']
  if differences:
    raise UserError(
      f'{path} holds a run of another configuration '
      f'({"; ".join(differences)}): name another --run-dir, or give the '
      'options of that run to continue it'
    )
  before = {'devices': facts.get('devices'), **layout}
  now = {'devices': devices, **{key: wanted[key] for key in _LAYOUT}}
  return {key: now[key] for key in now if now[key] != before[key]}


def _differences(found: Any, wanted: Any, prefix: str = '--') -> list[str]:
  if isinstance(found, dict) and isinstance(wanted, dict):
    return [
      difference
      for key in {**found, **wanted}
      for difference in _differences(
        found.get(key),
        wanted.get(key),
        f'{prefix}{key}.'
        if isinstance(wanted.get(key), dict)
        else f'{prefix}{key}',
      )
    ]
  if found == wanted:
    return []
  return [f'{prefix} is {found!r} there, {wanted!r} here']
