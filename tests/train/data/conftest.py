import hashlib
import json
import zipfile

import pytest

from train.data import pip_fetch, wikipedia

ARTICLES = {
  f'Article {i}': {
    'title': f'Article {i}',
    'extract': f'Article {i} is about the number {i * i}. Größe, 数 {i}.',
    'description': 'a number',
    'topic': 'Mathematics',
  }
  for i in range(60)
}


@pytest.fixture
def articles():
  """What the small wheel holds."""
  return ARTICLES


@pytest.fixture
def make_wheel():
  """Writes a small wheel that pip accepts; returns its pin."""

  def make(directory, articles=ARTICLES):
    directory.mkdir(parents=True, exist_ok=True)
    project, version = wikipedia.WHEEL.project, wikipedia.WHEEL.version
    info = f'{project.replace("-", "_")}-{version}.dist-info'
    path = directory / wikipedia.WHEEL.filename
    with zipfile.ZipFile(path, 'w') as archive:
      archive.writestr(wikipedia.MEMBER, json.dumps(articles))
      archive.writestr(
        f'{info}/METADATA',
        f'Metadata-Version: 2.1\nName: {project}\nVersion: {version}\n'
        'Requires-Dist: a-project-that-is-not-there\n',
      )
      archive.writestr(
        f'{info}/WHEEL',
        'Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\n'
        'Tag: py3-none-any\n',
      )
      archive.writestr(f'{info}/RECORD', '')
    return pip_fetch.Wheel(
      project=project,
      version=version,
      filename=path.name,
      sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
    )

  return make


@pytest.fixture
def no_pip(monkeypatch):
  """Nothing on this machine answers as pip."""
  monkeypatch.setattr(pip_fetch, '_candidates', lambda: iter(()))


@pytest.fixture
def write_corpus():
  """Writes documents as one .jsonl file; returns the glob for it."""

  def write(directory, texts, field='text'):
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / 'corpus.jsonl'
    path.write_text(
      ''.join(json.dumps({field: text}) + '\n' for text in texts), 'utf-8'
    )
    return str(path)

  return write
