import dataclasses
import importlib.util
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import traffic
from gradpower_optax import sign_power
from train.config import Config, OptimizerConfig
from train.optimizer import make_optimizer, schedule

_spec = importlib.util.spec_from_file_location(
  'aot', pathlib.Path(__file__).parents[1] / 'models' / 'aot.py'
)
aot = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(aot)

STEPS = 12
OPTIMIZER = OptimizerConfig(
  power=1.3, power_eps=1e-3, learning_rate=0.02, warmup_steps=2, eps=1e-4,
  clip_norm=1.0,
)  # fmt: skip
SHAPES = {'w': (3, 5), 'b': (4,), 'deep': {'u': (2, 2, 2)}}


@pytest.fixture(params=['cpu', 'others'])
def platform(request, monkeypatch):
  """Both ways to clip and to take the power, on a CPU."""
  if request.param == 'others':
    monkeypatch.setattr(
      lax, 'platform_dependent', lambda *args, cpu, default: default(*args)
    )
  return request.param


def draw(seed, scale=1.0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda shape: (scale * rng.normal(size=shape)).astype(np.float32),
    SHAPES,
    is_leaf=lambda x: isinstance(x, tuple),
  )


def gradients():
  """Some above the norm to clip at, some below."""
  return [draw(100 + i, scale=[3.0, 0.05][i % 2]) for i in range(STEPS)]


def train(optimizer, params, grads):
  @jax.jit
  def step(params, state, grads):
    updates, state, *_ = optimizer.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  state = optimizer.init(params)
  for g in grads:
    params, state = step(params, state, g)
  return params


def adam_power(c, rates, params, grads, order=('clip', 'power')):
  """AdamPower as the paper prints it, in float64."""
  theta = [np.float64(x) for x in jax.tree.leaves(params)]
  m = [np.zeros_like(x) for x in theta]
  v = [np.zeros_like(x) for x in theta]
  for t, (tree, rate) in enumerate(zip(grads, rates, strict=True), start=1):
    g = [np.float64(x) for x in jax.tree.leaves(tree)]
    for stage in order:
      if stage == 'power':
        g = [np.sign(x) * (np.abs(x) + c.power_eps) ** c.power for x in g]
      else:
        norm = math.sqrt(sum((x**2).sum() for x in g))
        g = [x * min(1.0, c.clip_norm / norm) for x in g]
    for i, x in enumerate(g):
      m[i] = c.b1 * m[i] + (1 - c.b1) * x
      v[i] = c.b2 * v[i] + (1 - c.b2) * x**2
      step = m[i] / (1 - c.b1**t)
      step /= np.sqrt(v[i] / (1 - c.b2**t)) + c.eps
      theta[i] = theta[i] - rate * (step + c.weight_decay * theta[i])
  return theta


def furthest(params, theta):
  return max(
    np.abs(np.float64(x) - y).max()
    for x, y in zip(jax.tree.leaves(params), theta, strict=True)
  )


@pytest.mark.parametrize('power', [1.3, 1.0, 0.8])
def test_the_chain_is_clip_power_adamw(power):
  c = dataclasses.replace(OPTIMIZER, power=power)
  params = train(
    make_optimizer(Config(optimizer=c, steps=STEPS)), draw(0), gradients()
  )
  rates = [0.0, 0.01, *[0.02] * 6, *[0.02 - 0.018 * i / 4 for i in range(4)]]
  wanted = adam_power(c, rates, draw(0), gradients())
  assert furthest(params, wanted) < 2e-6
  if power != 1:
    other = adam_power(c, rates, draw(0), gradients(), ('power', 'clip'))
    assert furthest(params, other) > 1e-4


def links(c):
  """Optax's own: what clips and takes the power, and AdamW."""
  before = [optax.clip_by_global_norm(c.clip_norm)] if c.clip_norm else []
  if c.power != 1 or c.power_eps:
    before.append(sign_power(c.power, eps=c.power_eps))
  adamw = optax.adamw(
    schedule(c, STEPS), b1=0.9, b2=0.95, eps=1e-4, weight_decay=0.1
  )
  return before, adamw


def optax_chain(c):
  before, adamw = links(c)
  return optax.chain(*before, adamw)


def powered(c, grads):
  before = optax.chain(*links(c)[0])
  return [jax.jit(before.update)(g, before.init(g))[0] for g in grads]


@pytest.mark.parametrize(
  ('power', 'power_eps', 'clip_norm'),
  [(1, 0, 1), (1, 0, 0), (1.2, 0, 0.7), (1.2, 0, 0), (2.5, 1e-3, 0.7)],
)
def test_updates_are_those_of_optax_to_the_bit(
  platform, power, power_eps, clip_norm
):
  c = dataclasses.replace(
    OPTIMIZER, power=power, power_eps=power_eps, clip_norm=clip_norm
  )
  ours = train(
    make_optimizer(Config(optimizer=c, steps=STEPS)), draw(0), gradients()
  )
  if platform == 'cpu' and power != 1 and clip_norm:
    # Compilers round a product in a sum or not, depending on what is beside
    # it: here AdamW is on its own.
    optaxs = train(links(c)[1], draw(0), powered(c, gradients()))
  else:
    optaxs = train(optax_chain(c), draw(0), gradients())
  jax.tree.map(np.testing.assert_array_equal, ours, optaxs)


def test_the_state_is_that_of_the_chain():
  """A checkpoint of the chain can go on."""
  ours = make_optimizer(Config(optimizer=OPTIMIZER, steps=STEPS))
  params = draw(0)
  state = ours.init(params)
  assert jax.tree.structure(state) == jax.tree.structure(
    optax_chain(OPTIMIZER).init(params)
  )
  _, after, _ = ours.update(params, state, params)
  assert jax.tree.structure(after) == jax.tree.structure(state)
  assert type(after) is type(state)


def test_clip_norm_0_does_not_clip():
  c = dataclasses.replace(OPTIMIZER, clip_norm=0.0)
  params = train(make_optimizer(Config(optimizer=c, steps=STEPS)), draw(0),
                 gradients())  # fmt: skip
  rates = [float(schedule(c, STEPS)(i)) for i in range(STEPS)]
  wanted = adam_power(c, rates, draw(0), gradients(), ('power',))
  assert furthest(params, wanted) < 2e-6


NAMES = 'grad_norm', 'clipped_norm', 'powered_norm'


def measure(c):
  """Gradients to the three norms, compiled once."""
  optimizer = make_optimizer(Config(optimizer=c, steps=STEPS))
  update = jax.jit(optimizer.update)

  def norms(grads):
    params = jax.tree.map(jnp.ones_like, grads)
    *_, found = update(grads, optimizer.init(params), params)
    assert found.keys() == set(NAMES)
    assert {(str(x.dtype), x.shape) for x in found.values()} == {
      ('float32', ())
    }
    return [np.longdouble(found[name]) for name in NAMES]

  return norms


@pytest.mark.parametrize('clip_norm', [1.0, 0.0])
@pytest.mark.parametrize(
  ('power', 'power_eps'), [(0.8, 0), (1, 0), (1.2, 0), (1.2, 1e-9), (1.5, 0)]
)
def test_norms(platform, power, power_eps, clip_norm):
  del platform
  c = dataclasses.replace(
    OPTIMIZER, power=power, power_eps=power_eps, clip_norm=clip_norm
  )
  norms = measure(c)
  eps = np.longdouble(np.float32(power_eps))
  # At 1e-12, |g|^(2 * 1.5) is where float32 ends.
  for scale in (1e-12, 1e-9, 1e-6, 1e-2, 1.0, 1e4)[power == 1.5 :]:
    grads = draw(1, scale)
    grads['w'][0] = 0
    g = np.concatenate([
      np.asarray(x, np.longdouble).ravel() for x in jax.tree.leaves(grads)
    ])  # fmt: skip
    norm = np.sqrt((g**2).sum())
    clipped = g * min(1, clip_norm / norm) if clip_norm else g
    powered = np.sign(g) * (np.abs(clipped) + eps) ** np.longdouble(power)
    wanted = [norm] + [np.sqrt((x**2).sum()) for x in (clipped, powered)]
    np.testing.assert_allclose(norms(grads), wanted, rtol=1e-5)


def test_norms_of_no_gradient(platform):
  del platform
  c = dataclasses.replace(OPTIMIZER, power=1.2, power_eps=0.0)
  assert measure(c)(draw(0, 0.0)) == [0, 0, 0]


@pytest.mark.parametrize('power', [1.0, 1.2])
@pytest.mark.parametrize('value', [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_shows(platform, value, power):
  del platform
  c = dataclasses.replace(OPTIMIZER, power=power, power_eps=0.0)
  grads = draw(0)
  grads['b'][1] = value
  norms = measure(c)(grads)
  np.testing.assert_equal(norms[0], np.longdouble(value))
  assert not np.isfinite(norms).any()


@pytest.mark.parametrize('power', [1.0, 1.2])
def test_norms_are_global(platform, power):
  """Sharded: the same numbers; and nothing moves but sums of squares."""
  mesh = jax.make_mesh((8,), ('x',), axis_types=(jax.sharding.AxisType.Auto,))
  place = {'w': P('x'), 'v': P(None, 'x'), 'whole': P()}
  shapes = {'w': (16, 3), 'v': (5, 8), 'whole': (7,)}
  rng = np.random.default_rng(0)
  grads = {k: rng.normal(size=s).astype('float32') for k, s in shapes.items()}
  c = dataclasses.replace(OPTIMIZER, power=power, power_eps=0.0)
  optimizer = make_optimizer(Config(optimizer=c, steps=STEPS))
  update = jax.jit(optimizer.update)
  alone = update(grads, optimizer.init(grads), grads)
  sharded = {
    k: jax.device_put(g, NamedSharding(mesh, place[k]))
    for k, g in grads.items()
  }
  arguments = sharded, jax.jit(optimizer.init)(sharded), sharded
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-6, atol=1e-9),
    alone,
    update(*arguments),
  )
  text = update.lower(*arguments).compile().as_text()
  reductions = re.findall(r'= (.*) all-reduce\(', text)
  assert all(set(re.findall(r'\w+\[(.*?)\]', x)) == {''} for x in reductions)
  # On a CPU, one before the clip and one in either branch after it.
  assert len(reductions) == (3 if platform == 'cpu' and power != 1 else 1)
  assert not re.search(r' (all-gather|all-to-all|collective-permute)\(', text)


@pytest.mark.parametrize('power_eps', [0.0, 1e-8])
def test_on_a_cpu_norms_are_free(power_eps):
  """No more memory traffic than the chain's, and a power instead of two."""
  c = dataclasses.replace(OPTIMIZER, power=1.2, power_eps=power_eps)
  ours = make_optimizer(Config(optimizer=c, steps=STEPS))
  chain = optax_chain(c)
  size = 2**16
  g = jnp.ones(size)

  def cost(function):
    compiled = (
      jax.jit(function, donate_argnums=1).lower(g, ours.init(g), g).compile()
    )
    found = compiled.cost_analysis()
    temporary = compiled.memory_analysis().temp_size_in_bytes
    return (
      found['bytes accessed'] / 4 / size,
      temporary / 4 / size,
      found['flops'] / size,
    )

  words, temporary, flops = cost(ours.update)
  plain_words, plain_temporary, plain_flops = cost(chain.update)
  assert words < plain_words + 0.01
  assert temporary < plain_temporary + 0.01
  assert flops < 0.7 * plain_flops


@pytest.mark.slow
def test_on_a_tpu_norms_are_read_where_the_gradient_is():
  mesh = aot.topology_mesh('v5e:2x4', fsdp=8)
  c = dataclasses.replace(OPTIMIZER, power=1.2, power_eps=0.0)
  ours = make_optimizer(Config(optimizer=c, steps=STEPS))
  params = {
    name: jax.ShapeDtypeStruct(
      (2048, 2048), jnp.float32, sharding=NamedSharding(mesh, P('fsdp'))
    )
    for name in 'abc'
  }
  whole = NamedSharding(mesh, P())
  state = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=params['a'].sharding if x.ndim else whole
    ),
    jax.eval_shape(ours.init, params),
  )

  def compile(update):
    step = jax.jit(update, donate_argnums=1)
    text = step.lower(params, state, params).compile().as_text()
    moved = traffic.count(text)
    reductions = len(re.findall(r' all-reduce(?:-start)?\(', text))
    return (moved.read + moved.written) / (3 * 4 * 2048 * 256), reductions

  words, reductions = compile(ours.update)
  plain_words, plain_reductions = compile(optax_chain(c).update)
  assert words < plain_words + 0.2  # Of eight.
  assert reductions == plain_reductions == 1


def rate(name, count, *, steps=300, warmup=10, ratio=0.1):
  config = OptimizerConfig(
    learning_rate=2.0, schedule=name, warmup_steps=warmup, final_lr_ratio=ratio
  )
  return float(schedule(config, steps)(jnp.int32(count)))


@pytest.mark.parametrize('name', ['wsd', 'cos', 'constant'])
def test_warm_up_is_linear_from_zero(name):
  assert [rate(name, i) for i in (0, 5, 10)] == pytest.approx([0.0, 1.0, 2.0])


@pytest.mark.parametrize('name', ['wsd', 'cos', 'constant'])
def test_without_warm_up_the_first_step_has_the_peak(name):
  assert rate(name, 0, warmup=0) == 2.0
  assert rate(name, 0, warmup=0, steps=1) == 2.0


def test_wsd_is_constant_until_two_thirds_then_linear():
  assert [rate('wsd', i) for i in (10, 100, 200)] == [2.0] * 3
  assert rate('wsd', 250) == pytest.approx((2.0 + 0.2) / 2)
  # It would be 0.2 one step after the last.
  assert rate('wsd', 299) == pytest.approx(0.2 + 1.8 / 100)
  assert rate('wsd', 300) == pytest.approx(0.2)


def test_wsd_decays_from_the_end_of_a_long_warm_up():
  assert rate('wsd', 280, warmup=280) == 2.0
  assert rate('wsd', 290, warmup=280) == pytest.approx(1.1)


def test_cos_falls_along_half_a_wave():
  for count in (10, 60, 155, 299):
    done = (count - 10) / 290
    wanted = 0.2 + 1.8 * (1 + math.cos(math.pi * done)) / 2
    assert rate('cos', count) == pytest.approx(wanted, rel=1e-4)


def test_constant_stays():
  assert [rate('constant', i) for i in (10, 200, 299)] == [2.0] * 3


@given(
  st.sampled_from(['wsd', 'cos', 'constant']),
  st.integers(1, 10**6),
  st.data(),
)
def test_every_rate_is_finite_and_within_the_peak(name, steps, data):
  config = OptimizerConfig(
    learning_rate=data.draw(st.floats(1e-6, 10.0), 'peak'),
    schedule=name,
    warmup_steps=data.draw(st.integers(0, steps - 1), 'warmup'),
    final_lr_ratio=data.draw(st.floats(0.0, 1.0), 'ratio'),
  )
  Config(optimizer=config, steps=steps)  # It is legal.
  count = data.draw(
    st.integers(0, steps - 1)
    | st.sampled_from([0, config.warmup_steps, 2 * steps // 3, steps - 1]),
    'count',
  )
  value = float(schedule(config, steps)(count))
  assert math.isfinite(value)
  assert 0 <= value <= config.learning_rate * (1 + 1e-6)
  if count > config.warmup_steps:
    lowest = config.learning_rate * config.final_lr_ratio
    assert value >= lowest * (1 - 1e-3) - 1e-9
