import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.curve import Curve


def _curve(values, most=1024):
  curve = Curve(most)
  for value in values:
    curve.add(value)
  return curve


@given(
  st.lists(st.floats(-1e6, 1e6), max_size=300),
  st.sampled_from([2, 4, 16, 1024]),
)
def test_points_are_means_of_equal_parts(values, most):
  points = _curve(values, most).points
  assert len(points) <= most
  if not points:
    assert not values
    return
  each = 1
  while len(values) // each > most:
    each *= 2
  assert len(points) == len(values) // each
  for i, point in enumerate(points):
    part = values[i * each : (i + 1) * each]
    assert point == pytest.approx(sum(part) / each, abs=1e-6)


def test_what_is_not_finite_is_left_out():
  assert _curve([1.0, math.nan, 2.0, math.inf, -math.inf]).points == [1.0, 2.0]


@pytest.mark.parametrize('values', [
  [], [1.0], range(8), [2.0] * 100,
])  # fmt: skip
def test_nothing_to_see(values):
  assert _curve(map(float, values)).draw(40, 4, 'loss') == []


def _dots(rows):
  """Positions of dots, x from the left and y from the top."""
  positions = set()
  for y, row in enumerate(rows):
    for x, character in enumerate(row):
      bits = ord(character) - 0x2800 if character != ' ' else 0
      for bit, (dx, dy) in enumerate(
        [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (0, 3), (1, 3)]
      ):
        if bits >> bit & 1:
          positions.add((2 * x + dx, 4 * y + dy))
  return positions


def test_it_falls_from_top_left_to_bottom_right():
  drawn = _curve([10 - i / 10 for i in range(100)]).draw(30, 3, 'loss')
  axis, rows = zip(*drawn, strict=True)
  assert axis == ('    10 ', '  loss ', '   0.1 ')
  dots = _dots(rows)
  columns = 2 * (30 - len(axis[0]))
  assert (0, 0) in dots and (columns - 1, 11) in dots
  assert {x for x, _ in dots} == set(range(columns))


@given(
  st.lists(st.floats(-1e9, 1e9), min_size=9, max_size=200),
  st.integers(1, 100),
  st.integers(2, 8),
)
def test_each_column_is_joined_to_the_one_before(values, width, height):
  drawn = _curve(values).draw(width, height, 'loss')
  if not drawn:
    return
  assert len(drawn) == height
  dots = _dots([row for _, row in drawn])
  columns = {}
  for x, y in dots:
    columns.setdefault(x, []).append(y)
  assert min(columns) == 0
  last = max(columns)
  assert sorted(columns) == list(range(last + 1))
  for ys in columns.values():
    assert sorted(ys) == list(range(min(ys), max(ys) + 1))
  for x in range(1, last + 1):
    before, here = columns[x - 1], columns[x]
    # Next to each other, in height too.
    gap = max(min(here) - max(before), min(before) - max(here))
    assert gap <= 1


def test_one_peak_reaches_the_top():
  values = [0.0] * 50 + [1.0] + [0.0] * 49
  axis, rows = zip(*_curve(values).draw(112, 2, 'loss'), strict=True)
  assert axis[0].strip() == '1' and axis[1].strip() == '0'
  ys = {y for _, y in _dots(rows)}
  assert ys == set(range(8))
