"""A curve of dots, four rows and two columns of them to a character."""

import math

_MOST_POINTS = 1024
_EMPTY = 0x2800
# Of a braille character, by column and row.
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))


class Curve:
  """A sequence of any length as at most so many means of equal parts."""

  def __init__(self, most: int = _MOST_POINTS):
    self.points: list[float] = []
    self._most = most  # Even.
    self._each = 1  # Values in a point.
    self._sum, self._count = 0.0, 0

  def add(self, value: float) -> None:
    """Takes the next value, unless it is not finite."""
    if not math.isfinite(value):
      return
    self._sum += value
    self._count += 1
    if self._count < self._each:
      return
    if len(self.points) == self._most:
      pairs = zip(self.points[::2], self.points[1::2], strict=True)
      self.points = [(a + b) / 2 for a, b in pairs]
      self._each *= 2
      return  # This point is half full.
    self.points.append(self._sum / self._count)
    self._sum, self._count = 0.0, 0

  def draw(self, width: int, height: int, label: str) -> list[tuple[str, str]]:
    """Draws the points.

    Args:
      width: Characters of a row, those of the axis among them.
      height: Rows, at least 2.
      label: Of the axis.

    Returns:
      By row the axis, and the curve; nothing where points are few or all the
      same.
    """
    points = tuple(self.points)
    lowest, highest = min(points, default=0.0), max(points, default=0.0)
    if not (len(points) > 8 and 0 < highest - lowest < math.inf):
      return []
    axis = [f'{highest:.3g}', *[''] * (height - 2), f'{lowest:.3g}']
    if height > 2:
      axis[1] = label
    margin = max(map(len, axis)) + 2
    columns = max(2, 2 * (width - margin - 1))
    scale = (4 * height - 1) / (highest - lowest)
    heights = [
      round((highest - points[i * len(points) // columns]) * scale)
      for i in range(columns)
    ]
    return [
      (text.rjust(margin) + ' ', row)
      for text, row in zip(axis, _rows(heights, height), strict=True)
    ]


def _rows(heights: list[int], count: int) -> list[str]:
  """Dots at heights, counted from the top, each joined to the one before."""
  cells = [[0] * (len(heights) // 2) for _ in range(count)]
  before = heights[0]
  for x, y in enumerate(heights):
    low, high = sorted((before, y))
    # The one before has its own dot.
    for at in range(low + (low == before < y), high + 1 - (high == before > y)):
      cells[at // 4][x // 2] |= _DOTS[x % 2][at % 4]
    before = y
  # Some fonts show the dots that an empty character does not have.
  return [
    ''.join(chr(_EMPTY + dots) if dots else ' ' for dots in row).rstrip()
    for row in cells
  ]
