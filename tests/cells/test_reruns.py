"""Cells that drew and were run again: what a kernel sees of them, and no more."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from IPython.core.inputtransformer2 import TransformerManager

from flax_magics.cells.journal import ExecutedCell, Journal, Registered
from flax_magics.cells.reruns import Rerun, reruns

transform = TransformerManager().transform_cell


def log(*cells):
    """A log of `(id, text)`, numbered from 1; what else is known of an execution stands third."""
    return [
        ExecutedCell(number, text, cell=cell, **(more[0] if more else {}))
        for number, (cell, text, *more) in enumerate(cells, 1)
    ]


def test_a_cell_that_drew_and_was_run_again():
    found = log(("a", "%flax_apply net(x)"), ("b", "1"), ("a", "%flax_apply net(x)"), ("a", "%flax_apply net(x)"))
    (rerun,) = reruns(found, {1: ["net(x)"], 3: ["net(x)"], 4: ["net(x)"]}, transform)
    assert rerun == Rerun((1, 3, 4), True, False, {})
    assert rerun.text == "cell [4] ran 3 times"
    assert dict(rerun.marks()) == {1: ("cell run again since, as [4]",), 3: ("cell run again since, as [4]",)}


def test_an_edited_one():
    found = log(("a", "%flax_apply net(x)"), ("a", "%flax_apply --train net(x)"))
    (rerun,) = reruns(found, {1: ["net(x)"], 2: ["net(x)"]}, transform)
    assert rerun.text == "cell [2] was edited and ran twice"
    assert dict(rerun.marks()) == {1: ("cell edited since, as [2]",)}


def test_cells_that_ran_once_or_did_not_draw_or_bind_below_are_nobodys_business():
    draw = ("a", "%flax_apply net(x)")
    assert reruns(log(("x", "x = 1"), draw), {2: ["net(x)"]}, transform) == ()
    assert reruns(log(("x", "x = 1"), ("x", "x = 1")), {}, transform) == ()
    cells = [("x", "x = 1"), draw, ("b", "x = 2"), ("c", "%flax_apply net(x)")]
    assert reruns(log(*cells), {2: ["net(x)"], 4: ["net(x)"]}, transform) == ()


def test_a_variable_that_another_cell_rebound_in_between():
    cells = [("x", "x = 1"), ("a", "y = %flax_apply net(x)"), ("b", "x = x + 1"), ("a", "y = %flax_apply net(x)")]
    (rerun,) = reruns(log(*cells), {2: ["net(x)"], 4: ["net(x)"]}, transform)
    assert rerun.text == "cell [4] ran twice; x changed in [3]"
    assert dict(rerun.marks()) == {2: ("cell run again since, as [4]",), 4: ("x changed in [3], after [2]",)}


@pytest.mark.parametrize(
    ("drawing", "between", "rebound"),
    [
        ("x = 1\n%flax_apply net(x)", "x = 2\nz = 3", {}),  # the cell binds it itself, or does not use it
        ("%flax_apply net(x)", "%%flaxmodel net = Net()\nclass Net(nn.Module): ...", {"net": 2}),
        ("%flax_apply net(x)", "x = = 1", {}),
        ("%flax_apply net(x)", "%%bash\nx=2", {}),
    ],
)
def test_what_a_cell_in_between_binds(drawing, between, rebound):
    cells = log(("a", drawing), ("b", between), ("a", drawing))
    (rerun,) = reruns(cells, {1: ["net(…)"], 3: ["net(…)", "net(x)"]}, transform)
    assert rerun.rebound == rebound


def test_without_ids_it_is_said_of_the_text_alone():
    found = log((None, "%flax_apply net(x)"), (None, " %flax_apply net(x)\n"), (None, "%flax_apply net(y)"))
    (rerun,) = reruns(found, {1: ["net(x)"], 2: ["net(x)"], 3: ["net(y)"]}, transform)
    assert rerun.text == "the text of cell [2] ran twice"
    assert dict(rerun.marks()) == {1: ("the same text run again since, as [2]",)}


def test_one_that_drew_once_and_is_the_same_draws_once_in_run_all_too():
    cells = [("m", "%%flaxmodel net = Net(3)\nclass Net(nnx.Module): ..."), ("a", "1")]
    assert reruns(log(*cells, cells[0]), {1: ["Net(3)"]}, transform) == ()
    edited = ("m", "%%flaxmodel net = Net(4)\nclass Net(nnx.Module): ...")
    (rerun,) = reruns(log(*cells, edited), {1: ["Net(3)"]}, transform)
    assert rerun.text == "cell [3] was edited and ran twice"


def test_a_variable_whose_cell_was_run_again_after_the_draw():
    cells = [("x", "x = 1"), ("a", "%flax_apply net(x)"), ("x", "x = 2"), ("b", "x = 3")]
    (rerun,) = reruns(log(*cells), {2: ["net(x)"]}, transform)
    assert rerun == Rerun((2,), True, False, {}, {"x": 3})
    assert rerun.text == "cell [2] ran before x changed in [3]"
    assert dict(rerun.marks()) == {2: ("x changed since, in [3]",)}


def test_a_cell_that_is_what_it_was_binds_the_same_unless_it_goes_on():
    draw = ("a", "%flax_apply net(x)")
    same = ("x", "x = 1\ny = x + 1")
    assert reruns(log(same, draw, same), {2: ["net(x)"]}, transform) == ()
    for text in ("x = x + 1", "x += 1", "y = 2 * x\nx = y"):
        going_on = ("x", text)
        (rerun,) = reruns(log(going_on, draw, going_on), {2: ["net(x)"]}, transform)
        assert rerun.since == {"x": 3}


def test_nor_is_it_anything_in_between_unless_another_had_bound_since():
    draw, one, two = ("a", "%flax_apply net(x)"), ("x", "x = 1"), ("b", "x = 2")
    (rerun,) = reruns(log(one, draw, one, draw), {2: ["net(x)"], 4: ["net(x)"]}, transform)
    assert rerun.rebound == {}
    (rerun,) = reruns(log(one, two, draw, one, draw), {3: ["net(x)"], 5: ["net(x)"]}, transform)
    assert rerun.rebound == {"x": 4}


def test_run_again_and_rebound_since():
    cells = [("x", "x = 1"), ("a", "%flax_apply net(x)"), ("a", "%flax_apply net(x)"), ("x", "x = 2")]
    (rerun,) = reruns(log(*cells), {2: ["net(x)"], 3: ["net(x)"]}, transform)
    assert rerun.text == "cell [3] ran twice; x changed in [4]"
    assert dict(rerun.marks()) == {2: ("cell run again since, as [3]",), 3: ("x changed since, in [4]",)}


def model(state):
    registered = (Registered("net", "Net()", state),)
    return "m", "%%flaxmodel\nclass Net(nn.Module): ...\nnet = Net()", {"registered": registered}


def test_a_model_that_is_kept_was_not_rebound():
    draw = ("a", "%flax_apply net(x)")
    assert reruns(log(model("new"), draw, model("unchanged")), {2: ["net(x)"]}, transform) == ()
    (rerun,) = reruns(log(model("new"), draw, model("changed")), {2: ["net(x)"]}, transform)
    assert rerun.text == "cell [2] ran before net changed in [3]"


def test_a_cell_that_failed_before_it_drew_has_not_run():
    draw, failed = ("a", "%flax_apply net(x)"), ("a", "%flax_apply net(y)", {"error": "FlaxMagicsError", "line": 1})
    for cells, drew in (((failed, draw), [2]), ((draw, failed), [1]), ((failed, failed, draw, failed), [3])):
        assert reruns(log(*cells), {number: ["net(x)"] for number in drew}, transform) == ()
    (rerun,) = reruns(log(draw, failed, draw), {1: ["net(x)"], 3: ["net(x)"]}, transform)
    assert rerun == Rerun((1, 3), True, False, {})
    # One that drew first took a draw that Run All will not take.
    later = ("a", "%flax_apply net(x)\n1 / 0", {"error": "ZeroDivisionError", "line": 2})
    (rerun,) = reruns(log(later, draw), {1: ["net(x)"], 2: ["net(x)"]}, transform)
    assert rerun.text == "cell [2] was edited and ran twice"


def test_a_cell_that_failed_bound_what_came_before():
    draw = ("a", "%flax_apply net(x, y)")
    failed = ("x", "x = 1\n1 / 0\ny = 2", {"error": "ZeroDivisionError", "line": 2})
    (rerun,) = reruns(log(("x", "x = 1; y = 2"), draw, failed), {2: ["net(x, y)"]}, transform)
    assert rerun.since == {"x": 3}


def test_a_call_in_a_function_of_another_cell_has_names_of_its_own():
    cells = [("f", "def f(x):\n  return net(x)"), ("x", "x = 1"), ("a", "f(2)"), ("x", "x = 2")]
    assert reruns(log(*cells), {3: ["net(x)"]}, transform) == ()


def test_beginning_anew_is_no_running_again():
    draw = ("a", "%flax_apply net(x)")
    restart = ("r", "%flax_key --seed 0 --fresh", {"restarted": "fresh"})
    assert reruns(log(draw, restart, draw), {1: ["net(x)"], 3: ["net(x)"]}, transform) == ()
    plain = ("r", "%flax_key --seed 0", {"restarted": "seed"})
    (rerun,) = reruns(log(draw, plain, draw), {1: ["net(x)"], 3: ["net(x)"]}, transform)
    assert rerun.numbers == (1, 3)
    assert reruns(log(plain, draw, plain, draw), {2: ["net(x)"], 4: ["net(x)"]}, transform) == ()


def test_of_many_executions_the_last_is_named():
    found = log(*[("a", "%flax_apply net(x)")] * 6)
    (rerun,) = reruns(found, {number: ["net(x)"] for number in range(1, 7)}, transform)
    assert rerun.text == "cell [6] ran 6 times"


def test_a_cell_that_an_interrupt_ended_in_ipythons_own_code_has_its_number():
    journal, info = Journal(lambda: 0), SimpleNamespace(raw_cell="y = 1", store_history=True)
    journal.begin(info)
    error = KeyboardInterrupt()
    journal.end(SimpleNamespace(info=info, execution_count=None, error_before_exec=None, error_in_exec=error), 7)
    assert [(cell.number, cell.text, cell.error) for cell in journal.executed] == [(7, "y = 1", "KeyboardInterrupt")]
