"""What docs/aot.md says of the command and its JSON."""

import pathlib
import re
import shlex

import pytest

from train import cli, commands
from train.aot import command

TEXT = (pathlib.Path(__file__).parents[2] / 'docs/aot.md').read_text('utf-8')
COMMANDS = re.findall(r'^    python -m train (aot .*)$', TEXT, re.MULTILINE)


def test_there_are_commands():
  assert len(COMMANDS) >= 2


@pytest.mark.parametrize('line', COMMANDS)
def test_commands_parse(line, monkeypatch):
  seen = []

  def note(config, options):
    seen.append((config, options))

  monkeypatch.setattr(command, 'run', note)
  assert commands.run('python -m train', shlex.split(line)) == 0
  [(_, options)] = seen
  assert options.topology in line
  assert bool(options.trials) == ('--search' in line)


def test_all_options_are_listed(capsys, monkeypatch):
  monkeypatch.setattr(cli, 'add_config_options', lambda parser: None)
  with pytest.raises(SystemExit):
    commands.run('python -m train', ['aot', '--help'])
  own = set(re.findall(r'--[a-z][\w.-]*', capsys.readouterr().out))
  listed = set(re.findall(r'^\| `(--[a-z][\w.-]*)', TEXT, re.MULTILINE))
  assert own - {'--help'} == listed
