"""The command line, generated from the config dataclasses.

Every field is an option, `--path.to.field VALUE`; `docs/cli.md` is the
contract that commands keep.
"""

import argparse
import dataclasses
import difflib
import itertools
import os
import pathlib
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from etils import epath

from models import families
from train import recipes, storage
from train.config import OF_TEXT, Config
from train.errors import UserError

_GLOB_OPTIONS = ('--files', '--data.files')
_NAMED = 3  # Arguments that make no sense.


class Parser(argparse.ArgumentParser):
  """argparse whose errors are `UserError`s of one line."""

  def __init__(self, **kwargs):
    kwargs.setdefault('allow_abbrev', False)
    super().__init__(**kwargs)

  def error(self, message: str) -> NoReturn:
    """Raises instead of printing the whole usage."""
    raise UserError(f'{message} (see {self.prog} --help)')

  def parse_args(self, args=None, namespace=None):
    """Refuses what is left over, of which a shell can make very much."""
    args = sys.argv[1:] if args is None else list(args)
    namespace, rest = self.parse_known_args(args, namespace)
    if rest:
      _check_globs(args, rest)
      more = len(rest) - _NAMED
      self.error(
        f'unrecognized arguments: {" ".join(rest[:_NAMED])}'
        + (f' and {more:,} more' if more > 0 else '')
      )
    return namespace

  def parse_known_args(self, args=None, namespace=None):
    """Refuses '--option=--', which Python before 3.13 reads as no value."""
    namespace, rest = super().parse_known_args(args, namespace)
    for action in self._actions:
      if action.option_strings and getattr(namespace, action.dest, None) == []:
        self.error(
          f'argument {action.option_strings[0]}: expected one argument'
        )
    return namespace, rest


def add_config_options(parser: argparse._ActionsContainer) -> None:
  """Adds an option for every field of `Config`, of all families of models."""
  for path, kind in _options().items():
    # A boolean's name alone means true.
    alone: dict[str, Any] = {'nargs': '?', 'const': True}
    parser.add_argument(
      f'--{path}',
      dest=path,
      default=argparse.SUPPRESS,
      type=_SPECIAL[kind][0] if kind in _SPECIAL else _converter(kind),
      metavar=_SPECIAL[kind][1] if kind in _SPECIAL else kind.__name__,
      **(alone if kind is bool else {}),
    )


def config(recipe: str, options: argparse.Namespace) -> Config:
  """Returns a recipe's config with the options given.

  Raises:
    UserError: there is no such recipe, or the values do not make a valid
      config.
  """
  base = recipes.get(
    recipe,
    corpus=getattr(options, 'data.corpus', None),
    schedule=getattr(options, 'optimizer.schedule', None),
  )
  return with_options(base, options)


def with_options(config: Config, options: argparse.Namespace) -> Config:
  """Returns the recipe's config with the options given.

  Raises:
    UserError: the values do not make a valid config.
  """
  given = {
    path: getattr(options, path)
    for path in _options()
    if hasattr(options, path)
  }
  own = {path for path, _ in _fields(type(config.model), 'model.')}
  for path in given:
    if path.startswith('model.') and path not in own:
      raise UserError(
        f'--{path} is not an option of a {families.family(config.model)} model'
      )
  try:
    made = _replace(config, given)
  except ValueError as error:  # From `models`, which names 'model.field'.
    raise UserError(f'--{error}') from error
  for name in OF_TEXT:
    if made.data.prepared and f'data.{name}' in given:
      raise UserError(
        f'--data.{name} does not go with --data.prepared: `prepare` has read,'
        ' tokenized and split the text'
      )
  return made


def with_values(config: Config, values: dict[str, Any]) -> Config:
  """Returns a config with fields changed, 'optimizer.power' to its value.

  Raises:
    UserError: there is no such field, it is none of its model's, or the values
      do not make a valid config.
  """
  for path in values:
    _check_field(path, ())
  return with_options(config, argparse.Namespace(**values))


def value(path: str, text: str, also: Sequence[str] = ()) -> Any:
  """Reads a field's value as the command line does.

  Args:
    path: Of the field, 'optimizer.power'.
    text: Its value.
    also: Other names to suggest.

  Raises:
    UserError: there is no such field, or the text is no such value.
  """
  _check_field(path, also)
  kind = _options()[path]
  convert = _SPECIAL[kind][0] if kind in _SPECIAL else _converter(kind)
  try:
    return convert(text)
  except argparse.ArgumentTypeError as error:
    raise UserError(f'{path}: {error}') from None


def _check_field(path: str, also: Sequence[str]) -> None:
  kinds = _options()
  if path not in kinds:
    near = difflib.get_close_matches(path, [*kinds, *also], n=3, cutoff=0.5)
    hint = f': did you mean {" or ".join(near)}?' if near else ''
    raise UserError(f'there is no field {path!r}{hint}')


def say(text: str) -> None:
  """Prints to stdout, which may be full, or closed by `head`: no error."""
  try:
    try:
      print(text, flush=True)
    except UnicodeEncodeError:  # A name, where stdout is not in UTF-8.
      print(text.encode('ascii', 'backslashreplace').decode(), flush=True)
  except OSError:
    # What is left in the buffer must not fail again on the way out.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def positive(text: str) -> int:
  """A whole number from 1, for options that are not fields."""
  return _least(1, text)


def count(text: str) -> int:
  """A whole number from 0, for options that are not fields."""
  return _least(0, text)


def _least(least: int, text: str) -> int:
  value = _converter(int)(text)
  if value < least:
    raise argparse.ArgumentTypeError(f'{text} is not at least {least}')
  return value


def part(text: str) -> float:
  """A number between 0 and 1, neither of them, for options of commands."""
  value = _converter(float)(text)
  if not 0 < value < 1:
    raise argparse.ArgumentTypeError(f'{text} is not between 0 and 1')
  return value


def share(text: str) -> float:
  """A number above 0 and at most 1, for options that are not fields."""
  value = _converter(float)(text)
  if not 0 < value <= 1:
    raise argparse.ArgumentTypeError(f'{text} is not above 0 and at most 1')
  return value


def span(text: str) -> tuple[int, int]:
  """'FIRST' or 'FIRST:COUNT', both from 1; a count is 3 unless given."""
  first, colon, many = text.partition(':')
  return positive(first), positive(many) if colon else 3


def path(text: str) -> pathlib.Path:
  """A path on a disk, with ~ expanded."""
  if not text:
    raise argparse.ArgumentTypeError('it is empty')
  if '://' in text:
    raise argparse.ArgumentTypeError(f'{text!r} is not on a disk')
  try:
    return pathlib.Path(text).expanduser()
  except RuntimeError:  # '~name' of nobody here.
    raise argparse.ArgumentTypeError(f'{text!r} has no such home') from None


def place(text: str) -> epath.Path:
  """A path on a disk, or an address in an object store, 'gs://...'."""
  if '://' not in text:
    found = epath.Path(path(text))
    if storage.is_local(found):
      return found
    raise argparse.ArgumentTypeError(f'{text!r} would be read as {found}')
  try:
    return storage.directory(text)
  except UserError as error:
    raise argparse.ArgumentTypeError(str(error)) from None


def _check_globs(args: Sequence[str], rest: Sequence[str]) -> None:
  """Raises: UserError: what is left over are files that a shell found."""
  for option in _GLOB_OPTIONS:
    if option not in args:
      continue
    values = itertools.takewhile(
      lambda arg: not arg.startswith('-'), args[args.index(option) + 1 :]
    )
    found = [arg for arg in values if os.path.exists(arg)]
    if len(found) > 1 and not set(rest).isdisjoint(found):
      raise UserError(
        f'{option} takes one pattern: put it in quotes, as in {option}'
        f" '{_glob(found)}' (the shell has made {len(found):,} files of it)"
      )


def _glob(paths: Sequence[str]) -> str:
  """A pattern such as one that a shell made these paths of."""
  folder = os.path.dirname(paths[0])
  backwards = [name[::-1] for name in paths]
  common = os.path.commonprefix(backwards)[::-1]  # noqa: RUF071
  _, dot, suffix = os.path.basename(common).partition('.')
  return os.path.join(folder, f'*{dot}{suffix}')


def _options() -> dict[str, Any]:
  """Every option's dotted path and type."""
  paths = dict(_fields(Config))
  for kind in families.CONFIGS.values():
    paths |= _fields(kind, 'model.')
  return paths


def _fields(config: Any, prefix: str = '') -> Iterator[tuple[str, type]]:
  """Every leaf field's dotted path and type."""
  for name, kind in typing.get_type_hints(config).items():
    if dataclasses.is_dataclass(kind):
      yield from _fields(kind, f'{prefix}{name}.')
    else:
      yield prefix + name, kind


def _replace(config: Any, given: dict[str, Any]) -> Any:
  """Sets dotted paths, each dataclass once: its checks see the whole."""
  own = {path: value for path, value in given.items() if '.' not in path}
  for field in dataclasses.fields(config):
    below = {
      path.removeprefix(f'{field.name}.'): value
      for path, value in given.items()
      if path.startswith(f'{field.name}.')
    }
    if below:
      own[field.name] = _replace(getattr(config, field.name), below)
  return dataclasses.replace(config, **own)


def _converter(kind: type) -> Callable[[str], Any]:
  def convert(text: str):
    if not text:
      raise argparse.ArgumentTypeError('it is empty')
    try:
      value = kind(text)
    except ValueError:
      raise argparse.ArgumentTypeError(
        f'{text!r} is not {"a whole number" if kind is int else "a number"}'
      ) from None
    if kind is int and abs(value) > 2**32:
      raise argparse.ArgumentTypeError(f'{text} is too large')
    return value

  return convert


def _boolean(text: str) -> bool:
  if text.lower() not in ('true', 'false'):
    raise argparse.ArgumentTypeError(f'{text!r} is neither true nor false')
  return text.lower() == 'true'


def _numbers(text: str) -> tuple[int, ...]:
  try:
    return tuple(int(number) for number in text.split(',') if text)
  except ValueError:
    raise argparse.ArgumentTypeError(
      f'{text!r} is not whole numbers joined by commas'
    ) from None


_SPECIAL: dict[Any, tuple[Callable[[str], Any], str]] = {
  bool: (_boolean, 'true|false'),
  tuple[int, ...]: (_numbers, 'int,int'),
}
