"""Runs the examples of docs/order.md: every number on the page is checked."""

import doctest
import pathlib
import re

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
  assert runner.tries == len(example.examples) > 20


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
  text = re.sub(r'```.*?```', '', _PAGE.read_text(), flags=re.DOTALL)
  marks = set(re.findall(r'\[[a-z- ]+\]', text))
  assert marks == {'[paper]', '[code]', '[second-hand]', '[here]'}
