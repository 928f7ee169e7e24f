"""Runs the examples of docs/order.md: every number on the page is checked."""

import doctest
import pathlib
import re

import pytest

_PAGE = pathlib.Path(__file__).parents[2] / 'docs' / 'order.md'


def _example():
  text = _PAGE.read_text()
  # Blank what is not code, so that a failure names the line of the page.
  kept = []
  inside = False
  for line in text.splitlines():
    fence = line.startswith('```')
    kept.append(line if inside and not fence else '')
    if fence:
      inside = not inside and line == '```python'
  return doctest.DocTestParser().get_doctest(
    '\n'.join(kept) + '\n', {}, _PAGE.name, str(_PAGE), 0
  )


def test_page_says_what_its_code_prints():
  report = []
  example = _example()
  runner = doctest.DocTestRunner(verbose=False)
  runner.run(example, out=report.append)
  assert runner.failures == 0, ''.join(report)
  assert runner.tries == len(example.examples) > 30


def test_a_wrong_number_would_be_seen():
  example = _example()
  printed = next(e for e in example.examples if 'norm 1.23' in e.want)
  printed.want = printed.want.replace('1.23', '1.24')
  runner = doctest.DocTestRunner(verbose=False)
  runner.run(example, out=lambda _: None)
  assert runner.failures == 1


@pytest.mark.parametrize('mark', re.findall(r'\[[a-z-]+\]', _PAGE.read_text()))
def test_marks_are_the_four_that_the_page_explains(mark):
  assert mark in ('[paper]', '[code]', '[second-hand]', '[here]')
