"""What makes a run the same run when its directory is opened again."""

import importlib.metadata
import json
import platform
from typing import Any

from etils import epath

from train.config import OF_TEXT, with_defaults
from train.errors import UserError

_PACKAGES = (
  'jax', 'jaxlib', 'optax', 'flax', 'orbax-checkpoint', 'grain',
  'tensorflow-datasets', 'tokenizers', 'numpy',
)  # fmt: skip

# Of the configuration: how the work is laid out, equal up to rounding.
_LAYOUT = ('mesh', 'accumulate')

# Of the configuration: what changes nothing of what is trained.
_FREE = ('keep',)

# Of the data: where it lies; what it is, its hash tells.
_PLACES = ('prepared', 'tokenizer')


def versions() -> dict[str, str]:
  """Of Python and of the packages that a run's numbers depend on."""
  found = {'python': platform.python_version()}
  for name in _PACKAGES:
    found[name] = importlib.metadata.version(name)
  return found


def check_same(
  path: epath.Path,
  wanted: dict[str, Any],
  source_hash: str,
  devices: str = '',
) -> dict[str, Any]:
  """Compares a run with the one that a directory holds.

  Args:
    path: The run directory.
    wanted: The configuration.
    source_hash: Of the text, vocabulary and split.
    devices: Their number and kind.

  Returns:
    What is otherwise here: 'devices', 'mesh', 'accumulate', and 'versions',
    with 'A -> B' by package.

  Raises:
    UserError: it is another run, or a damaged one.
  """
  try:
    found = json.loads((path / 'config.json').read_text())
    facts = json.loads((path / 'run.json').read_text())
    if not (isinstance(found, dict) and isinstance(facts, dict)):
      raise ValueError('config.json or run.json is not a JSON object')
    found = with_defaults(found)
  except (OSError, ValueError) as error:
    raise UserError(
      f'{path} holds a damaged run ({error}): name another --run-dir'
    ) from error
  layout = {key: found.get(key, wanted[key]) for key in _LAYOUT}
  same = layout | {key: wanted[key] for key in _FREE}
  before = found
  if isinstance(data := found.get('data'), dict):
    # An older version wrote down what was not read of prepared data.
    of_text = OF_TEXT if wanted['data']['prepared'] else ()
    places = {key: wanted['data'][key] for key in (*_PLACES, *of_text)}
    found = found | {'data': data | places}
  differences = _differences(found | same, wanted | same)
  if facts.get('source_hash') != source_hash and not differences:
    differences = [_other_data(before, wanted)]
  if differences:
    raise UserError(
      f'{path} holds a run of another configuration '
      f'({"; ".join(differences)}): name another --run-dir, or give the '
      'options of that run to continue it'
    )
  began = {'devices': facts.get('devices'), **layout}
  now = {'devices': devices, **{key: wanted[key] for key in _LAYOUT}}
  moved = {key: now[key] for key in now if now[key] != began[key]}
  if updated := _updated(facts.get('versions')):
    moved['versions'] = updated
  return moved


def _other_data(found: dict[str, Any], wanted: dict[str, Any]) -> str:
  """What to say where only the hash of the data differs."""
  there, here = found['data']['prepared'], wanted['data']['prepared']
  if there == here:
    return 'the text or vocabulary has changed'
  return (
    f'--data.prepared is {there!r} there, {here!r} here: of other text, '
    'vocabulary or weights'
  )


def _updated(before: Any) -> dict[str, str]:
  """Packages whose version is another than it was."""
  if not isinstance(before, dict):
    return {}
  return {
    name: f'{before[name]} -> {now}'
    for name, now in versions().items()
    if before.get(name, now) != now
  }


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
