"""Safetensors: what is wrong has a name, and nothing is half written."""

import dataclasses
import importlib.util
import io
import json
import pathlib

import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from flax import nnx

from models import huggingface, huggingface_files
from models.config import Qwen2MoeConfig
from models.families import build

_spec = importlib.util.spec_from_file_location(
  'huggingface_reference',
  pathlib.Path(__file__).with_name('huggingface_reference.py'),
)
reference = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(reference)
BASE, MOE = reference.BASE, reference.MOE
INDEX = 'model.safetensors.index.json'


@pytest.mark.parametrize(
  ('layout', 'name', 'change', 'words'),
  [
    ('llama', 'model.layers.1.mlp.up_proj.weight', None, 'lacks {}'),
    ('llama', 'extra', (2,), 'unknown tensors: {}'),
    ('llama', 'model.layers.2.mlp.up_proj.weight', (40, 24), 'unknown .*{}'),
    ('llama', 'model.norm.weight', (3, 2), r'{} has shape \(3, 2\), not \(24'),
    ('llama', 'lm_head.weight', (24, 37), r'{} has shape \(24, 37\)'),
    ('llama', 'lm_head.bias', (37,), 'unknown tensors: {}'),
    ('llama', 'model.layers.0.self_attn.q_proj.bias', (24,), 'unknown .*{}'),
    ('moe', 'model.layers.0.mlp.experts.5.up_proj.weight', None, 'lacks {}'),
    ('moe', 'model.layers.0.mlp.experts.6.up_proj.weight', (10, 24), '.* {}'),
    ('moe', 'model.layers.1.self_attn.k_proj.bias', None, 'lacks {}'),
    ('moe', 'model.layers.1.mlp.gate.weight', (5, 24), r'{} has shape \(5, 24'),
    ('moe', 'model.layers.1.mlp.shared_expert_gate.weight', None, 'lacks {}'),
    ('fused', 'model.layers.1.mlp.experts.down_proj', None, 'lacks {}'),
    ('fused', 'model.layers.1.mlp.experts.gate_up_proj', None, 'lacks {}'),
    (
      'fused',  # Gate and up along the last axis, as other models have them.
      'model.layers.1.mlp.experts.gate_up_proj',
      (6, 24, 20),
      r'{} has shape \(6, 24, 20\), not \(6, 20, 24\)',
    ),
  ],
)
def test_names_what_is_wrong_with_a_tensor(
  layout, name, change, words, tmp_path
):
  config = BASE if layout == 'llama' else MOE
  tensors = reference.weights(config)
  if layout == 'fused':
    tensors = reference.fused(tensors)
  tensors.pop(name, None)
  if change is not None:
    tensors[name] = np.zeros(change, np.float32)
  with pytest.raises(ValueError, match=words.format(name)):
    huggingface.load(reference.write(tmp_path, config, tensors))


def test_layouts_of_experts_do_not_mix(tmp_path):
  tensors = reference.weights(MOE)
  fused = reference.fused(tensors)
  mixed = {k: v for k, v in tensors.items() if '.layers.0.' not in k}
  mixed |= {k: v for k, v in fused.items() if '.layers.0.' in k}
  with pytest.raises(
    ValueError, match=r'lacks model\.layers\.1\.mlp\.experts\.down_proj'
  ):
    huggingface.load(reference.write(tmp_path, MOE, mixed))


def test_many_missing_tensors_make_a_short_message(tmp_path):
  with pytest.raises(ValueError, match=r'lacks lm_head.* and \d+ more'):
    huggingface.load(reference.write(tmp_path, MOE, {}))


@pytest.mark.parametrize('dtype', [np.float64, np.int32, np.int8])
def test_other_types_are_refused(dtype, tmp_path):
  tensors = reference.weights(BASE)
  tensors['model.norm.weight'] = np.ones(24, dtype)
  with pytest.raises(ValueError, match=r'model\.norm\.weight is [FI]\d+; it'):
    huggingface.load(reference.write(tmp_path, BASE, tensors))


TIED = {**BASE, 'tie_word_embeddings': True}


def tied_twice(dtype=np.float32):
  """Tensors of a tied model that stores its head too."""
  tensors = reference.weights(TIED)
  table = tensors['model.embed_tokens.weight'].astype(dtype)
  tensors['model.embed_tokens.weight'] = table
  return tensors | {'lm_head.weight': table.copy()}


@pytest.mark.parametrize('dtype', [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_tied_head_may_be_stored_too(dtype, tmp_path, monkeypatch):
  monkeypatch.setattr(huggingface, '_PART', 5 * 24)  # Of 37 rows, 5 at once.
  original, sizes = huggingface_files.Tensors.read, []

  def read(tensors, name, slices):
    block = original(tensors, name, slices)
    if name == 'lm_head.weight':
      sizes.append(block.size)
    return block

  monkeypatch.setattr(huggingface_files.Tensors, 'read', read)
  tensors = tied_twice(dtype)
  tensors['lm_head.weight'][3, 4] = np.nan  # No reason to say that they differ.
  tensors['model.embed_tokens.weight'][3, 4] = np.nan
  model = huggingface.load(reference.write(tmp_path, TIED, tensors))
  assert model.head is None
  assert sizes == [5 * 24] * 7 + [2 * 24]


@pytest.mark.parametrize('row', [0, 17, 36])
def test_a_tied_head_that_differs_is_named(row, tmp_path, monkeypatch):
  monkeypatch.setattr(huggingface, '_PART', 5 * 24)
  tensors = tied_twice()
  tensors['lm_head.weight'][row, 23] += 1e-6
  folder = reference.write(tmp_path, TIED, tensors)
  words = (
    r'lm_head\.weight to model\.embed_tokens\.weight, but they differ: set '
    'tie_word_embeddings to false'
  )
  with pytest.raises(ValueError, match=words):
    huggingface.load(folder)
  # Nor is it left out where the caller asks for a tied model.
  untied = reference.write(tmp_path, BASE, tensors)
  config = dataclasses.replace(
    huggingface.load_config(untied), tie_embeddings=True
  )
  with pytest.raises(ValueError, match='but they differ'):
    huggingface.load(untied, config=config)
  head = huggingface.load(untied).head[...].T  # What the message advises.
  assert np.array_equal(head, tensors['lm_head.weight'])


@pytest.mark.parametrize('change', [np.zeros((37, 23)), np.zeros((37, 24))])
def test_a_tied_head_of_another_shape_or_type_is_named(change, tmp_path):
  folder = reference.write(
    tmp_path, TIED, tied_twice() | {'lm_head.weight': change}
  )
  with pytest.raises(ValueError, match=r'lm_head\.weight (has shape|is F64)'):
    huggingface.load(folder)


FREQUENCIES = 1 / 10000 ** (np.arange(0, 6, 2) / 6)
LLAMA3 = {**BASE, 'rope_parameters': reference.LLAMA3}


@pytest.mark.parametrize(
  ('config', 'stored', 'is_right'),
  [
    (BASE, FREQUENCIES, True),
    (BASE, FREQUENCIES.astype(np.float32), True),
    (BASE, FREQUENCIES.astype(np.float16), True),
    (BASE, FREQUENCIES.astype(ml_dtypes.bfloat16), True),
    (BASE, FREQUENCIES / 2, False),  # Positions divided by two.
    (BASE, FREQUENCIES[:2], False),
    (BASE, np.append(FREQUENCIES, 1), False),
    (BASE, FREQUENCIES[None], False),
    (BASE, np.full(3, np.nan), False),
    (LLAMA3, FREQUENCIES, False),
    (LLAMA3, np.array([0.20469, 0.00157490, 1.98425e-5]), True),
  ],
)
def test_stored_frequencies_are_compared(config, stored, is_right, tmp_path):
  name = 'model.layers.1.self_attn.rotary_emb.inv_freq'
  tensors = reference.weights(config) | {name: stored}
  folder = reference.write(tmp_path, config, tensors)
  if is_right:
    huggingface.load(folder)
  else:
    with pytest.raises(
      ValueError, match=f'{name} differs from what rope_theta'
    ):
      huggingface.load(folder)


def test_an_adapter_is_not_left_out(tmp_path):
  folder = reference.write(tmp_path, BASE)
  (folder / 'adapter_config.json').write_text('{}')
  with pytest.raises(ValueError, match=r'holds an adapter, .*: merge it'):
    huggingface.load(folder)


@pytest.mark.parametrize('shards', [1, 3])
def test_a_truncated_file_is_named(shards, tmp_path):
  folder = reference.write(tmp_path, BASE, shards=shards)
  path = sorted(folder.glob('*.safetensors'))[-1]
  content = path.read_bytes()
  for length in (0, 5, 100, len(content) - 1):
    path.write_bytes(content[:length])
    with pytest.raises(ValueError, match=f'{path.name} is not a whole'):
      huggingface.load(folder)
  path.write_bytes(b'x' * 1000)
  with pytest.raises(ValueError, match=f'{path.name} is not a whole'):
    huggingface.load(folder)


def test_missing_files_are_named(tmp_path):
  folder = reference.write(tmp_path, BASE, shards=3)
  (folder / 'model-00002-of-00003.safetensors').unlink()
  with pytest.raises(FileNotFoundError, match='model-00002-of-00003'):
    huggingface.load(folder)
  (folder / INDEX).unlink()
  with pytest.raises(FileNotFoundError, match=r'neither model\.safetensors'):
    huggingface.load(folder)
  with pytest.raises(FileNotFoundError, match=r'no folder .*nowhere$'):
    huggingface.load(folder / 'nowhere')


@pytest.mark.parametrize(
  ('text', 'words'),
  [
    ('{', 'is not JSON'),
    ('[]', 'weight_map'),
    ('{}', 'weight_map'),
    ('{"weight_map": ["a"]}', 'weight_map'),
    ('{"weight_map": {"a": 1}}', 'weight_map'),
    ('{"weight_map": {"a": "b", "c": {}}}', 'weight_map'),
    ('{"weight_map": "a"}', 'weight_map'),
  ],
)
def test_a_broken_index_is_named(text, words, tmp_path):
  folder = reference.write(tmp_path, BASE, shards=2)
  (folder / INDEX).write_text(text)
  with pytest.raises(ValueError, match=words) as caught:
    huggingface.load(folder)
  assert INDEX in str(caught.value)
  assert '\n' not in str(caught.value)


def list_in_index(folder, files):
  path = folder / INDEX
  index = json.loads(path.read_text())
  index['weight_map'] |= files
  path.write_text(json.dumps(index))


@pytest.mark.parametrize(
  'place',
  ['', '.', '..', '/', '../model/model-00001-of-00002.safetensors',
   './model-00001-of-00002.safetensors', 'a/b.safetensors', 'a\\b', 'c:b',
   '{}/model-00001-of-00002.safetensors'],
)  # fmt: skip
def test_an_index_names_only_files_of_its_folder(place, tmp_path):
  folder = reference.write(tmp_path / 'model', BASE, shards=2)
  place = place.format(folder)  # Even where there is such a file.
  list_in_index(folder, {'model.norm.weight': place})
  with pytest.raises(ValueError, match='only name files of its own') as caught:
    huggingface.load(folder)
  message = str(caught.value)
  assert message.startswith(f'{folder / INDEX}: weight_map names {place!r};')


def test_a_link_to_a_file_elsewhere_is_followed(tmp_path):
  """So a download cache keeps its files."""
  folder = reference.write(tmp_path / 'model', BASE, shards=2)
  for i, path in enumerate(sorted(folder.glob('*.safetensors'))):
    path.rename(tmp_path / f'{i}')
    path.symlink_to(tmp_path / f'{i}')
  huggingface.load(folder)


def test_a_directory_is_no_safetensors(tmp_path):
  folder = reference.write(tmp_path, BASE, shards=2)
  (folder / 'deeper').mkdir()
  list_in_index(folder, {'extra': 'deeper'})
  with pytest.raises(ValueError, match=f'^{folder / "deeper"} is not a file$'):
    huggingface.load(folder)
  (folder / 'model.safetensors').mkdir()
  with pytest.raises(ValueError, match=r'model\.safetensors is not a file$'):
    huggingface.load(folder)


def test_a_tensor_that_only_the_index_has_is_named(tmp_path):
  folder = reference.write(tmp_path, BASE, shards=2)
  list_in_index(folder, {'extra': 'model-00001-of-00002.safetensors'})
  with pytest.raises(
    ValueError, match=f'^{folder / INDEX} lists extra, which no file holds$'
  ):
    huggingface.load(folder)


def test_a_tensor_in_two_files_is_named(tmp_path):
  folder = reference.write(tmp_path, BASE, shards=2)
  first, second = sorted(folder.glob('*.safetensors'))
  theirs, tensors = map(safetensors.numpy.load_file, (first, second))
  name = min(theirs)
  safetensors.numpy.save_file({**tensors, name: theirs[name]}, second)
  with pytest.raises(
    ValueError, match=f'^{name} stands in both {first} and {second}$'
  ):
    huggingface.load(folder)


def model(**changes):
  config = Qwen2MoeConfig(
    vocab_size=9, d_model=8, n_layers=2, n_heads=2, d_ff=8, n_experts=4,
    d_expert=6, **changes,
  )  # fmt: skip
  return build(config, rngs=nnx.Rngs(params=0))


def contents(folder):
  """All tensors of a folder, by the library's own reader."""
  return {
    name: tensor
    for path in folder.glob('*.safetensors')
    for name, tensor in safetensors.numpy.load_file(path).items()
  }


@pytest.mark.parametrize('d_shared', [0, 4])
def test_shards_are_at_most_so_large(d_shared, tmp_path):
  ours = model(d_shared=d_shared)
  huggingface.save(ours, tmp_path / 'one')
  whole = contents(tmp_path / 'one')
  assert [p.name for p in sorted((tmp_path / 'one').iterdir())] == [
    'config.json', 'model.safetensors',
  ]  # fmt: skip
  huggingface.save(ours, tmp_path / 'many', max_bytes=1000)
  files = sorted((tmp_path / 'many').glob('*.safetensors'))
  assert len(files) > 3
  for i, path in enumerate(files, 1):
    assert path.name == f'model-{i:05}-of-{len(files):05}.safetensors'
    tensors = safetensors.numpy.load_file(path)
    assert sum(t.nbytes for t in tensors.values()) <= 1000
    with safetensors.safe_open(path, framework='numpy') as opened:
      assert opened.metadata() == {'format': 'pt'}
  parts = contents(tmp_path / 'many')
  assert set(parts) == set(whole)
  for name, tensor in whole.items():
    assert np.array_equal(parts[name], tensor), name
  index = json.loads((tmp_path / 'many' / INDEX).read_text())
  assert set(index['weight_map']) == set(whole)
  for name, file in index['weight_map'].items():
    assert name in safetensors.numpy.load_file(tmp_path / 'many' / file)
  total = sum(tensor.nbytes for tensor in whole.values())
  assert index['metadata'] == {'total_size': total}
  huggingface.save(
    huggingface.load(tmp_path / 'many'), tmp_path / 'again', max_bytes=10**6
  )
  first, again = (
    (tmp_path / name / 'model.safetensors').read_bytes()
    for name in ('one', 'again')
  )
  assert first == again


def test_a_tensor_above_the_size_has_its_own_file(tmp_path):
  huggingface.save(model(), tmp_path, max_bytes=1)
  files = sorted(tmp_path.glob('*.safetensors'))
  assert {len(safetensors.numpy.load_file(path)) for path in files} == {1}


def test_nothing_of_an_earlier_model_stays(tmp_path):
  (tmp_path / 'tokenizer.json').write_text('{}')
  (tmp_path / 'adapter.safetensors').write_text('')
  for size in (1000, 2000, 10**6, 3000):
    huggingface.save(model(), tmp_path, max_bytes=size)
    (tmp_path / 'adapter.safetensors').unlink(missing_ok=True)
    names = {path.name for path in tmp_path.iterdir()}
    assert ('model.safetensors' in names) == (size == 10**6)
    assert (INDEX in names) == (size != 10**6)
    shards = {name for name in names if name.startswith('model-')}
    assert all(
      name.endswith(f'{len(shards):05}.safetensors') for name in shards
    )
    assert 'tokenizer.json' in names
    huggingface.load(tmp_path)


@pytest.mark.parametrize('size', [1000, 10**6])
def test_a_failed_save_leaves_what_was_there(size, tmp_path, monkeypatch):
  huggingface.save(model(), tmp_path, max_bytes=size)
  before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
  original, calls = huggingface._fetch, []

  def fetch(*args):
    calls.append(args)
    if len(calls) == 20:
      raise OSError('no space left')
    return original(*args)

  monkeypatch.setattr(huggingface, '_fetch', fetch)
  with pytest.raises(OSError, match='no space left'):
    huggingface.save(model(tie_embeddings=True), tmp_path, max_bytes=size)
  after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
  assert after == before


def test_tensors_are_fetched_one_at_a_time(tmp_path, monkeypatch):
  """Each is in the file before the next is asked for."""
  original, fetched = huggingface._fetch, []
  kept_back = 2 * io.DEFAULT_BUFFER_SIZE  # By a file object.

  def fetch(param, place, at):
    (temporary,) = tmp_path.glob('model.safetensors.*.tmp')
    assert temporary.stat().st_size >= sum(fetched) - kept_back
    fetched.append(4 * int(np.prod(place.layout.stored)))
    return original(param, place, at)

  monkeypatch.setattr(huggingface, '_fetch', fetch)
  huggingface.save(model(d_shared=3000), tmp_path)
  assert kept_back < max(fetched) < sum(fetched) / 4


def test_an_existing_file_is_never_half_read(tmp_path):
  path = tmp_path / 'file'
  path.write_text('old')
  with pytest.raises(KeyError), huggingface_files.replaced(path) as temporary:
    temporary.write_text('new')
    raise KeyError
  assert path.read_text() == 'old'
  assert [p.name for p in tmp_path.iterdir()] == ['file']
