"""Runs the pages of docs/guides, each from top to bottom as one program."""

import pathlib
import sys
import types

import pytest

import gradpower_optax
from gradpower_optax import sign_power

GUIDES = pathlib.Path(__file__).parents[2] / 'docs' / 'guides'
# What a page imports beside jax and optax. Of the pages left out here,
# pytorch_test runs pytorch.md and maxtext_test reads maxtext.md.
NEEDS = {
  'optax': None,
  'nnx': 'flax',
  'linen': 'flax',
  'equinox': 'equinox',
  'haiku': 'haiku',
}
ELSEWHERE = {'maxtext', 'pytorch'}


def run(path: pathlib.Path, monkeypatch) -> None:
  # Blank what is not code, so that a failure names the line of the page.
  kept, inside = [], False
  for line in path.read_text().splitlines():
    fence = line.startswith('```')
    kept.append(line if inside and not fence else '')
    if fence:
      inside = not inside and line == '```python'
  # Classes of the page look for their module by name.
  module = types.ModuleType(f'guide_{path.stem}')
  monkeypatch.setitem(sys.modules, module.__name__, module)
  exec(compile('\n'.join(kept), str(path), 'exec'), vars(module))


def page(name: str) -> pathlib.Path:
  if NEEDS[name]:
    pytest.importorskip(NEEDS[name], reason=f'{name} is not installed')
  return GUIDES / f'{name}.md'


def test_every_guide_is_run():
  assert {p.stem for p in GUIDES.glob('*.md')} == NEEDS.keys() | ELSEWHERE


@pytest.mark.slow
@pytest.mark.parametrize('name', NEEDS)
def test_a_guide_holds(name, monkeypatch):
  run(page(name), monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize('name', NEEDS)
def test_a_guide_would_notice_another_power(name, monkeypatch):
  path = page(name)
  other = lambda p, **options: sign_power(1.3 if p == 1.2 else p, **options)
  monkeypatch.setattr(gradpower_optax, 'sign_power', other)
  with pytest.raises(AssertionError):
    run(path, monkeypatch)
