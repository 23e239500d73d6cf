"""The live line: nothing while things are quick, a ticking line when they are slow, nothing left behind."""

from __future__ import annotations

import contextvars
import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from flax_magics.report.live import Live, Progress, Tick, Ticker, ticker

CELL: contextvars.ContextVar[str] = contextvars.ContextVar("cell", default="none")


class Publisher:
    """Keeps what is published: text, whether it updates, its display id, and the cell it was routed to."""

    def __init__(self) -> None:
        self.sent: list[tuple[str, bool, str | None, str]] = []

    def publish(self, data: dict[str, Any], metadata: dict[str, Any], transient: dict[str, str], update: bool) -> None:
        self.sent.append((data["text/plain"], update, transient.get("display_id"), CELL.get()))


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def kernel() -> Any:
    return SimpleNamespace(kernel=object(), display_pub=Publisher())


def clock(*readings: float) -> Callable[[], float]:
    """Gives the readings in turn, then the last one for ever."""
    left = iter(readings)
    return lambda: next(left, readings[-1])


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "nothing happened for ten seconds"
        time.sleep(0.002)


@contextmanager
def phase(live: Live, text: str) -> Iterator[Progress]:
    """A block of work that the live line tells of."""
    try:
        yield live.begin(text)
    finally:
        live.end()


@pytest.fixture(autouse=True)
def nothing_left_to_draw() -> Iterator[None]:
    """The one thread that draws may live on for a while; it has nothing more to do, and holds up no exit."""
    yield
    assert ticker._job is None
    drawing = [thread for thread in threading.enumerate() if thread.name == "flax_magics live"]
    assert len(drawing) <= 1
    assert all(thread.daemon for thread in drawing)


def test_quick_work_shows_nothing() -> None:
    shell = kernel()
    live = Live(shell)
    with phase(live, "compiling net"):
        pass
    assert shell.display_pub.sent == []
    assert live.display_id is None


def test_slow_work_ticks_in_one_display_and_the_report_replaces_it() -> None:
    shell = kernel()
    live = Live(shell, delay=0.001, interval=0.001, clock=clock(10.0, 13.2, 73.9))
    with phase(live, "compiling net"):
        until(lambda: len(shell.display_pub.sent) >= 2)
    known = live.display_id
    assert known is not None
    assert shell.display_pub.sent[:2] == [
        ("compiling net · 3 s", False, known, "none"),
        ("compiling net · 1 min 3 s", True, known, "none"),
    ]
    del shell.display_pub.sent[:]
    live.show({"text/plain": "done"})
    assert shell.display_pub.sent == [("done", True, known, "none")]
    assert live.display_id is None


def test_a_report_without_a_live_line_is_published_anew() -> None:
    shell = kernel()
    Live(shell).show({"text/plain": "done"})
    assert shell.display_pub.sent == [("done", False, None, "none")]


def test_clearing_blanks_what_was_shown_and_nothing_else() -> None:
    shell = kernel()
    live = Live(shell, delay=0.001)
    live.clear()
    assert shell.display_pub.sent == []
    with phase(live, "compiling net"):
        until(lambda: bool(shell.display_pub.sent))
    known = live.display_id
    live.show({})
    assert shell.display_pub.sent[-1] == ("", True, known, "none")
    assert live.display_id is None


def test_the_text_can_change() -> None:
    shell = kernel()
    live = Live(shell, delay=0.001, interval=0.001, clock=lambda: 0.0)

    def shown(text: str) -> bool:
        return bool(shell.display_pub.sent) and shell.display_pub.sent[-1][0] == text

    with phase(live, "tracing net") as progress:
        until(lambda: shown("tracing net · 0 s"))
        progress.text = "compiling net"
        until(lambda: shown("compiling net · 0 s"))
    assert len({display for _, _, display, _ in shell.display_pub.sent}) == 1


def test_output_goes_to_the_cell_that_asked() -> None:
    shell = kernel()
    token = CELL.set("cell 7")
    try:
        with phase(Live(shell, delay=0.001), "compiling net"):
            until(lambda: bool(shell.display_pub.sent))
    finally:
        CELL.reset(token)
    assert shell.display_pub.sent[0][3] == "cell 7"


def test_an_error_ends_the_ticking_and_passes_through() -> None:
    with pytest.raises(KeyboardInterrupt), phase(Live(kernel(), delay=0.001), "compiling net"):
        raise KeyboardInterrupt


def test_a_line_that_cannot_be_published_harms_nothing() -> None:
    shell = SimpleNamespace(kernel=object(), display_pub=None)
    with phase(Live(shell, delay=0.001), "compiling net"):
        time.sleep(0.02)


def test_a_terminal_shows_one_line_and_wipes_it() -> None:
    stream = Terminal()
    live = Live(SimpleNamespace(display_pub=Publisher()), delay=0.001, clock=clock(0.0, 3.0), stream=stream)
    with phase(live, "compiling \x1b[31mnet"):
        until(lambda: stream.getvalue() != "")
    assert stream.getvalue() == "\r\x1b[Kcompiling \\x1b[31mnet · 3 s\r\x1b[K"
    assert live.display_id is None


def test_a_pipe_shows_nothing() -> None:
    stream = io.StringIO()
    with phase(Live(None, delay=0.001, stream=stream), "compiling net"):
        time.sleep(0.01)
    assert stream.getvalue() == ""


def test_a_script_prints_its_report(capsys: pytest.CaptureFixture[str]) -> None:
    Live(None).show({"text/plain": "done"})
    assert capsys.readouterr().out == "done\n"


# -- the thread that tells the lines when to draw: one at most, a daemon, gone when there is nothing to do


def started(since: set[threading.Thread]) -> list[threading.Thread]:
    """Threads that were not there before."""
    return [thread for thread in threading.enumerate() if thread not in since]


def test_a_job_is_drawn_when_it_is_due_and_again_after_each_interval():
    ticker, drawn = Ticker(idle=0.01), []
    ticker.begin(Tick(lambda: drawn.append(threading.current_thread().name), 0.001, 0.001))
    until(lambda: len(drawn) >= 3)
    ticker.end()
    assert set(drawn) == {"flax_magics live"}


def test_nothing_is_drawn_once_end_has_returned():
    ticker, drawn = Ticker(idle=0.01), []
    for _ in range(50):
        ticker.begin(Tick(lambda: drawn.append(1), 0.0, 0.0))
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

    ticker.begin(Tick(draw, 0.0, 60.0))
    begun.wait(10)
    threading.Timer(0.02, go_on.set).start()
    ticker.end()
    assert done == [1]


def test_many_jobs_have_one_daemon_thread_which_ends_when_it_is_idle():
    before = set(threading.enumerate())
    ticker = Ticker(idle=0.05)
    for _ in range(20):
        ticker.begin(Tick(lambda: None, 60.0, 60.0))
        ticker.end()
    (thread,) = started(before)
    assert (thread.name, thread.daemon) == ("flax_magics live", True)
    until(lambda: not thread.is_alive())
    assert started(before) == []
    drawn: list[int] = []
    ticker.begin(Tick(lambda: drawn.append(1), 0.0, 60.0))
    until(lambda: drawn == [1])
    ticker.end()


def test_the_thread_stays_while_there_is_work_however_long_it_is_idle():
    before = set(threading.enumerate())
    ticker, drawn = Ticker(idle=0.001), []
    ticker.begin(Tick(lambda: drawn.append(1), 0.03, 60.0))
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

    ticker.begin(Tick(draw, 0.0, 0.0))
    until(lambda: tried == [1])
    ticker.end()
    until(lambda: started(before) == [])
    assert tried == [1]


def test_an_interrupted_end_has_given_the_job_up():
    ticker, begun, go_on, drawn = Ticker(idle=0.005), threading.Event(), threading.Event(), []

    class Interrupted(threading.Condition):
        def __enter__(self) -> bool:
            if threading.current_thread() is threading.main_thread() and begun.is_set():
                raise KeyboardInterrupt
            return super().__enter__()

    def draw() -> None:
        drawn.append(1)
        begun.set()
        go_on.wait(10)

    ticker._changed = Interrupted(threading.Lock())
    ticker.begin(Tick(draw, 0.0, 0.0))
    begun.wait(10)
    with pytest.raises(KeyboardInterrupt):
        ticker.end()
    go_on.set()
    until(lambda: ticker._thread is None)
    assert drawn == [1]
