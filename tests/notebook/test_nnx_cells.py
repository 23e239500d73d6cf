"""NNX models in cells: built on the line or in the cell, kept while nothing changed, one truth in the namespace."""

from __future__ import annotations

import pytest
from by_hand import bits
from flax import nnx

NET = """\
from flax import nnx
class Net(nnx.Module):
  def __init__(self, hidden, out, rngs):
    self.first = nnx.Linear(4, hidden, rngs=rngs)
    self.dropout = nnx.Dropout(0.5, rngs=rngs)
    self.last = nnx.Linear(hidden, out, rngs=rngs)
  def __call__(self, x):
    return self.last(self.dropout(self.first(x)))
"""
LINE = f"%%flaxmodel net = Net(8, 3)\n{NET}"
CELL = f"%%flaxmodel\n{NET}net = Net(8, 3, rngs=nnx.Rngs(0))\n"


def test_an_unchanged_cell_keeps_the_object_and_makes_no_draw(notebook):
    notebook(LINE)
    net = notebook["net"]
    notebook("%flax_apply -q net(x);")
    state = bits(nnx.state(net))
    assert "unchanged" in notebook(LINE)
    assert notebook["net"] is net
    assert bits(nnx.state(net)) == state
    assert notebook.session.draws == 1
    assert "out of order" not in notebook("%flax")  # nothing was rebound either
    notebook("%flax_apply -q net(x);")
    assert notebook.session.runs[-1].program == "reused"


def test_an_instance_of_the_cells_own_is_kept_too_and_a_new_seed_is_a_new_model(notebook):
    notebook(CELL)
    net = notebook["net"]
    notebook("%flax_apply -q net(x);")
    notebook(CELL)
    assert notebook["net"] is net
    out = notebook(CELL.replace("Rngs(0)", "Rngs(1)"))
    assert "initial values" in out
    assert notebook["net"] is not net
    other = notebook["Net"](8, 3, rngs=nnx.Rngs(1))
    assert bits(nnx.state(notebook["net"])) == bits(nnx.state(other))


def test_a_bare_construction_in_the_cell_fails_as_python_does_and_says_where_to_move_it(notebook):
    out = notebook.fails(f"%%flaxmodel\n{NET}net = Net(8, 3)\n")
    assert "missing 1 required positional argument: 'rngs'" in out
    assert out.splitlines()[-1] == (
        "to have it built with the session's rngs, move it to the line: %%flaxmodel net = Net(…)"
    )


def test_a_class_that_needs_rngs_alone_is_built(notebook):
    notebook(f"%%flaxmodel\n{NET.replace('self, hidden, out, rngs', 'self, rngs, hidden=8, out=3')}")
    notebook("y = %flax_apply -q Net(x)")
    assert notebook.session.runs[-1].shape == "float32[3,4,3]"


def test_a_class_that_needs_more_answers_with_the_line_to_write(notebook):
    out = notebook.fails(f"%%flaxmodel\n{NET}")
    assert "%%flaxmodel net = Net(hidden=…, out=…)" in out


def test_the_object_in_the_namespace_is_what_runs(notebook):
    notebook(LINE)
    notebook("net.last = nnx.Linear(8, 2, rngs=nnx.Rngs(9))")
    notebook("y = %flax_apply -q net(x)")
    assert notebook.session.runs[-1].shape == "float32[3,4,2]"
    notebook("net = Net(8, 5, rngs=nnx.Rngs(0))")
    out = notebook("y = %flax_apply net(x)")
    assert "net is another module now, Net(" in out
    assert notebook.session.runs[-1].shape == "float32[3,4,5]"


def test_check_looks_at_a_construction_by_shapes_alone(notebook):
    out = notebook(LINE.replace("%%flaxmodel ", "%%flaxmodel --check 'net(x)' "))
    assert "float32[3,4,3]" in out
    assert "67 parameters" in out


@pytest.mark.parametrize("cell", [LINE, CELL])
def test_the_status_counts_the_parameters(notebook, cell):
    notebook(cell)
    assert "67 parameters" in notebook("%flax")
