import dataclasses

import jax
import pytest

from train import deterministic, recipes

CONFIG = dataclasses.replace(recipes.get('demo'), deterministic=True)


def test_only_a_gpu_needs_it(tmp_path):
  for platform in ('cpu', 'tpu'):
    assert deterministic.options(CONFIG, platform, tmp_path) is None
  assert deterministic.options(recipes.get('demo'), 'gpu', tmp_path) is None
  assert not any(tmp_path.iterdir())


@pytest.mark.parametrize('kept', [True, False])
def test_the_compiler_knows_the_options(tmp_path, kept):
  found = deterministic.options(CONFIG, 'gpu', tmp_path if kept else None)
  assert found is not None
  assert found['xla_gpu_exclude_nondeterministic_ops'] is True
  assert (tmp_path / 'autotune').is_dir() == kept
  # Any XLA knows all platforms' options by name, and refuses others.
  jax.jit(lambda x: x + 1, compiler_options=found)(1)
  with pytest.raises(Exception, match='No such compile option'):
    jax.jit(lambda x: x + 2, compiler_options=found | {'xla_gpu_x': 1})(1)
