"""Apache Beam as an engine: the same jobs, on as many machines as it has.

They share the directory that is prepared: what comes of a job is in its files.
"""

import functools
import json
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

from train import errors, storage
from train.data.prepare import engine
from train.data.prepare import progress as progress_lib

try:
  import apache_beam as beam
  from apache_beam.options import pipeline_options
except ImportError as error:
  raise errors.UserError(
    "Apache Beam is not installed: pip install -e '.[train,beam]'"
  ) from error

_ERRORS = 'errors'
_BUG = 'bug'
_LONGEST_MESSAGE = 400


class Beam:
  """Runs each job as a pipeline.

  Args:
    options: Beam's, as '--runner=FlinkRunner'; without a runner, Beam's own
      choice for one machine.
    work: A directory that all workers share.

  Raises:
    UserError: Beam does not take the options.
  """

  def __init__(self, options: Sequence[str], work: pathlib.Path):
    try:
      self._options = pipeline_options.PipelineOptions(list(options))
      # What is wrong with them is found when they are looked at.
      self._options.get_all_options()
      beam.Pipeline(options=self._options)
    except (SystemExit, ValueError, ImportError, AttributeError) as error:
      reason = '' if isinstance(error, SystemExit) else f' ({error})'
      raise errors.UserError(
        f'Beam does not take these options: {" ".join(options)}{reason}'
      ) from error
    self._errors = work / _ERRORS

  def run(
    self,
    job: engine.Job,
    tasks: Sequence[Any],
    progress: progress_lib.Progress,
  ) -> None:
    """As `engine.Engine.run`."""
    shutil.rmtree(self._errors, ignore_errors=True)
    self._errors.mkdir()
    do = functools.partial(_do, job=job, failures=self._errors)
    try:
      with beam.Pipeline(options=self._options) as pipeline:
        _ = (
          pipeline
          | beam.Create(list(enumerate(tasks)), reshuffle=False)
          | beam.Reshuffle()
          | beam.Map(do)
        )
    except Exception as error:  # Each runner has its own.
      if (self._errors / _BUG).exists():
        raise
      reason = ' '.join(str(error).split())[:_LONGEST_MESSAGE]
      raise errors.UserError(
        f'Beam failed: {type(error).__name__}: {reason}'
      ) from error
    for path in sorted(self._errors.iterdir()):
      raise errors.UserError(json.loads(path.read_text('utf-8')))
    progress.count(0, sum(task.size for task in tasks))


def _do(
  numbered: tuple[int, Any], job: engine.Job, failures: pathlib.Path
) -> None:
  """Does a task; what a user can mend is written down, and not tried again."""
  if not failures.is_dir():
    raise RuntimeError(
      f'a worker does not find {failures.parent}: the directory has to be on a'
      ' file system that all of them share'
    )
  number, task = numbered
  try:
    job(task, lambda tokens, size: None)
  except errors.UserError as error:
    storage.write_atomically(
      failures / f'{number:08d}.json', json.dumps(str(error))
    )
  except Exception:
    (failures / _BUG).touch()
    raise
