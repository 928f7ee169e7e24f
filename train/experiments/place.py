"""Where an experiment writes: one call at a time, and only where it can."""

import contextlib
import pathlib
import tempfile
from collections.abc import Iterator

from train import distributed, storage
from train.lock import FileLock


@contextlib.contextmanager
def held(out: pathlib.Path, store: pathlib.Path) -> Iterator[None]:
  """Locks the directory of an experiment; what cannot be written is said now.

  Args:
    out: Of results and page. Made, as `store` is.
    store: Of the cells, which experiments share: it is not locked.

  Raises:
    UserError: another call has `out`, or one of them cannot be written.
  """
  with contextlib.ExitStack() as stack:
    with distributed.together():
      if distributed.is_main():
        for directory in (out, store):
          _probe(directory)
        stack.callback(FileLock(out, '--out').release)
    yield


def _probe(directory: pathlib.Path) -> None:
  with storage.one_line_errors(directory):
    storage.make_directory(directory)
    with tempfile.TemporaryFile(dir=directory):
      pass
