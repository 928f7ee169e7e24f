import jax
import pytest

from train import kept_programs

OPTIONS = ('jax_compilation_cache_dir',
           'jax_persistent_cache_min_compile_time_secs')  # fmt: skip


@pytest.fixture(autouse=True)
def unchanged():
  before = {name: getattr(jax.config, name) for name in OPTIONS}
  yield
  for name, value in before.items():
    jax.config.update(name, value)


def test_programs_are_kept_in_the_cache(monkeypatch, tmp_path):
  monkeypatch.setenv('GRADPOWER_CACHE', str(tmp_path))
  jax.config.update('jax_compilation_cache_dir', None)
  kept_programs.keep()
  kept = jax.config.jax_compilation_cache_dir
  assert kept == str(tmp_path / 'programs' / kept_programs._processor())
  assert jax.config.jax_persistent_cache_min_compile_time_secs == 0.5


def test_a_directory_of_ones_own_stays(tmp_path):
  jax.config.update('jax_compilation_cache_dir', str(tmp_path))
  seconds = jax.config.jax_persistent_cache_min_compile_time_secs
  kept_programs.keep()
  assert jax.config.jax_compilation_cache_dir == str(tmp_path)
  assert jax.config.jax_persistent_cache_min_compile_time_secs == seconds


def test_another_processor_has_other_programs(monkeypatch):
  mine = kept_programs._processor()
  assert mine == kept_programs._processor()
  monkeypatch.setattr(kept_programs.platform, 'machine', lambda: 'riscv64')
  assert kept_programs._processor() != mine


def test_a_program_is_found_again(start, finish, tiny, tmp_path):
  """By the next process, without a word."""
  kept = {
    'JAX_COMPILATION_CACHE_DIR': '',
    'GRADPOWER_CACHE': str(tmp_path / 'cache'),
    'JAX_LOG_COMPILES': '0',
  }
  note = (
    'import atexit, jax.monitoring\n'
    'hits = []\n'
    'jax.monitoring.register_event_listener('
    'lambda name, **_: hits.append(name))\n'
    'atexit.register(lambda: print("hits:", '
    'sum(name.endswith("/cache_hits") for name in hits)))\n'
  )
  for name in ('first', 'second'):
    status, out, err = finish(start(
      'run', 'demo', '--run-dir', tmp_path / name, *tiny, '--stop-at', 1,
      prelude=note, **kept,
    ))  # fmt: skip
    assert status == 0, err
    hits = int(out.rpartition('hits: ')[2])
    assert hits == 0 if name == 'first' else hits >= 2
    assert 'arning' not in err
  [directory] = (tmp_path / 'cache' / 'programs').iterdir()
  assert any('train_step' in path.name for path in directory.iterdir())
