import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.config import LlamaConfig

SMALL = st.integers(-1, 12)


def offenders(shape):
  """Fields of an illegal shape, by the rules as the field docs state them."""
  found = {
    name
    for name in ('d_model', 'n_layers', 'n_heads', 'd_ff')
    if shape[name] < 1
  }
  found |= {n for n in ('vocab_size', 'n_kv_heads') if shape[n] < 0}
  if found:
    return found
  if shape['d_model'] % shape['n_heads']:
    return {'n_heads'}
  if shape['d_model'] // shape['n_heads'] % 2:
    return {'d_model'}
  if shape['n_kv_heads'] and shape['n_heads'] % shape['n_kv_heads']:
    return {'n_kv_heads'}
  return set()


@given(
  st.fixed_dictionaries(
    {
      'vocab_size': SMALL,
      'd_model': st.integers(-1, 48),
      'n_layers': SMALL,
      'n_heads': SMALL,
      'n_kv_heads': SMALL,
      'd_ff': SMALL,
    }
  )
)
def test_a_shape_is_legal_or_its_field_is_named(shape):
  wrong = offenders(shape)
  if not wrong:
    config = LlamaConfig(**shape)
    assert config.head_dim * config.n_heads == config.d_model
    assert config.head_dim % 2 == 0
    assert config.n_heads % config.kv_heads == 0
    return
  with pytest.raises(ValueError) as error:
    LlamaConfig(**shape)
  assert any(f'model.{name}' in str(error.value) for name in wrong)
  assert '\n' not in str(error.value)


@pytest.mark.parametrize('name', ['norm_eps', 'rope_theta', 'init_std'])
@pytest.mark.parametrize('value', [0.0, -1.0, math.nan, math.inf])
def test_numbers_must_be_positive_and_finite(name, value):
  with pytest.raises(ValueError, match=rf'model\.{name}'):
    LlamaConfig(**{name: value})


@pytest.mark.parametrize('dtype', ['float16', 'float64', '', 'bf16'])
def test_other_dtypes_are_refused(dtype):
  with pytest.raises(ValueError, match=r"model\.dtype.*'float32'.*'bfloat16'"):
    LlamaConfig(dtype=dtype)


def test_a_config_cannot_change():
  with pytest.raises(dataclasses.FrozenInstanceError):
    LlamaConfig().d_model = 3


def test_key_and_value_heads_follow_the_query_heads():
  assert LlamaConfig(n_heads=8).kv_heads == 8
  assert LlamaConfig(n_heads=8, n_kv_heads=2).kv_heads == 2
