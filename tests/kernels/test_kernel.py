"""Commands in a real kernel, as nbclient runs it: reports, failures, a loop, and all cells run again."""

from __future__ import annotations

import pytest
from kernels import RUN_JSON, Cell
from sharp_bits import LOAD, MODEL, SETUP


@pytest.fixture(scope="module")
def notebook(living):
    living.run("import flax_magics\nsession = flax_magics.session()\n%flax_apply -q my_model(x);")
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
def test_a_report_is_shown_as_text_as_html_and_as_data(notebook):
    (data,) = notebook.run("y = %flax_apply my_model(x)").displays
    assert set(data) == {"text/plain", "text/html", RUN_JSON}
    assert data["text/plain"].startswith("my_model · as written (training=False) · ")
    assert 'class="flax-magics ' in data["text/html"]
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
    _, keys = notebook.run("for _ in range(50):\n  %flax_key latent").displays
    assert keys["text/plain"] == "key latent · cpu:0 · draws 52–100 · 49 keys"


@pytest.mark.parametrize(
    ("source", "name", "says"),
    [
        ("y = %flax_apply my_modl(x)", "FlaxMagicsError", "did you mean my_model?"),
        ("y = %flax_apply --train my_model(x[..., :2])", "ScopeParamShapeError", "kernel"),
        ("%%flaxmodel\nclass MyModel(nn.Module):\n  x: int = 1 / 0", "ZeroDivisionError", "division by zero"),
    ],
)
def test_a_mistake_fails_the_cell_once_and_leaves_the_session_as_it_was(notebook, source, name, says):
    notebook.run("y = %flax_apply my_model(x)\nstate = session._state")
    (error,) = (output for output in notebook.fails(source).outputs if output.output_type == "error")
    assert error.ename == name
    assert says in error.evalue or says in "\n".join(error.traceback)
    assert notebook.run("print(session._state is state)").printed == "True\n"


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


@pytest.mark.smoke
def test_what_a_failed_cell_pins_goes_and_so_it_does_by_itself_out_of_memory(notebook):
    notebook.run(
        "import gc\n"
        "def alive(): gc.collect(); return {one.unsafe_buffer_pointer() for one in jax.live_arrays() if one.nbytes > 8}\n"
        "start, held = alive(), jax.live_arrays()\n"
        "def f(): big = jnp.ones((500, 500)).block_until_ready(); raise ValueError\n"
        "def g(): big = jnp.ones((500, 500)).block_until_ready(); "
        "return jax.jit(lambda x: jnp.broadcast_to(x, (1 << 44,)) + 1)(1.0)"
    )
    notebook.fails("f()")
    notebook.run("jnp.ones(3) + 1")
    assert notebook.run("print(alive() - start)").printed != "set()\n"
    assert "  let go  the last error, with its frames    Out[" in notebook.run("%flax_free").report
    assert notebook.run("print(alive() - start)").printed == "set()\n"
    failed = notebook.fails("g()")
    assert "\nfree · cpu:0 1.0 MB freed · held: " in failed.report
    assert notebook.run("print(alive() - start)").printed == "set()\n"
    notebook.run("del start, held, alive, f, g")
