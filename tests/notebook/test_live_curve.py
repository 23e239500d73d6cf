"""A training under way is shown in the one display of its cell, which its report takes over, stopped or finished."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace
from runs_to_show import CURVE, INTERRUPTED, TRAINED, UNDER_WAY

from flax_magics import Session
from flax_magics.base.files import RUN_JSON
from flax_magics.execution.record import Outcome
from flax_magics.notebook.interrupts import InterruptGuard
from flax_magics.notebook.notebook import CommandInProgress
from flax_magics.notebook.reporter import Reporter, Settings
from flax_magics.report.live import Live
from flax_magics.report.text import normal
from flax_magics.run import Run
from flax_magics.state.runs import StoredRun

STOPPED = normal(INTERRUPTED).replace("after 6 steps", "after 6 steps · `flax_magics.session().runs[-1]` is its Run")


class Training:
    """A cell that trains, in a notebook whose live line comes at once and is drawn again without end."""

    def __init__(self) -> None:
        self.shown: dict[object, list[dict[str, Any]]] = {}
        settings = Settings(0, "auto", "auto", {}, False, 0)
        shell = SimpleNamespace(kernel=object(), display_pub=self)
        self.session, self.reporter = Session(), Reporter(shell, lambda: settings)
        self.interrupts = InterruptGuard()
        self.reporter._live = Live(shell, delay=0.0, interval=0.0)
        self.held: list[Run] = []  # the session holds no outputs
        self.working: Any = None

    def publish(self, data: dict[str, Any], metadata: object, transient: dict[str, str], update: bool) -> None:
        display = transient.get("display_id")
        assert update is (display is not None and display in self.shown)
        self.shown.setdefault(display, []).append(data)

    def __call__(self, *, quiet: bool = False) -> CommandInProgress:
        self.quiet = quiet
        return CommandInProgress(self, "training net", quiet=quiet)  # type: ignore[arg-type]

    def prepare(self) -> None:
        pass

    def reaches(self, run: Run) -> None:
        """Tells how far it is, and goes on when that was shown."""
        self.session.services.on_progress(run)
        if not self.quiet:
            self.until(normal(run))

    def fails(self, error: BaseException, *, reached: Run | None = None, kept: Run | None = None) -> None:
        """Trains as far as `reached`, leaves the Run `kept`, and ends with the error."""
        with self():
            if reached is not None:
                self.reaches(reached)
            if kept is not None:
                self.keeps(kept)
            raise error

    def keeps(self, run: Run) -> None:
        """Makes a run part of the session, as a training does with its finished steps."""
        draw = self.session._state.root.draw()
        self.held.append(run)
        self.session._commit(self.session._state, Outcome(run, StoredRun(run), draw))

    def until(self, text: str) -> None:
        deadline = time.monotonic() + 10
        while not (self.shown and text in self.texts[-1]):
            assert time.monotonic() < deadline, "not shown for ten seconds"
            time.sleep(0.001)

    @property
    def texts(self) -> list[str]:
        """What the one display has shown, one after the other."""
        (shown,) = self.shown.values()
        return [data["text/plain"] for data in shown]

    @property
    def last(self) -> dict[str, Any]:
        (shown,) = self.shown.values()
        return shown[-1]


@pytest.fixture
def training() -> Training:
    return Training()


def test_the_curve_takes_the_place_of_the_line_and_the_report_that_of_the_curve(training) -> None:
    with training() as live:
        training.until("training net · 0 s · interrupt the kernel to stop")
        training.reaches(UNDER_WAY)
        assert training.last["text/plain"].endswith("\ntraining net · 0 s · interrupt the kernel to stop")
        assert "<svg" in training.last["text/html"]
        assert RUN_JSON not in training.last
        training.reaches(replace(UNDER_WAY, trained=replace(CURVE, total=600)))
    training.reporter.report(TRAINED, live, quiet=False)
    assert training.texts[-1] == normal(TRAINED)
    assert training.last[RUN_JSON]["trained"]["losses"] == [2.31, 1.7, 1.4, 0.9, 0.23, 0.5]


def test_after_an_interrupt_the_finished_steps_are_shown_and_how_to_go_on(training) -> None:
    with pytest.raises(KeyboardInterrupt) as raised:
        training.fails(KeyboardInterrupt(), reached=UNDER_WAY, kept=INTERRUPTED)
    assert training.texts[-1] == STOPPED
    assert training.last[RUN_JSON]["trained"]["stopped"] == "interrupted"
    said = raised.value._render_traceback_()  # type: ignore[attr-defined]
    assert said == ["KeyboardInterrupt: stopped while training net; kept: its 6 finished steps"]


def test_an_error_after_finished_steps_shows_them_as_well(training) -> None:
    with pytest.raises(ValueError, match="labels"):
        training.fails(ValueError("labels"), kept=INTERRUPTED)
    assert training.texts[-1] == STOPPED


def test_one_that_fails_before_its_first_step_leaves_nothing_even_after_an_earlier_training(training) -> None:
    training.keeps(TRAINED)
    with pytest.raises(KeyboardInterrupt) as raised:
        training.fails(KeyboardInterrupt(), reached=UNDER_WAY)
    assert training.texts[-1] == ""
    said = raised.value._render_traceback_()  # type: ignore[attr-defined]
    assert said == ["KeyboardInterrupt: stopped while training net; the session is as it was before"]


def test_a_quiet_one_shows_no_curve_and_no_report(training) -> None:
    with training(quiet=True) as live:
        training.until("training net · 0 s")
        training.reaches(UNDER_WAY)
    training.reporter.report(TRAINED, live, quiet=True)
    assert set(training.texts) == {"training net · 0 s · interrupt the kernel to stop", ""}


def test_the_next_command_begins_with_its_own_line(training) -> None:
    with training() as live:
        training.reaches(UNDER_WAY)
    training.reporter.report(TRAINED, live, quiet=False)
    training.session.services.on_progress(UNDER_WAY)  # by a method of the session, without a command
    training.shown.clear()
    with training():
        training.until("training net · 0 s")
    assert not any("net · train" in text for text in training.texts)


def test_each_training_of_a_loop_has_its_own_report(training) -> None:
    for draw in (3, 4, 5):
        training.reporter.report(replace(TRAINED, draw=draw), Live(training.reporter._shell), quiet=False)
    training.reporter.end_cell()
    (shown,) = training.shown.values()
    assert [data["text/plain"].split(" · ")[3].splitlines()[0] for data in shown] == [
        "draw 3 of seed 0",
        "draw 4 of seed 0",
        "draw 5 of seed 0",
    ]
