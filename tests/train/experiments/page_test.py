import html.parser
import math
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from train import charts, plots
from train.config import Config, to_dict
from train.errors import UserError
from train.experiments import comparison as comparison_lib
from train.experiments import figure_page, page
from train.experiments.comparison import ArmResult, Comparison

STEPS, EVERY, TOKENS = 2000, 100, 2048
VERSIONS = {'python': '3.13.1', 'jax': '0.12.0', 'numpy': '2.3.0'}
MINUS = '\N{MINUS SIGN}'


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
    if tag != 'meta':
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


def record(arm, seed, shift=0.0, *, diverged=False, power=1.0, **fields):
  noise = np.random.default_rng(seed)
  own = np.random.default_rng([seed, sum(map(ord, arm))])
  config = to_dict(Config(steps=STEPS, seed=seed))
  config['optimizer']['power'] = power
  curve, walk = [], 0.0
  level = 0.03 * noise.standard_normal()
  for step in range(0, STEPS + 1, EVERY):
    walk = 0.8 * walk + 0.002 * own.standard_normal()
    share = step / STEPS
    loss = 3.4 + 4.2 * math.exp(-9 * share) + level * share + walk
    loss += shift * min(1.0, 3 * share) - 0.15 * max(0.0, share - 2 / 3)
    if diverged and share > 0.4:
      break
    curve.append([step, step * TOKENS, round(loss, 6)])
  return {
    'arm': arm,
    'seed': seed,
    'status': 'diverged' if diverged else 'done',
    'validation_loss': None if diverged else curve[-1][2],
    'params_digest': '' if diverged else f'sha256:{seed:04x}{abs(shift):.20f}',
    'tokens': curve[-1][1],
    'parameters': 250_000,
    'flops': 3.1e12,
    'seconds': 118.4 + seed,
    'validation': curve,
    'train': [],
    'source_hash': 'abc',
    'config': config,
    'device': 'a CPU, 2 cores',
    'versions': VERSIONS,
    'code': '915b819',
    'time': '2026-11-23T08:00:00Z',
    **fields,
  }


def result(name, shift, seeds, power=1.0, missing=(), diverged=(), **fields):
  cells = {
    seed: None
    if seed in missing
    else record(
      name, seed, shift, power=power, diverged=seed in diverged, **fields
    )
    for seed in seeds
  }
  overrides = {} if power == 1 else {'optimizer.power': power}
  return ArmResult(name, overrides, cells)


def compare(arms, wanted=None, headline=True, **fields):
  arms = {arm.name: arm for arm in arms}
  first = next(iter(arms))
  wanted = wanted or [(arm, first) for arm in arms if arm != first]
  fields = {'title': 'A comparison', 'command': 'python -m train x', **fields}
  return Comparison(
    arms=arms,
    pairs=comparison_lib.pairs(arms, wanted),
    headline=wanted[0] if headline else None,
    **fields,
  )


@pytest.fixture(scope='module')
def eight():
  seeds = range(8)
  return compare(
    [
      result('base', 0.0, seeds),
      result('p12', -0.02, seeds, 1.2),
      result('p09', 0.02, seeds, 0.9),
      result('same', 0.0, seeds, 1.01),
    ],
    notes=['One size alone.'],
  )


def render(tmp_path, comparison):
  path = tmp_path / 'report.html'
  page.write(path, comparison)
  return path.read_text(encoding='utf-8')


def row(text, name):
  """The cells of the pair's row."""
  found = re.search(
    f'<span>{name}</span><small>(.*?)</small></th>(.*?)</tr>', text, re.DOTALL
  )
  return [found[1], *re.findall(r'<td.*?<span>(.*?)</span></td>', found[2])]


def heads(text):
  return re.findall(r'<h3>([^<]*)</h3>', text)


def test_the_headline_comes_first_and_in_words(tmp_path, eight):
  text = Page(render(tmp_path, eight)).text
  pair = eight.pairs[0]
  p = pair.paired
  assert pair.arm == 'p12' and p.ci95[1] < 0
  start = text.index('Named before it was run: p12 against base')
  sentence = (
    f'p12 against base: {MINUS}{-p.mean:.4f} (95 % {MINUS}{-p.ci95[0]:.4f} to '
    f'{MINUS}{-p.ci95[1]:.4f}) over 8 seeds: better. It is the mean paired '
    'difference of final validation loss, in nats a token: below zero p12 is '
    'better. Paired t-test p < 0.001, sign-flip test p = 0.008.'
  )
  assert start < text.index(sentence) < text.index('Figures')
  assert 'One size alone.' in text and 'Preliminary' not in text


def test_worse_and_cannot_be_told(tmp_path, eight):
  arms = list(eight.arms.values())
  worse = compare(arms, [('p09', 'base')])
  text = Page(render(tmp_path, worse)).text
  assert 'p09 against base: +0.0' in text and 'over 8 seeds: worse.' in text
  unclear = compare(arms, [('same', 'base')])
  text = Page(render(tmp_path, unclear)).text
  assert 'over 8 seeds: cannot be told. The interval holds zero' in text
  assert 'seeds: better' not in text


def test_an_unnamed_comparison_is_exploration(tmp_path, eight):
  text = Page(
    render(tmp_path, compare(eight.arms.values(), headline=False))
  ).text
  assert 'No comparison was named before it was run All that follows' in text
  assert 'named before it was run;' not in text and 'seeds: better' not in text


def test_every_pair_has_its_row(tmp_path, eight):
  text = render(tmp_path, eight)
  for pair in eight.pairs:
    p = pair.paired
    found = row(text, f'{pair.arm} against base')
    assert found[1] == '8'
    assert found[2] == charts.signed(p.mean)
    assert found[3] == f'{p.sd:.4f}'
    assert found[4] == ' to '.join(map(charts.signed, p.ci95))
    assert found[-1] == 'none'
  assert row(text, 'p12 against base')[0] == 'better; named before it was run'
  assert row(text, 'p09 against base')[0] == 'worse'
  assert row(text, 'p09 against base')[-2] == 'not reached'
  share = eight.pairs[0].tokens_to_baseline / (STEPS * TOKENS)
  assert row(text, 'p12 against base')[-2] == f'{100 * share:.0f} %'


def test_only_the_named_pair_escapes_holm():
  paired = comparison_lib.paired.Paired(5, -0.01, 0.01, (-0.02, -1e-4), 0.04)
  pair = comparison_lib.Pair('a', 'b', range(5), paired, 0.2, None, None, {})
  assert page.verdict(pair, paired.p_value) == 'better'
  assert page.verdict(pair, pair.p_holm) == 'cannot be told'


def test_figures_tell_what_their_bands_are(tmp_path, eight):
  text = render(tmp_path, eight)
  assert heads(text) == [
    'Mean paired differences', 'Validation loss',
    'Paired differences over time', 'Final loss by seed',
    'Tokens to the baseline&#x27;s final loss',
  ]  # fmt: skip
  # Of four arms those of the headline have a band, of three pairs all.
  assert text.count('<path class="band') == 2 + 3
  assert text.count('the 95 % interval of the mean over seeds') == 2
  parsed = Page(text)
  assert all(plot['aria-label'] for plot in parsed.all('svg', role='img'))
  for path in [tag['d'] for tag in parsed.all('path') if 'class' in tag]:
    assert re.fullmatch(r'[-MLhz\d. ]+', path)
  joins = text.count('class="join"')
  assert joins == 8 * 3  # Eight seeds from arm to arm.


def test_one_seed_has_no_band_and_no_verdict(tmp_path):
  arms = [result('base', 0.0, [3]), result('p12', -0.02, [3], 1.2)]
  text = render(tmp_path, compare(arms))
  assert 'class="band' not in text and 'class="span' not in text
  assert 'Shaded' not in text
  words = Page(text).text
  assert f'p12 against base: {MINUS}0.0' in words
  assert 'from one seed: cannot be told. Nothing says how much of' in words
  assert 'Means over one seed.' in words
  assert row(text, 'p12 against base')[3:8] == ['\N{EM DASH}'] * 5


def test_no_pair_yet(tmp_path):
  seeds = range(3)
  arms = [
    result('base', 0.0, seeds, missing=[1, 2]),
    result('p12', -0.02, seeds, 1.2, missing=[0]),
  ]
  text = render(tmp_path, compare(arms))
  words = Page(text).text
  assert 'cannot be told, as no seed has finished with both.' in words
  assert 'Preliminary: 3 of 3 seeds are not run yet.' in words
  assert '6 cells: 3 done, 3 not run yet' in words
  assert 'each mean has seeds of its own' in words
  assert 'Paired differences over time' not in heads(text)
  assert row(text, 'p12 against base')[1] == '0 of 3'


def test_nothing_run_and_no_pairs(tmp_path):
  arms = [
    result(name, 0.0, [0], power, missing=[0])
    for name, power in (('base', 1.0), ('p12', 1.2))
  ]
  text = render(tmp_path, compare(arms))
  assert heads(text) == [] and '>Figures<' not in text
  assert '2 cells: 2 not run yet' in text
  assert '<th scope="row">p12</th><td>1.2</td>' in text
  empty = Comparison('empty', {}, [], None)
  assert 'There is no cell.' in render(tmp_path, empty)


def test_all_diverged(tmp_path):
  seeds = range(4)
  arms = [
    result('base', 0.0, seeds),
    result('p12', -0.02, seeds, 1.2, diverged=seeds),
  ]
  text = render(tmp_path, compare(arms))
  words = Page(text).text
  assert 'cannot be told, as no seed has finished with both.' in words
  assert 'Cells diverged, of 4 seeds: p12 in 4.' in words
  assert 'p12: diverged with seeds 0, 1, 2, 3.' in words
  assert row(text, 'p12 against base')[-1] == 'p12 4'
  assert text.count('<strong>diverged</strong>') == 4
  both = [result(n, 0.0, seeds, diverged=seeds) for n in ('base', 'b')]
  assert heads(render(tmp_path, compare(both))) == []


def test_a_diverged_seed_is_told_beside_the_verdict(tmp_path):
  seeds = range(8)
  arms = [
    result('base', 0.0, seeds),
    result('p12', -0.05, seeds, 1.2, diverged=[2]),
  ]
  words = Page(render(tmp_path, compare(arms))).text
  assert 'over 7 seeds that both finished: better.' in words
  assert 'of 8 seeds: p12 in 1. They are in no mean' in words
  assert 'p12: diverged with seed 2.' in words


def test_mixed_devices_and_versions_are_told(tmp_path):
  seeds = range(3)
  older = VERSIONS | {'jax': '0.10.2'}
  base = result('base', 0.0, seeds)
  other = result('p12', -0.02, seeds, 1.2, versions=older, device='a GPU')
  text = render(tmp_path, compare([base, other]))
  words = Page(text).text
  assert (
    'p12 against base: the two cells of a seed come from different devices and '
    'versions, which is part of their difference.' in words
  )
  assert 'Versions, those that differ first Package 1 2 jax 0.12.0 0.1' in words
  # Each seed on a machine of its own is another matter.
  cells = {
    arm: ArmResult(arm, {}, {
      seed: record(arm, seed, shift, device=f'machine {seed}')
      for seed in seeds
    })
    for arm, shift in (('base', 0.0), ('b', 0.01))
  }  # fmt: skip
  words = Page(render(tmp_path, compare(cells.values()))).text
  assert 'b against base: its seeds come from different devices; the' in words
  assert 'part of their difference' not in words
  same = Page(render(tmp_path, compare([base, result('b', 0, seeds)]))).text
  assert 'come from different' not in same


def test_remarks_on_many_pairs_are_one(tmp_path):
  arms = [result('base', 0.0, [0])]
  arms += [result(f'a{i}', 0.01, [0], device='a GPU') for i in range(6)]
  words = Page(render(tmp_path, compare(arms))).text
  assert 'a0 against base, a1 against base, a2 against base and 3 more' in words
  assert words.count('part of their difference') == 1


def test_hundreds_of_cells(tmp_path):
  arms = [result('base', 0.0, range(5))]
  arms += [
    result(f'p{p / 10}-{i}', (p - 12) / 100, range(5), p / 10)
    for p in range(8, 16)
    for i in range(5)
  ]
  text = render(tmp_path, compare(arms, headline=False))
  words = Page(text).text
  assert '205 cells: 205 done' in words
  assert text.count('<details>') == 1
  assert 'Every cell' in words
  assert f'{charts.COLOURS} of 41 arms are drawn' in words
  assert f'{charts.COLOURS} of 40 pairs are drawn' in words
  assert '<path class="band' not in text
  assert words.count('So many curves have no bands.') == 2
  assert len(text) < 700_000


def test_cells_show_what_they_came_from(tmp_path, eight):
  parsed = Page(render(tmp_path, eight))
  cell = eight.arms['p12'].seeds[3]
  assert (
    f'p12 3 done {cell["validation_loss"]:.4f} '
    f'{cell["params_digest"][7:17]} 121 a CPU, 2 cores 1 915b819' in parsed.text
  )
  assert parsed.all('code', title=cell['params_digest'])
  total = duration_of(eight)
  assert (
    f'32 cells: 32 done. Their steps took {total} and 9.9e+13' in parsed.text
  )


def duration_of(comparison):
  seconds = sum(
    cell['seconds']
    for a in comparison.arms.values()
    for cell in a.seeds.values()
  )
  return f'{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min'


def test_configuration_tells_what_the_arms_change(tmp_path, eight):
  text = Page(render(tmp_path, eight)).text
  changed = text.index('What the arms change Arm optimizer.power base 1.0 p12')
  assert changed < text.index('What all share:') < text.index('b2 0.95')
  assert 'seed 0 ' not in text[changed:]
  assert text.index('To run it again python -m train x') > changed


def control(name, of, **fields):
  arm = result(name, 0.01, range(2), 1.2)
  changed = {f'optimizer.{key}': value for key, value in fields.items()}
  return ArmResult(name, {**of.overrides, **changed}, arm.seeds)


def test_controls_say_what_they_take_away(tmp_path):
  base, p12 = (result(n, 0.0, range(2), p) for n, p in
               (('base', 1.0), ('p12', 1.2)))  # fmt: skip
  rate = {'learning_rate': 0.015032771777641678, 'weight_decay': 0.1}
  arms = [
    base, p12,
    control('base-lr-of-p12', base, **rate),
    control('p12-measured-lr', p12, **rate),
    control('p12-eps', p12, eps=2.51188643e-10),
    control('p12-norm', p12, match_norm=True),
    control('p12-lr0.01', p12, **rate), control('p12-lr0.02', p12, **rate),
    control('mine-eps', base, eps=1.0), control('p12-eps-2', p12, b1=0.5),
  ]  # fmt: skip
  words = Page(render(tmp_path, compare(arms))).text
  told = words[words.index('Controls') : words.index('Figures')]
  for sentence in (
    'base-lr-of-p12 : learning rate 0.01503, at which its steady steps are as '
    'long as those of p12: against it, p12 shows',
    'p12-measured-lr : learning rate 0.01503, at which',
    'those of the baseline, as measured: it takes away',
    "p12-eps : Adam's eps is 2.512e-10,",
    'p12-norm : the powered gradient is scaled back',
    'p12-lr0.01, p12-lr0.02 : p12 at the other learning rates that it is tuned',
  ):
    assert sentence in told
  assert 'mine' not in told and 'eps-2' not in told
  assert '0.0150327' not in words[words.index('What the arms change') :]
  plain = Page(render(tmp_path, compare([base, p12]))).text
  assert 'Controls' not in plain


def test_page_loads_nothing_and_repeats_itself(tmp_path, eight):
  text = render(tmp_path, eight)
  assert text == render(tmp_path, eight)
  parsed = Page(text)
  assert '://' not in text and 'url(' not in text and '@import' not in text
  tags = {tag for tag, _ in parsed.tags}
  assert not {'script', 'link', 'img', 'iframe'} & tags
  ids = [attrs['id'] for _, attrs in parsed.tags if 'id' in attrs]
  assert len(ids) == len(set(ids))
  links = {a['href'] for _, a in parsed.tags if 'href' in a}
  assert links <= {f'#{name}' for name in ids} and links
  assert "default-src 'none'" in text


def test_hostile_strings_stay_text(tmp_path):
  evil = '"><script>alert(1)</script><img src=x onerror=y>\'&amp;\ud800'
  fields = {'device': evil, 'versions': {evil: evil}, 'code': evil}
  arms = [result('base', 0.0, range(2)), result(evil, 0.1, range(2), **fields)]
  arms[1].overrides[evil] = evil
  arms[1].seeds[0]['config'][evil] = evil
  arms[1].seeds[0]['params_digest'] = evil
  text = render(tmp_path, compare(arms, title=evil, notes=[evil], command=evil))
  parsed = Page(text)
  assert not {'script', 'img'} & {tag for tag, _ in parsed.tags}
  assert not any(name.startswith('on') for _, a in parsed.tags for name in a)
  assert parsed.text.count(evil.replace('\ud800', '?')) > 10


def test_an_interval_too_wide_is_cut_and_said_so(tmp_path):
  arms = [result('base', 0.0, range(8))]
  arms += [result(name, -0.02, range(8), 1.2) for name in ('a', 'b', 'c')]
  two = result('two', -0.02, range(8), 1.2, missing=range(2, 8))
  two.seeds[0]['validation_loss'] += 0.3
  text = render(tmp_path, compare([*arms, two]))
  assert 'without a mark at its end goes on beyond the edge' in text
  forest = text[text.index('Mean paired diff') : text.index('Validation loss<')]
  assert forest.count('class="span') == 4 and forest.count('class="cap') == 6


def test_bad_path_is_one_line(tmp_path, eight):
  with pytest.raises(UserError, match=r'cannot write .*: No such file'):
    page.write(tmp_path / 'no' / 'x.html', eight)


@given(
  st.lists(
    st.tuples(
      st.sampled_from(['done', 'diverged', 'missing']), st.floats(1, 9)
    ),
    min_size=6,
    max_size=6,
  )
)
def test_whatever_the_cells_are_there_is_a_page(tmp_path_factory, cells):
  folder = tmp_path_factory.mktemp('any')
  arms = []
  for k, name in enumerate(('base', 'p12')):
    seeds = {}
    for seed, (status, loss) in enumerate(cells[3 * k : 3 * k + 3]):
      cell = record(name, seed, diverged=status == 'diverged')
      if status == 'done':
        cell['validation'][-1][2] = cell['validation_loss'] = loss
      seeds[seed] = None if status == 'missing' else cell
    arms.append(ArmResult(name, {}, seeds))
  for tag, attrs in Page(render(folder, compare(arms))).tags:
    for key in ('x', 'y', 'x1', 'x2', 'y1', 'y2', 'd', 'height', 'cx'):
      place = attrs.get(key) or ''
      assert 'nan' not in place and 'inf' not in place, (tag, attrs)


def test_a_figure_page(tmp_path):
  points = [(0.8, plots.Estimate(0.01, 0.0, 0.02)), (1.2, -0.02)]
  y = charts.y_axis('Difference', [0.02, -0.02], symmetric=True)
  x = charts.y_axis('Power p', [0.8, 1.2])
  drawn = charts.legend(['AdamW']) + plots.plot(
    'Sweep.', x, y, [plots.Dots(0, points, 'AdamW')], zero=True
  )
  path = tmp_path / 'figure.html'
  sections = [
    figure_page.Section('Power', 'A <sweep>.', drawn, [['p', 'n'], ['1', '3']]),
    figure_page.Section('Nothing', 'Not run.', ''),
  ]
  figure_page.write(path, 'Fig. 2', sections, notes=['One size.'])
  text = path.read_text(encoding='utf-8')
  parsed = Page(text)
  assert heads(text) == ['Power'] and 'Nothing Not run.' in parsed.text
  assert 'A <sweep>.' in parsed.text and 'One size.' in parsed.text
  assert 'Power p n 1 3' in parsed.text
  assert "default-src 'none'" in text and '://' not in text


def labels(text):
  return [plot['aria-label'] for plot in Page(text).all('svg', role='img')]


def test_the_table_judges_by_holm_but_the_named_pair(tmp_path):
  paired = comparison_lib.paired.Paired(5, -0.01, 0.01, (-0.02, -1e-4), 0.04)
  seeds = range(5)
  arms = {name: result(name, 0.0, seeds) for name in ('base', 'a', 'b')}
  pairs = [
    comparison_lib.Pair(arm, 'base', seeds, paired, 0.08, None, None, {})
    for arm in ('a', 'b')
  ]
  text = render(tmp_path, Comparison('t', arms, pairs, ('a', 'base')))
  assert row(text, 'a against base')[0] == 'better; named before it was run'
  assert row(text, 'b against base')[0] == 'cannot be told'


def test_differences_over_time_end_at_the_mean_of_the_table(tmp_path, eight):
  label = labels(render(tmp_path, eight))[2]
  assert label.startswith('Mean paired difference by training tokens; ')
  for pair in eight.pairs:
    last = charts.signed(pair.paired.mean)
    assert f'{pair.arm} against base ends at {last}' in label


def test_curves_are_means_over_the_seeds_that_all_have(tmp_path):
  arms = [
    result('base', 0.0, range(8)),
    result('p12', -0.02, range(8), 1.2, missing=[5, 6, 7]),
  ]
  text = render(tmp_path, compare(arms))
  assert 'Means over 5 seeds.' in text
  mean = np.mean([arms[0].losses()[seed] for seed in range(5)])
  assert f'base ends at {mean:.4f}' in labels(text)[1]
  assert '5 of 8 seeds</text>' in text


def test_of_many_the_named_pair_is_drawn(tmp_path):
  arms = [result('base', 0.0, range(2))]
  arms += [result(f'a{i}', -0.01 * i, range(2), 1.2) for i in range(9)]
  arms += [result('worst', 0.5, range(2), 1.2)]
  wanted = [('worst', 'base')] + [(f'a{i}', 'base') for i in range(9)]
  found = labels(render(tmp_path, compare(arms, wanted)))
  assert 'worst ends at' in found[1] and 'base ends at' in found[1]
  assert 'worst against base ends at' in found[2]
  assert 'a8 against base' in found[2] and 'a0 against' not in found[2]


def test_tokens_are_shown_for_each_seed(tmp_path, eight):
  text = render(tmp_path, eight)
  share = eight.pairs[0].tokens_to_baseline / (STEPS * TOKENS)
  assert f'p12 against base {100 * share:.0f} %' in labels(text)[-1]
  assert text.count('class="dot c1"') == 8
