import pytest

from train.config import Config
from train.experiments import sweep_page
from train.experiments.comparison import ArmResult
from train.experiments.sweep_page import Point, Sweep


def sweep(*points):
  """Of values by field, and a loss on one seed; None where it is not run."""
  return Sweep('title', [
    Point(
      ArmResult(str(i), {}, {
        0: loss and {'status': 'done', 'validation_loss': loss}
      }),
      values, Config(),
    )
    for i, (values, loss) in enumerate(points)
  ])  # fmt: skip


@pytest.mark.parametrize(
  'losses, told',
  [
    ([3.0, 3.1, 3.2], 'The best lr of those tried, 0.01, is the lowest of '
     'them: a better one may lie below.'),
    ([3.2, 3.1, 3.0], 'The best lr of those tried, 0.03, is the highest of '
     'them: a better one may lie above.'),
    ([3.2, 3.0, 3.1], None),
    ([3.2, None, 3.1], None),  # There is no best one yet.
  ],
  ids=['low', 'high', 'inside', 'open'],
)  # fmt: skip
def test_a_best_at_the_edge_is_told(tmp_path, losses, told):
  rates = (0.01, 0.02, 0.03)
  found = sweep(*zip([{'lr': rate} for rate in rates], losses, strict=True))
  assert sweep_page.edges(found) == ([told] if told else [])
  sweep_page.write(tmp_path / 'page.html', found)
  for text in (sweep_page.text(found), (tmp_path / 'page.html').read_text()):
    assert ('a better one may lie' in text) == bool(told)


def test_two_values_are_a_comparison_but_of_rates():
  points = [({'lr': lr, 'p': p, 'optimizer': 'adamw'}, 3 - lr - p / 10)
            for lr in (0.01, 0.02) for p in (1.0, 1.2)]  # fmt: skip
  (told,) = sweep_page.edges(sweep(*points))
  assert 'best lr of those tried, 0.02' in told


def test_nothing_is_no_table():
  found = sweep(({'lr': 0.1}, None), ({'lr': 0.2}, None))
  assert sweep_page.text(found) == '  no cell is finished yet'
