"""Beam wants an older protobuf and pyarrow than others: see docs/data.md."""

import dataclasses
import importlib.util
import sys

import pytest

from tests.train.data.prepare import fakes
from train import errors
from train.data import source
from train.data.prepare import prepare, progress

REQUEST = source.Request('packed', 16, 0.2)
THREADS = ('--runner=DirectRunner',)
PROCESSES = (
  *THREADS,
  '--direct_num_workers=2',
  '--direct_running_mode=multi_processing',
)
TASKS = [fakes.Task(i) for i in range(6)]

needs_beam = pytest.mark.skipif(
  importlib.util.find_spec('apache_beam') is None,
  reason='Apache Beam is not installed',
)
pytestmark = pytest.mark.filterwarnings('ignore')  # Beam's own.


@pytest.fixture
def beam_engine():
  pytest.importorskip('apache_beam', reason='Apache Beam is not installed')
  from train.data.prepare import beam_engine

  return beam_engine


def test_says_which_extra_it_needs(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'apache_beam', None)
  monkeypatch.delitem(
    sys.modules, 'train.data.prepare.beam_engine', raising=False
  )
  with pytest.raises(errors.UserError, match=r'\.\[train,beam\]'):
    prepare(fakes.corpus(), fakes.bpe(), REQUEST, tmp_path / 'x', engine='beam')
  assert not (tmp_path / 'x').exists()


@needs_beam
@pytest.mark.parametrize('options', [(), THREADS, PROCESSES])
@pytest.mark.parametrize('layout', ['stream', 'packed'])
def test_beam_gives_the_same_bytes(tmp_path, options, layout):
  request = dataclasses.replace(REQUEST, layout=layout)
  arguments = (fakes.corpus(), fakes.bpe(), request)
  made = prepare(*arguments, tmp_path / 'local')
  assert made == prepare(
    *arguments, tmp_path / 'beam', engine='beam', beam_options=options
  )
  local = fakes.contents(tmp_path / 'local')
  assert fakes.contents(tmp_path / 'beam') == local


@needs_beam
def test_goes_on_with_what_the_other_engine_began(tmp_path):
  arguments = (fakes.corpus(), fakes.bpe(), REQUEST)
  with pytest.raises(KeyboardInterrupt):
    prepare(*arguments, tmp_path / 'x', progress=fakes.Interrupting(4))
  prepare(*arguments, tmp_path / 'x', engine='beam')
  prepare(*arguments, tmp_path / 'local')
  local = fakes.contents(tmp_path / 'local')
  assert fakes.contents(tmp_path / 'x') == local


@pytest.mark.parametrize('options', [THREADS, PROCESSES])
def test_a_mistake_is_told_as_it_is(tmp_path, beam_engine, options):
  with pytest.raises(errors.UserError, match=r'^a mistake in the input$'):
    beam_engine.Beam(options, tmp_path).run(
      fakes.Job(tmp_path, 'mistake'), TASKS, progress.Progress()
    )


def test_a_bug_keeps_its_traceback(tmp_path, beam_engine):
  with pytest.raises(ZeroDivisionError):
    beam_engine.Beam(THREADS, tmp_path).run(
      fakes.Job(tmp_path, 'bug'), TASKS, progress.Progress()
    )


@pytest.mark.parametrize(
  'option', ['--runner=NoSuchRunner', '--direct_num_workers=x']
)
def test_options_that_beam_does_not_take(tmp_path, beam_engine, option):
  with pytest.raises(errors.UserError, match=f'these options: {option}'):
    beam_engine.Beam([option], tmp_path)


def test_a_worker_that_does_not_share_the_directory(tmp_path, beam_engine):
  with pytest.raises(RuntimeError, match='a file system that all of them'):
    beam_engine._do((0, TASKS[0]), fakes.Job(tmp_path), tmp_path / 'no')


def test_a_runner_that_fails_is_one_line(tmp_path, beam_engine, monkeypatch):
  def fails(*args, **options):
    raise OSError('no cluster\nanywhere')

  monkeypatch.setattr(beam_engine.beam, 'Create', fails)
  with pytest.raises(errors.UserError, match='OSError: no cluster anywhere'):
    beam_engine.Beam((), tmp_path).run(
      fakes.Job(tmp_path), TASKS, progress.Progress()
    )
