"""A report is as long as its news, and carries its data; runs of a loop, and what is registered, are a line each."""

from __future__ import annotations

import json

import pytest
from html_reader import EVIL, Reader
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from rich.cells import cell_len
from runs_to_show import COMPILED, INIT, KEY, NOTE, NOTED, REPEATED, REUSED

from flax_magics.base.files import RUN_JSON
from flax_magics.base.measures import Timing
from flax_magics.cells.journal import Registered
from flax_magics.report.html import bundle, level, loop_bundle, registered_bundle
from flax_magics.report.html import report_html as html
from flax_magics.report.text import Loop, notice_text, registered_text
from flax_magics.report.text import report as text
from flax_magics.run import Note, Run


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (REUSED, "line"),
        (COMPILED, "normal"),
        (INIT, "normal"),
        (KEY, "line"),
        (NOTED, "normal"),
        (REPEATED, "normal"),
        (replace(REUSED, first=True), "normal"),
        (replace(KEY, first=True), "normal"),
        (replace(REUSED, program="disk cache"), "line"),
    ],
)
def test_auto_is_as_long_as_the_news(run: Run, expected: str) -> None:
    assert level(run, "auto") == expected


@pytest.mark.parametrize("setting", ["off", "line", "normal", "details"])
def test_a_setting_is_obeyed(setting: str) -> None:
    assert level(COMPILED, setting) == setting


def test_a_bundle_has_text_html_and_data() -> None:
    shown = bundle(REUSED, "line", "auto")
    assert shown["text/plain"] == text(REUSED, "line")
    assert shown["text/html"] == html(REUSED, "line")
    assert shown[RUN_JSON] == REUSED.to_json()
    assert json.loads(json.dumps(shown[RUN_JSON]))["draw"] == 2


def test_style_text_leaves_the_html_out() -> None:
    assert set(bundle(REUSED, "line", "text")) == {"text/plain", RUN_JSON}


def test_off_shows_sharp_bits_alone() -> None:
    assert bundle(REUSED, "off", "auto") == {}
    assert set(bundle(NOTED, "off", "auto")) == {"text/plain", "text/html"}


# -- a loop


def counted(*runs: object) -> Loop:
    loop = Loop()
    for run in runs:
        loop.add(run)  # type: ignore[arg-type]
    return loop


def test_a_hundred_runs_are_one_line() -> None:
    loop = counted(*(replace(REUSED, draw=draw) for draw in range(2, 102)))
    shown = "net · train · cpu:0 · draws 2–101 · 100 runs · reused · run median 0.22 ms"
    assert notice_text(loop.line()) == Reader(loop_bundle(loop, "auto")["text/html"]).text == shown


def test_what_was_compiled_among_them_is_said() -> None:
    loop = counted(COMPILED, REUSED, replace(REUSED, model="critic", draw=3, changed={"batch_stats": 2}))
    assert notice_text(loop.line()) == (
        "net, critic · train · cpu:0 · draws 1–3 · 3 runs ·\n"
        "    1 compiled in 0.41 s (first run of this program), 2 reused ·\n"
        "    run median 0.22 ms · batch_stats: update 2"
    )


def test_the_median_is_that_of_the_runs_so_far() -> None:
    loop, medians = Loop(), []
    for seconds in (0.001, 0.003, 0.005):
        loop.add(replace(REUSED, timing=Timing(run=seconds)))
        medians.append(loop.line().texts[4])
    assert medians[1:] == ["run median 2.00 ms", "run median 3.00 ms"]


def test_a_sharp_bit_is_said_once() -> None:
    assert counted(NOTED, NOTED).notes == (NOTE,)
    assert notice_text(counted(NOTED, NOTED).line()).count("! ") == 1


def test_keys_count_as_draws_but_not_as_times() -> None:
    assert notice_text(counted(KEY, replace(KEY, draw=4)).line()) == "key latent · draws 3–4 · 2 keys"


def test_a_loop_is_escaped() -> None:
    loop = counted(replace(REUSED, model=EVIL, mode=EVIL, device=EVIL, program=EVIL, notes=(Note("k", EVIL, EVIL),)))
    assert "<script" not in loop_bundle(loop, "auto")["text/html"]
    assert "text/html" not in loop_bundle(loop, "text")


# -- what `%%flaxmodel` says


@pytest.mark.parametrize(
    ("model", "shown"),
    [
        (Registered("net", "Net(features=8)"), "net · Net(features=8) · registered"),
        (Registered("net", "Net()", "unchanged", variables="kept"), "net unchanged · variables and programs kept"),
        (Registered("net", "Net()", "unchanged"), "net unchanged · programs kept"),
        (Registered("net", "Net()", "changed", variables="kept"), "net changed · variables kept"),
        (Registered("net", "Net()", "changed", ("f 3→4", "g 1→2")), "net changed: f 3→4, g 1→2 · registered anew"),
        (
            Registered("net", "Net()", "changed", ("a/kernel [4,3]→[4,5]",), "dropped"),
            "net changed: a/kernel [4,3]→[4,5] · variables dropped · next run initialises",
        ),
    ],
)
def test_one_line_says_what_became_of_a_model(model: Registered, shown: str) -> None:
    assert registered_text([model]) == Reader(registered_bundle([model], "auto")["text/html"]).text == shown


def test_several_models_are_several_lines_with_their_checks() -> None:
    models = [
        Registered("net", "Net()", check=(("out", "float32[3]"), ("streams", "dropout"))),
        Registered("critic", "Critic()"),
    ]
    assert registered_text(models) == (
        "net · Net() · registered\n  out      float32[3]\n  streams  dropout\ncritic · Critic() · registered"
    )


def test_nothing_registered_is_nothing_shown() -> None:
    assert registered_bundle([], "auto") == {}


def test_names_are_escaped() -> None:
    model = Registered(EVIL, EVIL, "changed", (EVIL,), "kept", ((EVIL, EVIL),))
    assert "<script" not in registered_bundle([model, Registered(EVIL, EVIL)], "auto")["text/html"]
    assert set(registered_bundle([model], "text")) == {"text/plain"}


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=150), st.text(max_size=150))
def test_no_line_of_it_is_wider_than_80_columns(name: str, code: str) -> None:
    model = Registered(name, code, "changed", (code, name), "dropped", ((name, code),))
    assert all(cell_len(row) <= 80 for row in registered_text([model, Registered(name, code)]).split("\n"))
