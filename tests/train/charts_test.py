import math

from hypothesis import given
from hypothesis import strategies as st

from train import charts, series

finite = st.floats(-1e12, 1e12)


@given(low=finite, span=st.floats(1e-9, 1e12), log=st.booleans())
def test_ticks_are_few_and_inside(low, span, log):
  low = abs(low) + 1e-6 if log else low
  high = low + max(span, abs(low) * 1e-6)
  axis = charts.Axis('', low, high, log=log)
  ticks = axis.ticks()
  assert 1 <= len(ticks) <= 8
  places = [axis.place(value) for value, _ in ticks]
  assert places == sorted(places)
  assert all(-1e-6 <= place <= 1 + 1e-6 for place in places)


def test_tick_labels():
  label = lambda *args, **kw: [
    text for _, text in charts.Axis(*args, **kw).ticks()
  ]
  assert label('', 0, 500) == ['0', '100', '200', '300', '400', '500']
  assert label('', 0, 30000)[-1] == '30k'
  assert label('', 0, 6.2e9) == ['0', '2B', '4B', '6B']
  assert label('', 0, 2.4e6)[:3] == ['0', '0.5M', '1.0M']
  assert label('', 3.95, 5.8) == ['4.0', '4.5', '5.0', '5.5']
  assert label('', -0.02, 0.02, plus=True)[0] == '\N{MINUS SIGN}0.02'
  assert label('', -0.02, 0.02, plus=True)[-1] == '+0.02'
  assert label('', 0.3, 4, log=True) == ['0.5', '1', '2']


@given(st.lists(finite, min_size=1, max_size=300))
def test_smooth_stays_within_its_neighbours_and_keeps_a_line(values):
  points = list(enumerate(values))
  out = series.smooth(points)
  assert [x for x, _ in out] == [x for x, _ in points]
  assert min(values) - 1e-3 <= min(y for _, y in out)
  assert max(y for _, y in out) <= max(values) + 1e-3
  line = series.smooth([(x, 2.0 * x) for x, _ in points])
  half = max(1, len(points) // 50)
  assert all(math.isclose(y, 2.0 * x, abs_tol=1e-9) for x, y in line[:-half])


def test_smooth_recovers_from_a_huge_value_and_keeps_gaps():
  values = [1.0] * 1000
  values[100], values[500] = 1e30, math.nan
  out = series.smooth(list(enumerate(values)))
  assert math.isnan(out[500][1])
  assert {y for _, y in [*out[:70], *out[130:500], *out[501:]]} == {1.0}


def test_thin_keeps_extremes_gaps_and_ends():
  values = [math.sin(i) for i in range(30000)]
  values[12345], values[20000], values[25000] = 50.0, -50.0, math.nan
  out = series.thin(list(enumerate(values)), 100)
  assert len(out) <= 302
  kept = dict(out)
  assert (
    kept[12345] == 50.0 and kept[20000] == -50.0 and math.isnan(kept[25000])
  )
  assert out[0][0] == 0 and out[-1][0] == 29999
  assert [x for x, _ in out] == sorted(kept)


def test_an_axis_from_zero_reaches_below_it_where_values_do():
  axis = charts.y_axis('', [-3.0, -1.0], zero=True)
  assert axis is not None and axis.low == -3 and axis.high > 0
  axis = charts.y_axis('', [1.0, 3.0], zero=True)
  assert axis is not None and axis.low == 0 and axis.high > 3
