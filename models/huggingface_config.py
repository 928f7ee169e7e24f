"""config.json of Hugging Face's LLaMA, Qwen2 and Qwen2-MoE, and our configs.

A folder says more than shapes. What changes the computed numbers is read or,
where the models here do not have it, refused by name; so is what is unknown.
"""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

from models.config import (
  DecoderConfig,
  LlamaConfig,
  Qwen2MoeConfig,
  RopeScaling,
)

HARMLESS = frozenset({
  '_name_or_path', 'architectures', 'attention_dropout', 'bos_token_id',
  'dtype', 'eos_token_id', 'initializer_range', 'is_llama_config',
  'max_position_embeddings', 'output_router_logits', 'pad_token_id',
  'pretraining_tp', 'torch_dtype', 'transformers.js_config',
  'transformers_version', 'use_cache',
})  # fmt: skip
"""Options that only mean something to generation, to other software, or to
training there; `models.huggingface_facts` keeps those that stay true."""

_ARCHITECTURES = {
  'llama': 'LlamaForCausalLM',
  'qwen2': 'Qwen2ForCausalLM',
  'qwen2_moe': 'Qwen2MoeForCausalLM',
}

_ROPE_LENGTH = 'original_max_position_embeddings'


class _Field(NamedTuple):
  """A field of our configs and the option that says the same."""

  ours: str
  theirs: str
  kind: type
  default: Any = None
  """In transformers, where the option is left out; None if it must be there."""


_DECODER = (
  _Field('vocab_size', 'vocab_size', int),
  _Field('d_model', 'hidden_size', int),
  _Field('n_layers', 'num_hidden_layers', int),
  _Field('n_heads', 'num_attention_heads', int),
  _Field('d_ff', 'intermediate_size', int),
  _Field('norm_eps', 'rms_norm_eps', float, 1e-6),
  _Field('tie_embeddings', 'tie_word_embeddings', bool, False),
)
_KV_HEADS = _Field('n_kv_heads', 'num_key_value_heads', int)
_MOE = (
  _Field('qkv_bias', 'qkv_bias', bool, True),
  _Field('n_experts', 'num_experts', int),
  _Field('experts_per_token', 'num_experts_per_tok', int),
  _Field('d_expert', 'moe_intermediate_size', int),
  _Field('d_shared', 'shared_expert_intermediate_size', int),
  _Field('renormalize', 'norm_topk_prob', bool, False),
  _Field('sparse_step', 'decoder_sparse_step', int, 1),
  _Field('dense_layers', 'mlp_only_layers', list, []),
  _Field('balance_loss', 'router_aux_loss_coef', float, 0.001),
)

_POSITIVE = (*_DECODER[:1], _KV_HEADS)  # Of ours, 0 leaves them open.


def from_hugging_face(given: Any, path: str) -> DecoderConfig:
  """Translates a config.json.

  Args:
    given: What the file holds.
    path: Its name, for messages.

  Returns:
    A `LlamaConfig`, with `qkv_bias` for a Qwen2, or a `Qwen2MoeConfig`.

  Raises:
    ValueError: an option is missing, unknown, not supported, or of the wrong
      type; the message names it.
  """
  if not isinstance(given, dict):
    raise ValueError(f'{path} holds no JSON object')
  options = _Options(given, path)
  for name in HARMLESS:
    options.drop(name)
  family = options.take('model_type', str)
  if family not in _ARCHITECTURES:
    known = ', '.join(map(repr, _ARCHITECTURES))
    raise ValueError(
      f'{path}: model_type = {family!r} is not supported, only {known}'
    )
  options.only('hidden_act', 'silu')
  values = options.fields(_DECODER)
  values['rope_theta'], scaling = _rope(options)
  if family == 'llama':
    # Left out, as many as queries have; Qwen's default is a number.
    values |= options.fields([_KV_HEADS._replace(default=0)])
    for name in ('attention_bias', 'mlp_bias', 'rope_interleaved'):
      options.only(name, False)
  else:
    values |= options.fields([_KV_HEADS])
    _refuse_windows(options, values['n_layers'])
    values['qkv_bias'] = True
  kind: type[DecoderConfig] = LlamaConfig
  if family == 'qwen2_moe':
    kind = Qwen2MoeConfig
    values |= options.fields(_MOE)
  head_dim = options.take('head_dim', int, 0)
  options.finish()
  for field in _POSITIVE:
    value = given.get(field.theirs)
    if value is not None and value < 1:
      raise ValueError(
        f'{path}: {field.theirs} must be at least 1, not {value}'
      )
  try:
    config = kind(rope_scaling=RopeScaling(**scaling), **values)
  except ValueError as error:  # Out of range; it has our names.
    theirs = {f.ours: f.theirs for f in (*_DECODER, _KV_HEADS, *_MOE)}
    message = re.sub(
      r'model\.(\w+)', lambda m: theirs.get(m[1], m[1]), str(error)
    )
    raise ValueError(f'{path}: {message}') from error
  if head_dim not in (0, config.head_dim):
    raise ValueError(
      f'{path}: head_dim = {head_dim} is not supported, only '
      f'{config.head_dim}, hidden_size / num_attention_heads'
    )
  return config


def to_hugging_face(config: DecoderConfig) -> dict[str, Any]:
  """Translates one of our configs.

  What only concerns the computation here (`scan_layers`, `remat`, `dtype`) or
  training (`z_loss`, `router_z_loss`, `init_std`) has no place there.

  Args:
    config: A `LlamaConfig` or a `Qwen2MoeConfig`.

  Returns:
    The contents of config.json, without those of `models.huggingface_facts`.
  """
  c = config
  family = 'qwen2' if c.qkv_bias else 'llama'
  fields: tuple[_Field, ...] = _DECODER
  if isinstance(c, Qwen2MoeConfig):
    family, fields = 'qwen2_moe', _DECODER + _MOE
  rope: dict[str, Any] = {'rope_type': 'default'}
  if c.rope_scaling.factor != 1.0:
    scaling = dataclasses.asdict(c.rope_scaling)
    length = scaling.pop('original_length')
    rope = {'rope_type': 'llama3', **scaling, _ROPE_LENGTH: length}
  return {
    'architectures': [_ARCHITECTURES[family]],
    'model_type': family,
    'hidden_act': 'silu',
    **{field.theirs: getattr(c, field.ours) for field in fields},
    _KV_HEADS.theirs: c.kv_heads,
    'head_dim': c.head_dim,
    # The spelling of transformers 5, then that of transformers 4 and others.
    'rope_parameters': {**rope, 'rope_theta': c.rope_theta},
    'rope_theta': c.rope_theta,
    'rope_scaling': None if c.rope_scaling.factor == 1.0 else rope,
    'dtype': 'float32',
  }


class _Options:
  """Options of a JSON object, taken one after the other."""

  def __init__(self, given: dict[str, Any], path: str, prefix: str = ''):
    # None is how a config.json says that it says nothing.
    self._rest = {k: v for k, v in given.items() if v is not None}
    self.path, self._prefix = path, prefix

  def __bool__(self) -> bool:
    return bool(self._rest)

  def __contains__(self, name: str) -> bool:
    return name in self._rest

  def drop(self, name: str) -> None:
    self._rest.pop(name, None)

  def take(self, name: str, kind: type, default: Any = None) -> Any:
    """An option's value, which must be of a type, or its default."""
    value = self._rest.pop(name, default)
    if value is None:
      raise ValueError(f'{self.path} lacks {self._prefix}{name}')
    if not _is(value, kind):
      raise ValueError(
        f'{self.path}: {self._prefix}{name} must be {_KINDS[kind]}, not '
        f'{value!r}'
      )
    if kind is float:
      return float(value)
    return tuple(value) if kind is list else value

  def fields(self, fields: Iterable[_Field]) -> dict[str, Any]:
    """The values of fields, by our names."""
    return {f.ours: self.take(f.theirs, f.kind, f.default) for f in fields}

  def only(self, name: str, supported: Any) -> None:
    """Refuses any value but one."""
    if (value := self._rest.pop(name, supported)) != supported:
      raise ValueError(
        f'{self.path}: {self._prefix}{name} = {value!r} is not supported, '
        f'only {supported!r}'
      )

  def inner(self, name: str) -> '_Options':
    """The options of an object within; none if it is not there."""
    given = self.take(name, dict, {})
    return _Options(given, self.path, f'{self._prefix}{name}.')

  def finish(self) -> None:
    """Refuses what was not taken."""
    if self._rest:
      names = ', '.join(self._prefix + name for name in sorted(self._rest))
      raise ValueError(f'{self.path}: unknown options: {names}')


_KINDS = {
  bool: 'true or false', dict: 'an object', float: 'a number',
  int: 'a whole number', list: 'a list of whole numbers', str: 'a string',
}  # fmt: skip


def _is(value: Any, kind: type) -> bool:
  if kind is list:
    return isinstance(value, list) and all(_is(item, int) for item in value)
  if isinstance(value, bool):  # To Python it is an int.
    return kind is bool
  if kind is float and isinstance(value, int):
    return abs(value) < 2**63
  return isinstance(value, kind)


def _rope(options: _Options) -> tuple[float, dict[str, Any]]:
  """Returns the rotary embedding's base and scaling.

  Since transformers 5 they stand in `rope_parameters`; before, the base stood
  beside a `rope_scaling`. Versions differ in which they take where both are
  there, so what is stated twice must be equal.
  """
  inner = map(options.inner, ('rope_scaling', 'rope_parameters'))
  ropes = [rope for rope in inner if rope]
  thetas = [
    place.take('rope_theta', float)
    for place in (options, *ropes)
    if 'rope_theta' in place
  ]
  scalings = [_rope_scaling(rope) for rope in ropes]
  if any(x != said[0] for said in (thetas, scalings) for x in said):
    raise ValueError(
      f'{options.path}: rope_theta, rope_scaling and rope_parameters '
      'contradict each other: keep the correct one'
    )
  return (thetas or [10000.0])[0], (scalings or [{}])[0]


def _rope_scaling(rope: _Options) -> dict[str, Any]:
  """Returns the fields of our `RopeScaling` that an object gives."""
  kind = rope.take('rope_type', str, '') or rope.take('type', str, 'default')
  rope.only('type', kind)
  scaling = {}
  if kind == 'llama3':
    for name in ('factor', 'low_freq_factor', 'high_freq_factor'):
      scaling[name] = rope.take(name, float)
    scaling['original_length'] = rope.take(_ROPE_LENGTH, int)
  elif kind != 'default':
    raise ValueError(
      f'{rope.path}: rope_type {kind!r} is not supported, only '
      "'default' and 'llama3'"
    )
  rope.finish()
  return scaling


def _refuse_windows(options: _Options, n_layers: int) -> None:
  """Sliding windows may be described, if no layer has one."""
  options.only('use_sliding_window', False)
  options.drop('sliding_window')
  options.drop('max_window_layers')
  options.only('layer_types', ['full_attention'] * n_layers)
