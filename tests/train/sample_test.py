import io
import json
import pathlib
import re
import shutil
import signal
import sys

import jax
import numpy as np
import pytest
import tokenizers
from flax import nnx

from models import families, huggingface, sharding
from models.config import LlamaConfig, Qwen2MoeConfig
from train import __main__ as entry
from train import sample
from train.data.tokenizer import ByteLevelBPE
from train.digest import params_digest
from train.errors import UserError
from train.generate import generate

pytestmark = pytest.mark.usefixtures('kept_programs')

SHAPES = {
  'vocab_size': 270, 'd_model': 16, 'n_heads': 2, 'n_kv_heads': 1, 'd_ff': 32,
}  # fmt: skip
MODELS = {
  'llama': LlamaConfig(**SHAPES, n_layers=1),
  'qwen2_moe': Qwen2MoeConfig(
    **SHAPES, n_layers=2, n_experts=4, experts_per_token=2, d_expert=8,
    d_shared=8, sparse_step=2,
  ),
}  # fmt: skip


@pytest.fixture
def run_dir(trained, tmp_path):
  """A copy, to damage."""
  return shutil.copytree(trained, tmp_path / 'lr[2]')


@pytest.fixture(scope='module')
def trained(tmp_path_factory, tiny, data_cache, kept_programs):
  """A run on all devices, its layers scanned; steps 20 and 24 are kept."""
  run_dir = tmp_path_factory.mktemp('[1]**') / 'lr[1],**?'
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('GRADPOWER_CACHE', str(data_cache))
    assert entry.main([
      'run', 'demo', '--run-dir', str(run_dir), *tiny,
      '--model.n_layers=2', '--model.scan_layers=true',
    ]) == 0  # fmt: skip
  return run_dir


def write_folder(folder, config, **options):
  """A model of random parameters, its vocabulary padded from 257 to 270."""
  mesh = sharding.make_mesh(jax.devices()[:1])
  model = nnx.eval_shape(
    lambda: families.build(config, rngs=nnx.Rngs(params=0), mesh=mesh)
  )
  graph, shapes = nnx.split(model)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda x: rng.normal(size=x.shape, scale=0.3).astype(np.float32),
    nnx.to_pure_dict(shapes),
  )
  params['head'][:, 260] *= 10  # Padding would be drawn often.
  params = jax.tree.map(jax.numpy.asarray, params)
  huggingface.save(nnx.merge(graph, params), folder)
  vocabulary = ByteLevelBPE.train([], 257)
  (folder / 'tokenizer.json').write_bytes(vocabulary.content)
  change(folder / 'config.json', **options)
  return folder


def change(path, **options):
  path.write_text(json.dumps(json.loads(path.read_text()) | options))


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
  directory = tmp_path_factory.mktemp('hugging_face')
  # An end that no tokenizer has: their texts do not end by themselves.
  return {
    name: write_folder(
      directory / name, config, bos_token_id=0, eos_token_id=1000
    )
    for name, config in MODELS.items()
  }


def test_a_run_is_read_as_it_was_trained(trained):
  source = sample.load(trained)
  config = json.loads((trained / 'config.json').read_text())
  assert source.length == config['data']['sequence_length']
  assert source.model.mesh.size == 1
  assert not source.model.config.scan_layers
  params = nnx.to_pure_dict(nnx.state(source.model, nnx.Param))
  lines = (trained / 'metrics.jsonl').read_text().splitlines()
  wanted = json.loads(lines[-1])['params_digest']
  assert params_digest(jax.device_get(params), source.model.config) == wanted
  before = sample.load(trained, 20).model
  assert not np.array_equal(before.embedding[...], params['embedding'])


def test_text_of_a_run(trained, main, capsys):
  how = ['sample', trained, '--prompt', 'Über', '--tokens', '9']
  assert main(*how, '--temperature', '0') == 0
  captured = capsys.readouterr()
  assert captured.err == ''
  source = sample.load(trained)
  prompt = source.tokenizer.encode('Über')
  tokens = list(generate(source.model, prompt, 9, temperature=0))
  if tokens[-1] in source.tokenizer.ends:
    tokens.pop()
  whole = source.tokenizer.decode([*prompt, *tokens])
  assert captured.out == whole + '\n'
  assert whole.startswith('Über')

  texts = []
  for seed in (1, 1, 2):
    assert main(*how, '--seed', seed, '--temperature', '1') == 0
    texts.append(capsys.readouterr().out)
  assert texts[0] == texts[1] != texts[2]
  assert all(text.endswith('\n') for text in texts)


def test_a_run_as_a_hugging_face_folder(
  trained, main, capsys, tmp_path, monkeypatch
):
  """By the code of docs/models.md; the folder continues a text as the run."""
  page = pathlib.Path(__file__).parents[2] / 'docs' / 'models.md'
  blocks = re.findall(r'```python\n(.*?)```', page.read_text(), re.DOTALL)
  [code] = [block for block in blocks if 'sample.load(run)' in block]
  (tmp_path / 'runs' / 'demo').mkdir(parents=True)
  (tmp_path / 'runs' / 'demo' / 'adamw_power').symlink_to(trained)
  monkeypatch.chdir(tmp_path)
  exec(code, {})
  source = sample.load(trained)
  written = json.loads((tmp_path / 'exported' / 'config.json').read_text())
  assert {written['eos_token_id']} == source.tokenizer.ends
  assert written['max_position_embeddings'] == source.length
  texts = []
  for folder in (trained, 'exported'):
    assert main('sample', folder, '--tokens', '15', '--temperature', '0') == 0
    texts.append(capsys.readouterr().out)
  assert texts[0] == texts[1]
  exported = sample.load(pathlib.Path('exported'))
  assert exported.tokenizer.ends == source.tokenizer.ends
  assert exported.length == source.length


@pytest.mark.slow
def test_a_model_without_a_shared_expert(tiny, main, capsys, tmp_path):
  """Its matrices have no elements, which a checkpoint has to hold too."""
  how = [
    'run', 'demo_moe', *tiny, '--model.d_shared=0', '--model.n_experts=2',
    '--model.experts_per_token=1', '--model.d_expert=8', '--steps=5',
    '--save_every=2', '--run-dir', tmp_path / 'run',
  ]  # fmt: skip
  assert main(*how, '--stop-at', '3') == 0
  assert main(*how) == 0
  captured = capsys.readouterr()
  assert 'continues from step 3' in captured.err
  assert captured.out.splitlines()[-1].startswith('done: 5 steps')
  assert main('sample', tmp_path / 'run', '--tokens', '5') == 0
  captured = capsys.readouterr()
  assert captured.out.endswith('\n')
  assert captured.err == ''


def test_a_text_longer_than_the_training_warns_in_one_line(
  trained, main, capsys
):
  assert main('sample', trained, '--tokens', '40', '--top-p', '0.5') == 0
  captured = capsys.readouterr()
  assert captured.err.count('\n') == 1
  assert captured.err.startswith(
    'warning: prompt and --tokens come to 41 tokens, the model was trained on '
    '16 at once'
  )
  assert captured.out.endswith('\n')


@pytest.mark.parametrize('family', MODELS)
def test_text_of_a_hugging_face_folder(folders, main, capsys, family):
  folder = folders[family]
  assert main('sample', folder, '--prompt', 'ab', '--tokens', '8',
              '--temperature', '0') == 0  # fmt: skip
  captured = capsys.readouterr()
  assert captured.err == ''
  model = huggingface.load(folder)
  vocabulary = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
  tokens = vocabulary.encode('ab').ids
  forward = jax.jit(lambda tokens_BT: model(tokens_BT)[0])
  for at in range(len(tokens), len(tokens) + 8):
    padded = np.zeros((1, 12), np.int32)
    padded[0, :at] = tokens
    logits_V = np.asarray(forward(padded))[at - 1]
    # Of what the vocabulary has.
    tokens.append(int(logits_V[:257].argmax()))
  assert captured.out == vocabulary.decode(tokens) + '\n'


def test_a_text_ends_at_end_of_text(folders, tmp_path, main, capsys):
  folder = shutil.copytree(folders['llama'], tmp_path / 'folder')
  how = ['sample', folder, '--prompt', 'ab', '--tokens', '8',
         '--temperature', '0']  # fmt: skip
  source = sample.load(folder)
  prompt = source.tokenizer.encode('ab')
  known_V = source.tokenizer.known(270)
  tokens = list(
    generate(source.model, prompt, 8, temperature=0, allowed_V=known_V)
  )
  at = next(i for i, token in enumerate(tokens) if token != tokens[0])
  (folder / 'generation_config.json').write_text(
    json.dumps({'eos_token_id': [tokens[at], 5]})
  )
  change(folder / 'config.json', max_position_embeddings=9)
  assert main(*how) == 0
  captured = capsys.readouterr()
  text = source.tokenizer.decode([*prompt, *tokens[:at]])
  assert captured.out == text + '\n'
  assert 'trained on 9 at once' in captured.err


def test_every_token_is_printed_as_it_is_drawn(folders, monkeypatch, capsys):
  """And a character that takes several when it is whole."""
  [*tokens] = ByteLevelBPE.train([], 257).encode_batch(['é!\U0001f680'])[0]
  events = []

  def draw(*args, **kwargs):
    for token in tokens:
      events.append('token')
      yield token

  class Terminal(io.StringIO):
    def write(self, text):
      if text:
        events.append(text)

    def flush(self):
      if events[-1] != 'token':
        events.append('flush')

  monkeypatch.setattr(sample, 'generate', draw)
  monkeypatch.setattr(sys, 'stdout', Terminal())
  options = sample.Options(prompt='ä')
  assert sample.run(folders['llama'], options) == 'done'
  shown = [event for event in events if event != 'flush']
  assert shown == [
    'ä', 'token', 'token', 'é', 'token', '!',
    'token', 'token', 'token', 'token', '\U0001f680', '\n',
  ]  # fmt: skip
  for text in ('ä', 'é', '!', '\U0001f680', '\n'):
    assert events[events.index(text) + 1] == 'flush'


@pytest.mark.parametrize(
  ('options', 'words'),
  [
    (['--tokens', '0'], '--tokens: 0 is not at least 1'),
    (['--tokens', '1000001'], '--tokens must be in [1, 1000000]'),
    (['--tokens', 'x'], '--tokens'),
    (['--temperature', '-1'], '--temperature must be 0 or more and finite'),
    (['--temperature', 'nan'], '--temperature must be 0 or more and finite'),
    (['--temperature', 'inf'], '--temperature must be 0 or more and finite'),
    (['--temperature', 'warm'], '--temperature'),
    (['--top-p', '0'], '--top-p must be in (0, 1], not 0.0'),
    (['--top-p', '1.1'], '--top-p must be in (0, 1], not 1.1'),
    (['--top-p', 'nan'], '--top-p must be in (0, 1]'),
    (['--seed', '-1'], '--seed must be in [0, 2**32)'),
    (['--seed', str(2**32)], '--seed must be in [0, 2**32)'),
    (['--seed', '1.5'], '--seed'),
    (['--step', '0'], '--step: 0 is not at least 1'),
    (['--prompt'], '--prompt: expected one argument'),
    (['--steps', '3'], 'unrecognized arguments: --steps'),
    (['--step', '7'], 'there is no step 7 in'),
    (['--prompt', 'a\udcff'], '--prompt is not UTF-8 text'),
  ],
)
def test_a_mistake_in_an_option(
  trained, main, capsys, one_error, options, words
):
  assert main('sample', trained, *options) == 2
  captured = capsys.readouterr()
  assert words in one_error(captured.err)
  assert captured.out == ''


def rewrite(path, text):
  path.write_text(text)


def replace(path):
  """Leaves a directory in the place of a file."""
  path.unlink()
  path.mkdir()


def index(folder, text):
  """Leaves an index in the place of the one file, and two copies of that."""
  whole = (folder / 'model.safetensors').rename(folder / 'whole')
  shutil.copy(whole, folder / 'copy')
  (folder / 'model.safetensors.index.json').write_text(text)


@pytest.mark.parametrize(
  ('damage', 'words'),
  [
    (shutil.rmtree, 'no directory'),
    (lambda run: (run / 'config.json').unlink(), 'is neither a run directory'),
    (lambda run: rewrite(run / 'config.json', '{}'), 'is neither a run'),
    (lambda run: rewrite(run / 'config.json', '{"mo'), 'is not JSON'),
    (lambda run: rewrite(run / 'config.json', '[]'), 'is not a JSON object'),
    (lambda run: change(run / 'config.json', model={'d_model': 16}),
     'config.json was written by another version of this program, or is '
     'damaged (it does not say model.family): sample it with that version, or '
     'train it again, in another --run-dir'),
    (lambda run: change(run / 'config.json', model={'family': 'gpt2'}),
     'by another version of this program, or is damaged (not the '
     "configuration of a run: KeyError('gpt2'))"),
    (lambda run: change(run / 'config.json', model=[]), 'by another version'),
    (lambda run: change(run / 'config.json', steps=0), 'by another version'),
    (lambda run: (run / 'tokenizer.json').unlink(),
     'an older version made it; the command that trained it, given again'),
    (lambda run: rewrite(run / 'tokenizer.json', '{}'),
     'cannot be used as a tokenizer'),
    (lambda run: shutil.rmtree(run / 'checkpoints'),
     'there is no checkpoint yet'),
    (lambda run: [p.unlink() for p in run.glob('checkpoints/*/_METADATA')],
     'can be used (step 24: _METADATA is missing'),
  ],
)  # fmt: skip
def test_a_broken_run(run_dir, main, capsys, one_error, damage, words):
  damage(run_dir)
  assert main('sample', run_dir) == 2
  captured = capsys.readouterr()
  assert words in one_error(captured.err)
  assert captured.out == ''


def test_a_damaged_checkpoint_is_passed_over(run_dir, main, capsys):
  steps = sorted(int(p.name) for p in (run_dir / 'checkpoints').iterdir())
  (run_dir / 'checkpoints' / str(steps[-1]) / '_METADATA').write_text('{}')
  assert main('sample', run_dir, '--tokens', 3) == 0
  captured = capsys.readouterr()
  assert f'step {steps[-1]}' in captured.err
  assert captured.out


def test_a_directory_of_runs_names_them(trained, main, capsys, one_error):
  assert main('sample', trained.parent) == 2
  message = one_error(capsys.readouterr().err)
  assert message.endswith(f'did you mean {trained}?')


@pytest.mark.parametrize(
  ('damage', 'words'),
  [
    (lambda f: (f / 'tokenizer.json').unlink(), 'holds no tokenizer.json'),
    (lambda f: replace(f / 'config.json'), 'config.json: Is a directory'),
    (lambda f: replace(f / 'tokenizer.json'), 'tokenizer.json: Is a directory'),
    (lambda f: replace(f / 'model.safetensors'), 'safetensors is not a file'),
    (lambda f: index(f, '{}'), 'weight_map must give a file'),
    (lambda f: index(f, '{"weight_map": {"a": "../b"}}'),
     "index.json: weight_map names '../b'"),
    (lambda f: index(f, '{"weight_map": {"a": "whole"}}'),
     'index.json lists a, which no file holds'),
    (lambda f: index(f, '{"weight_map": {"a": "whole", "b": "copy"}}'),
     'lm_head.weight stands in both'),
    (lambda f: change(f / 'config.json', vocab_size=0),
     'config.json: vocab_size must be at least 1, not 0'),
    (lambda f: change(f / 'config.json', vocab_size=-1),
     'config.json: vocab_size must be at least 1, not -1'),
    (lambda f: (f / 'model.safetensors').unlink(), 'model.safetensors'),
    (lambda f: rewrite(f / 'model.safetensors', 'x'), 'model.safetensors'),
    (lambda f: change(f / 'config.json', model_type='gpt2'), "'gpt2' is not"),
    (lambda f: change(f / 'config.json', hidden_size=[]), 'hidden_size'),
    (lambda f: change(f / 'config.json', eos_token_id='</s>'), 'eos_token_id'),
    (lambda f: change(f / 'config.json', vocab_size=271), 'has shape'),
    (lambda f: rewrite(f / 'generation_config.json', '{'), 'is not JSON'),
  ],
)  # fmt: skip
def test_a_broken_folder(
  folders, tmp_path, main, capsys, one_error, damage, words
):
  folder = shutil.copytree(folders['llama'], tmp_path / 'folder')
  damage(folder)
  assert main('sample', folder) == 2
  captured = capsys.readouterr()
  assert words in one_error(captured.err)
  assert captured.out == ''


def test_a_folder_has_no_steps(folders, main, capsys, one_error):
  assert main('sample', folders['llama'], '--step', '3') == 2
  assert 'it has no --step' in one_error(capsys.readouterr().err)


def test_a_vocabulary_of_another_model(folders, tmp_path, main, capsys,
                                       one_error):  # fmt: skip
  folder = shutil.copytree(folders['llama'], tmp_path / 'folder')
  larger = ByteLevelBPE.train(['Donaudampfschifffahrt'] * 9, 300)
  (folder / 'tokenizer.json').write_bytes(larger.content)
  assert main('sample', folder, '--prompt', 'Donaudampfschifffahrt') == 2
  assert 'the tokenizer is of another model' in one_error(
    capsys.readouterr().err
  )


def test_a_diverged_run_ends_its_line_and_says_so(
  folders, main, capsys, monkeypatch
):
  def diverge(*args, **kwargs):
    yield 40
    raise UserError('diverged')

  monkeypatch.setattr(sample, 'generate', diverge)
  assert main('sample', folders['llama'], '--prompt', 'ab') == 2
  captured = capsys.readouterr()
  assert captured.out.startswith('ab') and captured.out.endswith('\n')
  assert captured.err == 'python -m train: error: diverged\n'


ENDLESS = ['--tokens', '1000', '--temperature', '1.5', '--top-p', '1']


def test_a_reader_that_has_enough_ends_it_quietly(folders, start):
  with start(
    'sample', folders['llama'], '--prompt', 'Once', *ENDLESS
  ) as process:
    assert process.stdout.read(6).startswith('Once')
    process.stdout.close()  # As `head` does.
    assert process.stderr.read() == ''
    assert process.wait(timeout=60) == 0


def test_an_interruption_ends_the_line(folders, start, finish):
  slow = (
    'import time\n'
    'from train import sample\n'
    'write = sample._write\n'
    'sample._write = lambda text: (time.sleep(0.01), write(text))\n'
  )
  process = start(
    'sample', folders['llama'], '--prompt', 'Once', *ENDLESS, prelude=slow
  )
  assert process.stdout.read(4) == 'Once'
  process.send_signal(signal.SIGINT)
  status, out, err = finish(process)
  assert status == 130
  assert out.endswith('\n')
  assert err == ''


@pytest.mark.skipif(not pathlib.Path('/dev/full').exists(), reason='no device')
def test_a_full_disk_is_said(folders, main, capsys, one_error, monkeypatch):
  monkeypatch.setattr(sample, 'generate', lambda *_, **__: iter([40]))
  with open('/dev/full', 'w') as full:
    monkeypatch.setattr(sys, 'stdout', full)
    assert main('sample', folders['llama'], '--prompt', 'ab') == 2
    full.flush()  # It leads elsewhere now.
  assert 'cannot write the text: No space left' in one_error(
    capsys.readouterr().err
  )
