"""Which mesh axes a collective runs over, from its groups of devices.

XLA writes groups of device numbers in three ways, or pairs for a permutation;
device n is the nth of the mesh, counted with the last axis fastest.
"""

import math
import re

import numpy as np

_LIST = re.compile(r'\{([\d,]*)\}')
_IOTA = re.compile(r'\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?')
_MESH = re.compile(
  r'mesh\[(?P<axes>[^\]]*)\](?:, device_ids=\((?P<ids>[^{]*)\))? *'
  r'\{(?P<over>[^}]*)\}'
)
_AXIS = re.compile(r"'?([\w.\-]+)'?=(\d+)")
_OVER = re.compile(r"'?([\w.\-]+)'?(?::\((\d+)\)(\d+))?")

MIXED = 'mixed'
"""Groups that are not those of any axes."""


def parse_groups(attributes: str, devices: int) -> np.ndarray:
  """Reads `replica_groups`, or the pairs of a permutation.

  Args:
    attributes: Of an instruction.
    devices: How many run the program.

  Returns:
    int (groups, members); of pairs, (pairs, 2) without those of a device with
    itself.

  Raises:
    ValueError: neither is there, or in a form that is not known.
  """
  pairs = _value(attributes, 'source_target_pairs')
  if pairs:
    ends = _lists(pairs)
    return ends[ends[:, 0] != ends[:, 1]]
  text = _value(attributes, 'replica_groups')
  if mesh := _MESH.match(text):
    return _mesh_groups(mesh)
  if iota := _IOTA.match(text):
    return _iota(*iota.groups())
  if text == '{}' or (not text and 'replica_groups' not in attributes):
    return np.arange(devices)[None]
  if text.startswith('{'):
    return _lists(text)
  raise ValueError(f'unknown groups of devices: {text[:80]!r}')


def axes_of(
  groups: np.ndarray, shape: dict[str, int], *, are_pairs: bool = False
) -> str:
  """Names the mesh axes that groups, or pairs, run over.

  Args:
    groups: From `parse_groups`.
    shape: The mesh's axes and their sizes, in order.
    are_pairs: They are those of a permutation.

  Returns:
    The axes joined by '+'; '' if no group has two members; `MIXED` if groups
    are not all devices along their axes, which pairs need not be.
  """
  if groups.size == 0 or groups.shape[1] < 2:
    return ''
  places = np.stack(np.unravel_index(groups, tuple(shape.values())), axis=-1)
  varies = (places != places[:, :1]).any(axis=(0, 1))
  names = [
    name for name, is_varying in zip(shape, varies, strict=True) if is_varying
  ]
  members = math.prod(shape[name] for name in names)
  if not are_pairs and names and groups.shape[1] != members:
    return MIXED
  return '+'.join(names)


def _value(attributes: str, key: str) -> str:
  """The text of an attribute, up to the comma or brace that ends it."""
  at = attributes.find(f'{key}=')
  if at < 0:
    return ''
  start = at = at + len(key) + 1
  depth = 0
  while at < len(attributes):
    letter = attributes[at]
    if letter in '{[(':
      depth += 1
    elif letter in '}])':
      depth -= 1
    elif letter == ',' and not depth:
      rest = attributes[at:]
      # The mesh form goes on after its comma.
      if not rest.startswith(', device_ids='):
        break
    at += 1
  return attributes[start:at].strip()


def _lists(text: str) -> np.ndarray:
  """{{0,1},{2,3}}; shorter lists repeat their last member."""
  lists = [
    [int(n) for n in found.split(',')]
    for found in _LIST.findall(text[1:-1])
    if found
  ]
  longest = max(map(len, lists), default=0)
  return np.array(
    [list_ + list_[-1:] * (longest - len(list_)) for list_ in lists], int
  ).reshape(-1, longest)


def _iota(shape: str, reshape: str, transpose: str | None) -> np.ndarray:
  """[4,2]<=[2,4]T(1,0): consecutive numbers, reshaped and transposed."""
  dims = _numbers(reshape)
  ids = np.arange(math.prod(dims)).reshape(dims)
  if transpose:
    ids = ids.transpose(_numbers(transpose))
  return ids.reshape(_numbers(shape))


def _mesh_groups(found: re.Match) -> np.ndarray:
  """mesh['a'=2,'b'=4] {'b':(2)2}: along axes of a mesh, or parts of them."""
  sizes = {name: int(size) for name, size in _AXIS.findall(found['axes'])}
  ids = np.arange(math.prod(sizes.values()))
  if order := found['ids']:
    iota = re.match(r'\[([\d,]+)\](?:T\(([\d,]+)\))?', order)
    if iota:
      ids = _iota(str(ids.size), iota[1], iota[2])
    else:
      ids = np.array(_numbers(order.strip('[]')))
  over: dict[str, list[tuple[int, int]]] = {}
  for name, before, size in _OVER.findall(found['over']):
    part = (int(before), int(size)) if size else (1, sizes[name])
    over.setdefault(name, []).append(part)
  dims: list[int] = []
  inside: list[int] = []
  for name, size in sizes.items():
    done = 1
    for before, length in sorted(over.get(name, ())):
      dims += [before // done, length]
      inside.append(len(dims) - 1)
      done = before * length
    dims.append(size // done)
  outside = [n for n in range(len(dims)) if n not in inside]
  members = math.prod(dims[n] for n in inside)
  return ids.reshape(dims).transpose(*outside, *inside).reshape(-1, members)


def _numbers(text: str) -> list[int]:
  return [int(n) for n in text.split(',')]
