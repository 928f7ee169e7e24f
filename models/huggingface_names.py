"""Where our parameters stand in a Hugging Face folder, and in which layout.

Shape suffixes: D model width, V vocabulary, N query heads, K key and value
heads, H head width, F hidden width, E experts, f an expert's hidden width, S
the shared expert's.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from models.config import DecoderConfig, Qwen2MoeConfig
from models.decoder import layer_places

Slices = tuple[slice, ...]

FUSED = 'mlp.experts.gate_up_proj'
"""Ends the names of the tensors that only the fused expert layout has."""


@dataclasses.dataclass(frozen=True)
class Layout:
  """How an array of ours stands in a stored one: its axes permuted, merged."""

  ours: tuple[int, ...]
  """The shape of our array."""
  axes: tuple[tuple[int, ...], ...]
  """By stored axis, those of our axes that it holds, the slowest first."""
  offset: tuple[int, ...] = ()
  """By stored axis, where ours begins; at 0 if left out."""
  whole: tuple[int, ...] = ()
  """The stored shape, where the stored array holds more than ours."""

  @property
  def stored(self) -> tuple[int, ...]:
    """The shape of the stored array."""
    return self.whole or tuple(
      math.prod(self.ours[axis] for axis in merged) for merged in self.axes
    )

  def cut(self, index: Slices) -> Slices:
    """What to read of the stored array for a part of ours.

    Of merged axes only the slowest one is cut; heads are split between
    devices, not a head's width.

    Args:
      index: Of our array, with starts and stops, without steps.
    """
    slices = []
    for axis, merged in enumerate(self.axes):
      first, *inner = merged
      size = math.prod(self.ours[a] for a in inner)
      start = self.offset[axis] if self.offset else 0
      slices.append(
        slice(
          start + index[first].start * size, start + index[first].stop * size
        )
      )
    return tuple(slices)

  def to_ours(self, block: np.ndarray, index: Slices) -> np.ndarray:
    """Turns what `cut` asked for into that part of our array."""
    order = [axis for merged in self.axes for axis in merged]
    first = {merged[0] for merged in self.axes}
    lengths = [s.stop - s.start for s in index]
    split = [lengths[a] if a in first else self.ours[a] for a in order]
    inner = tuple(slice(None) if a in first else index[a] for a in order)
    return block.reshape(split)[inner].transpose(np.argsort(order))

  def to_stored(self, array: np.ndarray) -> np.ndarray:
    """Turns our whole array into the stored one, if that holds no more."""
    order = [axis for merged in self.axes for axis in merged]
    return array.transpose(order).reshape(self.stored)


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a parameter stands: a grid of stored tensors of one layout."""

  names: np.ndarray
  """Of strings, by the parameter's leading axes: stacked layers, experts."""
  layout: Layout
  """Of one tensor, by the parameter's other axes."""

  @property
  def shape(self) -> tuple[int, ...]:
    """The parameter's."""
    return (*self.names.shape, *self.layout.ours)

  def read(
    self, index: Slices, read: Callable[[str, Slices], np.ndarray]
  ) -> np.ndarray:
    """Reads a part of the parameter, and nothing else.

    Args:
      index: Of the parameter, with starts and stops, without steps.
      read: From a stored tensor's name and slices to that part of it.

    Returns:
      The part, float32.
    """
    grid = self.names.ndim
    names, inner = self.names[index[:grid]], index[grid:]
    part = np.empty([s.stop - s.start for s in index], np.float32)
    for at, name in np.ndenumerate(names):
      block = read(str(name), self.layout.cut(inner))
      part[at] = self.layout.to_ours(block, inner)
    return part


def places(config: DecoderConfig, *, fused: bool = False) -> dict[str, Place]:
  """Every parameter's place.

  Args:
    config: Says which parameters there are and whether layers are stacked.
    fused: Whether the experts of a layer stand together in two tensors, as
      transformers 5 holds them, instead of each for itself, as published.

  Returns:
    By dotted path into the model.
  """
  c = config
  table = {
    'embedding': _plain('model.embed_tokens.weight', c.vocab_size, c.d_model)
  }
  layers = [_layer(c, i, fused) for i in range(c.n_layers)]
  if c.scan_layers:
    # Layers of one slot of a group are the repeats of its stack, in order.
    stacks = collections.defaultdict(list)
    for layer, (group, slot, _) in zip(layers, layer_places(c), strict=True):
      stacks[group, slot].append(layer)
    for (group, slot), stack in stacks.items():
      table |= {
        f'layers.{group}.{slot}.{rest}': _stack([s[rest] for s in stack])
        for rest in stack[0]
      }
  else:
    for i, layer in enumerate(layers):
      table |= {f'layers.{i}.{rest}': place for rest, place in layer.items()}
  table['norm.scale'] = _plain('model.norm.weight', c.d_model)
  if not c.tie_embeddings:
    table['head'] = _linear('lm_head.weight', c.d_model, c.vocab_size)
  return table


def _layer(config: DecoderConfig, i: int, fused: bool) -> dict[str, Place]:
  """A layer's parameters, by their path within it."""
  c, name = config, f'model.layers.{i}'
  d = c.d_model
  table = {
    'attention_norm.scale': _plain(f'{name}.input_layernorm.weight', d),
    'mlp_norm.scale': _plain(f'{name}.post_attention_layernorm.weight', d),
  }
  for ours, theirs, heads in (
    ('query', 'q_proj', c.n_heads),
    ('key', 'k_proj', c.kv_heads),
    ('value', 'v_proj', c.kv_heads),
  ):
    shape = (d, heads, c.head_dim)  # Stored as (N H, D).
    table[f'attention.{ours}'] = _place(
      f'{name}.self_attn.{theirs}.weight', Layout(shape, ((1, 2), (0,)))
    )
    if c.qkv_bias:
      table[f'attention.{ours}_bias'] = _place(
        f'{name}.self_attn.{theirs}.bias', Layout(shape[1:], ((0, 1),))
      )
  shape = (c.n_heads, c.head_dim, d)  # Stored as (D, N H).
  table['attention.out'] = _place(
    f'{name}.self_attn.o_proj.weight', Layout(shape, ((2,), (0, 1)))
  )
  if isinstance(c, Qwen2MoeConfig) and c.is_sparse(i):
    table |= _experts(c, f'{name}.mlp', fused)
  else:
    table |= _swiglu('mlp', f'{name}.mlp', d, c.d_ff)
  return table


def _experts(
  config: Qwen2MoeConfig, name: str, fused: bool
) -> dict[str, Place]:
  """A sparse layer's router, experts and shared expert."""
  c = config
  d, e, f = c.d_model, c.n_experts, c.d_expert
  table = {'moe.router': _linear(f'{name}.gate.weight', d, e)}
  if fused:
    # Gate and up stand one after the other, as (E, 2 f, D).
    both = f'{name}.experts.gate_up_proj'
    swapped = ((0,), (2,), (1,))
    for i, ours in enumerate(('gate', 'up')):
      table[f'moe.{ours}'] = _place(
        both, Layout((e, d, f), swapped, (0, i * f, 0), (e, 2 * f, d))
      )
    table['moe.down'] = _place(
      f'{name}.experts.down_proj', Layout((e, f, d), swapped)
    )
  else:
    each = [_swiglu('moe', f'{name}.experts.{j}', d, f) for j in range(e)]
    table |= {path: _stack([x[path] for x in each]) for path in each[0]}
  table |= _swiglu('moe.shared', f'{name}.shared_expert', d, c.d_shared)
  table['moe.shared_gate'] = _linear(f'{name}.shared_expert_gate.weight', d, 1)
  return table


def _swiglu(ours: str, theirs: str, d: int, f: int) -> dict[str, Place]:
  return {
    f'{ours}.gate': _linear(f'{theirs}.gate_proj.weight', d, f),
    f'{ours}.up': _linear(f'{theirs}.up_proj.weight', d, f),
    f'{ours}.down': _linear(f'{theirs}.down_proj.weight', f, d),
  }


def _place(name: str, layout: Layout) -> Place:
  return Place(np.array(name), layout)


def _plain(name: str, *shape: int) -> Place:
  return _place(name, Layout(shape, tuple((a,) for a in range(len(shape)))))


def _linear(name: str, inputs: int, outputs: int) -> Place:
  """A Linear of torch has its outputs first."""
  return _place(name, Layout((inputs, outputs), ((1,), (0,))))


def _stack(parts: Sequence[Place]) -> Place:
  """Places of one layout along a new leading axis."""
  return Place(np.stack([p.names for p in parts]), parts[0].layout)
