"""A training as people see it: exact texts, a picture of some hundred points, and numbers that lose no spike."""

from __future__ import annotations

import json
import re
from textwrap import dedent

import numpy as np
import pytest
from html_reader import EVIL, Reader
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from rich.cells import cell_len
from runs_to_show import CURVE, INTERRUPTED, TRAINED, UNDER_WAY

from flax_magics.base.measures import STORED, Curve, Evaluation, Task
from flax_magics.report.curve import BUCKETS, lines, picture, rates, sparkline
from flax_magics.report.html import bundle, level, progress_bundle, report_html
from flax_magics.report.text import normal, progress_line, report
from flax_magics.run import Run


def exactly(text: str) -> str:
    return dedent(text).strip("\n")


def with_curve(run: Run, **changes: object) -> Run:
    assert run.trained is not None
    return replace(run, trained=replace(run.trained, **changes))


def test_one_line() -> None:
    assert report(replace(TRAINED, made=None), "line") == exactly("""
        net · train · cpu:0 · draw 3 · 6 steps · epoch 2 · loss 0.5 · accuracy 0.875 ·
            eval loss 0.6 · eval accuracy 0.812 · 96 steps/s · 12.3k examples/s ·
            weights of draw 3
        """)


def test_the_line_of_one_under_way_says_how_far_it_is() -> None:
    run = with_curve(replace(UNDER_WAY, made=None, weights=""), evals=())
    assert report(run, "line") == exactly("""
        net · train · cpu:0 · draw 3 · step 6 of 500 · epoch 1.5 · loss 0.5 ·
            accuracy 0.875 · 96 steps/s · 12.3k examples/s · 5.15 s left
        """)


def test_where_an_epoch_is_a_step_or_is_of_unknown_length_epochs_are_not_told() -> None:
    for epoch in (1, None):
        assert "epoch" not in report(with_curve(TRAINED, epoch=epoch), "line")


def test_the_normal_form_has_a_line_for_each_loss_and_metric() -> None:
    assert normal(TRAINED) == exactly("""
        net · train (training=True) · cpu:0 · draw 3 of seed 0
          steps  6    epoch 2
          vars   began as initialised in draw 3    params: 15 parameters, 60 B
          keys   params → new variables    dropout → Dropout_0
          jit    compiled in 0.41 s: first run of this program
          run    62.5 ms    96 steps/s    12.3k examples/s
          loss, log       █▇▆▅▁▃  2.31 → 0.5     lowest 0.23 at step 5
          accuracy        ▁▂▄▆█▇  0.125 → 0.875  0.125 at step 1 … 0.938 at step 5
          eval loss, log  █▁      1.5 → 0.6      lowest 0.6 at step 6
          eval accuracy   ▁█      0.5 → 0.812    0.5 at step 3 … 0.812 at step 6
        """)


def test_one_that_was_stopped_says_so_and_how_to_go_on() -> None:
    assert normal(INTERRUPTED).splitlines()[-2:] == [
        "! interrupted after 6 steps",
        "  write: %flax_train --resume loss(net, train)",
    ]
    assert "step 6 of 500 · epoch 1.5 · interrupted · loss 0.5" in " ".join(report(INTERRUPTED, "line").split())
    assert "left" not in normal(INTERRUPTED)


def test_one_without_a_finished_step_has_no_curve() -> None:
    run = replace(INTERRUPTED, trained=Curve(total=500, stopped="interrupted"), notes=())
    text = normal(run)
    assert text.splitlines()[1] == "  steps  0 of 500"
    assert text.splitlines()[-1].startswith("  jit ")
    assert "<svg" not in report_html(run, "normal")


def test_of_arrays_in_batches_the_means_of_whole_epochs_are_told_by_their_examples() -> None:
    # Epochs of 128, 128 and 4 rows: the last batch hardly counts.
    curve = replace(CURVE, examples=520, task=Task(optimizer="optax.sgd(0.1)", batch=128), evals=())
    assert lines(curve) == [
        "  loss, log  █▇▆▅▁▃  2.31 → 0.5     by epoch 2 → 0.564",
        "  accuracy   ▁▂▄▆█▇  0.125 → 0.875  by epoch 0.192 → 0.844",
    ]
    assert "· loss 0.5 (epoch mean 0.564) · accuracy 0.875 (epoch mean 0.844) ·" in " ".join(
        report(with_curve(TRAINED, examples=520, task=curve.task), "line").split()
    )
    assert "  steps  6    epoch 2    batches of 128" in normal(replace(TRAINED, trained=curve)).splitlines()
    # One epoch and a part of the next, and data whose batches are not known.
    assert lines(replace(curve, epoch=4, examples=3 * 128 + 4 + 2 * 128))[1].endswith("  epoch mean 0.296")
    unknown = [
        replace(curve, epoch=1),
        replace(curve, examples=521),
        replace(curve, task=Task(batch=128, arrays=False)),
    ]
    assert {lines(one)[0].split("  ")[-1].strip() for one in unknown} == {"lowest 0.23 at step 5"}


def test_a_metric_that_stays_has_no_range() -> None:
    assert lines(Curve(np.float32([1, 1]), {"accuracy": np.zeros(2, np.float32)}))[1] == "  accuracy  ▅▅  0 → 0"


def test_one_that_goes_on_does_not_tell_again_what_made_its_weights() -> None:
    run = with_curve(TRAINED, task=Task(optimizer="optax.sgd(0.1)", parts=(3,)))
    assert normal(run).splitlines()[1:4] == [
        "  steps  6    epoch 2    all rows in each step: no --batch",
        "  vars   began as initialised in draw 3",
        "  keys   dropout → Dropout_0",
    ]
    assert "parameters" not in report(run, "line")


def test_a_single_step_is_a_dot() -> None:
    curve = Curve(np.float32([2.3]), total=10, seconds=0.1)
    assert lines(curve) == ["  loss  ▅  2.3"]
    drawn = picture(curve)
    assert drawn is not None
    assert drawn["steps"] == "575.0,95.0 575.0,95.0"


def test_what_is_not_finite_is_counted_and_marked() -> None:
    curve = replace(
        CURVE,
        metrics={"ratio": np.float32([1, np.nan, np.inf, 2, 3, 4])},
        evals=(Evaluation(3, np.nan, {}), Evaluation(6, 0.6, {})),
    )
    assert lines(curve)[1:] == [
        "  ratio           ▁××▃▆█  1 → 4       1 at step 1 … 4 at step 6; not finite 2",
        "                                      times, first at step 2",
        "  eval loss, log  ×▅      NaN → 0.6   lowest 0.6 at step 6; not finite 1 time,",
        "                                      first at step 3",
    ]
    drawn = picture(curve)
    assert drawn is not None
    assert drawn["broken"] == [312.5]
    assert "not finite" in Reader(report_html(with_curve(TRAINED, evals=curve.evals), "normal")).text
    assert picture(Curve(np.float32([np.nan, np.inf]), total=2)) is None


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        ([1.0, 1.0], "▅▅"),
        ([0, 1, 2, 3, 4, 5, 6, 7], "▁▂▃▄▅▆▇█"),
        (list(range(24)), "▁▂▃▄▅▆▇█"),
        ([0, 7, np.nan], "▁█×"),
    ],
)
def test_a_sparkline(values: list[float], shown: str) -> None:
    assert sparkline(np.array(values, np.float32), 8) == shown


def test_losses_that_span_a_decade_have_a_logarithmic_scale_and_others_none() -> None:
    steep, flat, negative = [2.0, 0.19], [2.0, 0.21], [2.0, -1.0]
    titles = [picture(Curve(np.float32(losses)))["title"] for losses in (steep, flat, negative)]  # type: ignore[index]
    assert titles == ["loss, logarithmic", "loss", "loss"]
    # One loss of the eval data decides as well: both are drawn on one scale.
    together = replace(CURVE, losses=np.float32(flat), evals=(Evaluation(2, 0.01, {}),))
    assert picture(together)["title"] == "loss, logarithmic"  # type: ignore[index]


@pytest.mark.parametrize(
    ("losses", "ticks"),
    [
        ([2.3, 0.9], ["1", "1.5", "2"]),
        ([2.31, 0.23], ["0.5", "1", "2"]),
        ([3.0, 1e-9], ["1e-09", "1e-07", "1e-05", "0.001", "0.1"]),
        ([-2e5, 3e5], ["-2e+05", "0", "2e+05"]),
        ([7.0, 7.0], ["6.5", "7", "7.5"]),
    ],
)
def test_the_axis_has_round_numbers(losses: list[float], ticks: list[str]) -> None:
    drawn = picture(Curve(np.float32(losses)))
    assert drawn is not None
    assert [text for text, _ in drawn["rows"]] == ticks  # type: ignore[union-attr]


def test_a_long_noisy_curve_keeps_its_spikes_in_some_hundred_points_and_has_a_smoothed_line() -> None:
    random = np.random.default_rng(0)
    losses = (np.exp(-np.arange(100_000) / 30_000) + 0.1 * random.random(100_000)).astype(np.float32)
    losses[54_321] = 9.0
    drawn = picture(Curve(losses))
    assert drawn is not None
    points = [tuple(map(float, point.split(","))) for point in str(drawn["steps"]).split()]
    assert len(points) <= 2 * BUCKETS + 2
    assert min(y for _, y in points) == points[[round(x) for x, _ in points].index(round(50 + 525 * 0.54322))][1]
    assert points[0][0] == 50.0
    assert points[-1][0] == 575.0
    assert len(str(drawn["smooth"]).split()) == 40
    quiet = picture(Curve(np.linspace(2, 1, 100_000, dtype=np.float32)))
    assert quiet is not None
    assert quiet["smooth"] == ""


@pytest.mark.parametrize(
    ("steps", "seconds", "shown"),
    [(5, 10.0, "0.5"), (999, 1.0, "999"), (9996, 10.0, "1k"), (2_140_000, 1.0, "2.14M"), (10**10, 1.0, "1e+04M")],
)
def test_a_rate(steps: int, seconds: float, shown: str) -> None:
    losses = np.broadcast_to(np.float32(1), (steps,))
    assert rates(Curve(losses, total=steps, seconds=seconds)) == (f"{shown} steps/s",)


def test_the_names_of_metrics_are_escaped() -> None:
    run = with_curve(TRAINED, metrics={EVIL: CURVE.losses, "a\x1b[31m": CURVE.losses}, stopped=EVIL)
    html = report_html(run, "normal")
    assert "<script" not in html
    assert "<script>alert('&')</script>" in Reader(html).text
    assert "\x1b" not in html + normal(run) + report(run, "line")


def test_without_styles_the_numbers_stand_beneath_the_picture() -> None:
    html = report_html(INTERRUPTED, "normal")
    text = Reader(re.sub(r"<svg.*?</svg>", "", html, flags=re.DOTALL)).text
    assert (
        "steps 6 of 500 · epoch 1.5 vars began as initialised in draw 3 · params: 15 parameters, 60 B "
        "keys params → new variables · dropout → Dropout_0 train · eval "
        "loss 2.31 → 0.5 lowest 0.23 at step 5 accuracy 0.125 → 0.875 0.125 at step 1 … 0.938 at step 5 "
        "eval loss 1.5 → 0.6 lowest 0.6 at step 6 eval accuracy 0.5 → 0.812 0.5 at step 3 … 0.812 at step 6 "
        "! interrupted after 6 steps write: %flax_train --resume loss(net, train) details"
    ) in text
    assert "training 62.5 ms, 96 steps/s · 12.3k examples/s" in text


def test_the_picture_is_static_and_takes_the_colours_of_its_host() -> None:
    (svg,) = re.findall(r"<svg viewBox=\"0 0 600.*?</svg>", report_html(INTERRUPTED, "normal"), flags=re.DOTALL)
    assert set(re.findall(r"(?:fill|stroke)=\"(\w+)\"", svg)) == {"none", "currentColor"}
    assert 'aria-label="loss over 6 steps: 2.31 → 0.5"' in svg
    assert svg.count("<circle") == 2  # the looks at the eval data are told from the steps by their form
    assert "stopped</text>" in svg
    assert "stopped</text>" not in report_html(UNDER_WAY, "normal")


@given(st.lists(st.floats(width=32), max_size=300), st.lists(st.floats(width=32), max_size=3), st.text(max_size=60))
def test_any_numbers_can_be_shown_in_80_columns(losses: list[float], looks: list[float], name: str) -> None:
    values = np.array(losses, np.float32)
    evals = tuple(Evaluation(n + 1, loss, {name: loss}) for n, loss in enumerate(looks))
    run = replace(TRAINED, trained=Curve(values, {name: values}, evals, total=1000, seconds=1.0))
    assert all(cell_len(line) <= 80 for line in normal(run).splitlines())
    assert cell_len(progress_line(run, "Ctrl-C stops it")) < 80
    Reader(report_html(run, "normal"))
    json.dumps(run.to_json(), allow_nan=False)


# -- as it goes on


def test_what_goes_on_stands_beneath_the_report_so_far() -> None:
    working = "training net · 3 s · interrupt the kernel to stop"
    shown = progress_bundle(UNDER_WAY, "auto", working)
    assert shown["text/plain"] == f"{normal(UNDER_WAY)}\n{working}"
    assert Reader(str(shown["text/html"])).text.endswith(f" {working}")
    assert set(shown) == {"text/plain", "text/html"}


def test_a_terminal_has_a_line_of_the_first_news_that_fit() -> None:
    assert progress_line(UNDER_WAY, "Ctrl-C stops it") == (
        "net · step 6 of 500 · loss 0.5 █▇▆▅▁▃ · 5.15 s left · Ctrl-C stops it"
    )
    assert progress_line(replace(UNDER_WAY, trained=Curve()), "Ctrl-C stops it") == "net · 0 steps · Ctrl-C stops it"


# -- as data


def test_a_curve_is_news_and_carries_its_numbers() -> None:
    assert level(replace(TRAINED, program="reused", made=None), "auto") == "normal"
    shown = bundle(INTERRUPTED, "normal", "auto")
    (data,) = (json.loads(json.dumps(value)) for kind, value in shown.items() if kind.endswith("json"))
    assert data["trained"] == {
        "steps": 6,
        "every": 1,
        "losses": [2.31, 1.7, 1.4, 0.9, 0.23, 0.5],
        "metrics": {"accuracy": [0.125, 0.25, 0.5, 0.75, 0.9375, 0.875]},
        "evals": [
            {"step": 3, "loss": 1.5, "metrics": {"accuracy": 0.5}},
            {"step": 6, "loss": 0.6, "metrics": {"accuracy": 0.8125}},
        ],
        "total": 500,
        "epoch": 4,
        "examples": 768,
        "seconds": 0.0625,
        "group": 1,
        "stopped": "interrupted",
    }


def test_its_numbers_are_the_very_bits() -> None:
    losses = np.random.default_rng(0).random(1000).astype(np.float32)
    assert np.array_equal(np.array(Curve(losses).to_json()["losses"], np.float32), losses)


def test_of_very_many_steps_every_nth_is_kept_and_that_is_said() -> None:
    data = Curve(np.arange(3 * STORED + 1, dtype=np.float32)).to_json()
    assert (data["steps"], data["every"]) == (3 * STORED + 1, 4)
    assert data["losses"] == list(range(0, 3 * STORED + 1, 4))
