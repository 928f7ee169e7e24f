"""An object store in this process's memory, under epath's gs:// paths.

It does what every object store does, and refuses the rest: there is no
appending, no renaming, no copying and no making of directories.
"""

import contextlib
import io
import threading

from etils.epath import backend, gpath, stat_utils


class MemoryStore(backend.Backend):
  """Name to content; `entered` puts it behind gs://."""

  def __init__(self):
    self.objects: dict[str, bytes] = {}
    self.failing: list[str] = []
    """Parts of names whose objects cannot be written."""
    self.lock = threading.Lock()

  @contextlib.contextmanager
  def entered(self, monkeypatch):
    monkeypatch.setitem(gpath._PREFIX_TO_BACKEND, 'gs', self)
    monkeypatch.setattr(gpath, '_is_tf_installed', lambda: False)
    yield self

  def written(self, name):
    """Called with the name of each object that has been written."""

  def open(self, path, mode):
    name, text = str(path), 'b' not in mode
    if mode.startswith('w'):
      return _Writer(self, name, text)
    if not mode.startswith('r'):
      raise io.UnsupportedOperation(f'{mode!r} of an object')
    with self.lock:
      if name not in self.objects:
        raise FileNotFoundError(name)
      content = self.objects[name]
    return io.StringIO(content.decode()) if text else io.BytesIO(content)

  def exists(self, path):
    return str(path) in self.objects or self.isdir(path)

  def isdir(self, path):
    return bool(self.listdir(path, missing_ok=True))

  def listdir(self, path, missing_ok=False):
    start = f'{path}/'
    with self.lock:
      found = {
        name.removeprefix(start).partition('/')[0]
        for name in self.objects
        if name.startswith(start)
      }
    if not found and not missing_ok:
      raise FileNotFoundError(path)
    return sorted(found)

  def remove(self, path):
    with self.lock:
      if self.objects.pop(str(path), None) is None:
        raise FileNotFoundError(path)

  def rmtree(self, path):
    with self.lock:
      for name in [n for n in self.objects if n.startswith(f'{path}/')]:
        del self.objects[name]

  def stat(self, path):
    size = len(self.objects[str(path)])
    return stat_utils.StatResult(False, size, 0, None, None, None)

  def _refuse(self, *_, **__):
    raise io.UnsupportedOperation('not of an object store')

  glob = walk = makedirs = mkdir = rename = replace = copy = _refuse


class _Writer(io.BytesIO):
  """The object is there once it is closed."""

  def __init__(self, store, name, text):
    super().__init__()
    self._store, self._name, self._text = store, name, text

  def write(self, content):
    return super().write(content.encode() if self._text else content)

  def __exit__(self, kind, *_):
    if kind is None:
      with self._store.lock:
        if any(part in self._name for part in self._store.failing):
          raise OSError('the network is down')
        self._store.objects[self._name] = self.getvalue()
      self._store.written(self._name)
    self.close()
