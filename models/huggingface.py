"""LLaMA and Qwen2-MoE in Hugging Face's format: config.json and safetensors.

`load` reads a folder onto any mesh and `save` writes one that transformers
loads. The translation of config.json is in `models.huggingface_config`, that
of names and layouts in `models.huggingface_names`; `models.huggingface_facts`
has what a folder says beside weights and shapes.
"""

import collections
import contextlib
import functools
import json
import os
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, Sharding

from models import huggingface_config, huggingface_facts, huggingface_files
from models.config import DecoderConfig
from models.decoder import Decoder
from models.families import build
from models.huggingface_facts import Facts
from models.huggingface_files import Tensor, Tensors
from models.huggingface_names import FUSED, Place, places
from models.layers import rotary_frequencies
from models.sharding import check, make_mesh, param_shardings

_HEAD, _EMBEDDING = 'lm_head.weight', 'model.embed_tokens.weight'
_PART = 2**24  # Elements to hold at once of tensors that are compared.


def load(
  folder: str | os.PathLike[str],
  *,
  config: DecoderConfig | None = None,
  mesh: Mesh | None = None,
) -> Decoder:
  """Loads a model.

  A process reads the parts of parameters that its devices hold, one at a time
  and each once, so that no host holds a second copy of the model.

  Args:
    folder: Holds config.json and safetensors, whole or in shards. Experts
      stand each for itself, as published, or fused, as transformers 5 holds
      them.
    config: Replaces what config.json says; to choose `scan_layers` or
      `dtype`, replace them in `load_config(folder)`.
    mesh: Where the model goes and will run, by the rules of
      `models.sharding`; None for the default device and its kernels.

  Returns:
    A model with float32 parameters: int32 tokens (batch, length) to float32
    logits (batch, length, vocabulary). Its `facts` are those of `load_facts`,
    which `save` writes back.

  Raises:
    ValueError: an option is not supported, a tensor is unknown, missing, of
      another shape or type or at odds with config.json, a file is broken, or
      the mesh does not divide the model; the message names it.
    FileNotFoundError: there is no such folder, or it lacks a file; the message
      names it.
    OSError: a file cannot be read; the message names it.
  """
  folder = pathlib.Path(folder)
  config_given = config is not None
  config = config or load_config(folder)
  if mesh is None:
    mesh = _default_mesh()
  else:
    check(config, mesh)
  model = nnx.eval_shape(
    lambda: build(config, rngs=nnx.Rngs(params=0), mesh=mesh)
  )
  if config_given:  # The folder's own may be missing or of something else.
    with contextlib.suppress(ValueError, OSError):
      model.facts = load_facts(folder)
  else:
    model.facts = load_facts(folder)
  graph, abstract = nnx.split(model)
  shapes = nnx.to_pure_dict(abstract)
  shardings = {} if mesh is None else _by_path(param_shardings(model, mesh))
  with Tensors(folder) as tensors:
    fused = any(name.endswith(FUSED) for name in tensors.names)
    table = places(config, fused=fused)
    _check_tensors(folder, tensors, table, config)
    _check_beside(folder, tensors, config)

    def put(path: tuple[Any, ...], _) -> jax.Array:
      name = _dotted(path)
      return _put(table[name], shardings.get(name), tensors)

    params = jax.tree_util.tree_map_with_path(put, shapes)
  return nnx.merge(graph, params)


def save(
  model: Decoder,
  folder: str | os.PathLike[str],
  *,
  facts: Facts | None = None,
  max_bytes: int = 5 * 10**9,
) -> None:
  """Writes config.json and safetensors, which transformers loads.

  Experts are written each for itself. Tensors are fetched and written one at
  a time. Of several processes all must call this, and the first writes.

  Args:
    model: What to write; its parameters stay float32.
    folder: Made if it is not there. Each file is replaced whole;
      safetensors of an earlier model are removed, and its
      generation_config.json. A tokenizer is left where it is.
    facts: Where a text ends and how long it may be; `Facts.of` makes them for
      a model trained here. None takes what `load` read with the model. A model
      without any writes no end of text, and transformers assumes its own
      length.
    max_bytes: Above this size the tensors are split into several files, with
      an index.

  Raises:
    ValueError: a token in `facts` is not in the model's vocabulary.
  """
  folder = pathlib.Path(folder)
  if facts is not None:
    facts.check(model.config.vocab_size)
  facts = facts or model.facts or Facts()
  config = huggingface_config.to_hugging_face(model.config)
  config |= json.loads(facts.options)
  params = _by_path(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
  tensors = {
    str(name): Tensor(
      place.layout.stored, functools.partial(_fetch, params[path], place, at)
    )
    for path, place in places(model.config).items()
    for at, name in np.ndenumerate(place.names)
  }
  if jax.process_index() == 0:
    folder.mkdir(parents=True, exist_ok=True)
    texts = {
      'config.json': json.dumps(config, indent=2) + '\n',
      huggingface_facts.GENERATION: facts.generation,
    }
    huggingface_files.write(folder, tensors, max_bytes, texts)
  else:  # Takes its part in fetching.
    for tensor in tensors.values():
      tensor.fetch()
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(f'saved {folder}')


def _default_mesh() -> Mesh | None:
  """Of the default device alone; None on a CPU, whose kernels need none."""
  (device,) = jnp.zeros(()).devices()
  return None if device.platform == 'cpu' else make_mesh([device])


def load_config(folder: str | os.PathLike[str]) -> DecoderConfig:
  """Reads config.json.

  Args:
    folder: Holds it.

  Returns:
    The same shapes as a `LlamaConfig` or a `Qwen2MoeConfig`.

  Raises:
    ValueError: it is broken, or an option is not supported; the message names
      it.
    FileNotFoundError: there is no such folder, or no config.json in it.
    OSError: config.json cannot be read.
  """
  path = pathlib.Path(folder) / 'config.json'
  given = huggingface_files.read_json(path)
  return huggingface_config.from_hugging_face(given, str(path))


def load_facts(folder: str | os.PathLike[str]) -> Facts:
  """Reads the facts in config.json and generation_config.json.

  Args:
    folder: Holds them; it may lack the second.

  Returns:
    The tokens that begin, end and pad a text, its greatest length, how it is
    sampled, and what else other software reads.

  Raises:
    ValueError: a file is broken; the message names it.
    FileNotFoundError: there is no such folder, or no config.json in it.
    OSError: a file cannot be read; the message names it.
  """
  return huggingface_facts.read(pathlib.Path(folder))


def _dotted(path: tuple[Any, ...]) -> str:
  return '.'.join(str(key.key) for key in path)


def _by_path(tree: Any) -> dict[str, Any]:
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {_dotted(path): leaf for path, leaf in leaves}


def _check_tensors(
  folder: pathlib.Path,
  tensors: Tensors,
  table: dict[str, Place],
  config: DecoderConfig,
) -> None:
  """Compares names and shapes before anything is read."""
  stored = {
    str(name): place.layout.stored
    for place in table.values()
    for name in place.names.flat
  }
  ignored = _frequencies(tensors)
  if config.tie_embeddings:
    ignored.add(_HEAD)
  if missing := sorted(stored.keys() - tensors.names):
    raise ValueError(f'{folder} lacks {_few(missing)}')
  if unknown := sorted(tensors.names - stored.keys() - ignored):
    raise ValueError(f'{folder} has unknown tensors: {_few(unknown)}')
  for name, shape in stored.items():
    tensors.check(name, shape)


def _frequencies(tensors: Tensors) -> set[str]:
  """The buffers of the rotary embedding, which old versions stored."""
  return {n for n in tensors.names if n.endswith('.rotary_emb.inv_freq')}


def _check_beside(
  folder: pathlib.Path, tensors: Tensors, config: DecoderConfig
) -> None:
  """Checks that tensors that are stored but not loaded agree with the config.

  Each process checks all of them and holds only a part of a tensor at a time.
  """
  c = config
  if (folder / 'adapter_config.json').exists():
    raise ValueError(
      f'{folder} holds an adapter, which adapter_config.json describes and '
      'which is not supported: merge it into the model'
    )
  if c.tie_embeddings and _HEAD in tensors.names:
    tensors.check(_HEAD, (c.vocab_size, c.d_model))
    rows = max(1, _PART // c.d_model)
    for start in range(0, c.vocab_size, rows):
      part = (
        slice(start, min(start + rows, c.vocab_size)),
        slice(0, c.d_model),
      )
      head, table = (
        tensors.read(name, part).astype(np.float32)
        for name in (_HEAD, _EMBEDDING)
      )
      if not np.array_equal(head, table, equal_nan=True):
        raise ValueError(
          f'{folder}: the config ties {_HEAD} to {_EMBEDDING}, but they '
          'differ: set tie_word_embeddings to false in config.json, or remove '
          f'{_HEAD}'
        )
  for name in sorted(_frequencies(tensors)):
    frequencies = rotary_frequencies(c.head_dim, c.rope_theta, c.rope_scaling)
    # Some are rounded to bfloat16, some to float16, whose least step is 6e-8.
    if tensors.shape(name) != frequencies.shape or not np.allclose(
      tensors.read(name, (slice(0, frequencies.size),)).astype(np.float32),
      frequencies,
      rtol=5e-3,
      atol=1e-7,
    ):
      raise ValueError(
        f'{folder}: {name} differs from what rope_theta and rope_parameters '
        'of config.json give: correct these, or remove the tensor'
      )


def _few(names: list[str]) -> str:
  more = f' and {len(names) - 4} more' if len(names) > 4 else ''
  return ', '.join(names[:4]) + more


def _put(
  place: Place, sharding: Sharding | None, tensors: Tensors
) -> jax.Array:
  """Reads a parameter onto its devices, each part of it once."""
  shape = place.shape
  if sharding is None:
    whole = tuple(slice(0, size) for size in shape)
    return jax.block_until_ready(
      jax.device_put(place.read(whole, tensors.read))
    )
  devices = collections.defaultdict(list)
  for device, index in sharding.addressable_devices_indices_map(shape).items():
    assert index is not None  # The device is addressable.
    ends = [s.indices(size)[:2] for s, size in zip(index, shape, strict=True)]
    devices[tuple(ends)].append(device)
  arrays = []
  for part, copies in devices.items():
    array = place.read(tuple(slice(*pair) for pair in part), tensors.read)
    arrays += [jax.device_put(array, device) for device in copies]
    jax.block_until_ready(arrays)  # What was read is then free.
  return jax.make_array_from_single_device_arrays(shape, sharding, arrays)


def _fetch(param: jax.Array, place: Place, at: tuple[int, ...]) -> np.ndarray:
  """A stored tensor's values: of a stack of them, one layer's or expert's."""
  part = param[at] if at else param
  if not (part.is_fully_addressable or part.is_fully_replicated):
    part = multihost_utils.process_allgather(part, tiled=True)
  return place.layout.to_stored(np.asarray(part))
