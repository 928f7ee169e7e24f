"""The paper's two corpora, as people hold them, by its recipes at tiny size."""

import gzip
import json
import lzma
import math
import os
import pathlib

import pyarrow
import pytest
from pyarrow import parquet

from train.__main__ import main

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(
    'GRADPOWER_DATA' not in os.environ,
    reason='GRADPOWER_DATA names no directory with prose and vocabularies',
  ),
]

TINY = [
  '--model.d_model=64', '--model.n_heads=1', '--model.n_layers=1',
  '--model.d_ff=64', '--model.dtype=float32', '--data.batch_size=2',
  '--optimizer.warmup_steps=2', '--optimizer.learning_rate=0.01', '--steps=8',
  '--eval_every=4', '--save_every=4', '--data.validation_tokens=4096',
]  # fmt: skip


def shared(name):
  return pathlib.Path(os.environ['GRADPOWER_DATA']) / name


@pytest.fixture(scope='module')
def texts():
  with lzma.open(shared('prose.jsonl.xz'), 'rt', encoding='utf-8') as file:
    return [json.loads(next(file))['text'] for _ in range(600)]


@pytest.fixture(scope='module')
def c4(tmp_path_factory, texts):
  """As allenai/c4 lies on a disk: en/c4-train.00000-of-00003.json.gz, ..."""
  folder = tmp_path_factory.mktemp('c4') / 'en'
  folder.mkdir()
  for i in range(3):
    path = folder / f'c4-train.{i:05}-of-00003.json.gz'
    with gzip.open(path, 'wt', encoding='utf-8') as file:
      for number, text in enumerate(texts[i::3]):
        line = {
          # Web pages are shorter than chapters, and some fit a row.
          'text': text[: 300 + 97 * (number % 40)],
          'timestamp': '2019-04-25T12:57:54Z',
          'url': f'https://example.com/{i}/{number}',
        }
        file.write(json.dumps(line, ensure_ascii=False) + '\n')
  return folder / 'c4-train.*.json.gz'


@pytest.fixture(scope='module')
def openwebtext(tmp_path_factory, texts):
  """As the hub's copies of OpenWebText lie: train-00000-of-00002.parquet."""
  folder = tmp_path_factory.mktemp('openwebtext')
  for i in range(2):
    parquet.write_table(
      pyarrow.table({'text': texts[i::2]}),
      folder / f'train-{i:05}-of-00002.parquet',
      row_group_size=100,
    )
  return folder / '*.parquet'


def prepared(files, tokenizer, layout, length, out, capsys):
  status = main(
    ['prepare', f'--files={files}', f'--tokenizer={shared(tokenizer)}',
     f'--layout={layout}', f'--seq={length}', f'--out={out}',
     '--validation-fraction=0.1', '--workers=2']
  )  # fmt: skip
  assert status == 0, capsys.readouterr().err
  return json.loads((out / 'stats.json').read_text())


@pytest.fixture
def trained(start, finish):
  """Trains as a user does, on one device: eight would want eight rows."""

  def train(out, run_dir, *options):
    command = [
      'run', 'llama_0.2b', f'--run-dir={run_dir}', f'--data.prepared={out}',
      *TINY, *options,
    ]  # fmt: skip
    # Stopped and gone on with, as long runs are.
    for more in ['--stop-at=5'], []:
      status, _, err = finish(start(*command, *more), timeout=600)
      assert status == 0, err
    return found(run_dir)

  return train


def found(run_dir):
  lines = [
    json.loads(line)
    for line in (run_dir / 'metrics.jsonl').read_text().splitlines()
  ]
  losses = {
    split: [line['loss'] for line in lines if line.get('split') == split]
    for split in ('train', 'validation')
  }
  return json.loads((run_dir / 'config.json').read_text()), losses


def test_c4_by_the_papers_recipe(c4, trained, tmp_path, capsys):
  stats = prepared(
    c4, 't5.spiece.model', 'truncate', 256, tmp_path / 'c4', capsys
  )
  assert stats['documents']['train'] + stats['documents']['validation'] == 600
  assert stats['windows'] == stats['documents']  # One document a row.
  assert stats['vocab_size'] == stats['padded_vocab_size'] == 32100
  config, losses = trained(tmp_path / 'c4', tmp_path / 'run')
  assert config['model']['vocab_size'] == 32100
  assert config['data']['layout'] == 'truncate'
  assert config['data']['sequence_length'] == 256
  assert len(losses['train']) == 8
  assert losses['train'][0] == pytest.approx(math.log(32100), abs=0.2)
  assert losses['validation'][-1] < losses['train'][0] - 1
  capsys.readouterr()
  assert (
    main(['sample', str(tmp_path / 'run'), '--prompt=The', '--tokens=5']) == 0
  )
  assert capsys.readouterr().out.startswith('The')


def test_openwebtext_by_the_papers_recipe(
  openwebtext, trained, tmp_path, capsys
):
  stats = prepared(
    openwebtext, 'gpt2.tiktoken', 'random', 1024, tmp_path / 'owt', capsys
  )
  assert (stats['vocab_size'], stats['padded_vocab_size']) == (50257, 50304)
  config, losses = trained(
    tmp_path / 'owt', tmp_path / 'run', '--data.corpus=openwebtext'
  )
  assert config['model']['vocab_size'] == 50304
  assert config['data']['layout'] == 'random'
  assert config['data']['sequence_length'] == 1024
  assert losses['train'][0] == pytest.approx(math.log(50304), abs=0.2)
  assert losses['validation'][-1] < losses['train'][0] - 1
  capsys.readouterr()
  assert (
    main(['sample', str(tmp_path / 'run'), '--prompt=The', '--tokens=5']) == 0
  )
  assert capsys.readouterr().out.startswith('The')
