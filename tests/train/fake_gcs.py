"""A Google Cloud Storage in memory, for tests: its JSON API over HTTP.

What gcsfs, google-cloud-storage and TensorStore ask of it, and no more: it
cannot append, compose, copy or rename, and it overwrites where the real one
would refuse (`ifGenerationMatch`): the last writer wins.

  with FakeGcs('bucket') as server:
    subprocess.run(..., env=os.environ | server.environment)
"""

import base64
import collections
import hashlib
import http.server
import itertools
import json
import re
import threading
import urllib.parse

_OBJECT = re.compile(r'(?:/download)?/storage/v1/b/([^/]+)/o/(.+)')
_OBJECTS = re.compile(r'(/upload)?(?:/resumable)?/storage/v1/b/([^/]+)/o')
_BUCKET = re.compile(r'/storage/v1/b/([^/]+)')
_PAGE = 100  # Objects in a listing; small, so that paging is seen.


class FakeGcs:
  """The server, as long as it is entered."""

  def __init__(self, *buckets: str):
    self.objects: dict[str, dict[str, tuple[bytes, int]]] = {
      bucket: {} for bucket in buckets
    }
    """Bucket to name to content and generation."""
    self.broken: dict[str, int] = {}
    """Part of an object's name to the HTTP status that its requests get."""
    self.refused: list[str] = []
    """What was asked that an object store cannot do."""
    self.asked: collections.Counter[str] = collections.Counter()
    """Requests by method."""
    self.lock = threading.Lock()
    self.generations = itertools.count(1)
    self.uploads: dict[str, tuple[str, str, bytes]] = {}
    handler = type('Handler', (_Handler,), {'store': self})
    self._server = _Server(('127.0.0.1', 0), handler)
    self.url = f'http://127.0.0.1:{self._server.server_port}'

  @property
  def environment(self) -> dict[str, str]:
    """Variables that send all clients here."""
    return {
      'STORAGE_EMULATOR_HOST': self.url,
      'TENSORSTORE_GCS_HTTP_URL': self.url,
      'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'token',
      'GOOGLE_CLOUD_PROJECT': 'project',
      'GCE_METADATA_HOST': '127.0.0.1:9',
      'NO_GCE_CHECK': 'true',
    }

  def __enter__(self):
    threading.Thread(target=self._server.serve_forever, daemon=True).start()
    return self

  def __exit__(self, *_):
    self._server.shutdown()
    self._server.server_close()

  def names(self, bucket: str) -> list[str]:
    """Of the bucket's objects."""
    with self.lock:
      return sorted(self.objects[bucket])

  def read(self, bucket: str, name: str) -> bytes:
    """An object's content."""
    with self.lock:
      return self.objects[bucket][name][0]

  def write(self, bucket: str, name: str, content: bytes) -> int:
    """Sets an object's content; returns its generation."""
    with self.lock:
      generation = next(self.generations)
      self.objects[bucket][name] = content, generation
      return generation


class _Server(http.server.ThreadingHTTPServer):
  daemon_threads = True
  request_queue_size = 128

  def handle_error(self, request, client_address):
    """A client that is killed hangs up: that is what is tested."""


class _Error(Exception):
  """An HTTP status to answer with."""


class _Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'
  wbufsize = -1  # Headers and body in one packet.
  store: FakeGcs

  def log_message(self, *_):
    """Says nothing."""

  def do_GET(self):
    self._answer(self._get)

  def do_POST(self):
    self._answer(self._post)

  def do_PUT(self):
    self._answer(self._put)

  def do_DELETE(self):
    self._answer(self._delete)

  def do_PATCH(self):
    self._answer(self._unknown)

  def _answer(self, method):
    self.store.asked[self.command] += 1
    length = int(self.headers.get('Content-Length') or 0)
    body = self.rfile.read(length)
    if self.headers.get('Transfer-Encoding') == 'chunked':
      body = self._chunks()
    url = urllib.parse.urlsplit(self.path)
    query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
    try:
      for part, status in self.store.broken.items():
        if part in urllib.parse.unquote(self.path) or part.encode() in body:
          raise _Error(status)
      method(url.path, query, body)
    except _Error as error:
      (status,) = error.args
      message = {'error': {'code': status, 'message': f'status {status}'}}
      self._send(status, json.dumps(message).encode())

  def _chunks(self):
    body = b''
    while size := int(self.rfile.readline(), 16):
      body += self.rfile.read(size)
      self.rfile.readline()
    self.rfile.readline()
    return body

  def _send(self, status, body=b'', headers=()):
    self.send_response(status)
    for name, value in dict(headers).items():
      self.send_header(name, value)
    self.send_header('Content-Length', str(len(body)))
    self.end_headers()
    self.wfile.write(body)

  def _json(self, value):
    self._send(
      200, json.dumps(value).encode(), {'Content-Type': 'application/json'}
    )

  def _bucket(self, bucket):
    if bucket not in self.store.objects:
      raise _Error(404)
    return self.store.objects[bucket]

  def _found(self, match):
    bucket, name = match[1], urllib.parse.unquote(match[2])
    with self.store.lock:
      if name not in self._bucket(bucket):
        raise _Error(404)
      return bucket, name, *self.store.objects[bucket][name]

  def _get(self, path, query, body):
    del body
    if match := _OBJECT.fullmatch(path):
      bucket, name, content, generation = self._found(match)
      if query.get('ifGenerationNotMatch') == str(generation):
        raise _Error(304)
      if query.get('alt') != 'media':
        self._json(_metadata(bucket, name, content, generation))
        return
      self._send_content(content, generation)
    elif match := _OBJECTS.fullmatch(path):
      self._list(match[2], query)
    elif match := _BUCKET.fullmatch(path):
      self._bucket(match[1])
      name = {'kind': 'storage#bucket', 'id': match[1], 'name': match[1]}
      self._json(name | {'location': 'US', 'storageClass': 'STANDARD'})
    else:
      self._unknown()

  def _send_content(self, content, generation):
    headers = {
      'Content-Type': 'application/octet-stream',
      'x-goog-generation': str(generation),
      'x-goog-hash': f'md5={_md5(content)}',
    }
    wanted = re.fullmatch(r'bytes=(\d*)-(\d*)', self.headers.get('Range') or '')
    if not wanted:
      self._send(200, content, headers)
      return
    size = len(content)
    first = int(wanted[1] or max(0, size - int(wanted[2] or 0)))
    last = (
      min(int(wanted[2]), size - 1) if wanted[1] and wanted[2] else size - 1
    )
    if first >= size:
      raise _Error(416)
    headers['Content-Range'] = f'bytes {first}-{last}/{size}'
    self._send(206, content[first : last + 1], headers)

  def _list(self, bucket, query):
    prefix, delimiter = query.get('prefix', ''), query.get('delimiter')
    start = max(query.get('startOffset', ''), query.get('pageToken', ''))
    end = query.get('endOffset')
    size = min(int(query.get('maxResults') or _PAGE), _PAGE)
    items, prefixes, token = [], [], None
    with self.store.lock:
      for name, (content, generation) in sorted(self._bucket(bucket).items()):
        if not name.startswith(prefix) or name < start or (end and name >= end):
          continue
        head, found, _ = name[len(prefix) :].partition(delimiter or '\0')
        if delimiter and found:
          below = prefix + head + delimiter
          if below in prefixes:
            continue
        if len(items) + len(prefixes) == size:
          token = name
          break
        if delimiter and found:
          prefixes.append(below)
        else:
          items.append(_metadata(bucket, name, content, generation))
    found = {'kind': 'storage#objects', 'items': items, 'prefixes': prefixes}
    self._json(found | ({'nextPageToken': token} if token else {}))

  def _post(self, path, query, body):
    match = _OBJECTS.fullmatch(path)
    if not match or not match[1]:
      self._unknown()
      return
    bucket = match[2]
    self._bucket(bucket)
    kind = query.get('uploadType')
    if kind == 'resumable' and 'upload_id' in query:
      self._put(path, query, body)
      return
    if kind == 'media':
      name, content = query['name'], body
    elif kind == 'multipart':
      name, content = self._parts(body)
    elif kind == 'resumable':
      name = query.get('name') or json.loads(body)['name']
      key = str(next(self.store.generations))
      self.store.uploads[key] = bucket, name, b''
      where = f'{self.store.url}{path}?uploadType=resumable&upload_id={key}'
      self._send(200, b'', {'Location': where})
      return
    else:
      self._unknown()
      return
    self._json(self._write(bucket, name, content))

  def _parts(self, body):
    boundary = re.search('boundary="?([^";]+)', self.headers['Content-Type'])[
      1
    ].encode()
    _, head, content, _ = body.split(b'--' + boundary)
    name = json.loads(re.split(rb'\r?\n\r?\n', head, maxsplit=1)[1])['name']
    content = re.split(rb'\r?\n\r?\n', content, maxsplit=1)[1]
    return name, re.sub(rb'\r?\n\Z', b'', content)

  def _put(self, path, query, body):
    """A part of a resumable upload; the object appears with its last."""
    del path
    bucket, name, content = self.store.uploads[query['upload_id']]
    content += body
    total = (self.headers.get('Content-Range') or '').rpartition('/')[2]
    if (total.isdecimal() and len(content) < int(total)) or total == '*':
      self.store.uploads[query['upload_id']] = bucket, name, content
      self._send(308, b'', {'Range': f'bytes=0-{len(content) - 1}'})
      return
    del self.store.uploads[query['upload_id']]
    self._json(self._write(bucket, name, content))

  def _write(self, bucket, name, content):
    generation = self.store.write(bucket, name, content)
    return _metadata(bucket, name, content, generation)

  def _delete(self, path, query, body):
    del query, body
    match = _OBJECT.fullmatch(path)
    if not match:
      self._unknown()
      return
    bucket, name, *_ = self._found(match)
    with self.store.lock:
      self.store.objects[bucket].pop(name, None)
    self._send(204)

  def _unknown(self, *_):
    self.store.refused.append(f'{self.command} {self.path}')
    raise _Error(501)


def _md5(content):
  return base64.b64encode(hashlib.md5(content).digest()).decode()


def _metadata(bucket, name, content, generation):
  return {
    'kind': 'storage#object', 'id': f'{bucket}/{name}/{generation}',
    'name': name, 'bucket': bucket, 'generation': str(generation),
    'metageneration': '1', 'size': str(len(content)),
    'contentType': 'application/octet-stream', 'storageClass': 'STANDARD',
    'md5Hash': _md5(content), 'etag': str(generation),
    'timeCreated': '2026-01-01T00:00:00.000Z',
    'updated': '2026-01-01T00:00:00.000Z',
  }  # fmt: skip
