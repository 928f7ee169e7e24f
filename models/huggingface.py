"""LLaMA and Qwen2-MoE in Hugging Face's format: config.json and safetensors.

`load` reads a folder onto any mesh and `save` writes one that transformers
loads. The translation of config.json is in `models.huggingface_config`, that
of names and layouts in `models.huggingface_names`.
"""

import collections
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

from models import huggingface_config, huggingface_files
from models.config import DecoderConfig
from models.decoder import Decoder
from models.families import build
from models.huggingface_files import Tensor, Tensors
from models.huggingface_names import FUSED, Place, places
from models.sharding import check, make_mesh, param_shardings


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
    logits (batch, length, vocabulary).

  Raises:
    ValueError: an option is not supported, a tensor is unknown, missing or of
      another shape or type, a file is broken, or the mesh does not divide the
      model; the message names it.
    FileNotFoundError: there is no such folder, or it lacks a file; the message
      names it.
    OSError: a file cannot be read; the message names it.
  """
  folder = pathlib.Path(folder)
  config = config or load_config(folder)
  if mesh is None:
    mesh = _default_mesh()
  else:
    check(config, mesh)
  model = nnx.eval_shape(
    lambda: build(config, rngs=nnx.Rngs(params=0), mesh=mesh)
  )
  graph, abstract = nnx.split(model)
  shapes = nnx.to_pure_dict(abstract)
  shardings = {} if mesh is None else _by_path(param_shardings(model, mesh))
  with Tensors(folder) as tensors:
    fused = any(name.endswith(FUSED) for name in tensors.names)
    table = places(config, fused=fused)
    _check_tensors(folder, tensors, table, config)

    def put(path: tuple[Any, ...], _) -> jax.Array:
      name = _dotted(path)
      return _put(table[name], shardings.get(name), tensors)

    params = jax.tree_util.tree_map_with_path(put, shapes)
  return nnx.merge(graph, params)


def save(
  model: Decoder,
  folder: str | os.PathLike[str],
  *,
  max_bytes: int = 5 * 10**9,
) -> None:
  """Writes config.json and safetensors, which transformers loads.

  Experts are written each for itself. Tensors are fetched and written one at
  a time. Of several processes all must call this, and the first writes.

  Args:
    model: What to write; its parameters stay float32.
    folder: Made if it is not there. Each file is replaced whole, and
      safetensors of an earlier model are removed.
    max_bytes: Above this size the tensors are split into several files, with
      an index.
  """
  folder = pathlib.Path(folder)
  config = huggingface_config.to_hugging_face(model.config)
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
    huggingface_files.write(folder, tensors, max_bytes)
    with huggingface_files.replaced(folder / 'config.json') as temporary:
      temporary.write_text(json.dumps(config, indent=2) + '\n')
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
  # Buffers that old versions stored, and a tied head that some store too.
  ignored = {n for n in tensors.names if n.endswith('.rotary_emb.inv_freq')}
  if config.tie_embeddings:
    ignored.add('lm_head.weight')
  if missing := sorted(stored.keys() - tensors.names):
    raise ValueError(f'{folder} lacks {_few(missing)}')
  if unknown := sorted(tensors.names - stored.keys() - ignored):
    raise ValueError(f'{folder} has unknown tensors: {_few(unknown)}')
  for name, shape in stored.items():
    tensors.check(name, shape)


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
