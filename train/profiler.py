"""A trace of a few steps, for xprof."""

import logging
import pathlib

import jax

_logger = logging.getLogger('train')


class Profiler:
  """Traces steps of a run; `step` and `close` are all that it needs.

  A trace that fails is said to have failed, and the run goes on.

  Args:
    local: The trace goes to its `profile/`, where xprof looks for runs.
    steps: The first, from 1, and how many; None for none.
  """

  def __init__(self, local: pathlib.Path, steps: tuple[int, int] | None):
    self._directory = local / 'profile'
    first, count = steps or (0, 0)
    self._steps = range(first, first + count)
    self._traced: list[int] = []
    self._tracing = False
    self._annotation: jax.profiler.StepTraceAnnotation | None = None

  def step(self, number: int) -> None:
    """Begins or ends the trace, where it is time.

    Args:
      number: Of the step about to be taken, from 1.
    """
    if number not in self._steps:
      if self._tracing:
        self._stop()
      return
    if not self._tracing and not self._traced:
      self._start()
    if self._tracing:
      self._leave_step()
      self._traced.append(number)
      self._annotation = jax.profiler.StepTraceAnnotation(
        'train', step_num=number
      )
      self._annotation.__enter__()

  def close(self) -> None:
    """Ends a trace that is under way; says where there was none at all."""
    if self._tracing:
      self._stop()
    elif self._steps and not self._traced:
      _logger.warning(
        'no profile: steps %d to %d were not taken now',
        self._steps[0],
        self._steps[-1],
      )

  def _start(self) -> None:
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # Each call of a function: slow, and large.
    _settle()
    try:
      jax.profiler.start_trace(self._directory, profiler_options=options)
    except Exception as error:  # Whatever the profiler of the platform raises.
      self._give_up(error)
      return
    self._tracing = True

  def _stop(self) -> None:
    _settle()
    self._leave_step()
    self._tracing = False
    try:
      jax.profiler.stop_trace()
    except Exception as error:
      self._give_up(error)
      return
    _logger.info(
      'profile of steps %d to %d: xprof --logdir %s --port 8791',
      self._traced[0],
      self._traced[-1],
      self._directory,
    )

  def _leave_step(self) -> None:
    if self._annotation is not None:
      self._annotation.__exit__(None, None, None)
      self._annotation = None

  def _give_up(self, error: Exception) -> None:
    self._steps = range(0)
    reason = str(error).partition('\n')[0] or type(error).__name__
    _logger.warning('no profile in %s: %s', self._directory, reason)


def _settle() -> None:
  """Waits for all devices: what they do still belongs to an earlier step."""
  jax.block_until_ready(jax.live_arrays())
