"""What the errors of TFDS mean: one line that helps, or a damaged record."""

import contextlib
import difflib
import importlib.util
import itertools
import pathlib
import re
import socket
from collections.abc import Iterator

import tensorflow_datasets as tfds
from etils import epath
from google.protobuf import message as protobuf

from train import errors, storage
from train.data import compressed

INFO = 'dataset_info.json'
"""The file that makes a directory a dataset's."""
_ROOT = pathlib.Path(tfds.__file__).parent
_EXTRAS = {
  'tensorflow': "pip install -e '.[train,tensorflow]'",
  'apache_beam': "pip install -e '.[train,beam]'",
}
# Those of requests, urllib3 and httpx, which need not be there.
_NETWORK_ERRORS = (
  'ConnectionError',
  'ConnectError',
  'MaxRetryError',
  'Timeout',
)
# How messages of array_record begin that the same bytes would give again. It
# has one class of errors for these and for what the machine could not do.
_DAMAGE = re.compile(
  '(Corrupted|Invalid|Truncated) Riegeli/records file'
  '|ArrayRecord file should be at least|Invalid postscript'
  r'|Could not parse footer|index \d+ out of bound'
)
# Of a record that was read as it was written, but is not what it should be.
_UNDECODABLE = (
  protobuf.DecodeError,
  ValueError,
  LookupError,
  AttributeError,
  TypeError,
)


@contextlib.contextmanager
def reading(directory: str) -> Iterator[None]:
  """Tells damage from all else that may happen while records are read.

  Args:
    directory: The dataset's.

  Raises:
    DamagedError: the same bytes would fail again.
    UserError: it may be the machine's fault, or is not known not to be.
  """
  try:
    yield
  except Exception as error:
    if isinstance(error, RuntimeError) and _DAMAGE.match(str(error)):
      raise _damaged(error) from error
    raise errors.UserError(explained(directory, 'read', error)) from error


@contextlib.contextmanager
def decoding(directory: str) -> Iterator[None]:
  """As `reading`, while what was read is decoded."""
  try:
    yield
  except Exception as error:
    # Some, TFDS makes RuntimeErrors with a longer message.
    cause = error.__cause__ if type(error) is RuntimeError else error
    if isinstance(cause, _UNDECODABLE):
      raise _damaged(error) from error
    raise errors.UserError(explained(directory, 'decode', error)) from error


def _damaged(error: Exception) -> compressed.DamagedError:
  return compressed.DamagedError(f'is damaged ({_first_line(error)})')


def explained(name: str, doing: str, error: Exception) -> str:
  """Returns one line that says what happened and what helps.

  Args:
    name: The dataset's, or its directory.
    doing: What failed: 'open', 'prepare', 'read' or 'decode'.
    error: What TFDS has raised.
  """
  if isinstance(error, MemoryError):
    return f'not enough memory to {doing} {name}'
  chain: list[BaseException] = []
  cause: BaseException | None = error
  while cause is not None and cause not in chain:
    chain.append(cause)
    cause = cause.__cause__ or cause.__context__
  for cause in chain:
    if isinstance(cause, ModuleNotFoundError) and cause.name:
      package = cause.name.split('.')[0]
      return (
        f'TFDS needs {package} to {doing} {name}:'
        f' {_EXTRAS.get(package, f"pip install {package}")}'
      )
  network = (ConnectionError, TimeoutError, socket.gaierror)
  for cause in reversed(chain):
    if isinstance(cause, network) or type(cause).__name__ in _NETWORK_ERRORS:
      return (
        f'no network to {doing} {name} ({_first_line(cause)}): prepare it where'
        ' there is one and name its directory, or give files'
      )
  if doing == 'open' and _is_directory(name):
    return no_dataset_in(name)
  if isinstance(error, tfds.core.DatasetNotFoundError):
    return _not_found(name)
  return f'TFDS cannot {doing} {name}: {_first_line(error)}'


def no_dataset_in(name: str) -> str:
  """Says what is in a place, and where below it there are datasets."""
  path = epath.Path(name).expanduser()
  if not path.exists():
    return f'no such directory: {name}'
  if not path.is_dir():
    return f'{name} is a file: name the directory of a dataset'
  below = (
    str(info.parent)
    for levels in ('*', '*/*', '*/*/*')  # Of name, configuration and version.
    for info in sorted(storage.matches(path, f'{levels}/{INFO}'))
  )
  found = list(itertools.islice(below, 4))
  hint = ''
  if found:
    hint = f': name the directory with it, as {", ".join(found[:3])}'
    hint += ', ...' if len(found) > 3 else ''
  return f'{name} has no {INFO} of TFDS{hint}'


def _first_line(error: BaseException) -> str:
  lines = str(error).strip().splitlines() or [type(error).__name__]
  return lines[0][:300]


def _is_directory(name: str) -> bool:
  """Whether what TFDS could not open is rather the name of a directory."""
  path = pathlib.Path(name).expanduser()
  beside = len(path.parts) > 1 and path.parent.is_dir()
  return not _is_known(name) and (path.exists() or beside)


def _is_known(name: str) -> bool:
  """Whether TFDS has a dataset of the name, which may need TensorFlow."""
  known = _dataset(name)
  names = tfds.list_builders(with_community_datasets=False)
  return known in names or _has_code(known)


def _dataset(name: str) -> str:
  """Returns the dataset of 'dataset/configuration:version'."""
  return name.split('/')[0].split(':')[0]


def _has_code(known: str) -> bool:
  return any(_ROOT.glob(f'*/{known}.py')) or any(_ROOT.glob(f'*/{known}/'))


def _alike(known: str) -> list[str]:
  """Returns names of datasets that one may have mistyped."""
  # Of those that need TensorFlow, these files alone give the names.
  checksums = (_ROOT / 'url_checksums').glob('*.txt')
  names = {path.stem for path in checksums}
  names.update(tfds.list_builders(with_community_datasets=False))
  return difflib.get_close_matches(known, sorted(names))


def _not_found(name: str) -> str:
  """Says why TFDS may not know a name.

  Builders that import TensorFlow are left out of what TFDS knows where it is
  not installed, without a word.
  """
  known = _dataset(name)
  missing = importlib.util.find_spec('tensorflow') is None
  if missing and _has_code(known):
    return f'TFDS needs tensorflow to open {name}: {_EXTRAS["tensorflow"]}'
  alike = ', '.join(_alike(known))
  message = f'TFDS has no dataset {name!r}'
  message += f' (it has {alike})' if alike else ''
  if missing:
    message += f', or needs tensorflow to open it: {_EXTRAS["tensorflow"]}'
  return message
