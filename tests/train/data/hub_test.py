"""Against a server that answers as the hub does, on this machine."""

import http.server
import json
import threading

import pytest
from huggingface_hub import constants

from train import errors
from train.data import hub, tokenizer

REPOS = {
  'org/t5': {'spiece.model': b'sentencepiece', 'tokenizer.json': b'json'},
  'org/gpt2': {'tokenizer.json': b'json', 'tokenizer.model': b'other'},
  'org/pictures': {'model.safetensors': b''},
  'org/gated': {'tokenizer.json': b'json'},
}
CODES = {
  'org/gated': (403, 'GatedRepo'),
  'org/none': (401, 'RepoNotFound'),
}


class Hub(http.server.BaseHTTPRequestHandler):
  """What huggingface_hub asks for to bring one file."""

  def answer(self, status, content=b'', **headers):
    self.send_response(status)
    self.send_header('Content-Length', str(len(content)))
    for name, value in headers.items():
      self.send_header(name.replace('_', '-'), value)
    self.end_headers()
    if self.command == 'GET':
      self.wfile.write(content)

  def do_GET(self):
    self.server.asked.append(f'{self.command} {self.path}')
    if self.path.startswith('/api/models/'):
      repo = self.path.removeprefix('/api/models/')
      if repo not in REPOS:
        return self.answer(401, X_Error_Code='RepoNotFound')
      siblings = [{'rfilename': name} for name in REPOS[repo]]
      info = {'id': repo, 'siblings': siblings}
      return self.answer(
        200, json.dumps(info).encode(), Content_Type='application/json'
      )
    repo, _, name = self.path[1:].partition('/resolve/main/')
    if repo in CODES:
      status, code = CODES[repo]
      return self.answer(status, X_Error_Code=code)
    self.answer(200, REPOS[repo][name], ETag='"1"', X_Repo_Commit='c' * 40)

  do_HEAD = do_GET

  def log_message(self, *_):
    pass


def use(monkeypatch, port):
  endpoint = f'http://127.0.0.1:{port}'
  monkeypatch.setattr(constants, 'ENDPOINT', endpoint)
  template = '/{repo_id}/resolve/{revision}/{filename}'
  monkeypatch.setattr(
    constants, 'HUGGINGFACE_CO_URL_TEMPLATE', endpoint + template
  )


@pytest.fixture
def server(monkeypatch, tmp_path):
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Hub) as server:
    server.asked = []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    use(monkeypatch, server.server_port)
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    monkeypatch.setattr(constants, 'HF_TOKEN_PATH', str(tmp_path / 'token'))
    yield server
    server.shutdown()
    thread.join()


@pytest.fixture
def no_network(monkeypatch):
  return lambda: use(monkeypatch, 9)  # Where nobody listens.


def download(repo):
  return hub.download(repo, tokenizer.FOLDER_FILES, '--tokenizer')


def test_the_first_of_its_files(server):
  assert download('org/t5').read_bytes() == b'sentencepiece'
  assert download('org/gpt2').read_bytes() == b'json'


def test_a_file_comes_once(server, no_network):
  first = download('org/gpt2')
  asked = len(server.asked)
  assert download('org/gpt2') == first
  assert not [
    line for line in server.asked[asked:] if line.startswith('GET /o')
  ]
  no_network()
  assert download('org/gpt2') == first


def refused(repo):
  with pytest.raises(errors.UserError) as error:
    tokenizer.open_tokenizer(repo)
  message = str(error.value)
  assert '\n' not in message
  assert message.startswith('--tokenizer: ')
  return message


def test_what_the_hub_refuses(server):
  assert 'org/none is no file or folder here, and no' in refused('org/none')
  assert 'org/gated is gated: ask for access' in refused('org/gated')
  assert 'has none of spiece.model, tokenizer.json' in refused('org/pictures')
  assert 'no public repository' in refused('org/a--b')


def test_a_file_of_the_hub_that_is_no_tokenizer(server):
  assert 'cannot be used as a tokenizer: it is neither' in refused('org/gpt2')


def test_without_a_network(server, no_network):
  no_network()
  assert refused('org/gpt2').endswith(
    'the Hugging Face hub cannot be reached: download spiece.model or '
    'tokenizer.json of org/gpt2 elsewhere and name the file'
  )
