"""Runs the examples of three pages: every number on them is checked."""

import doctest
import pathlib
import re

import pytest

_DOCS = pathlib.Path(__file__).parents[2] / 'docs'
_ORDER = _DOCS / 'order.md'
# And so many examples.
_PAGES = {_ORDER: 20, _DOCS / 'choosing-p.md': 6, _DOCS / 'noise.md': 6}


def _example(page=_ORDER):
  text = page.read_text()
  # Blank what is not code, so that a failure names the line of the page.
  kept = []
  inside = False
  for line in text.splitlines():
    fence = line.startswith('```')
    kept.append(line if inside and not fence else '')
    if fence:
      inside = not inside and line == '```python'
  return doctest.DocTestParser().get_doctest(
    '\n'.join(kept) + '\n', {}, page.name, str(page), 0
  )


@pytest.mark.parametrize('page', _PAGES, ids=lambda page: page.stem)
def test_page_says_what_its_code_prints(page):
  report = []
  example = _example(page)
  runner = doctest.DocTestRunner(verbose=False)
  runner.run(example, out=report.append)
  assert runner.failures == 0, ''.join(report)
  assert runner.tries == len(example.examples) > _PAGES[page]


def test_a_wrong_number_would_be_seen():
  example = _example()
  where = next(i for i, e in enumerate(example.examples) if '1.23' in e.want)
  example.examples = example.examples[: where + 1]
  wrong = example.examples[where]
  wrong.want = wrong.want.replace('1.23', '1.24')
  runner = doctest.DocTestRunner(verbose=False)
  runner.run(example, out=lambda _: None)
  assert runner.failures == 1


def test_marks_are_the_four_that_the_page_explains():
  text = re.sub(r'```.*?```', '', _ORDER.read_text(), flags=re.DOTALL)
  marks = set(re.findall(r'\[[a-z- ]+\]', text))
  assert marks == {'[paper]', '[code]', '[second-hand]', '[here]'}
