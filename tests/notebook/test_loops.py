"""Runs of one cell: each line has a report at its first run, and all further runs share one line in one display."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace
from runs_to_show import COMPILED, INIT, KEY, NOTED, REPEATED, REUSED

from flax_magics.base.files import RUN_JSON, RUNS_JSON
from flax_magics.notebook import reporter as module
from flax_magics.notebook.reporter import Reporter, Settings
from flax_magics.report.live import Live
from flax_magics.run import Note, Run


class Page:
    """What a notebook shows: display → its data, in order, and how many messages came."""

    def __init__(self) -> None:
        self.shown: dict[object, dict[str, Any]] = {}
        self.messages = 0

    def publish(self, data: dict[str, Any], metadata: object, transient: dict[str, str], update: bool) -> None:
        self.messages += 1
        display = transient.get("display_id", object())
        assert update is (display in self.shown)
        self.shown[display] = data

    @property
    def texts(self) -> list[str]:
        return [data["text/plain"] for data in self.shown.values()]


class Cell:
    """A cell of a notebook with a kernel, and a clock that a test moves."""

    def __init__(self) -> None:
        self.page = Page()
        self.time = 100.0
        settings = Settings(0, "auto", "auto", {}, False, 0)
        shell = SimpleNamespace(kernel=object(), display_pub=self.page)
        self.reporter = Reporter(shell, lambda: settings)
        self.reporter.begin_cell()

    def run(self, *runs: Run, quiet: bool = False, live: Live | None = None) -> None:
        for run in runs:
            self.reporter.report(run, live or self.reporter.live(), quiet=quiet)

    def ended(self) -> list[str]:
        self.reporter.end_cell()
        return self.page.texts


@pytest.fixture
def cell(monkeypatch: pytest.MonkeyPatch) -> Cell:
    cell = Cell()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: cell.time))
    return cell


def drawn(run: Run, first: int, runs: int) -> list[Run]:
    return [replace(run, draw=draw) for draw in range(first, first + runs)]


@pytest.mark.parametrize(
    ("run", "line"),
    [
        (REUSED, "net · train · cpu:0 · draws 2–50 · 49 runs · reused · run median 0.22 ms"),
        (KEY, "key latent · draws 2–50 · 49 keys"),
        (INIT, "net · init · cpu:0 · draws 2–50 · 49 inits · init median 0.52 ms"),
        (
            replace(REUSED, samples=2),
            "net · train · cpu:0 · draws 2–51 · 49 runs · reused · run median 0.22 ms",
        ),
        (
            COMPILED,
            "net · train · cpu:0 · draws 2–50 · 49 runs ·\n"
            "    compiled in 20.1 s (last: first run of this program) · run median 0.22 ms",
        ),
    ],
    ids=["apply", "key", "init", "samples", "compiled"],
)
def test_a_loop_is_its_first_report_and_one_line(cell, run, line):
    cell.run(*drawn(run, 1, 50))
    first, counted = cell.ended()
    assert "draw 1" in first or "draws 1–2" in first
    assert counted == line


def test_keys_and_runs_of_a_loop_are_counted_in_one_line(cell):
    for draw in range(1, 99, 2):
        cell.run(replace(KEY, draw=draw), replace(REUSED, draw=draw + 1))
    assert cell.ended()[2:] == [
        "key latent, net · train · cpu:0 · draws 3–98 · 48 keys, 48 runs · reused ·\n    run median 0.22 ms"
    ]


def test_what_a_loop_ran_is_kept_as_data(cell):
    cell.run(*drawn(KEY, 1, 50))
    cell.ended()
    first, counted = cell.page.shown.values()
    assert RUN_JSON in first
    assert [row.get("draw") for row in counted[RUNS_JSON]["runs"]] == list(range(2, 51))


def test_a_single_further_run_has_its_own_line_and_data(cell):
    cell.run(*drawn(REUSED, 1, 2))
    _, second = cell.ended()
    assert second == "net · train · cpu:0 · draw 2 · reused · run 0.22 ms"
    assert list(cell.page.shown.values())[1][RUN_JSON]["draw"] == 2


def test_different_lines_have_a_report_each_up_to_a_dozen(cell):
    cell.run(*(replace(KEY, call=f"k{n}", draw=n) for n in range(1, 21)))
    texts = cell.ended()
    assert len(texts) == 13
    assert texts[-1] == "key latent · draws 13–20 · 8 keys"


def test_of_many_models_the_first_ones_are_named(cell):
    cell.run(*(replace(REUSED, model=f"net{n}", draw=n) for n in range(1, 21)))
    assert cell.ended()[-1].startswith("net13, net14, net15, net16, … · train · cpu:0 · draws 13–20 · 8 runs")


def test_repeated_runs_have_their_times_each(cell):
    cell.run(*drawn(REPEATED, 1, 3))
    assert len(cell.ended()) == 3


def test_a_setting_of_normal_has_a_report_for_each_run(cell):
    cell.reporter._settings = lambda: Settings(0, "normal", "auto", {}, False, 0)
    cell.run(*drawn(REUSED, 1, 3))
    assert len(cell.ended()) == 3


def test_a_sharp_bit_that_is_news_has_its_own_report(cell):
    cell.run(*drawn(REUSED, 1, 3), replace(NOTED, draw=4), *drawn(NOTED, 5, 3))
    _, counted, noted = cell.ended()
    assert "draws 2–7 · 5 runs" in counted
    assert counted.count("! ") == noted.count("! ") == 1
    assert "draw 4 of seed 0" in noted


def test_a_name_that_is_bound_anew_at_each_turn_is_said_once(cell):
    def rebound(n: int) -> Run:
        return replace(COMPILED, draw=n, notes=(Note("rebound", f"net is another module now, Net({n}): registered"),))

    cell.run(*map(rebound, range(1, 9)))
    assert "".join(cell.ended()).count("is another module now") == 1
    cell.reporter.begin_cell()
    cell.run(rebound(9))  # in the next cell it is news again
    assert "! net is another module now, Net(9): registered" in cell.ended()[-1]


def test_a_line_is_drawn_at_most_four_times_a_second(cell):
    for run in drawn(REUSED, 1, 200):
        cell.time += 0.01
        cell.run(run)
    assert "199 runs" in cell.ended()[-1]
    assert len(cell.page.shown) == 2
    assert cell.page.messages <= 1 + 4 * 2 + 1


# -- a loop of slow runs


@pytest.fixture
def working(cell) -> Callable[[], Live]:
    """Shows the live line of a command once, and gives it."""
    live = cell.reporter.live()
    live._delay, live._interval, live._clock = 0.0, 60.0, lambda: 0.0

    def working() -> Live:
        live, before = cell.reporter.live(), cell.page.messages
        live.begin("running net")
        deadline = time.monotonic() + 10
        while cell.page.messages == before:
            assert time.monotonic() < deadline, "no live line for ten seconds"
            time.sleep(0.001)
        live.end()
        return live

    return working


def test_the_live_line_of_a_loop_is_part_of_the_counting_line(cell, working):
    for run in drawn(REUSED, 1, 4):
        cell.run(run, live=working())
    working()
    first, counted = cell.page.texts
    assert first.startswith("net · train · cpu:0 · draw 1 ")
    assert counted == (
        "net · train · cpu:0 · draws 2–4 · 3 runs · reused · run median 0.22 ms ·\n"
        "    running net · 0 s · interrupt the kernel to stop"
    )
    assert cell.ended()[1] == "net · train · cpu:0 · draws 2–4 · 3 runs · reused · run median 0.22 ms"


def test_quiet_runs_of_a_loop_show_their_live_lines_in_one_display(cell, working):
    for run in drawn(REUSED, 1, 4):
        cell.run(run, quiet=True, live=working())
    assert cell.ended() == [""]
