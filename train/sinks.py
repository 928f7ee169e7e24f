"""TensorBoard and Weights & Biases, in a thread of their own."""

import contextlib
import importlib
import pathlib
import queue
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from train.errors import UserError
from train.watch_options import WatchOptions

_END = None
_SECONDS_BETWEEN_FLUSHES = 10.0
_MOST_SECONDS_TO_CLOSE = 60.0


class Sink(Protocol):
  """Where measurements go."""

  name: str
  """For people."""

  def write(self, step: int, when: float, values: dict[str, float]) -> None:
    """Takes the values of a step, 'train/loss' and so on."""

  def close(self) -> None:
    """Passes on what is left."""


class Sinks:
  """Passes lines of metrics.jsonl on, without keeping the run waiting.

  A sink that fails is left out from then on, and the run told: measurements
  are in metrics.jsonl all the same.

  Args:
    watch: Which there are.
    local: The directory that they write to.
    name: Of the run.
    config: Of the run, as JSON holds it.
    step: Taken before now; what was measured after it is done again.
    say: Tells the person who watches.

  Raises:
    UserError: one that is asked for is not installed, or cannot be begun.
  """

  def __init__(
    self,
    watch: WatchOptions,
    local: pathlib.Path,
    name: str,
    config: dict[str, Any],
    step: int,
    say: Callable[[str], None],
  ):
    self._say = say
    self._sinks: list[Sink] = []
    if watch.tensorboard:
      self._sinks.append(TensorBoard(local / 'tensorboard', step))
    if watch.wandb:
      self._sinks.append(WandB(watch.wandb, local, name, config))
    self._lines: queue.SimpleQueue = queue.SimpleQueue()
    self._thread = threading.Thread(target=self._pass_on, daemon=True)
    self._thread.start()

  def put(self, line: Mapping[str, Any]) -> None:
    """Takes a line; returns at once."""
    self._lines.put(line)

  def close(self) -> None:
    """Waits until all is passed on, a minute at most."""
    self._lines.put(_END)
    self._thread.join(_MOST_SECONDS_TO_CLOSE)
    if self._thread.is_alive():
      names = ' and '.join(sink.name for sink in self._sinks)
      self._say(f'does not wait any longer for {names}')

  def _pass_on(self) -> None:
    while (line := self._lines.get()) is not _END:
      values = _values(line)
      when = line.get('time', time.time())
      self._each(lambda sink: sink.write(line['step'], when, values))  # noqa: B023
    self._each(lambda sink: sink.close())

  def _each(self, call: Callable[[Sink], None]) -> None:
    for sink in tuple(self._sinks):
      try:
        call(sink)
      except Exception as error:  # Whatever others' code raises.
        self._sinks.remove(sink)
        with contextlib.suppress(Exception):
          sink.close()
        self._say(f'no longer writes to {sink.name}: {_first_line(error)}')


def _values(line: Mapping[str, Any]) -> dict[str, float]:
  """The numbers of a line by 'train/loss', 'train/router_entropy/0' ..."""
  values: dict[str, float] = {}

  def add(name: str, value: Any) -> None:
    if isinstance(value, dict):
      for key, inner in value.items():
        add(f'{name}/{key}', inner)
    elif isinstance(value, list):
      add(name, dict(enumerate(value)))
    elif isinstance(value, int | float):
      values[name] = float(value)

  for key in line.keys() - {'step', 'time'}:
    add(key if key == 'layers' else f'{line["split"]}/{key}', line[key])
  return values


class TensorBoard:
  """Event files, written by tensorboardX.

  Its own writer would do so in a thread that a full disk ends, after which it
  blocks: this one uses what is below it.
  """

  name = 'TensorBoard'

  def __init__(self, directory: pathlib.Path, step: int):
    files = _import('tensorboardX.event_file_writer', 'tensorboard')
    self._event = importlib.import_module('tensorboardX.proto.event_pb2')
    self._summary = importlib.import_module('tensorboardX.proto.summary_pb2')
    try:
      directory.mkdir(parents=True, exist_ok=True)
      # Its names hold whole seconds, and a run may start again within one.
      suffix = f'.{time.time_ns()}'
      # It would read a relative 's3:x' as an address in an object store.
      place = str(directory.absolute() / 'events')
      self._writer = files.EventsWriter(place, suffix)
      # Readers drop what an earlier file has of later steps.
      start = self._event.SessionLog(status=self._event.SessionLog.START)
      self._write(step=step + 1, wall_time=time.time(), session_log=start)
      self._writer.flush()
    except OSError as error:
      raise UserError(
        f'cannot write to {directory}: {error.strerror or error}'
      ) from error
    self._flushed = time.monotonic()

  def write(self, step: int, when: float, values: dict[str, float]) -> None:
    """See `Sink`."""
    value = self._summary.Summary.Value
    summary = self._summary.Summary(
      value=[value(tag=tag, simple_value=x) for tag, x in values.items()]
    )
    self._write(step=step, wall_time=when, summary=summary)
    if (now := time.monotonic()) - self._flushed > _SECONDS_BETWEEN_FLUSHES:
      self._flushed = now
      self._writer.flush()

  def close(self) -> None:
    """See `Sink`."""
    self._writer.close()

  def _write(self, **fields: Any) -> None:
    self._writer.write_event(self._event.Event(**fields))


class WandB:
  """A run of Weights & Biases, taken up again where the directory has one."""

  name = 'Weights & Biases'

  def __init__(
    self,
    project: str,
    local: pathlib.Path,
    name: str,
    config: dict[str, Any],
  ):
    wandb = _import('wandb', 'wandb')
    # There too where a run goes on from an object store: the mirror fetches it.
    known = local / 'wandb-id'
    try:
      local.mkdir(parents=True, exist_ok=True)
      self._run = wandb.init(
        project=project, name=name, config=config, dir=str(local),
        id=known.read_text().strip() if known.exists() else None,
        resume='allow', settings={'console': 'off'},  # metrics.jsonl has more.
      )  # fmt: skip
      known.write_text(f'{self._run.id}\n')
    except Exception as error:  # Not logged in, no network, and others.
      raise UserError(
        f'--wandb {project}: {_first_line(error)} (`wandb login`, or '
        'WANDB_MODE=offline in the environment)'
      ) from error
    # Steps that are done again would be refused on its own axis.
    self._run.define_metric('*', step_metric='step')

  def write(self, step: int, when: float, values: dict[str, float]) -> None:
    """See `Sink`."""
    del when  # It takes its own.
    self._run.log({'step': step, **values})

  def close(self) -> None:
    """See `Sink`."""
    self._run.finish()


def _import(module: str, extra: str) -> Any:
  package = module.partition('.')[0]
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise UserError(
      f'--{extra} needs {package}, which cannot be imported ({error}): '
      f"pip install -e '.[train,{extra}]'"
    ) from error


def _first_line(error: Exception) -> str:
  text = getattr(error, 'strerror', None) or str(error)
  return text.strip().partition('\n')[0] or type(error).__name__
