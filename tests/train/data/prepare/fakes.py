"""Jobs and sources that processes started by tests can import."""

import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import random
import time

from train import errors
from train.data import tokenizer
from train.data.prepare import progress

WORDS = ('Ansatz', 'beam', '数学', 'gradient', 'the', 'power', 'of', '\n', 'ß')


@dataclasses.dataclass(frozen=True)
class Task:
  number: int
  size: int = 10


@dataclasses.dataclass(frozen=True)
class Job:
  """Leaves a file for each task, unless told otherwise."""

  directory: pathlib.Path
  what: str = ''
  at: int = 2

  def __call__(self, task, count):
    count(task.number, task.size)
    if task.number == self.at:
      match self.what:
        case 'mistake':
          raise errors.UserError('a mistake in the input')
        case 'bug':
          raise ZeroDivisionError('a bug')
        case 'death':
          os._exit(9)
        case 'sleep':
          (self.directory / 'asleep').write_text(str(os.getpid()))
          time.sleep(60)
    (self.directory / f'{task.number}').write_text(str(os.getpid()))


@dataclasses.dataclass
class Interrupting(progress.Progress):
  """As a person who presses Ctrl-C when so many things have been counted."""

  left: int

  def count(self, tokens, size):
    super().count(tokens, size)
    self.left -= 1
    if self.left < 0:
      raise KeyboardInterrupt


@dataclasses.dataclass(frozen=True)
class Part:
  """Documents in memory."""

  name: str
  texts: tuple[str, ...]

  @property
  def size(self):
    return sum(map(len, self.texts))

  def digest(self):
    return hashlib.sha256(json.dumps(self.texts).encode()).hexdigest()

  def read(self, problems):
    for i, text in enumerate(self.texts):
      if text == 'BAD':
        problems.found('json', f'{self.name}, line {i + 1} is bad')
      else:
        yield text


@dataclasses.dataclass(frozen=True)
class Source:
  """Parts in memory; equal ones cannot be told from others by their names."""

  texts: tuple[tuple[str, ...], ...]

  def parts(self):
    return [Part(f'part {i}', texts) for i, texts in enumerate(self.texts)]

  def listing(self):
    return [[part.name, part.size] for part in self.parts()]


def corpus(documents=240, parts=5, seed=0):
  """A source of short documents, some of them copies of one."""
  rng = random.Random(seed)
  texts = [
    f'{i if i % 40 else 0} ' + ' '.join(rng.choices(WORDS, k=i % 40 and 30))
    for i in range(documents)
  ]
  cuts = sorted(rng.sample(range(1, documents), parts - 1))
  return Source(
    tuple(
      tuple(texts[start:stop])
      for start, stop in zip([0, *cuts], [*cuts, documents], strict=True)
    )
  )


@functools.cache
def bpe():
  """A small vocabulary."""
  return tokenizer.ByteLevelBPE.train(
    (text for texts in corpus(60).texts for text in texts), 300
  )


def contents(directory):
  """The bytes of all files of a directory, by name."""
  return {
    path.name: path.read_bytes() if path.is_file() else None
    for path in sorted(directory.iterdir())
  }
