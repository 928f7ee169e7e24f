import dataclasses
import itertools
import math
import re

from hypothesis import given
from hypothesis import strategies as st

from train import charts, plots, series

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


def test_labels_of_a_logarithmic_axis_are_short():
  label = lambda low, high: [
    text for _, text in charts.Axis('', low, high, log=True).ticks()
  ]
  assert label(1e5, 1e9) == ['100k', '1M', '10M', '100M', '1B']
  minus = '\N{MINUS SIGN}'
  assert label(1e-9, 1e-5) == [f'1e{minus}{i}' for i in (9, 8, 7, 6, 5)]
  assert label(0.01, 1) == ['0.01', '0.02', '0.05', '0.1', '0.2', '0.5', '1']


def test_categories_share_the_axis():
  axis = charts.Categories('Schedule', ('cos', 'wsd'))
  assert [axis.place(value) for value, _ in axis.ticks()] == [0.25, 0.75]
  y = charts.y_axis('Loss', [1.0, 2.0])
  drawn = plots.plot('By schedule.', axis, y, [plots.Dots(0, [(1, 1.5)], 'a')])
  assert '>cos</text>' in drawn and '>wsd</text>' in drawn
  assert '<title>a: 1.5 at wsd</title>' in drawn
  assert 'x="75.00%" y="50.00%"' in drawn


UNIT = charts.Axis('', 0, 1)


def spans(drawn):
  found = re.findall(
    r'class="span [^"]*" x1="([\d.]+)%" x2="([\d.]+)%" y1="([\d.]+)%?" '
    r'y2="([\d.]+)%?"',
    drawn,
  )
  return [tuple(map(float, each)) for each in found]


def test_dots_have_intervals_both_ways():
  point = plots.Estimate(0.5, 0.25, 0.75), plots.Estimate(0.2, 0.1, 0.4)
  drawn = plots.plot('', UNIT, UNIT, [plots.Dots(1, [point], shift=4)])
  assert spans(drawn) == [(50, 50, 90, 60), (25, 75, 80, 80)]
  assert drawn.count('href="#capx"') == drawn.count('href="#capy"') == 2
  assert 'translate(4 0)' in drawn and 'class="mark c1"' in drawn
  assert '0.2 (0.1 to 0.4) at 0.5 (0.25 to 0.75)' in drawn


def test_an_interval_is_cut_at_the_edge_without_a_mark():
  point = 0.5, plots.Estimate(0.5, 0.25, 7.0)
  drawn = plots.plot('', UNIT, UNIT, [plots.Dots(0, [point])])
  assert spans(drawn) == [(50, 50, 75, 0)]
  assert drawn.count('class="cap') == 1
  # The value itself is beyond, its interval reaches in.
  point = 0.5, plots.Estimate(2.0, 0.25, 7.0)
  drawn = plots.plot('', UNIT, UNIT, [plots.Dots(0, [point])])
  assert spans(drawn) and 'class="mark' not in drawn


def test_bands_have_gaps_and_lie_below_curves():
  nan = math.nan
  edges = [(0, 0.1, 0.2), (0.5, 0.2, 0.3), (0.6, nan, nan), (1, 0.4, 0.5)]
  items = [charts.Curve(0, [(0, 0), (1, 1)]), plots.Band(0, edges)]
  drawn = plots.plot('', UNIT, UNIT, items)
  assert drawn.index('class="band c0"') < drawn.index('class="line c0"')
  assert re.search(r'class="band c0" d="([^"]*)"', drawn)[1] == (
    'M0.0 800.0L500.0 700.0L500.0 800.0L0.0 900.0zM1000.0 500.0L1000.0 600.0z'
  )


def test_a_line_of_a_power_law_is_straight_on_two_logarithmic_axes():
  x = charts.Axis('', 1e5, 1e9, log=True)
  y = charts.Axis('', 1, 100, log=True)
  points = [(n, 1e4 * n**-0.5) for n in (1e5, 1e6, 1e7, 1e8)]
  band = [(n, 0.0, 2 * value) for n, value in points]
  drawn = plots.plot('', x, y, [charts.Curve(0, points), plots.Band(0, band)])
  path = re.search(r'class="line c0".*?d="([^"]*)"', drawn)[1]
  places = [
    tuple(map(float, p.split())) for p in re.findall(r'[\d.]+ [\d.]+', path)
  ]
  slopes = {
    round((b[1] - a[1]) / (b[0] - a[0]), 6)
    for a, b in itertools.pairwise(places)
  }
  assert len(places) == 4 and slopes == {1.0}
  assert 'inf' not in drawn and 'nan' not in drawn


@given(st.lists(st.tuples(st.floats(), st.floats(), st.floats()), max_size=6))
def test_whatever_is_drawn_is_finite(values):
  estimates = [plots.Estimate(*each) for each in values]
  axis = charts.Axis('', 1e-3, 5, log=True)
  items = [
    plots.Dots(0, [(each, each) for each in estimates]),
    plots.Band(0, values),
  ]
  drawn = plots.plot('', axis, UNIT, items)
  drawn += plots.rows('', axis, [
    plots.Row('a', estimates, 0, faint=[v for v, _, _ in values]),
    plots.Row('b', estimates, None),
  ], 1.0, joined=True)  # fmt: skip
  # What a tooltip says may be infinite.
  places = re.findall(r' (?:d|[xy][12]?|c[xy])="([^"]*)"', drawn)
  assert places and not any('nan' in p or 'inf' in p for p in places)


def test_rows_name_their_values():
  rows = [
    plots.Row('first', [plots.Estimate(0.5, 0.25, 0.75)], 0, '0.5'),
    plots.Row('second <b>', [plots.Estimate(math.nan)], 1),
    plots.Row('third', [plots.Estimate(0.25)], faint=[0.1, 0.9, 4.0]),
  ]
  drawn = plots.rows('Rows.', UNIT, rows, line=0.0, joined=True)
  names = re.findall(r'class="name"[^>]*>([^<]*)<', drawn)
  assert names == ['first', 'second &lt;b&gt;', 'third']
  assert [s[:2] for s in spans(drawn)] == [(25, 75)]
  assert drawn.count('class="join"') == 1  # Past the row that lacks the value.
  assert drawn.count('class="dot plain"') == 2
  assert 'class="zero" x1="0.00%"' in drawn
  heights = [float(y) for y in re.findall(r'class="name" y="(\d+)"', drawn)]
  assert heights == sorted(heights)
  assert float(re.search(r'height="(\d+)"', drawn)[1]) > heights[-1]


def test_long_names_keep_both_ends_and_a_line_of_their_own():
  name = 'p12-lr-matched-by-measured-moments against base'
  row = plots.Row(name, [plots.Estimate(0.5)], text='+0.5 (0.2 to 0.9)')
  drawn = plots.rows('', UNIT, [row])
  shown = re.search(r'class="name" y="(\d+)">([^<]*)<title>([^<]*)<', drawn)
  assert len(shown[2]) <= 38 and shown[3] == name
  assert shown[2].startswith('p12-lr') and shown[2].endswith('against base')
  text = re.search(r'class="text" y="(\d+)"', drawn)
  assert int(text[1]) > int(shown[1])
  short = dataclasses.replace(row, name='p12')
  assert 'class="text right" x="100%"' in plots.rows('', UNIT, [short])


def test_nothing_is_drawn_of_nothing():
  assert plots.plot('', None, UNIT, []) == plots.plot('', UNIT, None, []) == ''
  assert plots.rows('', None, []) == plots.rows('', UNIT, []) == ''
  assert plots.figure('head', 'text', '') == ''
