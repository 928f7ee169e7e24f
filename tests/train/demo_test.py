import contextlib
import io
import json
import os
import re
import signal
import types

import pytest

from train import demo, loop
from train.__main__ import main as entry_point
from train.config import Config, OptimizerConfig
from train.errors import UserError

ARMS = 'adamw', 'adamw_power'


@pytest.fixture(scope='module')
def done(tmp_path_factory, tiny, data_cache):
  """A demo that nothing disturbed, on eight devices."""
  run_dir = tmp_path_factory.mktemp('demo') / 'run'
  out, err = io.StringIO(), io.StringIO()
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv('GRADPOWER_CACHE', str(data_cache))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
      status = entry_point(['demo', '--run-dir', str(run_dir), *tiny])
  assert status == 0, err.getvalue()
  return types.SimpleNamespace(dir=run_dir, out=out.getvalue())


def results(run_dir):
  return json.loads((run_dir / 'results.json').read_text())


def test_results_are_as_the_contract_says(done, read_metrics):
  document = results(done.dir)
  assert document.keys() == {'arms', 'difference'}
  assert list(document['arms']) == ['adamw', 'adamw_power']
  for name, arm in document['arms'].items():
    assert arm.keys() == {'validation_loss', 'params_digest', 'run_dir'}
    assert arm['run_dir'] == str(done.dir / name)
    end = read_metrics(done.dir / name)[-1]
    assert arm['validation_loss'] == end['validation_loss']
    assert arm['params_digest'] == end['params_digest']
  plain, powered = document['arms'].values()
  assert document['difference'] == (
    powered['validation_loss'] - plain['validation_loss']
  )
  assert plain['params_digest'] != powered['params_digest']


def test_the_arms_differ_in_the_power_alone(done):
  plain, powered = (
    json.loads((done.dir / name / 'config.json').read_text()) for name in ARMS
  )
  assert plain['optimizer'].pop('power') == 1.0
  assert powered['optimizer'].pop('power') == 1.2
  assert plain == powered
  plain, powered = (
    json.loads((done.dir / name / 'run.json').read_text()) for name in ARMS
  )
  assert plain == powered


def test_both_arms_start_from_the_same_parameters_and_batches(done, numbers):
  arms = [numbers(done.dir / name) for name in ARMS]
  # Warm-up begins at 0, so step 2 still sees the initial parameters.
  for plain, powered in list(zip(*arms, strict=True))[:2]:
    assert plain.pop('powered_norm') == plain['clipped_norm']
    assert powered.pop('powered_norm') != powered['clipped_norm']
    assert plain == powered
  assert arms[0][0]['loss'] != arms[0][1]['loss']
  assert arms[0][2]['loss'] != arms[1][2]['loss']


def test_the_table_and_the_warning_are_printed(done):
  document = results(done.dir)
  for name, arm in document['arms'].items():
    assert re.search(
      rf'^  {name} +{arm["validation_loss"]:.4f}$', done.out, re.M
    )
  difference = f'{document["difference"]:+.4f}'
  assert re.search(rf'^  difference +{re.escape(difference)}$', done.out, re.M)
  assert demo.WARNING in ' '.join(done.out.split())
  assert f'report: {done.dir / "report.html"}' in done.out


def test_the_report_is_one_page(done):
  page = (done.dir / 'report.html').read_text()
  assert page.lower().startswith('<!doctype html>')
  assert 'sign_power(1.2)' in page
  assert 'One seed at this size proves nothing' in page
  assert '<svg' in page
  for name in ARMS:
    assert name in page
  # It loads nothing: no scripts, sheets or pictures from elsewhere.
  assert not re.search(r'<(script|link|img|iframe)\b[^>]*\b(src|href)=', page)
  assert 'url(' not in page and '@import' not in page


def test_the_directory_holds_nothing_else(done):
  assert {path.name for path in done.dir.iterdir()} == {
    'adamw', 'adamw_power', 'results.json', 'report.html',
  }  # fmt: skip


def test_a_demo_that_is_done_draws_its_page_again(done, main, tiny, capsys):
  page = (done.dir / 'report.html').read_bytes()
  document = results(done.dir)
  metrics = done.dir / 'adamw' / 'metrics.jsonl'
  before = metrics.stat().st_mtime_ns
  (done.dir / 'report.html').unlink()
  (done.dir / 'results.json').unlink()
  assert main('demo', '--run-dir', done.dir, *tiny) == 0
  assert capsys.readouterr().out == done.out
  assert (done.dir / 'report.html').read_bytes() == page
  assert results(done.dir) == document
  assert metrics.stat().st_mtime_ns == before


def test_an_interrupted_demo_goes_on(
  done, main, tiny, tmp_path, capsys, monkeypatch, numbers
):
  run_dir = tmp_path / 'run'
  argv = ['demo', '--run-dir', run_dir, *tiny]
  run = loop.run

  def between_the_arms(config, directory, **kwargs):
    result = run(config, directory, **kwargs)
    os.kill(os.getpid(), signal.SIGINT)
    return result

  with monkeypatch.context() as patch:
    patch.setattr(loop, 'run', between_the_arms)
    assert main(*argv) == 130
  assert capsys.readouterr().err.endswith('\npython -m train: interrupted\n')
  assert [path.name for path in run_dir.iterdir()] == ['adamw']

  # In the last moments of the first arm: it ends, the second does not start.
  class LastMoment(loop.Monitor):
    def validation(self, line):
      super().validation(line)
      os.kill(os.getpid(), signal.SIGINT)

  other = tmp_path / 'other'
  with monkeypatch.context() as patch:
    patch.setattr(loop, 'Monitor', LastMoment)
    patch.setattr(loop._Run, '_train', lambda self: 'done')
    assert main('demo', '--run-dir', other, *tiny) == 130
  assert [path.name for path in other.iterdir()] == ['adamw']
  assert (
    'interrupted (SIGINT), before the first step' in capsys.readouterr().err
  )

  class Monitor(loop.Monitor):
    def train(self, line):
      super().train(line)
      if line['step'] == 11:
        os.kill(os.getpid(), signal.SIGINT)

  with monkeypatch.context() as patch:
    patch.setattr(loop, 'Monitor', Monitor)
    assert main(*argv) == 130
  captured = capsys.readouterr()
  assert captured.out == ''
  assert captured.err.endswith(
    f'interrupted (SIGINT), saved in {run_dir}; the same command goes on from '
    'there\n'
  )
  assert {path.name for path in run_dir.iterdir()} == set(ARMS)

  assert main(*argv) == 0
  for name in ARMS:
    assert numbers(run_dir / name) == numbers(done.dir / name)
  assert results(run_dir)['difference'] == results(done.dir)['difference']
  assert (run_dir / 'report.html').exists()


def test_a_full_disk_at_the_end_is_one_line(
  done, main, tiny, capsys, monkeypatch
):
  def full(*_):
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(demo, 'write_atomically', full)
  assert main('demo', '--run-dir', done.dir, *tiny) == 2
  captured = capsys.readouterr()
  assert 'no space left to write' in captured.err.splitlines()[-1]
  assert captured.out == ''


def test_losses_that_are_not_finite_are_strings(tmp_path):
  ends = {
    name: loop.Result('done', 3, loss, 'digest')
    for name, loss in zip(ARMS, (2.0, float('nan')), strict=True)
  }
  demo._write_results(tmp_path, ends)
  document = results(tmp_path)
  assert document['arms']['adamw']['validation_loss'] == 2.0
  assert document['arms']['adamw_power']['validation_loss'] == 'nan'
  assert document['difference'] == 'nan'
  assert 'nan' in demo._table(tmp_path, ends)


def test_a_demo_of_another_optimizer_is_refused(tmp_path):
  (tmp_path / 'adamw').mkdir()
  config = Config(optimizer=OptimizerConfig(name='muon', power=1.2))
  with pytest.raises(UserError, match=r'a demo with --optimizer\.name adamw'):
    demo.run(config, tmp_path)


def test_power_1_is_refused(tmp_path):
  config = Config()  # Its power is 1.
  with pytest.raises(demo.UserError, match='makes both arms the same'):
    demo.run(config, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()
