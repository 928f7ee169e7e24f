"""GradPower for optax: the elementwise gradient power, before any optimizer."""

from gradpower_optax.blockwise import blockwise_schedule, scale_by_blockwise
from gradpower_optax.muon import muon
from gradpower_optax.optimizers import (
  adagrad_power,
  adam_power,
  adamw_power,
  lion_power,
  muon_power,
)
from gradpower_optax.sign_power import sign_power

__version__ = '0.1.0'

__all__ = (
  'adagrad_power', 'adam_power', 'adamw_power', 'blockwise_schedule',
  'lion_power', 'muon', 'muon_power', 'scale_by_blockwise', 'sign_power',
)  # fmt: skip
