"""A line that ran before is found by its text, and gives what it would give if it were read anew."""

from __future__ import annotations

import gc
import signal
import sys
from collections import Counter
from typing import Any

import jax
import pytest
from by_hand import bits, keys_of
from interrupts import interrupted_after

from flax_magics import _session
from flax_magics.base.digest import digest_of
from flax_magics.base.files import RUNS_JSON
from flax_magics.execution.plan_cache import LastRun
from flax_magics.report import live as live_line
from flax_magics.report import text
from flax_magics.run import RELEASED
from flax_magics.state.runs import RepeatedRun


@pytest.fixture
def known(sharp_bits: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The notebook, and in `known.again` for each run of a line whether it went on from the one before."""
    again = _session.Session.run_again
    sharp_bits.again = []

    def watched(*args: Any) -> Any:
        run = again(*args)
        sharp_bits.again.append(run is not None)
        return run

    monkeypatch.setattr(_session.Session, "run_again", watched)
    return sharp_bits


def by_hand(notebook: Any, draw: int, x: Any) -> Any:
    model = notebook["MyModel"](3, True)
    variables = notebook.session.models["my_model"].variables
    return bits(jax.jit(model.apply)(variables, x, rngs=keys_of(draw)("dropout")))


def test_a_loop_draws_again_and_again(known):
    loop = "for i in range(6):\n  y = %flax_apply --train -q -o run my_model(x)\n  ys.append(y)\n  runs.append(run)"
    known(f"ys, runs = [], []\n{loop}")
    assert known.again == [False, *[True] * 5]
    assert [bits(y) for y in known["ys"]] == [by_hand(known, draw, known["x"]) for draw in range(1, 7)]
    assert known["runs"] == known.session.runs
    assert [run.draw for run in known["runs"]] == [1, 2, 3, 4, 5, 6]
    assert {run.call for run in known["runs"]} == {"my_model(x)"}


def test_new_arrays_in_each_run_are_the_runs_own(known):
    known("ys = []\nfor i in range(4):\n  x = x + 1\n  y = %flax_apply --train -q my_model(x)\n  ys.append((x, y))")
    assert known.again == [False, True, True, True]
    assert [bits(y) for _, y in known["ys"]] == [by_hand(known, draw, x) for draw, (x, _) in enumerate(known["ys"], 1)]


def test_names_are_those_of_the_place_where_the_line_stands(known):
    known("def f(x):\n  y = %flax_apply --train -q my_model(x)\n  return y\nys = [f(x), f(x + 1), f(x + 2)]")
    assert known.again[1:] == [True, True]
    assert [bits(y) for y in known["ys"]] == [by_hand(known, draw, known["x"] + (draw - 1)) for draw in (1, 2, 3)]


def test_a_name_that_holds_another_module_meanwhile_is_registered(known):
    known("y = %flax_apply --train -q my_model(x)\ny = %flax_apply --train -q my_model(x)")
    known("my_model = MyModel(2, True)\ny = %flax_apply --train -q my_model(x)")
    assert known["y"].shape[-1] == 2
    assert known.session.module("my_model") is known["my_model"]


@pytest.mark.parametrize("line", ["y = %flax_apply --train my_model(x)", "y = %flax_apply my_model(x);"])
def test_what_goes_wrong_is_told_as_ever(known, line):
    known(f"{line}\n{line}")
    known("good = x\ndel x")
    told = known.fails(line)
    assert told.startswith("FlaxMagicsError: name 'x' is not defined.")
    known("x = good[..., :2]")
    assert "ScopeParamShapeError" in known.fails(line)
    known("x = good")
    known(line)
    assert known.session.draws == 3
    known("del my_model")
    known(line)  # the session has it
    assert known.session.draws == 4


def test_a_semicolon_silences_it_too(known):
    line = "%flax_apply --train -q my_model(x)"
    known(line)
    assert "Out[" in known(line)
    known(f"{line};")
    assert "Out[" not in known(f"{line};")
    assert known(f"y = {line};\ny.shape").endswith("(3, 4, 3)")


@pytest.mark.parametrize("interrupted", range(0, 384, 12))
def test_an_interrupt_at_any_line_of_it_leaves_all_or_nothing(known, interrupted):
    known("for i in range(3):\n  y = %flax_apply --train -q my_model(x)")
    before, hook = signal.getsignal(signal.SIGINT), sys.unraisablehook
    magic = known.shell.find_line_magic("flax_apply")

    # As the signal would, between two bytecodes of that frame.
    def interrupt(frame: Any) -> None:
        signal.getsignal(signal.SIGINT)(signal.SIGINT, frame)

    with interrupted_after(interrupted, interrupt, once=True):
        magic("--train -q my_model(x)")
    assert (signal.getsignal(signal.SIGINT), sys.unraisablehook) == (before, hook)
    session = known.session
    assert session.draws == len(session)
    assert session.draws in (3, 4)
    known("y = %flax_apply --train -q my_model(x)")
    assert bits(known["y"]) == by_hand(known, session.draws, known["x"])


def test_in_a_traced_function_it_is_refused_as_ever(known):
    line = "--train -q my_model(x)"
    known(f"for i in range(3):\n  y = %flax_apply {line}")
    told = known.fails(f"jax.jit(lambda z: get_ipython().run_line_magic('flax_apply', {line!r}))(1.0)")
    assert told.startswith(f"FlaxMagicsError: %flax_apply {line} stands in a function that JAX traces")
    assert known.session.draws == len(known.session) == 3
    known(f"y = %flax_apply {line}")
    assert bits(known["y"]) == by_hand(known, 4, known["x"])


@pytest.mark.parametrize("line", ["y = %flax_apply --train -q my_model(x)", "y = %flax_apply --train my_model(x)"])
def test_tasks_that_take_turns_draw_in_turn(known, line):
    known(
        "import asyncio\nys = []\nasync def work():\n  for i in range(3):\n"
        f"    {line}\n    ys.append(y)\n    await asyncio.sleep(0)\nawait asyncio.gather(work(), work())"
    )
    assert known.again == [False, *[True] * 5]
    assert [bits(y) for y in known["ys"]] == [by_hand(known, draw, known["x"]) for draw in range(1, 7)]


def test_a_live_line_of_a_run_that_came_to_nothing_is_blank(known, monkeypatch):
    line = "y = %flax_apply --train -q my_model(x)"
    known(f"{line}\n{line}")
    live = known.shell.find_line_magic("flax_apply").__self__.notebook.reporter.live()

    def shows_a_line(*args: Any) -> bool:
        known.session.services.on_phase("waiting")
        live.display_id = "shown"
        return False

    updated: list[Any] = []
    monkeypatch.setattr(LastRun, "holds", shows_a_line)
    monkeypatch.setattr(live_line, "publish", lambda shell, data, shown, update: updated.append((data, shown, update)))
    known(line)
    assert updated == [({"text/plain": ""}, "shown", True)]


def test_a_long_loop_leaves_nothing_but_its_history(known):
    loop = "for i in range(500):\n  x = x + 0\n  y = %flax_apply --train -q my_model(x)"
    known("%config FlaxMagics.replay_bytes = 0")

    def objects() -> Counter[str]:
        known(loop)
        gc.collect()
        return Counter(type(each).__name__ for each in gc.get_objects())

    objects()
    arrays, before = len(jax.live_arrays()), objects()
    grown = objects() - before
    assert len(jax.live_arrays()) == arrays
    of_history = {"RepeatedRun", "RunLog", "Place", "PyTreeDef", "ReferenceType", "Origin"}
    assert {name for name, n in grown.items() if n > 100} <= {*of_history, "list", "dict", "tuple"}
    assert sum(grown.values()) < 500 * 14


def test_what_nobody_asked_for_is_there_when_somebody_asks(known):
    known("ys = []\nfor i in range(4):\n  y = %flax_apply --train -q my_model(x)\n  ys.append(y)")
    last = known.session.runs[-1]
    assert known.session.runs[-1] is last
    assert (last.draw, last.program, last.output is known["ys"][-1], last.inputs[0][0] is known["x"]) == (
        4, "reused", True, True,
    )  # fmt: skip
    digests = [digest_of(y) for y in known["ys"]]
    del last
    known("ys.clear()\ny = None")
    assert [run.digest for run in known.session.runs] == digests
    assert [run.output for run in known.session.runs[1:]] == [RELEASED] * 3
    assert [values.size for values in known.session.runs[-1].values] == [36]


def rows_of(known, monkeypatch, cell: str) -> dict[str, Any]:
    """The runs that the counting line of a cell keeps as data, as in a kernel."""
    shown: list[dict[str, Any]] = []
    with monkeypatch.context() as patch:
        patch.setattr(known.shell, "kernel", object(), raising=False)
        patch.setattr(known.shell.display_pub, "publish", lambda data, **_: shown.append(data))
        known(cell)
    return shown[-1][RUNS_JSON]


def test_runs_of_a_counting_line_are_the_same_data_whether_they_were_made_or_not(known, monkeypatch):
    loop = "for i in range(8):\n  y = %flax_apply --train my_model(x)\n  x = x + 1"
    monkeypatch.setattr(text, "ROWS", 5)
    known(f"x_before = x\n{loop}")

    def data(restart: str) -> dict[str, Any]:
        return rows_of(known, monkeypatch, f"%flax_key {restart}\nx = x_before\n{loop}")

    quick = data("--seed 3")
    with monkeypatch.context() as patch:
        patch.setattr(RepeatedRun, "is_like", lambda *_: False)
        slow = data("--seed 3")
    for row in (*quick["runs"], *slow["runs"]):
        row.pop("started", None)
    assert [len(row) for row in quick["runs"]] == [len(row) for row in slow["runs"]]
    assert quick == slow
    assert quick["further"]["runs"] == 2
    assert known.session.runs[-1].digest == digest_of(known["y"])


def test_a_setting_that_changes_within_a_loop_counts_from_the_next_run_on(known, monkeypatch):
    loop = (
        "for i in range(6):\n  y = %flax_apply --train my_model(x)\n  if i == 3:\n    %config FlaxMagics.report = 'off'"
    )
    rows = rows_of(known, monkeypatch, loop)
    assert [row["draw"] for row in rows["runs"]] == [2, 3, 4]
