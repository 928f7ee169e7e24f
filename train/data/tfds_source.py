"""Documents from a dataset of TFDS: one by name, or a prepared directory."""

import contextlib
import dataclasses
import difflib
import functools
import hashlib
import importlib.util
import inspect
import io
import itertools
import json
import logging
import os
import pathlib
import socket
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core.download import downloader
from tensorflow_datasets.core.utils import conversion_utils, dtype_utils

from train import errors
from train.data import checks, compressed, source

_logger = logging.getLogger('train.data')

PART = 2**16
"""Examples of a part, at most."""
OPTIONS = ('--tfds', '--text-field', '--tfds-split')
_READ_BATCH = 1024
_ROOT = pathlib.Path(tfds.__file__).parent
_HUGGING_FACE = 'huggingface:'
_EXTRAS = {
  'tensorflow': "pip install -e '.[train,tensorflow]'",
  'apache_beam': "pip install -e '.[train,beam]'",
}
_INFO = 'dataset_info.json'
# Of a download; the pauses between them are 6 s in all, those of TFDS 3 min.
_RETRIES = 5
# Those of requests, urllib3 and httpx, which need not be there.
_NETWORK_ERRORS = (
  'ConnectionError',
  'ConnectError',
  'MaxRetryError',
  'Timeout',
)


class TfdsSource:
  """The texts of one feature, in the order in which TFDS has stored them."""

  def __init__(
    self,
    name: str,
    text_field: str = 'text',
    split: str = 'train',
    data_dir: str | os.PathLike | None = None,
    options: tuple[str, str, str] = OPTIONS,
  ):
    """Nothing is read yet.

    Args:
      name: As TFDS has it, 'lm1b', 'c4/en' or 'huggingface:org/name'; or a
        directory with a dataset_info.json. A dataset that is not there yet is
        prepared when it is needed, as ArrayRecord.
      text_field: The feature that is the text.
      split: As TFDS has it: also 'train+test' or 'train[:10%]'.
      data_dir: Where the datasets by name are; by default, where TFDS has
        them.
      options: The names of the options that gave the first three, for
        messages.
    """
    self._name = name
    self._text_field = text_field
    self._split = split
    self._data_dir = data_dir
    self._options = options

  def parts(self) -> Sequence[source.Part]:
    """Returns the parts, ranges of examples.

    Raises:
      UserError: there is no such dataset, split or feature of text, or it
        cannot be prepared or read; the message says what helps.
    """
    length = self._builder.info.splits[self._split].num_examples
    size = sum(size for _, size in self._sizes())
    return [
      Examples(
        directory=str(self._builder.data_path),
        split=self._split,
        text_field=self._text_field,
        start=start,
        stop=min(start + PART, length),
        size=size * min(PART, length - start) // length,
      )
      for start in range(0, length, PART)
    ]

  def listing(self) -> list[list[str | int]]:
    """Returns the dataset, the split, and the name and size of its files.

    Raises:
      UserError: as `parts`.
    """
    files: list[list[str | int]] = [[*file] for file in self._sizes()]
    return [[self._builder.info.full_name, self._split], *files]

  @functools.cached_property
  def _builder(self) -> tfds.core.DatasetBuilder:
    directory = epath.Path(self._name).expanduser()
    builder = None
    with self._explained('read'):
      if (directory / _INFO).exists():
        builder = tfds.builder_from_directory(directory)
      elif self._name.startswith(('/', '.', '~')) or '://' in self._name:
        raise self._error(_no_dataset_in(self._name))
    builder = builder or self._by_name()
    self._check(builder)
    return builder

  def _by_name(self) -> tfds.core.DatasetBuilder:
    name = self._name
    if name.startswith(_HUGGING_FACE):
      if importlib.util.find_spec('datasets') is None:
        raise self._error(
          f'TFDS reads {name} with a package that is not installed: pip install'
          ' datasets'
        )
      # TFDS takes what is after a '/' for the configuration.
      repository = '/'.join(name.removeprefix(_HUGGING_FACE).split('/')[:2])
      name = name.replace(
        repository, conversion_utils.to_tfds_name(repository), 1
      )
    with self._explained('open'):
      builder = tfds.builder(name, data_dir=self._data_dir)
    if not builder.data_path.exists():
      _logger.info('preparing %s with TFDS in %s', name, builder.data_path)
      if not sys.stderr.isatty():
        tfds.disable_progress_bar()
      # TFDS would look for it with a package that it does not declare
      # (tensorflow/datasets issue 11212).
      kind: Any = type(builder)
      kind.code_path = epath.Path(inspect.getfile(kind))
      with self._explained('prepare'), _few_retries():
        builder.download_and_prepare(
          file_format='array_record',
          download_config=tfds.download.DownloadConfig(try_download_gcs=False),
        )
    return builder

  def _check(self, builder: tfds.core.DatasetBuilder) -> None:
    """Whether there is such a split, of such texts, that can be read."""
    _, field_option, split_option = self._options
    where = f'{self._name} in {builder.data_path}'
    if self._split.split('[')[0] not in builder.info.splits and not (
      set('+[') & set(self._split)
    ):
      splits = ', '.join(sorted(builder.info.splits)) or 'none'
      raise self._error(
        f'{self._name} has no split {self._split!r} (it has: {splits}); name'
        f' one with {split_option}'
      )
    with self._explained(f'read the split {self._split!r} of'):
      if not builder.info.splits[self._split].num_examples:
        raise self._error(f'{self._name}: no examples in {self._split!r}')
      try:
        builder.as_data_source(self._split)
      except NotImplementedError as error:
        raise self._error(
          f'{where} was prepared as'
          f' {builder.info.file_format.value}, which only TensorFlow can read:'
          " prepare it as ArrayRecord, with file_format='array_record', or"
          ' delete it to have that done here'
        ) from error
    features = builder.info.features
    texts = sorted(name for name in features if _is_text(features[name]))
    if self._text_field not in texts:
      there = self._text_field in features
      what = 'is not text' if there else 'is not there'
      raise self._error(
        f'{self._name}: the feature {self._text_field!r} {what} (those of text:'
        f' {", ".join(texts) or "none"}); name one with {field_option}'
      )

  @property
  def _files(self) -> list[Any]:
    """Which examples TFDS reads from which file."""
    return self._builder.info.splits[self._split].file_instructions

  def _sizes(self) -> list[tuple[str, int]]:
    """Returns the name and bytes of every file."""
    with self._explained('read'):
      paths = [epath.Path(file.filename) for file in self._files]
      return [(path.name, path.stat().length) for path in dict.fromkeys(paths)]

  def _error(self, message: str) -> errors.UserError:
    return errors.UserError(f'{self._options[0]}: {message}')

  @contextlib.contextmanager
  def _explained(self, doing: str) -> Iterator[None]:
    """Makes one line of an error of TFDS, and drops what it prints."""
    try:
      with contextlib.redirect_stdout(io.StringIO()):
        yield
    except errors.UserError:
      raise
    except Exception as error:  # Builders are anyone's code.
      raise self._error(_explain(self._name, doing, error)) from error


@contextlib.contextmanager
def _few_retries() -> Iterator[None]:
  """Makes TFDS give up soon without network, and urllib3 silent about it."""
  logger = logging.getLogger('urllib3.connectionpool')
  before = downloader.MAX_RETRIES, logger.level
  downloader.MAX_RETRIES = _RETRIES
  logger.setLevel(logging.ERROR)
  try:
    yield
  finally:
    downloader.MAX_RETRIES = before[0]
    logger.setLevel(before[1])


def _is_text(feature: Any) -> bool:
  scalar = getattr(feature, 'shape', None) == ()
  return scalar and bool(dtype_utils.is_string(feature.np_dtype))


def _explain(name: str, doing: str, error: Exception) -> str:
  """Returns one line that says what happened and what helps."""
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
    return _no_dataset_in(name)
  if isinstance(error, tfds.core.DatasetNotFoundError):
    return _not_found(name)
  return f'TFDS cannot {doing} {name}: {_first_line(error)}'


def _first_line(error: BaseException) -> str:
  lines = str(error).strip().splitlines() or [type(error).__name__]
  return lines[0][:300]


def _is_directory(name: str) -> bool:
  """Whether what TFDS could not open is rather the name of a directory."""
  path = pathlib.Path(name).expanduser()
  beside = len(path.parts) > 1 and path.parent.is_dir()
  return not _is_known(name) and (path.exists() or beside)


def _no_dataset_in(name: str) -> str:
  """Says what is in a place, and where below it there are datasets."""
  path = epath.Path(name).expanduser()
  if not path.exists():
    return f'no such directory: {name}'
  if not path.is_dir():
    return f'{name} is a file: name the directory of a dataset'
  below = (
    str(info.parent)
    for levels in ('*', '*/*', '*/*/*')  # Of name, configuration and version.
    for info in sorted(path.glob(f'{levels}/{_INFO}'))
  )
  found = list(itertools.islice(below, 4))
  hint = ''
  if found:
    hint = f': name the directory with it, as {", ".join(found[:3])}'
    hint += ', ...' if len(found) > 3 else ''
  return f'{name} has no {_INFO} of TFDS{hint}'


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


@dataclasses.dataclass(frozen=True)
class Examples:
  """Those from `start` to `stop` of a split."""

  directory: str
  """Of the prepared dataset."""
  split: str
  text_field: str
  start: int
  stop: int
  size: int
  """Bytes of their share of the files."""

  @property
  def name(self) -> str:
    """The dataset's directory, and which examples."""
    return f'{self.directory}, {self.split}, examples {self.start:,} on'

  def digest(self) -> str:
    """Returns a hash of the texts, as far as they can be read.

    Raises:
      UserError: the dataset cannot be read.
    """
    digest = hashlib.sha256(json.dumps(['tfds', self.text_field]).encode())
    try:
      for raw in self._values():
        digest.update(len(raw).to_bytes(8, 'little') + raw)
    except compressed.DamagedError:
      digest.update(b'damaged')
    return digest.hexdigest()

  def read(self, problems: source.Problems) -> Iterator[str]:
    """Reads the texts.

    Raises:
      UserError: the dataset cannot be read, or as `problems.found`.
    """
    number = self.start
    place = lambda: f'{self.directory}, {self.split}, example {number:,}'
    try:
      for raw in self._values():
        text = checks.decoded(raw, place, problems)
        if text is not None and checks.usable(text, place, problems):
          yield text
        number += 1
    except compressed.DamagedError as error:
      problems.found('truncated', f'{place()} {error}')

  def _values(self) -> Iterator[bytes]:
    """Reads the texts as they are stored."""
    with _damage():
      builder = tfds.builder_from_directory(self.directory)
      examples = builder.as_data_source(self.split)
    for start in range(self.start, self.stop, _READ_BATCH):
      numbers = range(start, min(start + _READ_BATCH, self.stop))
      try:
        with _damage():
          batch = examples.__getitems__(numbers)
      except compressed.DamagedError:
        # One by one, to come as far as the damage.
        for number in numbers:
          with _damage():
            example = examples[number]
          yield example[self.text_field]
        raise
      yield from (example[self.text_field] for example in batch)


@contextlib.contextmanager
def _damage() -> Iterator[None]:
  """Gives whatever a library says of a bad record one name."""
  try:
    yield
  except Exception as error:
    raise compressed.DamagedError(
      f'is damaged ({_first_line(error)})'
    ) from error
