"""What a terminal gets: rich's colours where it has some, and its own width."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from msgspec.structs import replace
from runs_to_show import COMPILED, NOTED, REUSED

from flax_magics.base.text import fit
from flax_magics.report.display import coloured, on_terminal, publish
from flax_magics.report.text import normal, report


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Publisher:
    """Keeps the texts that are published."""

    def __init__(self) -> None:
        self.texts: list[object] = []

    def publish(self, data: dict[str, object], **_: object) -> None:
        self.texts.append(data["text/plain"])


ESCAPE = re.compile(r"\x1b\[[\d;]*m")


@pytest.fixture
def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes a terminal with colours of standard output, which pytest sets anew before a test's body."""
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "COLORTERM", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    return lambda: monkeypatch.setattr(sys, "stdout", Terminal())


@pytest.mark.parametrize("run", [REUSED, COMPILED, NOTED])
def test_colours_are_added_and_nothing_else(on_a_terminal, run) -> None:
    on_a_terminal()
    text = normal(run)
    assert ESCAPE.sub("", coloured(text)) == text
    assert len(ESCAPE.findall(coloured(text))) > 4


def test_the_name_is_bold_a_label_dim_and_a_sharp_bit_yellow(on_a_terminal) -> None:
    on_a_terminal()
    text = coloured(normal(NOTED))
    assert text.startswith("\x1b[1mnet\x1b[0m · train")
    assert "\x1b[2m  out\x1b[0m" in text
    assert "\x1b[1;33m! \x1b[0mDropout_0 is off" in text
    assert "\x1b[36m0.22 ms\x1b[0m" in text


def test_what_stands_above_a_report_is_dim(on_a_terminal) -> None:
    on_a_terminal()
    run = replace(NOTED, registered="Net(3)")
    assert coloured(normal(run)).startswith("\x1b[2mnet registered: Net(3)\x1b[0m\n\x1b[1mnet\x1b[0m · train")
    first = coloured(normal(replace(run, first=True)))
    assert first.startswith("\x1b[2mnew session, seed 0 · net registered: Net(3)\x1b[0m\n\x1b[1mnet\x1b[0m")


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_who_wants_no_colour_gets_none(on_a_terminal, monkeypatch, name, value) -> None:
    on_a_terminal()
    monkeypatch.setenv(name, value)
    assert coloured(normal(NOTED)) == normal(NOTED)


def test_a_shell_without_colours_and_a_kernel_get_plain_text(on_a_terminal) -> None:
    on_a_terminal()
    for shell in (
        SimpleNamespace(display_pub=Publisher(), colors="NoColor"),
        SimpleNamespace(display_pub=Publisher(), colors="Linux", kernel=object()),
    ):
        publish(shell, {"text/plain": report(REUSED, "line")})
        assert shell.display_pub.texts == [report(REUSED, "line")]
    shell = SimpleNamespace(display_pub=Publisher(), colors="Linux")
    publish(shell, {"text/plain": report(REUSED, "line")})
    assert "\x1b[" in shell.display_pub.texts[0]


def test_what_is_captured_or_piped_is_on_no_terminal(monkeypatch) -> None:
    for stream in (io.StringIO(), None):
        monkeypatch.setattr(sys, "stdout", stream)
        assert not on_terminal(SimpleNamespace())


@pytest.fixture
def width():
    yield fit
    fit()


def test_a_report_is_as_wide_as_the_terminal(width) -> None:
    width(120)
    assert "! Dropout_0 is off although --train was asked: deterministic=True is fixed in MyModel (line 8)" in normal(
        NOTED
    )
    width(50)
    assert max(map(len, normal(NOTED).splitlines())) <= 50
    width()
    assert max(map(len, normal(NOTED).splitlines())) <= 80
