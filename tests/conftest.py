"""Eight fake CPU devices, and property tests without a deadline."""

import os

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
