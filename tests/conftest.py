"""Eight fake CPU devices, quick compilation, properties without a deadline."""

import os
import re
from importlib import metadata

import pytest

# Read when jax starts its backend; nothing has imported jax before this file.
os.environ.setdefault('JAX_PLATFORMS', 'cpu')
# What JAX itself is told by the environment holds: with 0 all is compiled as
# users have it.
_QUICKLY = 'JAX_DISABLE_MOST_OPTIMIZATIONS'
_QUICK = os.environ['JAX_PLATFORMS'] == 'cpu' and _QUICKLY not in os.environ
_FLAGS = {'xla_force_host_platform_device_count': '8'}
# XLA's older emitters of loops compile in a third of the time. Newer versions
# have them no more, and end a process that asks for them.
_VERSION = tuple(int(n) for n in metadata.version('jaxlib').split('.')[:2])
if _QUICK and _VERSION < (0, 11):
  _FLAGS['xla_cpu_use_fusion_emitters'] = 'false'
  _FLAGS['xla_cpu_parallel_codegen_split_count'] = '1'
for _name, _value in _FLAGS.items():
  if _name not in os.environ.get('XLA_FLAGS', ''):
    os.environ['XLA_FLAGS'] = (
      f'{os.environ.get("XLA_FLAGS", "")} --{_name}={_value}'
    )

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


_AS_USERS_HAVE_IT = re.compile('aot/|(?<![a-z])tpu(?![a-z])')


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
  """Has tests on a CPU compile in less time: LLVM optimizes less.

  Programs for TPUs are compiled as users have them.
  """
  if not _QUICK:
    return
  quickly = not _AS_USERS_HAVE_IT.search(item.nodeid)
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
