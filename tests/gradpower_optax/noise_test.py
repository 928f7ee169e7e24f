"""Gradient noise: against numpy in double precision, and known noise."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from gradpower_optax import noise

POWERS = (0.8, 1.0, 1.2, 1.4)
UNOPTIMIZED = {'xla_backend_optimization_level': 0}
# Of mean 0 and variance 1.
DRAWS = {
  'uniform': functools.partial(
    jax.random.uniform, minval=-(3**0.5), maxval=3**0.5
  ),
  'gaussian': jax.random.normal,
  'laplace': lambda key, shape: jax.random.laplace(key, shape) / 2**0.5,
}


update = jax.jit(noise.update, compiler_options=UNOPTIMIZED)


@functools.partial(jax.jit, compiler_options=UNOPTIMIZED)
def sums(samples):
  """Statistics of gradients stacked in each leaf, fed by a jitted scan."""
  first = jax.tree.map(lambda x: x[0], samples)
  body = lambda stats, g: (noise.update(stats, g), None)
  return jax.lax.scan(body, noise.init(first, POWERS), samples)[0]


@functools.partial(jax.jit, static_argnums=(0, 1), compiler_options=UNOPTIMIZED)
def drawn(kind, shape, seed):
  return DRAWS[kind](jax.random.key(seed), shape)


@functools.cache
def known(kind, mean, count, seed=0):
  draw = drawn(kind, (count, 800, 64), seed)
  return noise.summarize(sums(mean + draw)).overall


def reference(samples, parts=1, eps=1e-8, clip_norm=np.inf):
  """The same in numpy; samples of one tensor, [k, ...]."""
  g = np.asarray(samples, np.longdouble).reshape(len(samples), -1)
  k = len(g)
  mean, variance = g.mean(0), g.var(0, ddof=1)
  m2, m4 = g.var(0), ((g - mean) ** 4).mean(0)
  k4 = k**2 * ((k + 1) * m4 - 3 * (k - 1) * m2**2)
  k4 /= (k - 1) * (k - 2) * (k - 3)
  squared = (k - 1) / (k + 1) * (variance**2 - k4 / k)
  signal = (mean**2).sum() - variance.sum() / k
  seen = (g != 0).any(0)
  square = np.maximum(mean**2 - variance / k, 0) + variance / parts
  clip = min(1, clip_norm / np.sqrt(max(signal + variance.sum() / parts, 0)))
  found = {
    'signal': signal,
    'noise': variance.sum(),
    'tail': k4.sum() / squared.sum() / parts,
    'unseen': (~seen).sum(),
    'eps_share': [], 'u': [], 'step_ratio': [],
  }  # fmt: skip
  for p in np.longdouble(POWERS):
    phi = (np.sign(g) * np.abs(g) ** p)[:, seen]
    q = (phi**2).sum(0)
    s = ((phi.sum(0) ** 2 / q - 1) / (k - 1)).mean()
    a = ((np.abs(phi).sum(0) ** 2 / q - 1) / (k - 1)).mean()
    s += noise._gaussian_bias(float(p)) / k * s * (1 - s)
    small = (np.sqrt(square[seen]) * clip) ** p < 10 * eps
    found['eps_share'].append(small.mean())
    found['u'].append(np.sqrt(max(s, 0)))
    found['step_ratio'].append(np.sqrt(a))
  found['step_ratio'] /= found['step_ratio'][1]
  return found


@pytest.mark.parametrize('count', [4, pytest.param(33, marks=pytest.mark.slow)])
@pytest.mark.parametrize('mean', [0.0, 1.0, 30.0])
def test_equals_numpy(count, mean):
  key = jax.random.key(count)
  samples = 1e-4 * (mean + jax.random.laplace(key, (count, 5, 7, 6)))
  samples = samples.at[:, 0, 0].set(0)
  found = noise.summarize(
    sums(samples), parts=4, eps=1e-6, clip_norm=1e-3
  ).overall
  expected = reference(samples, parts=4, eps=1e-6, clip_norm=1e-3)
  for name, value in expected.items():
    np.testing.assert_allclose(
      np.array(getattr(found, name), np.float64),
      np.array(value, np.float64),
      rtol=2e-3 if name == 'tail' else 2e-5,
      atol=1e-3 if name == 'tail' else 2e-5 * found.noise,
      err_msg=name,
    )
  assert found.size == 210
  over = found.noise / found.signal if found.signal > 0 else np.inf
  assert found.noise_scale == pytest.approx(over)
  assert found.noise_to_signal == pytest.approx(np.sqrt(over / 4))


@settings(max_examples=15)
@given(st.integers(0, 1000), st.integers(-60, 60))
def test_units_change_nothing_that_has_none(seed, exponent):
  """Powers of two, so that equality is to the bit."""
  samples = 0.2 + jax.random.normal(jax.random.key(seed), (8, 20, 20))
  one = noise.summarize(sums(samples), eps=0.0)
  other = noise.summarize(sums(samples * 2.0**exponent), eps=0.0)
  for name, value in one.overall._asdict().items():
    factor = 4.0**exponent if name in ('signal', 'noise') else 1
    np.testing.assert_array_equal(
      np.array(getattr(other.overall, name)), np.array(value) * factor, name
    )


def test_tiny_gradients_do_not_underflow():
  """At p = 1.4 the square of 1e-25 is no float32."""
  samples = jax.random.normal(jax.random.key(0), (8, 20, 20)) + 0.5
  found = noise.summarize(sums(samples * 1e-25)).overall
  expected = noise.summarize(sums(samples)).overall
  np.testing.assert_allclose(found.u, expected.u, rtol=1e-4)
  assert found.noise == pytest.approx(expected.noise * 1e-50, rel=1e-4)
  assert found.eps_share == (1, 1, 1, 1)


@pytest.mark.slow
@pytest.mark.parametrize('kind', DRAWS)
def test_noise_alone_has_no_power_to_suggest(kind):
  draw = drawn(kind, (8, 4, 200, 50), 1)
  found = noise.summarize(sums({str(i): draw[:, i] for i in range(4)}))
  over = [x.signal / x.noise for x in found.tensors.values()]
  assert abs(np.mean(over)) < 4 * np.std(over) / 2
  assert found.overall.power == 1


@pytest.mark.parametrize('kind', DRAWS)
def test_estimate_is_unbiased_without_a_signal(kind):
  draw = drawn(kind, (8, 800, 64), 2)
  reduced = noise._reduce(sums(draw), 0.0, 1, np.inf)
  s = np.asarray(reduced['s'][0]).sum(0) / draw[0].size
  # One element's has a variance below 2 / (k - 1)^2, k = 8.
  assert (np.abs(s) < 4 * np.sqrt(2 / 49 / draw[0].size)).all()


def test_without_noise_all_is_signal():
  g = jax.random.normal(jax.random.key(0), (20, 20))
  found = noise.summarize(sums(jnp.stack([g] * 8))).overall
  np.testing.assert_allclose(found.u, 1, rtol=1e-5)
  np.testing.assert_allclose(found.step_ratio, 1, rtol=1e-5)
  assert found.signal == pytest.approx(float(jnp.sum(g**2)), rel=1e-5)
  assert found.noise_to_signal < 1e-3


@pytest.mark.parametrize('kind, tail, drift, step', [
  ('uniform', -1.2, 1.065, 0.968),
  ('gaussian', 0.0, 0.996, 0.940),
  ('laplace', 3.0, 0.902, 0.903),
])  # fmt: skip
def test_known_noise_with_many_gradients(kind, tail, drift, step):
  found = known(kind, 0.1, 64)
  assert found.tail == pytest.approx(tail, abs=0.06)
  assert found.noise_to_signal == pytest.approx(10, rel=0.05)
  assert found.u[2] / found.u[1] == pytest.approx(drift, abs=0.02)
  assert found.step_ratio[2] == pytest.approx(step, abs=0.013)
  assert found.u[1] == pytest.approx(0.0995, abs=3 * found.u_error[1] + 0.001)


@pytest.mark.parametrize('kind, step', [
  ('uniform', 0.964), ('gaussian', 0.945), ('laplace', 0.929),
])  # fmt: skip
def test_eight_gradients_are_as_far_off_as_the_docstring_says(kind, step):
  assert known(kind, 0.1, 8).step_ratio[2] == pytest.approx(step, abs=0.002)


@pytest.mark.parametrize('kind, low, high', [
  ('uniform', 1.3, 1.4), ('gaussian', 0.9, 1.15), ('laplace', 0.8, 0.85),
])  # fmt: skip
@pytest.mark.parametrize('count', [8, 32])
def test_suggests_the_power_that_the_tail_asks_for(kind, low, high, count):
  found = known(kind, 0.3, count)
  assert low <= found.power <= high
  assert found.power_error < 0.1


def test_tail_is_right_from_eight_gradients():
  for kind, tail in (('uniform', -1.2), ('gaussian', 0), ('laplace', 3)):
    assert known(kind, 0.3, 8).tail == pytest.approx(tail, abs=0.15)


def test_top_of_a_parabola_is_found():
  powers = np.array([0.5, 0.8, 1.0, 1.4, 2.0])
  tops = np.array([0.3, 0.6, 0.9, 1.13, 1.9, 2.4])
  s = 1 - (powers - tops[:, None]) ** 2
  np.testing.assert_allclose(noise._top(powers, s), np.clip(tops, 0.5, 2))
  assert noise._top(powers, (powers - 1)[None] ** 2) == 2  # No top within.


def test_errors_are_those_of_repeated_draws():
  found = [known('gaussian', 0.3, 8, seed) for seed in range(12)]
  spread = np.std([x.u[1] for x in found], ddof=1)
  assert 0.5 < np.mean([x.u_error[1] for x in found]) / spread < 2


@pytest.mark.parametrize(
  'kind', [pytest.param('Auto', marks=pytest.mark.slow), 'Explicit']
)
def test_sharded_gradients_give_the_same(kind):
  if len(jax.devices()) < 8:
    pytest.skip('needs 8 devices; tests/conftest.py asks for fake ones')
  mesh = jax.make_mesh(
    (4, 2), ('fsdp', 'tensor'), axis_types=(getattr(AxisType, kind),) * 2
  )
  specs = {'w': P('fsdp', 'tensor'), 'g': P()}
  keys = jax.random.split(jax.random.key(0))
  samples = {
    name: jax.random.normal(key, (5, *shape)) + 0.3
    for key, (name, shape) in zip(
      keys, {'w': (16, 8), 'g': ()}.items(), strict=True
    )
  }
  expected = noise.summarize(sums(samples))
  place = lambda i: {
    name: jax.device_put(x[i], NamedSharding(mesh, specs[name]))
    for name, x in samples.items()
  }
  stats = noise.init(place(0), POWERS)
  for i in range(5):
    stats = update(stats, place(i))
  for x in jax.tree.leaves(stats.tensors['w'].sums):
    assert x.sharding.is_equivalent_to(NamedSharding(mesh, specs['w']), 2)
  found = noise.summarize(stats)
  assert found.tensors.keys() == {'w', 'g'}
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=3e-5), found, expected
  )


def test_bfloat16_gradients_are_summed_in_float32():
  samples = (0.5 + jax.random.normal(jax.random.key(0), (8, 20, 20))).astype(
    jnp.bfloat16
  )
  stats = noise.init(jnp.zeros((20, 20), jnp.bfloat16))
  for g in samples:
    stats = update(stats, g)
  assert {x.dtype.name for x in jax.tree.leaves(stats)} == {'float32', 'int32'}
  found = noise.summarize(stats).overall
  expected = reference(samples.astype(jnp.float32))
  np.testing.assert_allclose(found.u, np.float64(expected['u']), rtol=1e-4)


def test_summary_is_plain_and_names_tensors_by_path():
  tree = {'layers': [{'w': jnp.ones((4, 3, 2))}, {'w': jnp.ones((4, 5))}]}
  found = noise.summarize(sums(tree), examples_per_part=16)
  assert found.tensors.keys() == {'layers/0/w', 'layers/1/w'}
  assert found.gradients == 4
  text = json.dumps(found.overall._asdict())
  assert json.loads(text)['size'] == 11
  assert found.overall.noise_scale == 0


def test_memory_is_what_the_docstring_says():
  params = {'a': jnp.zeros((10, 10)), 'b': None}
  leaves = jax.tree.leaves(noise.init(params).tensors)
  assert sum(x.size for x in leaves if x.ndim) == 15 * 100


def test_more_parts_are_less_noise():
  samples = 0.1 + jax.random.laplace(jax.random.key(0), (8, 20, 20))
  one, eight = (noise.summarize(sums(samples), parts=n).overall for n in (1, 8))
  assert one.noise_to_signal == pytest.approx(8**0.5 * eight.noise_to_signal)
  assert one.tail == pytest.approx(8 * eight.tail)
  assert (one.u, one.noise_scale) == (eight.u, eight.noise_scale)


def test_what_is_not_finite_stays_in_its_tensor():
  good = 0.5 + jax.random.normal(jax.random.key(0), (5, 20, 20))
  bad = good.at[2, 3, 4].set(jnp.nan)
  found = noise.summarize(sums({'bad': bad, 'good': good}))
  assert np.isnan(found.tensors['bad'].u).all()
  assert found.tensors['bad'].power == 1
  assert np.isfinite(found.tensors['good'].u).all()
  assert np.isnan(found.overall.u).all()


def test_nothing_is_told_of_zeros():
  found = noise.summarize(sums(jnp.zeros((8, 20, 20)))).overall
  assert (found.unseen, found.power) == (400, 1.0)
  assert np.isnan(found.power_error)


def test_without_noise_no_power_is_best():
  g = jax.random.normal(jax.random.key(0), (20, 20))
  same = jnp.stack([g] * 8)
  found = noise.summarize(sums(same)).overall
  assert found.power == 1 and np.isnan(found.power_error)
  found = noise.summarize(
    sums(same * (1 + 0.01 * jax.random.normal(jax.random.key(1), same.shape)))
  ).overall
  assert (found.power, found.power_error) == (0.8, 0)  # The least of them.


@pytest.mark.parametrize(
  'params', [{'a': {'b': 1.0}, 'a/b': 2.0}, [{'b/c': 1.0, 'b': {'c': 1.0}}]]
)
def test_paths_that_are_one_text(params):
  with pytest.raises(ValueError, match='two parameters have the path'):
    noise.init(params)


@pytest.mark.parametrize('params', [{}, [], {'a': None}])
def test_there_must_be_parameters(params):
  with pytest.raises(ValueError, match='there are no parameters'):
    noise.init(params)


@pytest.mark.parametrize('powers', [(1.2,), (0, 1, 2), (1, 2, np.nan), ()])
def test_says_which_powers_it_takes(powers):
  with pytest.raises(ValueError, match='needs three powers in'):
    noise.init({'w': jnp.zeros(3)}, powers)


@pytest.mark.parametrize('grad', [
  {'w': jnp.zeros(4)},
  {'v': jnp.zeros(3)},
  {'w': jnp.zeros(3), 'v': jnp.zeros(3)},
  {'w': jnp.zeros(3, jnp.complex64)},
])  # fmt: skip
def test_says_that_gradients_do_not_fit(grad):
  stats = noise.init({'w': jnp.zeros(3)})
  with pytest.raises(ValueError, match='gradients are not') as raised:
    noise.update(stats, grad)
  assert '\n' not in str(raised.value)


def test_says_what_is_too_few():
  stats = sums({'w': jnp.ones((1, 3))})
  with pytest.raises(ValueError, match='1 gradients, 1 parts: too few'):
    noise.summarize(stats)
  stats = noise.update(stats, {'w': jnp.ones(3)})
  for parts in (0, np.nan):
    with pytest.raises(ValueError, match=f'2 gradients, {parts} parts: too'):
      noise.summarize(stats, parts=parts)
  for name, value in [
    ('eps', -1e-9), ('eps', np.nan), ('eps', np.inf), ('clip_norm', 0.0),
    ('clip_norm', -1.0), ('clip_norm', np.nan), ('examples_per_part', 0),
    ('examples_per_part', np.nan),
  ]:  # fmt: skip
    with pytest.raises(ValueError, match=f'{name} must be .*, not {value}'):
      noise.summarize(stats, **{name: value})
  assert np.isnan(noise.summarize(stats).overall.tail)
