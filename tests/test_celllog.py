"""Cells that drew and were run again: what a kernel sees of them, and no more."""

from __future__ import annotations

from IPython.core.inputtransformer2 import TransformerManager

from flax_magics.celllog import CellLog, Rerun

transform = TransformerManager().transform_cell


def log(*cells):
    """A log of `(id, text)`, numbered from 1."""
    found = CellLog()
    for number, (cell, text) in enumerate(cells, 1):
        found.begin(number, cell, text)
    return found


def test_cells_that_ran_once_are_nobodys_business():
    found = log(("a", "x = 1"), ("b", "%flax_apply net(x)"))
    assert found.reruns({2: ["net(x)"]}, transform) == ()


def test_a_cell_that_drew_and_was_run_again():
    found = log(("a", "%flax_apply net(x)"), ("b", "1"), ("a", "%flax_apply net(x)"), ("a", "%flax_apply net(x)"))
    (rerun,) = found.reruns({1: ["net(x)"], 3: ["net(x)"], 4: ["net(x)"]}, transform)
    assert rerun == Rerun((1, 3, 4), True, False, {})
    assert rerun.text == "cell [1] was run again as [3] and [4]"
    assert dict(rerun.marks()) == {1: ("cell run again since, as [4]",), 3: ("cell run again since, as [4]",)}


def test_one_that_did_not_draw_is_none():
    found = log(("a", "x = 1"), ("a", "x = 1"))
    assert found.reruns({}, transform) == ()


def test_an_edited_one():
    found = log(("a", "%flax_apply net(x)"), ("a", "%flax_apply --train net(x)"))
    (rerun,) = found.reruns({1: ["net(x)"], 2: ["net(x)"]}, transform)
    assert rerun.text == "cell [1] was edited and run again as [2]"
    assert dict(rerun.marks()) == {1: ("cell edited since, as [2]",)}


def test_a_variable_that_another_cell_rebound_in_between():
    cells = [("x", "x = 1"), ("a", "y = %flax_apply net(x)"), ("b", "x = x + 1"), ("a", "y = %flax_apply net(x)")]
    (rerun,) = log(*cells).reruns({2: ["net(x)"], 4: ["net(x)"]}, transform)
    assert rerun.text == "cell [2] was run again as [4]; x was rebound by [3] in between"
    assert dict(rerun.marks()) == {
        2: ("cell run again since, as [4]",),
        4: ("x was rebound by [3] since [2]",),
    }


def test_what_the_cell_binds_itself_and_what_it_does_not_use_is_none():
    cells = [("a", "x = 1\n%flax_apply net(x)"), ("b", "x = 2\nz = 3"), ("a", "x = 1\n%flax_apply net(x)")]
    (rerun,) = log(*cells).reruns({1: ["net(x)"], 3: ["net(x)"]}, transform)
    assert rerun.rebound == {}


def test_a_model_that_another_cell_registered_anew():
    cells = [
        ("a", "%flax_apply net(x)"),
        ("m", "%%flaxmodel net = Net()\nclass Net(nn.Module): ..."),
        ("a", "%flax_apply net(x)"),
    ]
    (rerun,) = log(*cells).reruns({1: ["net(x)"], 3: ["net(x)"]}, transform)
    assert rerun.rebound == {"net": 2}


def test_without_ids_it_is_said_of_the_text_alone():
    found = log((None, "%flax_apply net(x)"), (None, " %flax_apply net(x)\n"), (None, "%flax_apply net(y)"))
    (rerun,) = found.reruns({1: ["net(x)"], 2: ["net(x)"], 3: ["net(y)"]}, transform)
    assert rerun.text == "the text of cell [1] was run again as [2]"
    assert dict(rerun.marks()) == {1: ("the same text run again since, as [2]",)}


def test_a_cell_that_is_no_python_binds_nothing():
    cells = [("a", "%flax_apply net(x)"), ("b", "x = = 1"), ("c", "%%bash\nx=2"), ("a", "%flax_apply net(x)")]
    (rerun,) = log(*cells).reruns({1: ["net(…)"], 4: ["net(…)", "net(x)"]}, transform)
    assert rerun.rebound == {}
