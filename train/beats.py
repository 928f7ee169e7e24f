"""What the processes of a run say of themselves, and who is not heard.

Each says it to the store of JAX's coordination service.
"""

import json
import socket
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

_BEATS = 'gradpower/beat'
_HOST = socket.gethostname()


class Beat(NamedTuple):
  """What a process says of itself."""

  number: int
  """Of its beats so far."""
  host: str
  step: int
  """The last one it has reported."""
  reports: int
  """Of progress, so far; those of phases of a step too."""


class Listener:
  """What has been heard of each process, and when.

  Time is that of the listener alone, in seconds: clocks of hosts differ.

  Args:
    processes: How many there are.
    now: When it begins to listen.
  """

  def __init__(self, processes: int, now: float):
    self.beats: Mapping[int, Beat] = {}
    self._heard = dict.fromkeys(range(processes), now)
    self._moved = now

  def hear(self, beats: Mapping[int, Beat], now: float) -> None:
    """Takes the last beats of all processes."""
    for process, beat in beats.items():
      if beat != self.beats.get(process):
        self._heard[process] = now
    if _reports(beats) != _reports(self.beats):
      self._moved = now
    self.beats = beats

  def silent(self, limit: float, now: float) -> list[int]:
    """The processes of which nothing was heard for `limit` seconds."""
    return [i for i, heard in self._heard.items() if now - heard >= limit]

  def hung(self, limit: float, now: float) -> list[int]:
    """The processes furthest behind, if none moved for `limit` seconds."""
    if not any(_reports(self.beats)) or now - self._moved < limit:
      return []
    least = min(beat.step for beat in self.beats.values())
    return [i for i, beat in self.beats.items() if beat.step == least]


class Progress:
  """How far this process has come."""

  def __init__(self) -> None:
    self.step = 0
    self.reports = 0

  def report(self, step: int) -> None:
    """Notes that it has come to a step, or on within it."""
    self.step = step
    self.reports += 1


def post(client: Any, process: int, number: int, progress: Progress) -> None:
  """Says that this process lives."""
  beat = Beat(number, _HOST, progress.step, progress.reports)
  client.key_value_set(_key(process), json.dumps(beat), allow_overwrite=True)


def read(client: Any) -> dict[int, Beat]:
  """The last beat of each process."""
  found = client.key_value_dir_get(f'{_BEATS}/')
  return {
    int(key.rpartition('/')[2]): Beat(*json.loads(text)) for key, text in found
  }


def names(client: Any, processes: Iterable[int]) -> str:
  """Numbers and hosts, for a line of an error."""
  beats = read(client)
  named = [
    f'process {i} on {beats[i].host}' if i in beats else f'process {i}'
    for i in processes
  ]
  more = [f'{len(named) - 4} more'] if len(named) > 4 else []
  return ', '.join(named[:4] + more)


def wait_for(client: Any, process: int, seconds: float) -> None:
  """Until a process has said something."""
  client.blocking_key_value_get(_key(process), int(seconds * 1000))


def _key(process: int) -> str:
  return f'{_BEATS}/{process:08}'


def _reports(beats: Mapping[int, Beat]) -> list[int]:
  return [beat.reports for beat in beats.values()]
