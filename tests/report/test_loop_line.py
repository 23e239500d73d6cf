"""Runs of a loop are counted in one line."""

from __future__ import annotations

from dataclasses import replace

from html_reader import EVIL, Reader
from runs_to_show import COMPILED, KEY, NOTE, NOTED, REUSED

from flax_magics.base.measures import Timing
from flax_magics.report import html
from flax_magics.report.html import loop_bundle
from flax_magics.report.text import Loop, loop_line
from flax_magics.run import Note


def counted(*runs: object) -> Loop:
    loop = Loop()
    for run in runs:
        loop = loop.add(run)  # type: ignore[arg-type]
    return loop


def test_a_hundred_runs_are_one_line() -> None:
    loop = counted(*(replace(REUSED, draw=draw) for draw in range(2, 102)))
    text = "net · train · cpu:0 · draws 2–101 · 100 runs · reused · run median 0.22 ms"
    assert loop_line(loop) == Reader(html.loop_html(loop)).text == text


def test_what_was_compiled_among_them_is_said() -> None:
    loop = counted(COMPILED, REUSED, replace(REUSED, model="critic", draw=3, changed={"batch_stats": 2}))
    assert loop_line(loop) == (
        "net, critic · train · cpu:0 · draws 1–3 · 3 runs ·\n"
        "    1 compiled in 0.41 s, 2 reused · run median 0.22 ms · batch_stats: update 2"
    )


def test_the_median_is_that_of_the_runs_so_far() -> None:
    one = counted(replace(REUSED, timing=Timing(run=0.001)))
    two = one.add(replace(REUSED, timing=Timing(run=0.003)))
    other = one.add(replace(REUSED, timing=Timing(run=0.005)))
    assert (one.median, two.median, other.median) == (0.001, 0.002, 0.003)


def test_a_sharp_bit_is_said_once() -> None:
    assert counted(NOTED, NOTED).notes == (NOTE,)
    assert loop_line(counted(NOTED, NOTED)).count("! ") == 1


def test_keys_count_as_draws_but_not_as_times() -> None:
    assert loop_line(counted(KEY)) == "key latent · draw 3 · 1 run"


def test_a_loop_is_escaped() -> None:
    loop = counted(replace(REUSED, model=EVIL, mode=EVIL, device=EVIL, program=EVIL, notes=(Note("k", EVIL, EVIL),)))
    assert "<script" not in loop_bundle(loop, "auto")["text/html"]
    assert "text/html" not in loop_bundle(loop, "text")
