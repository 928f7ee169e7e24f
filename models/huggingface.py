"""LLaMA in Hugging Face's format: config.json and safetensors, in and out.

Shape suffixes: D model width, N query heads, K key and value heads, H head
width.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import ml_dtypes  # noqa: F401 (numpy then knows bfloat16)
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from models.config import LlamaConfig, RopeScaling
from models.llama import Llama

_INDEX = 'model.safetensors.index.json'
_SINGLE = 'model.safetensors'

# What only means something to generation, or to training elsewhere.
_HARMLESS = {
  'architectures', 'attention_dropout', 'bos_token_id', 'dtype',
  'eos_token_id', 'initializer_range', 'max_position_embeddings',
  'pad_token_id', 'pretraining_tp', 'torch_dtype', 'transformers_version',
  'use_cache', '_name_or_path',
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class _Entry:
  """Where one of our parameters stands in a folder, and in which layout."""

  name: str
  shape: tuple[int, ...]
  """The stored tensor's."""
  to_ours: Callable[[np.ndarray], np.ndarray]
  to_theirs: Callable[[np.ndarray], np.ndarray]


def load(
  folder: str | os.PathLike[str],
  *,
  config: LlamaConfig | None = None,
  sharding: Callable[[str], jax.sharding.Sharding] | None = None,
) -> Llama:
  """Loads a LLaMA model.

  Tensors are read one at a time, so that a host holds no second copy of the
  model.

  Args:
    folder: Holds config.json and safetensors, whole or in shards.
    config: Replaces what config.json says; to choose `scan_layers` or
      `dtype`, replace them in `load_config(folder)`.
    sharding: From a parameter's dotted path to where it goes; by default it
      goes to the default device.

  Returns:
    A model with float32 parameters: int32 tokens (batch, length) to float32
    logits (batch, length, vocabulary).

  Raises:
    ValueError: an option is not supported, a tensor is unknown, missing or of
      another shape; the message names it.
    FileNotFoundError: the folder lacks a file; the message names it.
  """
  folder = pathlib.Path(folder)
  config = config or load_config(folder)
  model = nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(params=0)))
  graph, abstract = nnx.split(model)
  table = _table(config)
  with _Tensors(folder) as tensors:
    _check_names(folder, tensors, table)

    def read(path: str) -> np.ndarray:
      entry = table[path]
      return entry.to_ours(tensors.read(entry.name, entry.shape))

    def place(path, leaf: jax.ShapeDtypeStruct) -> jax.Array:
      name = '.'.join(str(key.key) for key in path)
      if name in table:
        array = read(name)
      else:  # Stacked: 'layers.mlp.up' of all layers.
        part = name.removeprefix('layers.')
        array = np.stack(
          [read(f'layers.{i}.{part}') for i in range(config.n_layers)]
        )
      return jax.device_put(array, sharding(name) if sharding else None)

    params = jax.tree_util.tree_map_with_path(place, nnx.to_pure_dict(abstract))
  return nnx.merge(graph, params)


def save(model: Llama, folder: str | os.PathLike[str]) -> None:
  """Writes config.json and model.safetensors, which transformers loads.

  Args:
    model: What to write; its parameters stay float32.
    folder: Made if it is not there. Both files are replaced whole.

  Raises:
    ValueError: the format has no place for an option; nothing is written.
  """
  folder = pathlib.Path(folder)
  config = model.config
  text = json.dumps(_to_hugging_face(config), indent=2) + '\n'
  params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  tensors = {}
  for path, entry in _table(config).items():
    array = np.asarray(_lookup(params, path, config.scan_layers))
    tensors[entry.name] = np.ascontiguousarray(entry.to_theirs(array))
  folder.mkdir(parents=True, exist_ok=True)
  with _replaced(folder / _SINGLE) as temporary:
    safetensors.numpy.save_file(tensors, temporary, metadata={'format': 'pt'})
  with _replaced(folder / 'config.json') as temporary:
    temporary.write_text(text)


def load_config(folder: str | os.PathLike[str]) -> LlamaConfig:
  """Reads config.json.

  Args:
    folder: Holds it.

  Returns:
    The same shapes as a `LlamaConfig`.

  Raises:
    ValueError: an option is not supported; the message names it.
    FileNotFoundError: there is no config.json.
  """
  path = pathlib.Path(folder) / 'config.json'
  try:
    given = json.loads(path.read_text())
  except ValueError as error:
    raise ValueError(f'{path} is not JSON: {error}') from error
  return _from_hugging_face(given, str(path))


def _from_hugging_face(given: Mapping[str, Any], path: str) -> LlamaConfig:
  rest = {k: v for k, v in given.items() if k not in _HARMLESS}

  def take(name: str, default: Any = None) -> Any:
    value = rest.pop(name, None)
    if value is None:
      value = default
    if value is None:
      raise ValueError(f'{path} lacks {name}')
    return value

  def only(name: str, supported: Any) -> None:
    if (value := rest.pop(name, supported)) not in (supported, None):
      raise ValueError(
        f'{path}: {name} = {value!r} is not supported, only {supported!r}'
      )

  only('model_type', 'llama')
  only('hidden_act', 'silu')
  only('attention_bias', False)
  only('mlp_bias', False)
  d_model, n_heads = take('hidden_size'), take('num_attention_heads')
  only('head_dim', d_model // n_heads)
  # Since transformers 5 in one place, with the base; before it in two.
  rope = rest.pop('rope_parameters', None) or {}
  scaling = rest.pop('rope_scaling', None) or {}
  theta = rest.pop('rope_theta', None)
  scaling = {**scaling, **rope}
  config = LlamaConfig(
    vocab_size=take('vocab_size'),
    d_model=d_model,
    n_layers=take('num_hidden_layers'),
    n_heads=n_heads,
    n_kv_heads=take('num_key_value_heads', n_heads),
    d_ff=take('intermediate_size'),
    norm_eps=take('rms_norm_eps', 1e-6),
    rope_theta=scaling.pop('rope_theta', theta or 10000.0),
    rope_scaling=_rope_scaling(scaling, path),
    tie_embeddings=take('tie_word_embeddings', False),
  )
  if rest:
    raise ValueError(f'{path}: unknown options: {", ".join(sorted(rest))}')
  return config


def _rope_scaling(given: dict[str, Any], path: str) -> RopeScaling:
  kind = given.pop('rope_type', given.pop('type', 'default'))
  given.pop('type', None)
  if kind == 'default':
    return RopeScaling()
  if kind != 'llama3':
    raise ValueError(
      f"{path}: rope_type {kind!r} is not supported, only 'default' and "
      "'llama3'"
    )
  length = given.pop('original_max_position_embeddings', None)
  try:
    return RopeScaling(
      **given, **({} if length is None else {'original_length': length})
    )
  except TypeError as error:
    raise ValueError(f'{path}: rope scaling: {error}') from error


def _to_hugging_face(config: LlamaConfig) -> dict[str, Any]:
  c = config
  if c.qkv_bias:
    raise ValueError("model.qkv_bias has no place in Hugging Face's LLaMA")
  rope: dict[str, Any] = {'rope_type': 'default', 'rope_theta': c.rope_theta}
  if c.rope_scaling.factor != 1.0:
    scaling = dataclasses.asdict(c.rope_scaling)
    length = scaling.pop('original_length')
    rope |= scaling
    rope |= {
      'rope_type': 'llama3',
      'original_max_position_embeddings': length,
    }
  return {
    'architectures': ['LlamaForCausalLM'],
    'model_type': 'llama',
    'hidden_act': 'silu',
    'vocab_size': c.vocab_size,
    'hidden_size': c.d_model,
    'num_hidden_layers': c.n_layers,
    'num_attention_heads': c.n_heads,
    'num_key_value_heads': c.kv_heads,
    'head_dim': c.head_dim,
    'intermediate_size': c.d_ff,
    'rms_norm_eps': c.norm_eps,
    'rope_parameters': rope,
    'tie_word_embeddings': c.tie_embeddings,
    'attention_bias': False,
    'mlp_bias': False,
    'dtype': 'float32',
  }


def _table(config: LlamaConfig) -> dict[str, _Entry]:
  """Our dotted paths, layers unstacked, to the stored tensors."""
  c = config
  d, h = c.d_model, c.head_dim

  def plain(name: str, *shape: int) -> _Entry:
    return _Entry(name, shape, lambda x: x, lambda x: x)

  def linear(name: str, outputs: int, inputs: int) -> _Entry:
    return _Entry(name, (outputs, inputs), np.transpose, np.transpose)

  def heads(name: str, n: int) -> _Entry:
    """(N H, D) there, (D, N, H) here."""
    return _Entry(
      name,
      (n * h, d),
      lambda x: x.T.reshape(d, n, h),
      lambda x: x.reshape(d, n * h).T,
    )

  def merged(name: str, n: int) -> _Entry:
    """(D, N H) there, (N, H, D) here."""
    return _Entry(
      name,
      (d, n * h),
      lambda x: x.T.reshape(n, h, d),
      lambda x: x.reshape(n * h, d).T,
    )

  table = {
    'embedding': plain('model.embed_tokens.weight', c.vocab_size, d),
    'norm.scale': plain('model.norm.weight', d),
  }
  if not c.tie_embeddings:
    table['head'] = linear('lm_head.weight', c.vocab_size, d)
  for i in range(c.n_layers):
    theirs, ours = f'model.layers.{i}', f'layers.{i}'
    attention, mlp = f'{theirs}.self_attn', f'{theirs}.mlp'
    table |= {
      f'{ours}.attention_norm.scale': plain(
        f'{theirs}.input_layernorm.weight', d
      ),
      f'{ours}.attention.query': heads(f'{attention}.q_proj.weight', c.n_heads),
      f'{ours}.attention.key': heads(f'{attention}.k_proj.weight', c.kv_heads),
      f'{ours}.attention.value': heads(
        f'{attention}.v_proj.weight', c.kv_heads
      ),
      f'{ours}.attention.out': merged(f'{attention}.o_proj.weight', c.n_heads),
      f'{ours}.mlp_norm.scale': plain(
        f'{theirs}.post_attention_layernorm.weight', d
      ),
      f'{ours}.mlp.gate': linear(f'{mlp}.gate_proj.weight', c.d_ff, d),
      f'{ours}.mlp.up': linear(f'{mlp}.up_proj.weight', c.d_ff, d),
      f'{ours}.mlp.down': linear(f'{mlp}.down_proj.weight', d, c.d_ff),
    }
  return table


class _Tensors:
  """The tensors of a folder, read one at a time."""

  def __init__(self, folder: pathlib.Path):
    index = folder / _INDEX
    if index.exists():
      files = sorted(set(json.loads(index.read_text())['weight_map'].values()))
    elif (folder / _SINGLE).exists():
      files = [_SINGLE]
    else:
      raise FileNotFoundError(f'{folder} holds neither {_SINGLE} nor {_INDEX}')
    self._stack = contextlib.ExitStack()
    self._file: dict[str, tuple[str, Any]] = {}
    for name in files:
      opened = self._stack.enter_context(
        safetensors.safe_open(folder / name, framework='numpy')
      )
      self._file |= dict.fromkeys(opened.keys(), (name, opened))

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._stack.close()

  @property
  def names(self) -> set[str]:
    """Every tensor in the folder."""
    return set(self._file)

  def read(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Returns a tensor as float32, if it has the shape."""
    file, opened = self._file[name]
    found = tuple(opened.get_slice(name).get_shape())
    if found != shape:
      raise ValueError(f'{file}: {name} has shape {found}, not {shape}')
    return opened.get_tensor(name).astype(np.float32)


def _check_names(folder, tensors: _Tensors, table: dict[str, _Entry]) -> None:
  wanted = {entry.name for entry in table.values()}
  # Buffers that old versions stored, and a tied head that some store too.
  ignored = {n for n in tensors.names if n.endswith('.rotary_emb.inv_freq')}
  if 'head' not in table:
    ignored.add('lm_head.weight')
  if missing := sorted(wanted - tensors.names):
    raise ValueError(f'{folder} lacks {_few(missing)}')
  if unknown := sorted(tensors.names - wanted - ignored):
    raise ValueError(f'{folder} has unknown tensors: {_few(unknown)}')


def _few(names: list[str]) -> str:
  more = f' and {len(names) - 4} more' if len(names) > 4 else ''
  return ', '.join(names[:4]) + more


def _lookup(params: Any, path: str, stacked: bool) -> Any:
  """A parameter by its unstacked path."""
  keys: list[Any] = path.split('.')
  if keys[0] == 'layers':
    layer = int(keys[1])
    if stacked:
      return _lookup(params['layers'], '.'.join(keys[2:]), False)[layer]
    keys[1] = layer
  for key in keys:
    params = params[key]
  return params


@contextlib.contextmanager
def _replaced(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A name to write under, put in the place of `path` at the end."""
  temporary = path.with_name(f'{path.name}.{os.getpid()}.tmp')
  try:
    yield temporary
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)
