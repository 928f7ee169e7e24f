import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train import charts, event_table, marks, timeline
from train.lives import alive, clock, duration, lives, unit_of
from train.marks import Lane, Mark
from train.run_log import Event, RunLog

START = 1_700_000_000.0


def event(kind, step, after, **facts):
  return Event(kind, step, None if after is None else START + after, facts)


def measured(*pairs, loss=2.0):
  return {
    step: {'step': step, 'loss': loss, 'tokens': 8 * step, 'time': START + at}
    for step, at in pairs
  }


def killed(end='open'):
  """Began, died at 100 s, went on from step 5 at 160 s."""
  events = [
    event('began', 0, 0.0),
    event('saved', 5, 60.0, seconds=0.5, bytes=2_000_000),
    event('skipped', 9, 100.0, reason='spike', loss=7.25, grad_norm='inf'),
    event('fell_back', 5, 159.0, refused=10, reason='no manifest'),
    event('resumed', 5, 160.0),
    event('saved', 10, 200.0, seconds=0.5, bytes=2_000_000),
  ]
  if end != 'open':
    facts = {'error': 'diverged <x>'} if end == 'failed' else {}
    events.append(event(end, 12, 220.0, **{'status': 'SIGTERM', **facts}))
  run = RunLog('a', {}, measured(*((s, 10 * s) for s in range(1, 6))))
  run.train |= measured((6, 165.0), (12, 219.0))
  run.events, run.end, run.resumed = events, end, [5]
  return run


def test_a_run_that_was_killed_has_two_lives():
  first, second = lives(killed())
  assert (first.start.kind, first.end) == ('began', 'died')
  # Of what came after the save only a skipped step is on record. A checkpoint
  # was refused by the life that began afterwards.
  assert first.last == (START + 100, 9) and first.seconds == 100
  assert (second.start.kind, second.start.step) == ('resumed', 5)
  assert second.last == (START + 219, 12) and second.end == 'open'
  assert alive(killed()) == (100 + 59, 219)


@pytest.mark.parametrize('end', ['stopped', 'failed', 'done'])
def test_a_life_that_ended_says_how(end):
  assert [life.end for life in lives(killed(end))] == ['died', end]


def test_a_copy_without_history_lives_from_its_first_measurement():
  run = RunLog('a', {}, measured((1, 0), (2, 30)), measured((2, 31)))
  (life,) = lives(run)
  assert life.points[0] == (START, 0) and life.last == (START + 31, 2)
  run.events = [event('resumed', 1, 20)]
  assert [life.start.kind for life in lives(run)] == ['began', 'resumed']


def test_what_has_no_time_has_no_lives():
  run = RunLog('a', {}, {1: {'step': 1, 'loss': 2.0}})
  run.events = [event('resumed', 1, None)]
  assert lives(run) == [] and alive(run) == (0, 0)
  assert timeline.draw([run]) == ''
  assert 'resumed' not in event_table.draw([run])  # Its first line.


kinds = [
  'began', 'resumed', 'saved', 'fell_back', 'skipped', 'stopped', 'failed',
  'done',
]  # fmt: skip
events = st.lists(
  st.builds(event, st.sampled_from(kinds), st.integers(0, 99),
            st.none() | st.floats(-1e6, 1e6))
)  # fmt: skip
steps = st.lists(st.tuples(st.integers(0, 99), st.floats(-1e6, 1e6)))


@given(events, steps)
def test_lives_never_go_back(history, pairs):
  run = RunLog('a', {}, measured(*pairs))
  run.events = history
  found = lives(run)
  points = [point for life in found for point in life.points]
  assert [at for at, _ in points] == sorted(at for at, _ in points)
  for life in found:
    reached = [step for _, step in life.points]
    assert reached == sorted(reached)
  living, whole = alive(run)
  assert 0 <= living <= whole + 1e-3
  timeline.draw([run, killed()])
  event_table.draw([run, killed()])


def test_time_is_told_in_fitting_units():
  assert [duration(s) for s in (0, 59.6, 61, 3600, 3725, 90000, 1e7)] == [
    '0 s', '1 min', '1 min 1 s', '1 h', '1 h 2 min', '1 d 1 h', '115 d 17 h',
  ]  # fmt: skip
  assert unit_of([3, 200.0]) == ('Minutes', 60)
  assert unit_of([]) == ('Seconds', 1) and unit_of([5e5])[0] == 'Days'
  assert clock(START) == '2023-11-14 22:13:20'


axis = charts.Axis('x', 0, 100)


@given(st.lists(st.floats(0, 100)))
def test_marks_that_would_touch_are_one(places):
  found = marks.grouped(axis, [Mark(at, f'at {at}') for at in places])
  assert len(found) <= 301
  gaps = [b.at - a.at for a, b in itertools.pairwise(found)]
  assert all(gap >= 100 / 300 * (1 - 1e-9) for gap in gaps)
  counts = (
    re.match(r'([\d,]+) drawn as one: from', mark.title) for mark in found
  )
  assert sum(
    int(count[1].replace(',', '')) if count else 1 for count in counts
  ) == len(places)


def test_hundreds_of_evenly_spaced_marks_stay_even():
  found = marks.grouped(axis, [Mark(i / 10, f'save {i}') for i in range(1000)])
  gaps = {round(b.at - a.at, 6) for a, b in itertools.pairwise(found)}
  assert len(gaps) == 1
  assert found[0].title == '4 drawn as one: from save 0 to save 3'


def test_lanes_without_marks_are_left_out():
  strips = [Lane('saves', [[Mark(1, 'a<b')], []]), Lane('fails', [[], []])]
  text = marks.lanes(axis, strips)
  assert '>saves</text>' in text and 'fails' not in text
  assert '<title>a&lt;b</title>' in text


def test_the_figure_over_time():
  text = timeline.draw([killed()])
  names = re.findall(r'<text class="y" dx="-8"[^>]*>([a-z]+)</text>', text)
  assert names == ['alive', 'saves', 'skips', 'fails']
  bar = r'<rect class="bar c0" x="([\d.]+)%" y="0" width="([\d.]+)%'
  bars = re.findall(bar, text)
  spans = [(float(x), float(width)) for x, width in bars]
  expected = [(0, 100 * 100 / 219), (100 * 160 / 219, 100 * 59 / 219)]
  assert spans == [pytest.approx(span, abs=0.01) for span in expected]
  assert 'resumed from step 5, 1 min after the last sign of life' in text
  assert 'step 5 saved (2.0 MB in 0.5 s), 2023-11-14 22:14:20 UTC' in text
  assert 'step 9 skipped (spike)' in text
  assert 'checkpoint 10 refused' in text
  assert 'last seen at step 12, 2023-11-14 22:16:59 UTC' in text
  assert text.count('class="dotted') == 1
  assert 'Minutes since the run began' in text


def test_restarts_and_skips_over_steps_and_over_tokens():
  by_step = timeline.on_steps([killed()], charts.Axis('', 0, 12), 'step')
  by_tokens = timeline.on_steps([killed()], charts.Axis('', 0, 96), 'tokens')
  assert by_step == by_tokens
  assert f'<line class="rule c0" x1="{500 / 12:.2f}%"' in by_step
  assert f'x="{900 / 12:.2f}%"' in by_step and by_step.count('<use') == 1


def test_many_restarts_do_not_drown_the_curve():
  run = killed()
  run.resumed = list(range(12))
  assert timeline.on_steps([run], charts.Axis('', 0, 12), 'step').count(
    'class="rule c0 many"'
  ) == len(run.resumed)


def rows(text):
  found = re.findall(r'<tr[^>]*>(.*?)</tr>', text.partition('<tbody>')[2])
  return [' '.join(re.sub('<[^>]+>', ' ', row).split()) for row in found]


def test_the_table_of_events():
  assert rows(event_table.draw([killed('stopped')])) == [
    '2023-11-14 22:15:00 1 min 40 s 9 '
    'skipped: spike (loss 7.25, gradient norm inf)',
    '2023-11-14 22:15:59 2 min 39 s 5 checkpoint 10 refused: no manifest',
    '2023-11-14 22:16:00 2 min 40 s 5 '
    'resumed, 1 min after the last sign of life, at step 9',
    '2023-11-14 22:17:00 3 min 40 s 12 stopped by SIGTERM',
  ]
  last = rows(event_table.draw([killed()]))[-1]
  assert last == (
    '2023-11-14 22:16:59 3 min 39 s 12 last sign of life; no end on record: '
    'running, or died'
  )


@pytest.mark.parametrize('status, text', [
  ('stopped', 'stopped'), ('at once', 'stopped at once'),
  ('SIGINT', 'stopped by SIGINT'),
])  # fmt: skip
def test_how_it_stopped(status, text):
  run = killed('stopped')
  run.events[-1].facts['status'] = status
  assert rows(event_table.draw([run]))[-1].endswith(f' 12 {text}')


def test_a_failure_says_why():
  text = event_table.draw([killed('failed')])
  assert rows(text)[-1].endswith(' 12 failed: diverged &lt;x&gt;')
  text = timeline.draw([killed('failed')])
  assert 'failed at step 12, 2023-11-14 22:17:00 UTC' in text
  assert ' 2 fails' in text


def test_crosses_drawn_as_one_are_counted():
  run, x = killed(), charts.Axis('', 0, 1200)
  assert timeline.skips([run], x, 'step') == 'Crosses: skipped steps (1).'
  run.events += [event('skipped', step, 101.0) for step in range(800, 825)]
  assert timeline.skips([run], x, 'step') == (
    'Crosses: skipped steps (26, some drawn as one).'
  )
  assert timeline.on_steps([run], x, 'step').count('<use') < 26
  assert '26 skips' in timeline.draw([run])
  run.events = []
  assert timeline.skips([run], x, 'step') == ''


def test_a_run_without_trouble_has_no_table():
  run = RunLog('a', {}, measured((1, 1)), end='done')
  run.events = [event('began', 0, 0), event('saved', 1, 2), event('done', 1, 3)]
  assert event_table.draw([run]) == ''


def test_what_repeats_is_one_row():
  run = RunLog('a', {}, measured((1, 1)), end='done')
  run.events = [
    event('began', 0, 0),
    *(event('skipped', step, step, reason='spike') for step in (3, 4, 5, 9)),
    *(event('save_failed', 9, 10 + i, error='full <disk>') for i in range(3)),
    event('saved', 9, 20),
    event('save_failed', 12, 30, error='full <disk>'),
  ]
  assert [row.partition(' s ')[2] for row in rows(event_table.draw([run]))] == [
    '3\N{EN DASH}5 skipped: spike 3 times',
    '9 skipped: spike',
    '9 not saved: full &lt;disk&gt; 3 times',
    '12 not saved: full &lt;disk&gt;',
  ]


def test_a_long_table_is_cut_and_says_so():
  run = RunLog('a', {}, measured((1, 1)), end='done')
  run.events = [event('began', 0, 0)]
  for i in range(100):
    run.events += [
      event('skipped', 10 * i, 2 * i, reason='spike'),
      event('save_failed', 10 * i, 2 * i + 1, error='full'),
    ]
  found = rows(event_table.draw([run, killed()]))
  assert found[8] == '176 left out: 88 skipped steps, 88 failed saves'
  assert len(found) == 8 + 1 + 16 + 4
  assert ' a 0 skipped: spike' in found[0]


@pytest.mark.parametrize('moved', [{}, {'devices': '4 <cpu>'}])
def test_a_run_that_went_on_elsewhere_says_where(moved):
  run = killed()
  run.events[4] = event('resumed', 5, 160.0, **moved)
  text = event_table.draw([run])
  assert ('resumed on other devices 4 &lt;cpu&gt;,' in text) == bool(moved)


def test_what_changed_on_a_resume_is_told_in_words():
  facts = {
    'versions': {'jax': '0.10.2 -> 0.12.0', 'flax': '1 -> 2'},
    'mesh': {'data': 0, 'fsdp': 4},
    'accumulate': 2,
  }
  text = event_table._text(Event('resumed', 3, None, facts))
  assert text == (
    'resumed on other versions jax 0.10.2 -> 0.12.0, flax 1 -> 2, mesh data 0, '
    'fsdp 4, accumulate 2'
  )
