import json

import pytest

from benchmarks import scaling, scaling_page


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


def test_points_are_kept_and_drawn(compiled, tmp_path, capsys):
  out, page = tmp_path / 'out.json', tmp_path / 'page.html'
  first = ['--topologies', 'v5p:4x4x4', '--json', str(out)]
  assert scaling.main(first) == 0
  more = ['--topologies', 'v5p:2x2x2', 'v5p:4x4x4', '--json', str(out)]
  assert scaling.main([*more, '--page', str(page)]) == 0
  assert compiled == ['v5p:4x4x4', 'v5p:2x2x2']  # Not compiled again.
  devices = [one['devices'] for one in json.loads(out.read_text())['points']]
  assert devices == [8, 64]
  table = capsys.readouterr().out
  assert '260.0' in table and '40.0%' in table
  assert page.read_text().count('<svg role="img"') == 4


def test_points_of_other_versions_are_compiled_again(
  compiled, monkeypatch, tmp_path
):
  arguments = ['--topologies', 'v5p:2x2x2', '--json', str(tmp_path / 'x.json')]
  scaling.main(arguments)
  monkeypatch.setattr(scaling, 'versions', lambda: {'jax': '2'})
  scaling.main(arguments)
  assert len(compiled) == 2


def test_the_same_batch_on_every_device():
  for devices in (8, 64, 6144):
    config = scaling.config_for(devices)
    assert config.data.batch_size == scaling.ROWS * devices
    assert config.mesh.fsdp == min(devices, 64)


def test_a_page_needs_nothing_else():
  page = scaling_page.page([made('v5p:2x2x2', 8), made('v5p:4x4x4', 64)])
  assert '<script' not in page and 'http' not in page
