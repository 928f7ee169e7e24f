import dataclasses
import math
import pathlib
import re
import shlex

import jax
import pytest

from models import sharding
from train import cli, commands, mesh

PAGE = pathlib.Path(__file__).parents[2] / 'docs' / 'launch.md'


def run_commands():
  """The arguments of each `python -m train run` on the page."""
  text = PAGE.read_text().replace('\\\n', ' ')
  for found in re.findall(r'python -m (train run [^\n"\'&;]*)', text):
    words = shlex.split(re.sub(r'\$\w+', '2', found))
    if 'RECIPE' not in words:
      yield words[1:]


COMMANDS = list(run_commands())


def test_there_are_commands():
  assert len(COMMANDS) >= 8


@pytest.mark.parametrize('argv', COMMANDS, ids=' '.join)
def test_a_command_is_accepted(argv, monkeypatch):
  seen = []

  def note(options):
    config = cli.config(options.recipe, options)
    seen.append((config, options))
    return 0

  monkeypatch.setattr(commands, '_run', note)
  assert commands.run('python -m train', argv) == 0
  [(config, options)] = seen
  assert (options.coordinator is None) == (options.processes is None)
  sizes = dataclasses.asdict(config.mesh)
  if len(jax.devices()) % math.prod(sizes[axis] or 1 for axis in sharding.AXES):
    split = math.prod(sizes[axis] or 1 for axis in sharding.BATCH)
    assert config.data.batch_size % (split * config.accumulate) == 0
  else:
    mesh.check(config, mesh.make_mesh(config.mesh))
