import threading
import time

import pytest

from train.data import prefetch


@pytest.mark.parametrize('threads', [1, 3])
@pytest.mark.parametrize('depth', [1, 4])
def test_batches_come_in_order(threads, depth):
  read = []

  def slowly(i):
    time.sleep(0.002 * (i % 3))
    read.append(i)
    return i * i

  with prefetch.Prefetch(slowly, 5, depth=depth, threads=threads) as ahead:
    assert [ahead.next(i) for i in range(5, 40)] == [
      i * i for i in range(5, 40)
    ]
  assert len(read) == len(set(read))


def test_no_more_than_depth_are_ahead():
  asked, read = [4], []
  may_read = threading.Semaphore(0)

  def note(i):
    may_read.acquire()
    read.append((i, asked[0]))
    return i

  with prefetch.Prefetch(note, 4, depth=3, threads=2) as ahead:
    may_read.release(3)
    deadline = time.monotonic() + 5
    while len(read) < 3 and time.monotonic() < deadline:
      time.sleep(0.001)
    assert sorted(i for i, _ in read) == [4, 5, 6]  # Before any is asked for.
    may_read.release(1000)
    for i in range(4, 60):
      asked[0] = i
      assert ahead.next(i) == i
  assert all(i <= at + 3 for i, at in read)


def test_reading_goes_on_while_the_loop_is_busy():
  with prefetch.Prefetch(lambda i: time.sleep(0.02) or i, 0) as ahead:
    ahead.next(0)
    waited = 0.0
    for i in range(1, 10):
      time.sleep(0.03)
      start = time.perf_counter()
      ahead.next(i)
      waited += time.perf_counter() - start
  assert waited < 0.1


def test_an_error_is_raised_at_its_batch():
  def read(i):
    if i == 3:
      raise ValueError(f'batch {i}')
    return i

  with prefetch.Prefetch(read, 0, depth=8) as ahead:
    assert [ahead.next(i) for i in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match='batch 3'):
      ahead.next(3)
    assert ahead.next(4) == 4


def test_jumps():
  with prefetch.Prefetch(lambda i: -i, 0, depth=3) as ahead:
    found = [ahead.next(i) for i in (0, 1, 100, 101, 7, 7, 8)]
  assert found == [0, -1, -100, -101, -7, -7, -8]


def test_what_is_not_wanted_any_more_is_not_read():
  read, may_read = [], threading.Semaphore(0)

  def note(i):
    may_read.acquire()
    read.append(i)
    return i

  with prefetch.Prefetch(note, 0, depth=4, threads=1) as ahead:
    waiting = threading.Timer(0.05, may_read.release, [20])
    waiting.start()
    assert ahead.next(100) == 100
    waiting.join()
  assert [i for i in read if i < 100] in ([], [0])  # That was being read.


def test_close_leaves_no_thread():
  before = set(threading.enumerate())
  started, read = threading.Event(), []

  def note(i):
    started.set()
    time.sleep(0.05)
    read.append(i)

  ahead = prefetch.Prefetch(note, 0, depth=50, threads=3)
  started.wait()
  assert set(threading.enumerate()) - before
  ahead.close()
  assert not set(threading.enumerate()) - before
  assert len(read) < 50  # What was being read, not what was to come.
  ahead.close()
  with pytest.raises(RuntimeError):
    ahead.next(0)
