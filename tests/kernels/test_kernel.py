"""Every command in a real kernel, as nbclient runs it: equal bits, reports, failures that stop the notebook."""

from __future__ import annotations

import re

import pytest
from kernels import RUN_JSON, Cell
from nbclient.exceptions import CellExecutionError
from sharp_bits import LOAD, MODEL, SETUP

BY_HAND = """
root_key = jax.random.key(0)
root_key, params_key, dropout_key = jax.random.split(root_key, 3)
by_hand = my_model.init(params_key, x)
expected = jax.jit(lambda v, x, k: my_model.apply(v, x, rngs={'dropout': k}))(by_hand, x, dropout_key)

def equal(a, b):
  a, b = jax.tree_util.tree_leaves(a), jax.tree_util.tree_leaves(b)
  same = [p.dtype == q.dtype and p.shape == q.shape and p.tobytes() == q.tobytes()
          for p, q in zip(map(np.asarray, a), map(np.asarray, b), strict=True)]
  print('equal' if same and all(same) else 'different')

import flax_magics
session = flax_magics.session()
"""


@pytest.fixture(scope="module")
def notebook(living):
    living.run(BY_HAND)
    return living


@pytest.fixture(autouse=True)
def seed_0_again(request):
    if "notebook" in request.fixturenames:
        request.getfixturevalue("notebook").run("%flax_key --seed 0 --fresh --quiet")


@pytest.mark.smoke
def test_the_extension_loads_without_a_word_and_a_model_cell_says_one_line(notebook):
    load, setup, model = (Cell(node.outputs) for node in notebook.client.nb.cells[:3])
    assert load.outputs == []
    assert setup.outputs == []
    assert model.report == "my_model · MyModel(num_neurons=3, training=False) · registered"
    assert model.printed == ""


@pytest.mark.smoke
def test_the_first_apply_has_every_bit_of_the_code_by_hand(notebook):
    cell = notebook.run("y = %flax_apply my_model(x)\nequal(y, expected)")
    assert cell.printed == "equal\n"
    assert notebook.run("equal(session.models['my_model'].variables, by_hand)").printed == "equal\n"
    assert cell.run["keys"]["params"][:8] == "375f238f"
    assert cell.run["keys"]["dropout"][:8] == "f71f4ea9"


@pytest.mark.smoke
def test_a_report_is_shown_as_text_as_html_and_as_data(notebook):
    (data,) = notebook.run("y = %flax_apply my_model(x)").displays
    assert set(data) == {"text/plain", "text/html", RUN_JSON}
    assert data["text/plain"].startswith("my_model · as written (training=False) · ")
    assert 'class="flax-magics"' in data["text/html"]
    assert "<script" not in data["text/html"]
    run = data[RUN_JSON]
    assert (run["model"], run["call"], run["seed"], run["draw"]) == ("my_model", "my_model(x)", 0, 1)
    assert run["timing"]["run"] > 0


@pytest.mark.smoke
def test_the_runs_of_a_loop_share_one_counting_line(notebook):
    first, line = notebook.run("for _ in range(50):\n  y = %flax_apply --train my_model(x)").displays
    assert "draw 1 of seed 0" in first["text/plain"]
    assert line["text/plain"].startswith("my_model · train · cpu:0 · draws 2–50 · 49 runs · reused · run median ")
    assert notebook.run("print(session.draws, len(session.runs) >= 50)").printed == "50 True\n"


@pytest.mark.parametrize(
    ("source", "name", "says"),
    [
        ("y = %flax_apply my_modl(x)", "FlaxMagicsError", "did you mean my_model?"),
        ("y = %flax_apply --train my_model(x[..., :2])", "ScopeParamShapeError", "kernel"),
        ("%%flaxmodel\nclass MyModel(nn.Module):\n  x: int = 1 / 0", "ZeroDivisionError", "division by zero"),
    ],
)
def test_a_mistake_fails_the_cell_once_and_leaves_the_session_as_it_was(notebook, source, name, says):
    notebook.run("y = %flax_apply my_model(x)")
    look = "print(session.draws, len(session.runs), jax.random.key_data(session.root_key), list(session.models))"
    look += "\nequal(session.models['my_model'].variables, by_hand)"
    before = notebook.run(look).printed
    cell = notebook.fails(source)
    (error,) = (output for output in cell.outputs if output.output_type == "error")
    assert error.ename == name
    assert says in error.evalue or says in "\n".join(error.traceback)
    assert notebook.run(look).printed == before


@pytest.mark.smoke
def test_a_cell_that_fails_stops_the_notebook(notebook):
    before = len(notebook.client.nb.cells)
    with pytest.raises(CellExecutionError, match="no model is called `nobody`"):
        notebook.run_all(["y = %flax_apply nobody(x)", "print('never')"])
    assert len(notebook.client.nb.cells) == before + 1


def test_run_all_in_a_living_kernel_equals_restart_and_run_all(open_notebook, start_notebook):
    cells = [
        LOAD,
        "%flax_key --seed 0 --fresh",
        SETUP,
        MODEL,
        "first = %flax_apply -o one my_model(x)",
        "second = %flax_apply --train -o two my_model(x)",
        "key = %flax_key latent",
        "variables = %flax_init -o three my_model(x)",
        "third = %flax_apply --train -o four my_model(x)",
        "print(*(run.digest for run in (one, two, three, four)), jax.random.key_data(key), np.asarray(third))",
    ]
    restarted = start_notebook().run_all(cells)[-1].printed
    notebook = open_notebook()
    assert notebook.run_all(cells)[-1].printed == restarted
    living = notebook.run_all(cells)
    assert living[-1].printed == restarted
    assert "!" not in living[1].report


SLOW = """
%%flaxmodel
import time

class Slow(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Dense(5)(x)
    if not self.is_initializing():
      time.sleep(2)
    return x

slow = Slow()
"""

WATCH = """
shown = []
publish = get_ipython().display_pub.publish

def watched(data, *args, **kwargs):
  shown.append(data['text/plain'])
  publish(data, *args, **kwargs)

get_ipython().display_pub.publish = watched
"""


@pytest.mark.smoke
def test_what_is_slow_is_told_of_while_it_lasts_and_the_report_takes_its_place(notebook):
    notebook.run(SLOW)
    notebook.run("%flax_init -q slow(x);")
    notebook.run(WATCH)
    cell = notebook.run("y = %flax_apply slow(x)")
    assert cell.report.startswith("slow · as written · ")
    assert len(cell.outputs) == 1
    live = notebook.run("del get_ipython().display_pub.publish\nprint(shown[0])").printed
    assert re.fullmatch(r"tracing slow · \d s\n", live)
