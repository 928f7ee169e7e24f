"""Eight fake CPU devices, quick compilation, properties without a deadline."""

import os
import re

import pytest

# Read when jax starts its backend; nothing has imported jax before this file.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
_FLAG = '--xla_force_host_platform_device_count'
if _FLAG not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {_FLAG}=8'

try:
  import hypothesis
except ImportError:  # Where only transformers' parity is tested.
  pass
else:
  # A machine may be busy, and a first example compiles. The same examples
  # everywhere: a failure is the change's, not the day's.
  hypothesis.settings.register_profile(
    'patient',
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
  )
  hypothesis.settings.load_profile('patient')


_QUICKLY = 'JAX_DISABLE_MOST_OPTIMIZATIONS'
_AS_USERS_HAVE_IT = re.compile(
  'gradpower_optax/|benchmarks/|aot/|(?<![a-z])tpu(?![a-z])|live_parity'
)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
  """Has tests of models and trainer on a CPU compile in less time.

  It is LLVM that optimizes less. Tests of the optimizers, whose last bits and
  memory are looked at, of programs for TPUs, and the live parity with
  transformers have programs as users have them.
  """
  on_cpu = os.environ['JAX_PLATFORMS'] == 'cpu'
  quickly = on_cpu and not _AS_USERS_HAVE_IT.search(item.nodeid)
  os.environ[_QUICKLY] = str(int(quickly))  # Of processes that it starts.
  import jax

  jax.config.update(_QUICKLY.lower(), quickly)


@pytest.fixture(scope='session')
def programs(tmp_path_factory):
  """Where compiled programs are kept, which saves half of the time."""
  return str(tmp_path_factory.mktemp('programs'))


@pytest.fixture(scope='module')
def kept_programs(programs):
  """Keeps those of a file of tests: what is compiled again is read."""
  import jax
  from jax.experimental.compilation_cache import compilation_cache

  changed = {
    'jax_compilation_cache_dir': programs,
    'jax_persistent_cache_min_compile_time_secs': 0,
  }
  before = {name: getattr(jax.config, name) for name in changed}
  for values in (changed, before):
    for name, value in values.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()  # It looks at the settings once.
    if values is changed:
      yield
