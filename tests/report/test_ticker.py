"""The thread that tells the live lines when to draw: one at most, a daemon, gone when there is nothing to do."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from flax_magics.report import live
from flax_magics.report.live import Ticker


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "nothing happened for ten seconds"
        time.sleep(0.002)


def started(since: set[threading.Thread]) -> list[threading.Thread]:
    """Threads that were not there before."""
    return [thread for thread in threading.enumerate() if thread not in since]


def test_a_job_is_drawn_when_it_is_due_and_again_after_each_interval():
    ticker, drawn = Ticker(idle=0.01), []
    ticker.begin(lambda: drawn.append(threading.current_thread().name), 0.001, 0.001)
    until(lambda: len(drawn) >= 3)
    ticker.end()
    assert set(drawn) == {"flax_magics live"}


def test_after_a_drawing_that_took_the_processor_long_the_next_is_put_off(monkeypatch):
    ticker, drawn = Ticker(idle=0.01), []
    clock = SimpleNamespace(monotonic=time.monotonic, thread_time=iter([0.0, 1000.0]).__next__)
    monkeypatch.setattr(live, "time", clock)
    ticker.begin(lambda: drawn.append(1), 0.0, 0.0)
    until(lambda: bool(drawn))
    ticker.end()
    assert ticker._due > time.monotonic() + 40_000


def test_nothing_is_drawn_once_end_has_returned():
    ticker, drawn = Ticker(idle=0.01), []
    for _ in range(50):
        ticker.begin(lambda: drawn.append(1), 0.0, 0.0)
        until(lambda: bool(drawn))
        ticker.end()
        before = len(drawn)
        time.sleep(0.001)
        assert len(drawn) == before
        drawn.clear()


def test_end_waits_for_a_drawing_that_is_under_way():
    ticker, begun, go_on, done = Ticker(idle=0.01), threading.Event(), threading.Event(), []

    def draw() -> None:
        begun.set()
        go_on.wait(10)
        done.append(1)

    ticker.begin(draw, 0.0, 60.0)
    begun.wait(10)
    threading.Timer(0.02, go_on.set).start()
    ticker.end()
    assert done == [1]


def test_many_jobs_have_one_daemon_thread_which_ends_when_it_is_idle():
    before = set(threading.enumerate())
    ticker = Ticker(idle=0.05)
    for _ in range(20):
        ticker.begin(lambda: None, 60.0, 60.0)
        ticker.end()
    (thread,) = started(before)
    assert (thread.name, thread.daemon) == ("flax_magics live", True)
    until(lambda: not thread.is_alive())
    assert started(before) == []
    drawn: list[int] = []
    ticker.begin(lambda: drawn.append(1), 0.0, 60.0)
    until(lambda: drawn == [1])
    ticker.end()


def test_the_thread_stays_while_there_is_work_however_long_it_is_idle():
    before = set(threading.enumerate())
    ticker, drawn = Ticker(idle=0.001), []
    ticker.begin(lambda: drawn.append(1), 0.03, 60.0)
    until(lambda: drawn == [1])
    assert len(started(before)) == 1
    ticker.end()
    until(lambda: started(before) == [])


def test_a_job_that_cannot_be_drawn_is_tried_once_and_the_thread_still_ends():
    before = set(threading.enumerate())
    ticker, tried = Ticker(idle=0.005), []

    def draw() -> None:
        tried.append(1)
        raise ValueError

    ticker.begin(draw, 0.0, 0.0)
    until(lambda: tried == [1])
    ticker.end()
    until(lambda: started(before) == [])
    assert tried == [1]


def test_an_interrupted_end_has_given_the_job_up():
    ticker, begun, go_on, drawn = Ticker(idle=0.005), threading.Event(), threading.Event(), []

    class Interrupted:
        def __enter__(self, lock: Any = ticker._lock) -> None:
            if threading.current_thread() is threading.main_thread() and begun.is_set():
                raise KeyboardInterrupt
            lock.acquire()

        def __exit__(self, *error: object, lock: Any = ticker._lock) -> None:
            lock.release()

    def draw() -> None:
        drawn.append(1)
        begun.set()
        go_on.wait(10)

    ticker._lock = Interrupted()
    ticker.begin(draw, 0.0, 0.0)
    begun.wait(10)
    with pytest.raises(KeyboardInterrupt):
        ticker.end()
    go_on.set()
    until(lambda: ticker._thread is None)
    assert drawn == [1]


def test_no_interrupt_leaves_the_lock_taken():
    ticker, moments, turn = Ticker(idle=0.05), random.Random(0), -1

    def interrupt() -> None:
        for n in range(60):
            while turn < n:
                time.sleep(1e-4)
            time.sleep(moments.random() * 1e-3)
            signal.raise_signal(signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    for n in range(60):
        try:
            turn = n
            while True:
                ticker.begin(lambda: None, 60.0, 60.0)
                ticker.end()
        except KeyboardInterrupt:
            assert ticker._lock.acquire(timeout=10)
            ticker._lock.release()
    thread.join()
    ticker.end()
    until(lambda: ticker._thread is None)
