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

from flax_magics.report.live import Live, publish, ticker

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
def phase(live: Live, text: str) -> Iterator[None]:
    """A block of work that the live line tells of."""
    live.begin(text)
    try:
        yield
    finally:
        live.end()


@pytest.fixture(autouse=True)
def nothing_left_to_draw() -> Iterator[None]:
    """The one thread that draws may live on for a while; it has nothing more to do, and holds up no exit."""
    yield
    assert ticker._draw is None
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
        ("compiling net · 3 s · interrupt the kernel to stop", False, known, "none"),
        ("compiling net · 1 min 3 s · interrupt the kernel to stop", True, known, "none"),
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
    live = Live(shell, delay=0.001, interval=0.001)

    def shown(text: str) -> bool:
        return bool(shell.display_pub.sent) and shell.display_pub.sent[-1][0].startswith(text)

    with phase(live, "tracing net"):
        until(lambda: shown("tracing net · 0 s"))
        live.text = "compiling net"
        until(lambda: shown("compiling net · 0 s"))
    assert len({display for _, _, display, _ in shell.display_pub.sent}) == 1


def test_a_phase_that_is_over_at_once_is_not_shown() -> None:
    shell, now = kernel(), [0.0]
    live = Live(shell, delay=1.0, interval=0.5, clock=lambda: now[0])
    live.begin("preparing")
    for at, text in ((0.1, "tracing net"), (1.4, "lowering net"), (1.45, "compiling net"), (2.4, "running net")):
        now[0] = at
        live.text = text
        now[0] = at + 0.1
        live._tick()
    live.end()
    assert live.text == "running net"  # what an interrupt tells
    phases = [text.partition(" ·")[0] for text, *_ in shell.display_pub.sent]
    assert phases == ["tracing net", "tracing net", "tracing net", "tracing net"]
    live.begin("preparing")
    live.text = "compiling net"
    live._tick()
    now[0] += 1.0
    live.text = "running net"
    now[0] += 0.5
    live._tick()
    live.end()
    assert [text.partition(" ·")[0] for text, *_ in shell.display_pub.sent[4:]] == ["compiling net", "running net"]


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
    assert stream.getvalue() == "\r\x1b[Kcompiling \\x1b[31mnet · 3 s · Ctrl-C stops it\r\x1b[K"
    assert live.display_id is None


def test_a_command_that_tells_how_far_it_is_has_that_in_the_place_of_its_line() -> None:
    shell = kernel()
    live = Live(shell, delay=60.0)
    live.within = lambda text: pytest.fail("it has a display of its own")
    with phase(live, "training net"):
        live.progress = lambda text: {"text/plain": f"step 3\n{text}"}
        live._tick()
    shown = "step 3\ntraining net · 0 s · interrupt the kernel to stop"
    assert shell.display_pub.sent == [(shown, False, live.display_id, "none")]
    with phase(live, "running net"):
        assert live.progress is None


def test_on_a_terminal_it_is_one_line() -> None:
    stream = Terminal()
    live = Live(SimpleNamespace(display_pub=Publisher()), delay=60.0, stream=stream)
    with phase(live, "training net"):
        live.progress = lambda text: {"text/plain": f"step 3 · {text}"}
        live._tick()
    assert stream.getvalue() == "\r\x1b[Kstep 3 · Ctrl-C stops it\r\x1b[K"


def test_a_shell_without_colours_and_a_kernel_get_plain_text(on_a_terminal) -> None:
    on_a_terminal()
    texts = []
    for facts in ({"colors": "NoColor"}, {"colors": "Linux", "kernel": object()}, {"colors": "Linux"}):
        shell = SimpleNamespace(display_pub=Publisher(), **facts)
        publish(shell, {"text/plain": "net · run 0.22 ms"})
        texts.append(shell.display_pub.sent[0][0])
    assert texts == ["net · run 0.22 ms"] * 2 + ["\x1b[1mnet\x1b[0m · run \x1b[36m0.22 ms\x1b[0m"]


def test_a_pipe_shows_nothing() -> None:
    stream = io.StringIO()
    with phase(Live(None, delay=0.001, stream=stream), "compiling net"):
        time.sleep(0.01)
    assert stream.getvalue() == ""


def test_a_script_prints_its_report(capsys: pytest.CaptureFixture[str]) -> None:
    Live(None).show({"text/plain": "done"})
    assert capsys.readouterr().out == "done\n"
