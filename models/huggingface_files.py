"""Safetensors, whole or in shards: read by slices, written as a stream."""

import contextlib
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401 (numpy then knows bfloat16)
import numpy as np
import safetensors

_INDEX = 'model.safetensors.index.json'
_SINGLE = 'model.safetensors'
_SHARD = re.compile(r'model-\d{5}-of-\d{5}\.safetensors')
_DTYPES = {'F32', 'F16', 'BF16'}


class Tensors:
  """The tensors of a folder; a context manager that keeps its files open.

  Args:
    folder: Holds model.safetensors, or an index and what it names.

  Raises:
    FileNotFoundError: a file is missing; the message names it.
    ValueError: a file is broken, a tensor stands in two of them, or the index
      is at odds with them; the message names what is wrong.
  """

  def __init__(self, folder: pathlib.Path):
    with contextlib.ExitStack() as stack:
      self._file: dict[str, tuple[pathlib.Path, Any]] = {}
      paths, promised = _files(folder)
      for path in paths:
        opened = _open(path)
        stack.enter_context(opened)
        names = opened.keys()
        if twice := self._file.keys() & names:
          other, _ = self._file[min(twice)]
          raise ValueError(f'{min(twice)} stands in both {other} and {path}')
        self._file |= dict.fromkeys(names, (path, opened))
      if absent := promised - self._file.keys():
        raise ValueError(
          f'{folder / _INDEX} lists {min(absent)}, which no file holds'
        )
      self._stack = stack.pop_all()

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._stack.close()

  @property
  def names(self) -> set[str]:
    """Every tensor in the folder."""
    return set(self._file)

  def shape(self, name: str) -> tuple[int, ...]:
    """A tensor's shape; reads nothing but the header."""
    return tuple(self._file[name][1].get_slice(name).get_shape())

  def check(self, name: str, shape: tuple[int, ...]) -> None:
    """Checks a tensor's shape and type; reads nothing but the header.

    Raises:
      ValueError: one is another; the message names the tensor and its file.
    """
    path, opened = self._file[name]
    if (found := self.shape(name)) != shape:
      raise ValueError(f'{path}: {name} has shape {found}, not {shape}')
    if (dtype := opened.get_slice(name).get_dtype()) not in _DTYPES:
      known = ', '.join(sorted(_DTYPES))
      raise ValueError(f'{path}: {name} is {dtype}; it can be {known}')

  def read(self, name: str, slices: tuple[slice, ...]) -> np.ndarray:
    """Reads a part of a tensor, in the type that it is stored in."""
    shape = [s.stop - s.start for s in slices]
    if 0 in shape:  # Which safetensors does not slice.
      return np.zeros(shape, np.float32)
    return self._file[name][1].get_slice(name)[slices]


class Tensor(NamedTuple):
  """A float32 tensor to write."""

  shape: tuple[int, ...]
  """Its shape, which is known before its values are."""
  fetch: Callable[[], np.ndarray]
  """Returns its values, once."""

  @property
  def nbytes(self) -> int:
    """Its size."""
    return 4 * int(np.prod(self.shape))


def write(
  folder: pathlib.Path,
  tensors: Mapping[str, Tensor],
  max_bytes: int,
  texts: Mapping[str, str | None],
) -> None:
  """Writes tensors, one at a time, and removes those of an earlier model.

  Args:
    folder: Where; it exists.
    tensors: By name.
    max_bytes: Above this size they are split into files of at most it, with
      an index; a tensor that is larger has a file of its own.
    texts: What other files hold, by their names; None for no such file.
  """
  shards = _split(tensors, max_bytes)
  if len(shards) == 1:
    files = {_SINGLE: shards[0]}
  else:
    files = {
      f'model-{i:05}-of-{len(shards):05}.safetensors': shard
      for i, shard in enumerate(shards, 1)
    }
  with contextlib.ExitStack() as stack:
    for name, text in texts.items():
      if text is not None:
        temporary = stack.enter_context(replaced(folder / name))
        temporary.write_bytes(text.encode())
    if len(shards) > 1:  # Comes into its place after what it names.
      index = {
        'metadata': {'total_size': sum(t.nbytes for t in tensors.values())},
        'weight_map': {n: file for file, shard in files.items() for n in shard},
      }
      temporary = stack.enter_context(replaced(folder / _INDEX))
      temporary.write_text(json.dumps(index, indent=2) + '\n')
    for file, shard in files.items():
      temporary = stack.enter_context(replaced(folder / file))
      _write_file(temporary, {name: tensors[name] for name in shard})
  current = {*files, *([_INDEX] if len(shards) > 1 else [])}
  for name, text in texts.items():
    if text is None:
      (folder / name).unlink(missing_ok=True)
  for path in folder.iterdir():
    ours = path.name in (_SINGLE, _INDEX) or _SHARD.fullmatch(path.name)
    if ours and path.name not in current:
      path.unlink()


@contextlib.contextmanager
def replaced(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A name to write under, put in the place of `path` at the end."""
  temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
  try:
    yield temporary
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)


def read_json(path: pathlib.Path) -> Any:
  """Reads a file of JSON.

  Raises:
    FileNotFoundError: there is no such file, or no such folder.
    OSError: it cannot be read.
    ValueError: it holds something else; all messages name it.
  """
  if not path.parent.is_dir():
    raise FileNotFoundError(f'there is no folder {path.parent}')
  if not path.exists():
    raise FileNotFoundError(f'there is no {path}')
  try:
    return json.loads(path.read_text(encoding='utf-8'))
  except (ValueError, RecursionError) as error:
    raise ValueError(f'{path} is not JSON: {error}') from error
  except OSError as error:
    raise OSError(f'cannot read {path}: {error.strerror}') from error


def _files(folder: pathlib.Path) -> tuple[list[pathlib.Path], set[str]]:
  """The folder's safetensors and the tensors that its index lists.

  The whole comes before shards, like in transformers.
  """
  if (folder / _SINGLE).exists():
    return [folder / _SINGLE], set()
  index = folder / _INDEX
  if not index.exists():
    raise FileNotFoundError(f'{folder} holds neither {_SINGLE} nor {_INDEX}')
  given = read_json(index)
  weight_map = given.get('weight_map') if isinstance(given, dict) else None
  if not isinstance(weight_map, dict) or not all(
    isinstance(file, str) for file in weight_map.values()
  ):
    raise ValueError(f'{index}: weight_map must give a file for each tensor')
  files = sorted(set(weight_map.values()))
  for file in files:
    # A downloaded index must not reach out of its folder, on any system.
    if file in ('', '..') or pathlib.PureWindowsPath(file).name != file:
      raise ValueError(
        f'{index}: weight_map names {file!r}; it can only name files of its '
        'own folder'
      )
  return [folder / file for file in files], set(weight_map)


def _open(path: pathlib.Path) -> Any:
  if not path.exists():
    raise FileNotFoundError(f'{path} is missing, which {_INDEX} names')
  if not path.is_file():
    raise ValueError(f'{path} is not a file')
  try:
    return safetensors.safe_open(path, framework='numpy')
  except safetensors.SafetensorError as error:
    raise ValueError(f'{path} is not a whole safetensors: {error}') from error
  except OSError as error:
    raise OSError(f'cannot read {path}: {error}') from error


def _split(tensors: Mapping[str, Tensor], max_bytes: int) -> list[list[str]]:
  """Fills one file after the other, in the order of the tensors."""
  shards: list[list[str]] = [[]]
  size = 0
  for name, tensor in tensors.items():
    if shards[-1] and size + tensor.nbytes > max_bytes:
      shards.append([])
      size = 0
    shards[-1].append(name)
    size += tensor.nbytes
  return shards


def _write_file(path: pathlib.Path, tensors: Mapping[str, Tensor]) -> None:
  """The format: the header's length, the header, the values end to end.

  safetensors' own writer wants all of a file in memory.
  """
  header: dict[str, Any] = {'__metadata__': {'format': 'pt'}}
  end = 0
  for name, tensor in tensors.items():
    start, end = end, end + tensor.nbytes
    header[name] = {
      'dtype': 'F32',
      'shape': tensor.shape,
      'data_offsets': [start, end],
    }
  text = json.dumps(header).encode()
  text += b' ' * (-len(text) % 8)  # The values are aligned.
  with path.open('wb') as file:
    file.write(len(text).to_bytes(8, 'little'))
    file.write(text)
    for tensor in tensors.values():
      file.write(np.ascontiguousarray(tensor.fetch(), '<f4').data)
