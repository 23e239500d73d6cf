"""A run as text: the exact forms, and never more than 80 columns, but for a terminal's own width; its colours there."""

from __future__ import annotations

import re
from textwrap import dedent

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from rich.cells import cell_len
from runs_to_show import COMPILED, INIT, KEY, NOTE, NOTED, REPEATED, REUSED, keys

from flax_magics.base.measures import Cost, Limits, Steady, Timing
from flax_magics.base.text import clean, cut, fit
from flax_magics.report.facts import building, keys_of, phases, rate_of, roof_of, run_of
from flax_magics.report.text import coloured, details, line_of, normal, report
from flax_magics.run import InitStats, Note, Run


def exactly(text: str) -> str:
    return dedent(text).strip("\n")


def line(run: Run) -> str:
    return report(run, "line")


def test_a_run_without_news_is_one_line() -> None:
    assert line(REUSED) == "net · train · cpu:0 · draw 2 · reused · run 0.22 ms"


def test_the_line_says_what_was_compiled_and_made() -> None:
    assert line(COMPILED) == "net · train · cpu:0 · draw 1 · 15 parameters · compiled in 0.41 s · run 0.22 ms"


def test_the_line_counts_updates_and_names_replays_and_waits() -> None:
    run = replace(REUSED, replayed=True, changed={"batch_stats": 12}, timing=Timing(run=0.0123, wait=0.3))
    assert line(run) == (
        "net · train · cpu:0 · draw 2 again · reused · waited 0.30 s · run 12.3 ms ·\n    batch_stats: update 12"
    )


def test_a_key_is_one_line() -> None:
    assert line(KEY) == normal(KEY) == "key latent · draw 3 of seed 0 · 33b04f44"


def test_the_normal_form() -> None:
    assert normal(COMPILED) == exactly("""
        net · train (training=True) · cpu:0 · draw 1 of seed 0
          out   float32[3,4,3]
          vars  params: 15 parameters, 60 B
          keys  params → new variables    dropout → Dropout_0
          jit   compiled in 0.41 s: first run of this program
          run   0.22 ms
        """)


def test_a_compilation_beside_the_init_counts_as_far_as_it_was_waited_for() -> None:
    timing = replace(COMPILED.timing, init=0.5, compile=0.677, beside=0.3)
    run = replace(COMPILED, timing=timing)
    assert "  jit   compiled in 0.41 s: first run of this program" in normal(run).splitlines()
    apart = " ".join(details(run).split())
    assert "trace 21.0 ms lower 12.0 ms XLA 0.38 s XLA beside the init 0.30 s" in apart
    again = " ".join(details(replace(run, timing=replace(timing, init=0.0))).split())
    assert "XLA 0.38 s XLA before this run 0.30 s" in again


def test_an_init() -> None:
    assert normal(INIT) == exactly("""
        net · init · cpu:0 · draw 1 of seed 0
          vars  params: 15 parameters, 60 B
          keys  params → new variables
          init  0.52 ms, eager
        """)


def test_the_first_report_of_a_session_says_so() -> None:
    first = replace(REUSED, first=True)
    assert normal(first).splitlines()[:2] == [
        "new session, seed 0",
        "net · train (training=True) · cpu:0 · draw 2 of seed 0",
    ]
    assert line(first) == "new session, seed 0\n" + line(REUSED)


def test_a_model_without_a_switch_shows_its_mode_alone() -> None:
    plain = replace(REUSED, mode="as written", switch="")
    assert normal(plain).splitlines()[0] == "net · as written · cpu:0 · draw 2 of seed 0"
    switched = replace(plain, switch="training=False")
    assert normal(switched).splitlines()[0] == "net · as written (training=False) · cpu:0 · draw 2 of seed 0"


def test_a_sharp_bit_stands_beneath_with_the_line_that_mends_it() -> None:
    assert normal(NOTED) == exactly("""
        net · train (training=True) · cpu:0 · draw 3 of seed 0
          out   float32[3,4,3]
          keys  dropout → nobody, layers off
          jit   reused
          run   0.22 ms
        ! Dropout_0 is off although --train was asked: deterministic=True is fixed in
          MyModel (line 8)
          in your model: deterministic=not self.training
        """)


def test_sharp_bits_are_said_at_every_level() -> None:
    note = "\n".join(normal(NOTED).splitlines()[-3:])
    assert report(NOTED, "off") == note
    assert line(NOTED) == line(replace(NOTED, notes=())) + "\n" + note
    assert report(NOTED, "details").endswith(note)


def test_everything_else_there_may_be_to_say() -> None:
    run = replace(
        REUSED,
        keys=keys("dropout", "noise"),
        used={"dropout": ("Dropout_0", "Dropout_1"), "noise": ("",)},
        made=InitStats(6, 24, ("params",), added=True),
        changed={"batch_stats": 11},
        sown={"intermediates": {"h": (np.zeros((8, 32), np.float32),)}},
        static=("n=3",),
        program="disk cache",
        reason="new process",
        timing=Timing(trace=0.3, lower=0.1, compile=0.05, run=0.0002, wait=0.3),
    )
    assert normal(run) == exactly("""
        net · train (training=True) · cpu:0 · draw 2 of seed 0
          out     float32[3,4,3]
          vars    params: 6 parameters, 24 B added to those there were
                  batch_stats: update 11
          sown    intermediates: {h: (float32[8,32],)}
          keys    dropout → Dropout_0, Dropout_1    noise → the model itself
          static  n=3 (part of the program: another value compiles again)
          jit     traced in 0.40 s, from the disk cache in 50.0 ms: new process
          wait    inputs were ready after 0.30 s
          run     0.20 ms
        """)
    assert [phase.name for phase in building(run)] == ["trace", "lower", "read"]


@pytest.mark.parametrize(
    ("timing", "told"),
    [
        (Timing(run=0.0002, wait=0.0099), ""),
        (Timing(run=0.0002, wait=0.01), "10.0 ms"),
        (Timing(run=3.0, wait=0.29), ""),
        (Timing(run=3.0, busy=0.29, wait=0.3), "0.30 s"),
        (Timing(run=9.0, wait=0.3, steady=Steady((9.0, 2.0, 2.0))), "0.30 s"),
    ],
)
def test_a_wait_is_told_from_ten_milliseconds_and_a_tenth_of_the_run_on(timing: Timing, told: str) -> None:
    run = replace(REUSED, timing=timing)
    assert ("wait" in line(run), "  wait  " in normal(run)) == (bool(told), bool(told))
    assert not told or f" · waited {told} · " in line(run)
    assert [phase.text for phase in phases(run) if phase.name == "wait"] == [told] * bool(told)


def test_nobody_is_named_for_streams_of_the_models_own_alone() -> None:
    run = replace(REUSED, keys=keys("params", "dropout", "default", "noise"), used={"noise": ("Noise_0",)})
    assert keys_of(run) == ("noise → Noise_0",)
    assert keys_of(replace(run, idle=("default", "params"))) == ("default → nobody, layers off", "noise → Noise_0")
    assert keys_of(replace(run, used={})) == ()


def test_a_repeated_run_shows_median_spread_and_first_outlier() -> None:
    assert normal(REPEATED).splitlines()[-3:] == [
        "  run     median 0.21 ms ± 0.005 ms of 21 (first outlier: the first run, 0.30",
        "          ms)",
        "  memory  1.5 KB by XLA's analysis: arguments, temporaries and outputs",
    ]
    assert line(REPEATED).endswith(" · run median 0.21 ms")


@pytest.mark.parametrize(
    ("times", "says"),
    [
        ((2e-4,) * 20, "median 0.20 ms ± 0.00 ms of 20"),
        ((2e-4, 9e-4, 2e-4, 2e-4), "median 0.20 ms ± 0.09 ms of 4"),
        ((*[2e-4] * 3, 9e-4, *[2e-4] * 6), "median 0.20 ms ± 0.00 ms of 10 (first outlier: run 4, 0.90 ms)"),
        (
            (*[2e-4] * 3, 9e-4, *[2e-4] * 9, 5e-4),
            "median 0.20 ms ± 0.00 ms of 14 (first outlier: run 4, 0.90 ms; 2 in all)",
        ),
        ((2.00e-4, 2.01e-4) * 8 + (2.1e-4,), "median 0.20 ms ± 0.0005 ms of 17"),
    ],
)
def test_the_first_outlier_is_named_where_there_is_one(times, says) -> None:
    assert run_of(replace(REUSED, timing=Timing(steady=Steady(times)))) == says


def test_rates_stand_beside_what_the_machine_reaches() -> None:
    steady = Timing(run=2e-3, steady=Steady((2e-3,) * 20))
    run = replace(REUSED, timing=steady, cost=Cost(268_435_456, 4_194_304))
    assert normal(run) == exactly("""
        net · train (training=True) · cpu:0 · draw 2 of seed 0
          out     float32[3,4,3]
          keys    dropout → Dropout_0
          jit     reused
          run     median 2.00 ms ± 0.00 ms of 20
          rate    134 GFLOP/s    2.1 GB/s    (268 MFLOP and 4.2 MB a run by XLA's count)
          memory  1.5 KB by XLA's analysis: arguments, temporaries and outputs
        """)
    limits = Limits("gpu:0", "bfloat16", 9.12e14, 1.3e12)
    memory = replace(REUSED.memory, peak=3_400_000_000)
    run = replace(run, device="gpu:0", cost=Cost(268_435_456, 4_194_304, loops=True), limits=limits, memory=memory)
    assert normal(run).splitlines()[1] == ("  roof    memory-bound: at least 0.2 % of what a large copy reaches")
    assert normal(run).splitlines()[-5:] == [
        "  rate    at least 134 GFLOP/s, 0.01 % of a large bfloat16 matmul's 912 TFLOP/s",
        "          at least 2.1 GB/s, 0.2 % of a large copy's 1.3 TB/s",
        "          (268 MFLOP and 4.2 MB a run by XLA's count, which counts the body of a",
        "          loop once)",
        "  memory  peak 3.4 GB, as gpu:0 counts since the process began",
    ]
    assert "(268 MFLOP and 4.2 MB a run on each of gpu:0-7 by" in normal(replace(run, device="gpu:0-7"))


@pytest.mark.parametrize(
    ("cost", "verdict"),
    [
        (Cost(1e9, 1e5), "compute-bound: 50 % of what a large float32 matmul reaches"),
        (Cost(1e6, 2e6), "memory-bound: 100 % of what a large copy reaches"),
        (
            Cost(1e9, 4e6),
            "compute-bound: 50 % of what a large float32 matmul reaches (its data fit into caches)",
        ),
        (Cost(2e7, 0.0), "neither compute- nor memory-bound: 1 % of what a large float32 matmul reaches"),
        (Cost(2e7, 0.0, loops=True), "compute-bound: at least 1 % of what a large float32 matmul reaches"),
        (Cost(0.0, 0.0), ""),
    ],
)
def test_a_run_held_against_the_machine_begins_with_its_verdict(cost: Cost, verdict: str) -> None:
    limits = Limits("cpu:0", "float32", 1e12, 1e9)
    run = replace(REUSED, timing=Timing(run=2e-3, steady=Steady((2e-3,) * 20)), cost=cost, limits=limits)
    assert roof_of(run) == ((verdict,) if verdict else ())
    parts = [verdict] if verdict else []
    assert [text for text in line_of(run).texts if text] == ["draw 2", *parts, "reused", "run median 2.00 ms"]
    rows = " ".join(normal(run).split())
    assert not verdict or rows.startswith(f"net · train (training=True) · cpu:0 · draw 2 of seed 0 roof {verdict} out ")
    assert roof_of(replace(run, limits=None)) == roof_of(replace(run, timing=Timing(run=2e-3))) == ()


def test_a_rate_of_what_was_not_counted_is_not_shown() -> None:
    steady = Timing(run=2e-3, steady=Steady((2e-3,) * 20))
    assert rate_of(replace(REUSED, timing=steady)) == ()
    assert rate_of(replace(REUSED, cost=Cost(10.0, 10.0))) == ()
    assert rate_of(replace(REUSED, timing=steady, cost=Cost(0.0, 4e6))) == ("2.0 GB/s", "(4.0 MB a run by XLA's count)")


def test_details() -> None:
    run = replace(COMPILED, keys=keys("params", "noise"), used={"noise": ("Noise_0",)})
    assert details(run) == exactly(f"""
        net · train (training=True) · cpu:0 · draw 1 of seed 0
          call    net(x)
          out     float32[3,4,3]
                  0 … 0, mean 0
          vars    params: 15 parameters, 60 B
          keys    params   375f238f  split(root, 3)[1]          → new variables
                  noise    ded1a5f8  fold_in(root, 4024608192)  → Noise_0
                  dropout  -         split(root, 3)[2]          → not needed: no module
                                                                asked for it
          jit     compiled in 0.41 s: first run of this program
                  trace 21.0 ms    lower 12.0 ms    XLA 0.38 s
          run     0.22 ms
          memory  arguments 204 B    temporaries 1.2 KB    outputs 144 B    code 3.4 KB
                  (by XLA's analysis)
          digest  {run.digest}
          by hand
            net.clone(training=True).apply(variables, x, rngs={{'dropout': dropout_key}})
        """)


def test_details_say_what_a_key_was_not_needed_for() -> None:
    assert "params   -         split(root, 3)[1]  → not needed: the variables were" in details(REUSED)
    assert "dropout  -         split(root, 3)[2]  → not needed: init takes params" in details(INIT)
    assert "latent  33b04f44  fold_in(root, 3493097033)  → you" in details(KEY)


def test_code_by_hand_keeps_its_lines_and_indentation() -> None:
    run = replace(REUSED, by_hand="output = net.apply(\n    variables,\n    x,\n)\n")
    assert details(run).endswith("  by hand\n    output = net.apply(\n        variables,\n        x,\n    )")


def test_several_lines_to_write_stand_below_each_other() -> None:
    run = replace(REUSED, notes=(Note("k", "two things:\none and two", "a = 1\nb = 2"),))
    assert report(run, "off") == "! two things:\n  one and two\n  write: a = 1\n         b = 2"


@pytest.mark.parametrize(
    ("text", "shown"),
    [("a\n\tb", "a b"), ("\x1b[31mred", "\\x1b[31mred"), ("a\u202eb", "a\\u202eb"), ("naïve 漢字", "naïve 漢字")],
)
def test_text_that_a_terminal_would_obey_is_shown_instead(text: str, shown: str) -> None:
    assert clean(text) == shown


def test_what_is_cut_says_so() -> None:
    assert cut("float32[3,4,3]", 10) == "float32[3…"


words = st.text(max_size=200)
names = st.text(min_size=1, max_size=120)


@settings(max_examples=150, deadline=None)
@given(words, names, words, names, words, words, st.lists(names, max_size=4))
def test_nothing_is_ever_wider_than_80_columns(
    model: str, stream: str, call: str, path: str, note: str, write: str, static: list[str]
) -> None:
    run = replace(
        COMPILED,
        model=model,
        mode=call,
        switch=path,
        call=call,
        device=note,
        keys={stream: COMPILED.keys["dropout"]},
        used={stream: (path, path)},
        changed={path: 3},
        sown={path: np.zeros(3)},
        static=tuple(static),
        reason=note,
        by_hand=write,
        notes=(Note("k", note, form=write), NOTE),  # a line to be pasted stays one line
        made=InitStats(15, 60, (path, stream)),
    )
    for shown in (report(run, "line"), normal(run), details(run), report(replace(run, command="key"), "details")):
        for row in shown.split("\n"):
            assert cell_len(row) <= 80, row


@settings(max_examples=100, deadline=None)
@given(names)
def test_no_message_is_ever_cut(message: str) -> None:
    shown = report(replace(REUSED, notes=(Note("k", message),)), "off")
    assert "".join(shown[1:].split()) == "".join("".join(map(clean, message.expandtabs(4).splitlines())).split())


ESCAPE = re.compile(r"\x1b\[[\d;]*m")


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
