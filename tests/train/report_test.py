import html.parser
import json
import math
import os
import pathlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train import charts
from train.errors import UserError
from train.report import write_report
from train.run_log import paired_difference, read_run

STEPS = 60
VOID = {'meta', 'link', 'br', 'hr', 'img', 'input'}


class Page(html.parser.HTMLParser):
  """Tags in order, text, and whether every element closes where it should."""

  def __init__(self, text):
    super().__init__()
    self.tags, self.words, self.open = [], [], []
    self.feed(text)
    self.close()
    assert not self.open

  def handle_starttag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))
    if tag not in VOID:
      self.open.append(tag)

  def handle_startendtag(self, tag, attrs):
    self.tags.append((tag, dict(attrs)))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if 'style' not in self.open:
      self.words.append(data)

  @property
  def text(self):
    return ' '.join(' '.join(self.words).split())

  def all(self, tag, **attrs):
    return [
      found
      for name, found in self.tags
      if name == tag and attrs.items() <= found.items()
    ]


def train_line(step, *, batch=16, **values):
  return {
    'step': step,
    'split': 'train',
    'loss': 4.0 + 3.6 * math.exp(-step / 10),
    'tokens': step * batch * 128,
    'learning_rate': 1e-3 * min(1.0, step / 5),
    'grad_norm': 0.5 + 1 / step,
    'tokens_per_second': 20000.0 + step,
    **values,
  }


def validation_line(step, shift=0.0, *, batch=16):
  loss = 4.1 + 3.6 * math.exp(-step / 10) + shift
  tokens = step * batch * 128
  return {'step': step, 'split': 'validation', 'loss': loss, 'tokens': tokens}


def healthy(shift=0.0, steps=STEPS, batch=16):
  lines = []
  for step in range(1, steps + 1):
    lines.append(train_line(step, batch=batch))
    if step % 10 == 0:
      lines.append(validation_line(step, shift, batch=batch))
  last = validation_line(steps, shift)['loss']
  done = {'event': 'done', 'step': steps, 'validation_loss': last}
  return [*lines, {**done, 'params_digest': 'sha256:0123456789abcdef'}]


def make_run(folder, lines, *, tail='', **config):
  folder.mkdir(parents=True)
  config = {
    'optimizer': {'power': 1.0, 'eps': 1e-8},
    'steps': STEPS,
    'versions': {'jax': '0.12.0'},
    **config,
  }
  (folder / 'config.json').write_text(json.dumps(config))
  text = ''.join(json.dumps(line) + '\n' for line in lines)
  (folder / 'metrics.jsonl').write_text(text + tail)
  return folder


@pytest.fixture
def adamw(tmp_path):
  return make_run(tmp_path / 'adamw', healthy())


@pytest.fixture
def power(tmp_path):
  optimizer = {'power': 1.2, 'eps': 1e-8}
  return make_run(tmp_path / 'power', healthy(-0.02), optimizer=optimizer)


def render(tmp_path, runs, **options):
  path = tmp_path / 'report.html'
  write_report(path, runs, **{'title': 'A comparison', **options})
  return path.read_text(encoding='utf-8')


def test_page_has_both_arms_and_the_difference(tmp_path, adamw, power):
  note = 'One seed at this size proves nothing: pair them.'
  text = render(tmp_path, {'adamw': adamw, 'power': power}, notes=[note])
  page = Page(text)
  assert text.startswith('<!DOCTYPE html>')
  assert page.all('html', lang='en') and page.all('title')
  assert note in page.text
  assert page.text.count('A comparison') == 2  # title and heading
  final = validation_line(STEPS)['loss']
  row = f'adamw {final:.4f} baseline {STEPS * 2048:,} 20,030 done at step 60'
  assert row in page.text
  assert f'power {final - 0.02:.4f} \N{MINUS SIGN}0.0200' in page.text
  assert page.all('code', title='sha256:0123456789abcdef')
  assert page.text.count('0123456789') == 2 and 'abcdef' not in page.text
  plots = page.all('svg', role='img')
  assert len(plots) == 5 and all(plot['aria-label'] for plot in plots)
  assert len(page.all('table')) == len(page.all('caption'))


def test_page_loads_nothing(tmp_path, adamw, power):
  text = render(tmp_path, {'adamw': adamw, 'power': power})
  page = Page(text)
  assert '://' not in text and 'url(' not in text and '@import' not in text
  assert not {'script', 'link', 'img', 'iframe'} & {tag for tag, _ in page.tags}
  ids = [attrs['id'] for _, attrs in page.tags if 'id' in attrs]
  assert len(ids) == len(set(ids))
  links = {a['href'] for _, a in page.tags if 'href' in a}
  assert links <= {f'#{name}' for name in ids} and links
  assert not any(a.get('src') for _, a in page.tags)
  assert "default-src 'none'" in text


def test_numbers_drawn_are_finite(tmp_path, adamw, power):
  page = Page(render(tmp_path, {'adamw': adamw, 'power': power}))
  paths = [attrs['d'] for attrs in page.all('path') if 'class' in attrs]
  assert len(paths) == 6 + 1 + 2 + 4 + 4
  for path in paths:
    assert re.fullmatch(r'(M-?[\d.]+ -?[\d.]+h0(L-?[\d.]+ -?[\d.]+)*)+', path)


def test_config_shows_what_differs_first(tmp_path, adamw, power):
  text = Page(render(tmp_path, {'adamw': adamw, 'power': power})).text
  assert '1 of 4 settings differ' in text
  differing = text.index('optimizer.power 1.0 1.2')
  assert differing < text.index('eps 1e-08') < text.index('jax 0.12.0')


def test_versions_come_from_run_json_first(tmp_path, adamw):
  (adamw / 'run.json').write_text('{"versions": {"jax": "0.10.2"}}')
  text = Page(render(tmp_path, {'adamw': adamw})).text
  assert 'jax 0.10.2' in text and '0.12.0' not in text


def test_single_run_has_no_difference(tmp_path, adamw):
  page = Page(render(tmp_path, {'adamw': adamw}))
  assert len(page.all('svg', role='img')) == 4
  assert 'ifference' not in page.text and 'differ ' not in page.text


def test_baseline_can_be_any_arm(tmp_path, adamw, power):
  runs = {'adamw': adamw, 'power': power}
  text = Page(render(tmp_path, runs, baseline='power')).text
  assert 'Difference to power' in text and '+0.0200' in text


def test_died_run_is_compared_where_it_still_lived(tmp_path, adamw):
  lines = [line for line in healthy(0.5) if line['step'] <= 34]
  died = make_run(tmp_path / 'died', lines, tail='{"step": 35, "split": "tr')
  text = Page(render(tmp_path, {'adamw': adamw, 'died': died})).text
  assert 'at step 34 of 60 no end on record: running, or died' in text
  assert 'died at' not in text and 'Last validation loss' in text
  assert '+0.5000 at step 30' in text
  assert '1 unreadable line was left out' in text


def test_line_cut_inside_a_character(tmp_path, adamw):
  with (adamw / 'metrics.jsonl').open('ab') as file:
    file.write('{"event": "é'.encode()[:-1])
  assert read_run('adamw', adamw).unreadable == 1


@pytest.mark.parametrize(
  'line',
  [
    '[1, 2]',
    '7',
    '{"step": 70, "split": "test", "loss": 1}',
    '{"step": 70, "split": [], "loss": 1}',
    '{"step": 70, "split": "train"}',
    '{"step": null, "split": "train", "loss": 1}',
    '{"step": 70, "split": "train", "loss": "low"}',
    '{"step": 70, "split": "train", "loss": 1, "tokens": "nan"}',
    '{"step": 70, "split": "train", "loss": 1, "time": 1e300}',
    '{"step": -1, "split": "train", "loss": 1}',
    '{"step": 1e300, "split": "train", "loss": 1}',
    '{"step": 70, "split": "layers", "layers": {"head": 3}}',
    '{"step": 70, "split": "layers", "layers": {"head": {"grad_norm": []}}}',
    '{"event": "saved", "step": 70, "time": -1}',
    '[' * 100000,
  ],
)
def test_foreign_lines_are_counted_not_believed(adamw, line):
  before = read_run('adamw', adamw)
  with (adamw / 'metrics.jsonl').open('a') as file:
    file.write(line + '\n')
  after = read_run('adamw', adamw)
  assert (before.unreadable, after.unreadable) == (0, 1)
  assert before.train == after.train and after.end == 'done'


def test_stopped_then_resumed_run_drops_what_was_done_again(tmp_path):
  lines = [train_line(step, loss=9.0) for step in range(1, 31)]
  lines += [{'event': 'stopped', 'step': 30}]
  stopped = make_run(tmp_path / 'a', lines)
  assert read_run('a', stopped).end == 'stopped'
  lines += [{'event': 'resumed', 'step': 20}]
  lines += [train_line(step, loss=5.0) for step in range(21, 26)]
  resumed = read_run('b', make_run(tmp_path / 'b', lines))
  assert resumed.end == 'open' and resumed.resumed == [20]
  assert list(resumed.train) == list(range(1, 26))
  assert resumed.train[20]['loss'] == 9.0 and resumed.train[21]['loss'] == 5.0
  text = Page(render(tmp_path, {'a': stopped})).text
  assert 'stopped at step 30 of 60' in text and 'no end on record' not in text


@pytest.mark.parametrize('bad', ['nan', 'inf', '-inf'])
def test_non_finite_values(tmp_path, adamw, bad):
  lines = healthy()
  for line in lines:
    if line['step'] >= 20 and 'loss' in line:
      line['loss'] = bad
      if line['split'] == 'train':
        line['grad_norm'] = bad
  lines[-1]['validation_loss'] = bad
  wild = make_run(tmp_path / 'wild', lines)
  text = render(tmp_path, {'adamw': adamw, 'wild': wild})
  page = Page(text)
  assert 'wild: the training loss is not finite from step 20' in page.text
  assert 'wild: the validation loss is not finite from step 20' in page.text
  row = page.text[page.text.index(f'wild {bad} ') :]
  assert charts.signed(float(bad)) in row[:40]
  drawn = ' '.join(str(attrs) for tag, attrs in page.tags if tag != 'svg')
  assert 'nan' not in drawn and 'inf' not in drawn


def test_nothing_finite_at_all(tmp_path):
  lines = [train_line(s, loss='nan', grad_norm='inf') for s in range(1, 5)]
  text = render(tmp_path, {'a': make_run(tmp_path / 'a', lines)})
  assert not {'Loss', 'Gradient norms'} & set(heads(text))
  assert 'Learning rate' in heads(text) and 'not finite from' in text


def test_one_line_is_enough(tmp_path):
  line = {'step': 0, 'split': 'validation', 'loss': 7.6}
  page = Page(render(tmp_path, {'a': make_run(tmp_path / 'a', [line])}))
  assert len(page.all('svg', role='img')) == 1 and '7.6000' in page.text


def test_runs_that_differ_in_batch_share_an_axis_of_tokens(tmp_path, adamw):
  wide = make_run(tmp_path / 'wide', healthy(steps=30, batch=32))
  page = Page(render(tmp_path, {'adamw': adamw, 'wide': wide}))
  assert 'Training tokens' in page.text and 'equal tokens' in page.text
  ours, theirs = read_run('w', wide), read_run('a', adamw)
  pairs = paired_difference(ours, theirs, 'tokens')
  assert [at for at, _ in pairs] == [40960, 81920, 122880]
  expected = ours.validation[10]['loss'] - theirs.validation[20]['loss']
  assert pairs[0][1] == expected


def test_hostile_strings_stay_text(tmp_path, adamw):
  evil = '"><script>alert(1)</script><img src=x onerror=y>\'&amp;\ud800'
  lines = healthy(0.1)
  lines[-1]['params_digest'] = evil
  run = make_run(
    tmp_path / 'evil', lines, **{evil: evil, 'nested': {evil: [1]}}
  )
  (run / 'run.json').write_text(json.dumps({'versions': {evil: evil}}))
  runs = {evil: run, 'adamw': adamw}
  text = render(tmp_path, runs, title=evil, notes=[evil])
  page = Page(text)
  assert not {'script', 'img'} & {tag for tag, _ in page.tags}
  assert not any(name.startswith('on') for _, a in page.tags for name in a)
  shown = evil.replace('\ud800', '?')
  assert page.text.count(shown) > 10
  assert page.all('code', title=shown)


def test_hostile_config_that_all_runs_share(tmp_path):
  evil = '<script>alert(1)</script>'
  config = {evil: {evil: evil}, 'list': [evil]}
  page = Page(
    render(tmp_path, {'a': make_run(tmp_path / 'a', healthy(), **config)})
  )
  assert not page.all('script')
  assert page.text.count(evil) == 4


def test_range_of_the_loss_leaves_out_the_first_tenth(tmp_path, adamw):
  text = render(tmp_path, {'adamw': adamw})
  loss = text[text.index('<h3>Loss') : text.index('<h3>Learning rate')]
  ticks = re.findall(r'<text class="y"[^>]*>([^<]*)<', loss)
  assert read_run('adamw', adamw).train[1]['loss'] > 7.2
  assert read_run('adamw', adamw).train[7]['loss'] < 5.8
  assert 5.0 <= float(ticks[-1]) <= 6.0
  assert float(ticks[0]) == 4.0


def test_same_input_gives_the_same_bytes(tmp_path, adamw, power):
  runs = {'adamw': adamw, 'power': power}
  assert render(tmp_path, runs) == render(tmp_path, runs)


def test_write_is_atomic(tmp_path, adamw, monkeypatch):
  path = tmp_path / 'report.html'
  path.write_text('old')
  before = sorted(tmp_path.iterdir())
  seen = []

  def failing(source, target):
    source = pathlib.Path(source)
    seen.append((source.parent, source.read_text().endswith('</html>\n')))
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(os, 'replace', failing)
  with pytest.raises(UserError, match=r'^no space left to write .*html$'):
    write_report(path, {'adamw': adamw}, title='t')
  assert seen == [(tmp_path, True)]
  assert path.read_text() == 'old'
  assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
  ('name', 'content', 'message'),
  [
    ('config.json', None, 'cannot read .*config.json: No such file'),
    ('config.json', '', 'config.json is empty'),
    ('config.json', '{"a": ', 'config.json is not JSON'),
    ('config.json', '[1]', 'config.json does not hold a JSON object'),
    ('run.json', '{', 'run.json is not JSON'),
    ('metrics.jsonl', None, 'cannot read .*metrics.jsonl: No such file'),
    ('metrics.jsonl', ' \n', 'metrics.jsonl is empty'),
    ('metrics.jsonl', '{"event": "stopped"}', 'holds no measurement'),
  ],
)
def test_bad_run_directory(tmp_path, adamw, name, content, message):
  (adamw / name).unlink(missing_ok=True)
  if content is not None:
    (adamw / name).write_text(content)
  with pytest.raises(UserError, match=message) as error:
    render(tmp_path, {'adamw': adamw})
  assert '\n' not in str(error.value)
  assert not (tmp_path / 'report.html').exists()


def test_bad_arguments(tmp_path, adamw):
  with pytest.raises(UserError, match='at least one run'):
    render(tmp_path, {})
  with pytest.raises(UserError, match="'power' is not among the runs: 'adamw'"):
    render(tmp_path, {'adamw': adamw}, baseline='power')
  with pytest.raises(UserError, match=r'cannot write .*: No such file'):
    write_report(tmp_path / 'no' / 'x.html', {'adamw': adamw}, title='t')


def test_median_throughput_ignores_the_compilation(tmp_path):
  lines = [
    train_line(s, tokens_per_second=1000 if s > 1 else 3) for s in (1, 2, 3)
  ]
  page = Page(render(tmp_path, {'a': make_run(tmp_path / 'a', lines)}))
  assert '6,144 1,000 at step 3 of 60' in page.text


NORMS = ('param_norm', 'grad_norm', 'powered_norm', 'update_norm')


def full_line(step, **values):
  extra = {
    'clipped_norm': 0.5, 'powered_norm': 0.2, 'memory': 3 * 2**30,
    'mfu': 0.42, 'data_seconds': 0.002, 'skipped': 0, 'time': 1e9 + step,
  }  # fmt: skip
  return train_line(step, **{**extra, **values})


def heads(page_text):
  return re.findall(r'<h3>([^<]*)</h3>', page_text)


def test_every_measure_has_its_figure(tmp_path):
  lines = [
    full_line(s, expert_load_max=[1.5, 2.5], router_entropy=[2.0, 1.0])
    for s in range(1, 9)
  ]
  run = make_run(tmp_path / 'a', lines)
  assert heads(render(tmp_path, {'a': run})) == [
    'Loss', 'Learning rate', 'Gradient norms', 'Throughput',
    'Model FLOPs utilisation', 'Waiting for data', 'Memory',
    'Load of the busiest expert', 'Entropy of routing', 'Time',
  ]  # fmt: skip
  found = read_run('a', run)
  assert found.train[3]['expert_load_max'] == 2.5
  assert found.train[3]['router_entropy'] == 1.0
  several = heads(render(tmp_path, {'a': run, 'b': run}))
  names = ('before clipping', 'after clipping', 'after the power')
  assert {f'Gradient norm {name}' for name in names} <= set(several)


def test_the_three_norms_are_told_apart(tmp_path):
  lines = [full_line(s, grad_norm=2.0) for s in range(1, 9)]
  text = render(tmp_path, {'a': make_run(tmp_path / 'a', lines)})
  figure = text[text.index('<h3>Gradient norms') :]
  figure = figure[: figure.index('</figure>')]
  assert 'before clipping, after clipping, after the power' in figure
  means = re.findall(r'<path class="(?:line|dashed) (c\d)".*?d="M\S+ (\S+)h0',
                     figure)  # fmt: skip
  assert [colour for colour, _ in means] == ['c0', 'c1', 'c2']
  heights = [float(height) for _, height in means]
  assert heights == sorted(heights) and len(set(heights)) == 3


def layers_line(step, grad_norm=0.5):
  paths = 'embedding', 'head', 'layers.0.mlp.up', 'layers.10.a', 'layers.2.a'
  norms = dict.fromkeys(NORMS, 2.0) | {'grad_norm': grad_norm}
  layers = dict.fromkeys(paths, norms)
  return {'step': step, 'split': 'layers', 'layers': layers}


def test_shares_are_in_percent_and_waiting_in_milliseconds(tmp_path):
  lines = [full_line(s, mfu=0.42, data_seconds=0.08) for s in range(1, 9)]
  text = render(tmp_path, {'a': make_run(tmp_path / 'a', lines)})
  for head, last in ('Model FLOPs', '40'), ('Waiting', '80'), ('Memory', '3'):
    figure = text[text.index(f'<h3>{head}') :]
    ticks = re.findall(
      r'<text class="y"[^>]*>([^<]*)<', figure.split('<h3>')[1]
    )
    assert ticks[-1] == last, head


def history(run, *events):
  text = ''.join(json.dumps(event) + '\n' for event in events)
  (run / 'events.jsonl').write_text(text)


def test_the_summary_tells_how_it_got_there(tmp_path):
  lines = [full_line(s, skipped=int(s > 3)) for s in range(1, 9)]
  run = make_run(tmp_path / 'a', lines)
  began = {'event': 'began', 'step': 0, 'time': 1e9 - 120}
  resumed = [
    {'event': 'resumed', 'step': s, 'time': 1e9 + s + 0.5} for s in range(1, 7)
  ]
  history(run, began)
  text = Page(render(tmp_path, {'a': run})).text
  open_ = 'at step 8 of 60 no end on record: running, or died '
  assert f'{open_}1 step skipped in 2 min 8 s' in text
  assert (
    'its last line is step 8, its last sign of life at 2001-09-09 01:46:48 '
    'UTC, 2 min 8 s after it began' in text
  )
  history(run, began, *resumed[:2])
  text = Page(render(tmp_path, {'a': run})).text
  assert (
    'resumed at 1, 2 1 step skipped running for 2 min 7 s of the 2 min 8 s '
    'from its start to its last sign of life' in text
  )
  history(run, began, *resumed)
  text = Page(render(tmp_path, {'a': run})).text
  assert 'resumed 6 times, last at 6 ' in text


def test_a_run_that_died_before_it_measured_anything(tmp_path, adamw):
  run = make_run(tmp_path / 'a', [])
  (run / 'metrics.jsonl').unlink()
  history(run, {'event': 'began', 'step': 0, 'time': 1e9})
  for runs in (
    {'a': run},
    {'a': run, 'adamw': adamw},
    {'adamw': adamw, 'a': run},
  ):
    text = Page(render(tmp_path, runs)).text
    assert 'at step 0 of 60 no end on record' in text
    assert 'its last sign of life at 2001-09-09 01:46:40 UTC' in text


def test_a_failure_is_told_in_the_summary_the_notes_and_the_table(tmp_path):
  run = make_run(tmp_path / 'a', [full_line(s) for s in range(1, 9)])
  error = 'not finite <3> steps in a row'
  failed = {'event': 'failed', 'step': 8, 'time': 1e9 + 9, 'status': 3}
  began = {'event': 'began', 'step': 0, 'time': 1e9}
  history(run, began, {**failed, 'error': error})
  text = Page(render(tmp_path, {'a': run})).text
  assert f'failed at step 8 of 60 {error}' in text
  assert f'a: failed at step 8 of 60: {error}' in text
  assert f'8 failed: {error}' in text and 'no end on record' not in text


def test_a_single_run_is_no_arm(tmp_path, adamw, power):
  text = Page(render(tmp_path, {'a': adamw})).text
  assert 'Run Final validation loss' in text and 'Arm' not in text
  assert 'validation training, a centred mean' in text
  text = Page(render(tmp_path, {'a': adamw, 'b': power})).text
  assert 'Arm Final validation loss' in text
  assert 'a b validation training, a centred mean' in text


def test_no_figure_without_a_pair(tmp_path, adamw):
  early = make_run(tmp_path / 'b', [train_line(1), validation_line(5)])
  found = heads(render(tmp_path, {'a': adamw, 'b': early}))
  assert found[:2] == ['Loss', 'Learning rate']


@pytest.mark.parametrize('first, fits', [(3e4, True), (1e9, False)])
def test_the_mean_fits_unless_it_is_an_outlier(tmp_path, first, fits):
  lines = [
    train_line(s, tokens_per_second=first if s == 1 else 2e4)
    for s in range(1, 200)
  ]
  text = render(tmp_path, {'a': make_run(tmp_path / 'a', lines)})
  figure = text[text.index('<h3>Throughput') :]
  top = re.search(r'<path class="line.*?d="M\S+ (\S+)h0', figure)
  assert (float(top[1]) >= 0) == fits


def test_layers_are_drawn_in_the_order_of_the_model(tmp_path):
  lines = [*healthy(), *(layers_line(s, s / 10) for s in (20, 40, 60))]
  run = make_run(tmp_path / 'a', lines)
  assert read_run('a', run).unreadable == 0
  page = Page(text := render(tmp_path, {'a': run}))
  assert 'embedding layer 0 layer 2 layer 10 head' in page.text
  assert len(page.all('div', **{'class': 'heat'})) == 4
  assert 'Gradient, before clipping, from 2 to 6' in text
  assert '<code>layers.2.a</code></th><td>2</td><td>6</td>' in text
  assert 'layers.0.mlp.up 2 6 2 2' in page.text
  assert 'From step 20 at the left to step 60' in page.text


def test_layers_done_again_are_dropped(tmp_path):
  lines = [train_line(1), layers_line(1), layers_line(2)]
  lines += [{'event': 'resumed', 'step': 1}]
  assert list(read_run('a', make_run(tmp_path / 'a', lines)).layers) == [1]


@pytest.mark.parametrize('bad', ['nan', 'inf', 0, -1])
def test_layers_without_a_finite_norm(tmp_path, bad):
  lines = [train_line(1), layers_line(1, bad), layers_line(2, bad)]
  page = Page(render(tmp_path, {'a': make_run(tmp_path / 'a', lines)}))
  # A norm below zero is none, and squared away.
  assert len(page.all('div', **{'class': 'heat'})) == 3 + (bad == -1)


def test_devices_are_told(tmp_path, adamw):
  (adamw / 'run.json').write_text('{"devices": "8 TPU v5p"}')
  assert 'devices 8 TPU v5p' in Page(render(tmp_path, {'adamw': adamw})).text


def test_skipped_steps_are_no_divergence(tmp_path):
  lines = [train_line(s) for s in range(1, 9)]
  lines[3]['loss'] = 'nan'
  run = make_run(tmp_path / 'a', lines)
  assert 'not finite from step 4' in Page(render(tmp_path, {'a': run})).text
  skipped = {'event': 'skipped', 'step': 4, 'reason': 'not finite'}
  (run / 'events.jsonl').write_text(json.dumps(skipped))
  assert 'finite from' not in Page(render(tmp_path, {'a': run})).text


def test_lone_surrogates_are_written(tmp_path, adamw):
  render(tmp_path, {'a\ud800': adamw})
  assert 'a?' in (tmp_path / 'report.html').read_text('utf-8')


names = st.sampled_from([
  'step', 'time', 'split', 'event', 'loss', 'grad_norm', 'tokens', 'layers',
  'reason', 'refused', 'bytes', 'seconds', 'expert_load_max', 'skipped',
])  # fmt: skip
odd = st.one_of(
  st.integers(),
  st.integers(0, 50),
  st.floats(),
  st.none(),
  st.lists(st.floats(), max_size=2),
  st.dictionaries(names, st.dictionaries(names, st.floats()), max_size=2),
  st.sampled_from([
    'nan', 'inf', '', 10**400, 'train', 'validation', 'layers', 'began',
    'resumed', 'saved', 'save_failed', 'fell_back', 'skipped', 'stopped',
    'failed', 'error', 'done', 1e9, 1e9 + 60, 1e12,
  ]),
)  # fmt: skip
odd_lines = st.lists(st.dictionaries(names, odd, min_size=1), max_size=8)
likely = st.fixed_dictionaries(
  {'step': st.integers(0, 40), 'time': st.floats(0, 2e11)},
  optional={
    'event': st.sampled_from(['began', 'resumed', 'saved', 'save_failed',
                              'fell_back', 'skipped', 'stopped', 'failed',
                              'done']),
    'split': st.sampled_from(['train', 'validation']),
    'loss': st.floats(),
    'data_seconds': st.floats(),
    'grad_norm': st.floats(),
  },
)  # fmt: skip


@given(
  metrics=odd_lines | st.lists(likely), events=odd_lines | st.lists(likely)
)
def test_whatever_the_lines_hold_there_is_a_page(
  tmp_path_factory, metrics, events
):
  folder = tmp_path_factory.mktemp('any')
  run = make_run(folder / 'run', [train_line(1), *metrics])
  text = ''.join(json.dumps(line) + '\n' for line in events)
  (run / 'events.jsonl').write_text(text)
  page = Page(render(folder, {'a': run, 'b': run}))
  for tag, attrs in page.tags:
    places = [attrs.get(key) for key in ('x', 'y', 'x1', 'x2', 'd', 'width')]
    assert not any(
      word in place for place in places if place for word in ('nan', 'inf')
    ), (tag, attrs)
