"""Documents from a dataset of TFDS: one by name, or a prepared directory."""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import inspect
import io
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow_datasets as tfds
from etils import epath
from tensorflow_datasets.core.download import downloader
from tensorflow_datasets.core.utils import conversion_utils, dtype_utils

from train import errors
from train.data import checks, compressed, local_file, source, tfds_errors

_logger = logging.getLogger('train.data')

PART = 2**16
"""Examples of a part, at most."""
OPTIONS = ('--tfds', '--text-field', '--tfds-split')
_READ_BATCH = 1024
_HUGGING_FACE = 'huggingface:'
# Of a download; the pauses between them are 6 s in all, those of TFDS 3 min.
_RETRIES = 5


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
      if (directory / tfds_errors.INFO).exists():
        builder = tfds.builder_from_directory(directory)
      elif self._name.startswith(('/', '.', '~')) or '://' in self._name:
        raise self._error(tfds_errors.no_dataset_in(self._name))
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
    option, field_option, split_option = self._options
    local_file.check_name(builder.data_path, option)
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
      raise self._error(
        tfds_errors.explained(self._name, doing, error)
      ) from error


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
        if text is not None:
          text = checks.document(text, place, problems)
        if text is not None:
          yield text
        number += 1
    except compressed.DamagedError as error:
      problems.found('truncated', f'{place()} {error}')

  def _values(self) -> Iterator[bytes]:
    """Reads the texts as they are stored."""
    records, features = self._open()
    for start in range(self.start, self.stop, _READ_BATCH):
      numbers = range(start, min(start + _READ_BATCH, self.stop))
      try:
        with tfds_errors.reading(self.directory):
          batch = records.__getitems__(numbers)
      except compressed.DamagedError:
        # Anew, as a reader that has failed goes on failing; and one by one, to
        # come as far as the damage.
        records, _ = self._open()
        batch = self._one_by_one(records, numbers)
      for record in batch:
        with tfds_errors.decoding(self.directory):
          raw = features.deserialize_example_np(record)[self.text_field]
          if raw is None:
            raise ValueError(f'it has no {self.text_field!r}')
        yield raw

  def _open(self) -> tuple[Any, Any]:
    """Returns the records of the split, as bytes, and what decodes them."""
    try:
      builder = tfds.builder_from_directory(self.directory)
      records = builder.as_data_source(
        self.split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES
      )
    except Exception as error:  # No record was read: none can be damaged.
      message = tfds_errors.explained(self.directory, 'read', error)
      raise errors.UserError(message) from error
    return records, builder.info.features

  def _one_by_one(self, records: Any, numbers: range) -> Iterator[bytes]:
    for number in numbers:
      with tfds_errors.reading(self.directory):
        record = records[number]
      yield record
