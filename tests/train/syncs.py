"""What a test sees of what is made durable."""

import os
import pathlib


def watch_syncs(monkeypatch):
  """A list of the files and directories that are synced from now on."""
  seen = []
  real = os.fsync

  def fsync(file):
    seen.append(pathlib.Path(os.readlink(f'/proc/self/fd/{file}')))
    real(file)

  monkeypatch.setattr(os, 'fsync', fsync)
  return seen
