import json

import pytest

from benchmarks import scaling, scaling_page
from train.errors import UserError


def made(topology, devices):
  return {
    'topology': topology,
    'devices': devices,
    'mesh': {'data': devices // 8, 'fsdp': 8, 'tensor': 1, 'expert': 1},
    'bytes_per_device': {'arguments': 10**9, 'peak': 3 * 10**9},
    'collectives': [
      {'kind': 'all-gather', 'axis': 'fsdp', 'count': 2, 'bytes': 5 * 10**9}
    ],
    'estimated_cycles': 10**6,
    'seconds': {'compute': 0.2, 'memory': 0.05, 'network_blocking': 0.01},
    'predicted_seconds': 0.26,
    'predicted_mfu': 0.4,
    'compile_seconds': 20.0,
  }


@pytest.fixture
def compiled(monkeypatch):
  asked = []

  def point(topology):
    asked.append(topology)
    sizes = topology.partition(':')[2].split('x')
    return made(topology, int(sizes[0]) * int(sizes[1]) * int(sizes[2]))

  monkeypatch.setattr(scaling, 'point', point)
  monkeypatch.setattr(scaling, 'versions', lambda: {'jax': '1'})
  return asked


def test_points_are_written_in_order_and_drawn(compiled, tmp_path, capsys):
  out, page = tmp_path / 'out.json', tmp_path / 'page.html'
  out.write_text('not JSON')  # What was there does not matter.
  arguments = ['--topologies', 'v5p:4x4x4', 'v5p:2x2x2', '--json', str(out)]
  assert scaling.main([*arguments, '--page', str(page)]) == 0
  assert compiled == ['v5p:2x2x2', 'v5p:4x4x4']
  devices = [one['devices'] for one in json.loads(out.read_text())['points']]
  assert devices == [8, 64]
  table = capsys.readouterr().out
  assert '260.0' in table and '40.0%' in table
  assert page.read_text().count('<svg role="img"') == 4


def test_a_run_cut_off_leaves_its_points(compiled, monkeypatch, tmp_path):
  made_before = scaling.point

  def point(topology):
    if compiled:
      raise KeyboardInterrupt
    return made_before(topology)

  monkeypatch.setattr(scaling, 'point', point)
  out = tmp_path / 'out.json'
  with pytest.raises(KeyboardInterrupt):
    scaling.main(['--json', str(out)])
  assert len(json.loads(out.read_text())['points']) == 1


def test_an_error_is_one_line(monkeypatch, capsys):
  def point(topology):
    raise UserError('there is no libtpu')

  monkeypatch.setattr(scaling, 'point', point)
  assert scaling.main([]) == 2
  error = capsys.readouterr().err
  assert error == ('python -m benchmarks.scaling: error: there is no libtpu\n')


def test_the_same_batch_on_every_device():
  for devices in (8, 64, 6144):
    config = scaling.config_for(devices)
    assert config.data.batch_size == scaling.ROWS * devices
    assert config.mesh.fsdp == min(devices, 64)


def test_a_page_needs_nothing_else():
  page = scaling_page.page([made('v5p:2x2x2', 8), made('v5p:4x4x4', 64)])
  assert '<script' not in page and 'http' not in page
