"""`%flax_vars`: a model's variables given and taken; and a run with untrained weights, which does not go unnoticed."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from by_hand import bits

NET = """\
%%flaxmodel net = Net()
class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
"""
PLAIN = """\
%%flaxmodel net = Net()
class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(4)(x)
"""
DOUBLE = "jax.tree.map(lambda p: 2 * p, variables)"


def write_of(out):
    """The lines that a message says to write, as a person copies them."""
    _, _, text = out.partition("write: ")
    lines = text.splitlines()
    return "\n".join([lines[0], *(line for line in lines[1:] if line.startswith(" " * 9))])


@pytest.fixture
def net(notebook):
    notebook(NET)
    notebook("variables = %flax_init -q net(x)")
    return notebook


# -- the command


def test_it_gives_the_variables_and_says_whose_they_are(net):
    assert net("given = %flax_vars net") == "net · initialised in draw 1 · 28 parameters, 144 B"
    assert net["given"] is net.session.models["net"].variables
    net("y = %flax_apply --train net(x)")
    assert net("given = %flax_vars net") == "net · initialised in draw 1 · 28 parameters, 144 B · batch_stats: update 1"
    assert net("given = %flax_vars -q net") == ""
    net("%flax_vars net")
    assert "Out" in net("%flax_vars net")
    assert "Out" not in net("%flax_vars net;")


def test_it_takes_others_and_every_report_says_so(net):
    net("y = %flax_apply net(x)")
    number = net.shell.execution_count
    assert net(f"%flax_vars net = {DOUBLE}") == f"net · set in cell [{number}] · 28 parameters, 144 B"
    out = net("y = %flax_apply net(x)")
    assert out.endswith(f"weights set in [{number}]")
    doubled = jax.tree.map(lambda p: 2 * p, net["variables"])
    assert np.array_equal(net["y"], net["net"].apply(doubled, net["x"]))
    assert f"set in cell [{number}]" in net("%flax")
    assert net.session.runs[-1].weights == f"set in cell [{number}]"
    number = net.shell.execution_count
    net("import flax_magics\nflax_magics.session().models['net'].variables = variables")
    assert net.session.models["net"].weights == f"set in cell [{number}]"


def test_the_expression_is_python_of_that_place(net):
    net("def give(factor):\n    %flax_vars -q net = jax.tree.map(lambda p: factor * p, variables)\ngive(3)")
    assert bits(net.session.models["net"].variables) == bits(jax.tree.map(lambda p: 3 * p, net["variables"]))
    net("%flax_vars -q net = {**variables,\n    'params': variables['params']}")
    assert bits(net.session.models["net"].variables) == bits(net["variables"])
    net("%flax_vars net = None")
    assert net.session.models["net"].variables is None


MISTAKES = {
    "%flax_vars net['params']": "%flax_vars takes the name of a model, not `net['params']`.\n"
    "  write: variables = %flax_vars net",
    "%flax_vars net.variables": "%flax_vars takes the name of a model, not `net.variables`.\n"
    "  write: variables = %flax_vars net",
    "%flax_vars net =": "`net =` needs a value.\n  form: %flax_vars net = …",
    "%flax_vars net = 3": "variables of `net` are a dict of collections, not an int.\n"
    "  form: %flax_vars net = {'params': …}",
    "%flax_apply --eval --variables [1] net(x)": "variables of `net` are a dict of collections, not a list.\n"
    "  form: %flax_apply --eval --variables {'params': …} net(x)",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_message_and_changes_nothing(net, line):
    before = net.session._state
    assert net.fails(line) == f"FlaxMagicsError: {MISTAKES[line]}"
    assert net.session._state is before


def test_what_is_no_state_of_an_nnx_module_for_one_run(notebook):
    notebook("from flax import nnx\n%flaxmodel net = nnx.Linear(4, 2)")
    for line in ("--variables net net(x)", "--mutable a --variables (net, 1) net(x)"):
        form = line.replace("(net, 1)", "net").replace("--variables net", "--variables nnx.state(…)")
        kind = "a Linear" if "1" not in line else "a tuple"
        assert notebook.fails(f"%flax_apply {line}") == (
            f"FlaxMagicsError: variables of `net` are an nnx.State, not {kind}.\n  form: %flax_apply {form}"
        )


def test_before_the_first_init(notebook):
    notebook(NET)
    assert notebook.fails("%flax_vars net") == (
        "FlaxMagicsError: `net` has no variables yet: its first run initialises them, or an init does.\n"
        "  form: %flax_init net(…)"
    )


PARTS = {
    "params": "{'params': params}",
    "{'params': params}": "{**flax_magics.session().models['net'].variables, **{'params': params}}",
    "dict(params=params)": "{**flax_magics.session().models['net'].variables, **dict(params=params)}",
    "state": "{**flax_magics.session().models['net'].variables, 'params': state.params}",
    "{'params': params} if x is not None else 0": "{**flax_magics.session().models['net'].variables,"
    " **({'params': params} if x is not None else 0)}",
}


@pytest.mark.parametrize("expression", PARTS)
def test_a_part_of_them_is_refused_with_the_line_that_gives_the_whole(net, expression):
    net(
        "import optax\nfrom flax.training.train_state import TrainState\n"
        "params = jax.tree.map(lambda p: 2 * p, variables['params'])\n"
        "state = TrainState.create(apply_fn=net.apply, params=params, tx=optax.sgd(0.1))"
    )
    out = net.fails(f"%flax_vars net = {expression}")
    expected = PARTS[expression]
    if expression == "params":
        expected = "{**flax_magics.session().models['net'].variables, 'params': params}"
    assert write_of(out) == f"%flax_vars net = {expected}"
    assert "flax_magics" not in net.shell.user_ns
    net(write_of(out))
    assert net.session.models["net"].variables["params"] is net["params"]
    assert bits(net.session.models["net"].variables["batch_stats"]) == bits(net["variables"]["batch_stats"])


def test_where_the_model_has_nothing_else_the_line_is_shorter(notebook):
    notebook(PLAIN)
    notebook("variables = %flax_init -q net(x)\nparams = variables['params']")
    out = notebook.fails("%flax_vars net = params")
    assert write_of(out) == "%flax_vars net = {'params': params}"
    notebook(write_of(out))


def test_nnx_gives_its_state_and_takes_it_into_the_object(notebook):
    notebook("from flax import nnx")
    notebook(
        "%%flaxmodel net = Net(4)\nclass Net(nnx.Module):\n  def __init__(self, n, rngs):\n"
        "    self.linear = nnx.Linear(n, 2, rngs=rngs)\n  def __call__(self, x):\n    return self.linear(x)"
    )
    assert notebook("state = %flax_vars net") == "net · initialised in draw 1 · 10 parameters, 40 B"
    kernel = notebook["net"].linear.kernel
    notebook("%flax_vars net = jax.tree.map(lambda p: 2 * p, state)")
    assert notebook["net"].linear.kernel is kernel
    assert bits(kernel[...]) == bits(2 * notebook["state"]["linear"]["kernel"][...])
    out = notebook.fails("%flax_vars net = net")
    assert write_of(out) == "%flax_vars net = nnx.state(net)"
    notebook(write_of(out))


# -- a loop by hand, and a run with the session's own


def notes(notebook):
    return [note.text for note in notebook.session.runs[-1].notes if note.kind == "weights"]


def held(expression):
    return [f"{expression} holds other weights than net has, and this run used those of net"]


PARAMS = "params = jax.tree.map(lambda p: 2 * p, params)"
LOOPS = {
    "variables": (NET, f"variables = {DOUBLE}", "variables"),
    "params beside statistics": (NET, PARAMS, "params"),
    "params": (PLAIN, PARAMS, "params"),
    "state": (PLAIN, "state = state.apply_gradients(grads=state.params)", "state.params"),
}


@pytest.mark.parametrize("loop", LOOPS)
def test_it_is_said_once_and_the_line_puts_it_right(notebook, loop):
    model, statement, expression = LOOPS[loop]
    notebook(model)
    notebook("variables = %flax_init -q net(x)")
    notebook("import optax\nfrom flax.training.train_state import TrainState\nparams = variables['params']")
    notebook("state = TrainState.create(apply_fn=net.apply, params=params, tx=optax.sgd(0.1))")
    for _ in range(2):
        notebook("y = %flax_apply net(x)")
        assert notes(notebook) == []
    notebook(statement)
    out = notebook("y = %flax_apply net(x)")
    assert notes(notebook) == held(f"`{expression}`")
    assert "  vars  initialised in draw 1\n" in out
    notebook("y = %flax_apply net(x)")
    assert notes(notebook) == []
    notebook(write_of(out))
    for _ in range(2):
        notebook("y = %flax_apply net(x)")
        assert notes(notebook) == []
    trained = eval(expression, notebook.shell.user_ns)
    trained = trained.get("params", trained)
    assert notebook.session.models["net"].variables["params"] is trained
    notebook(statement)
    notebook("y = %flax_apply net(x)")
    assert notes(notebook) == held(f"`{expression}`")


def test_all_in_one_cell(notebook):
    notebook(PLAIN)
    notebook(f"variables = %flax_init net(x)\nfor i in range(3):\n    variables = {DOUBLE}\ny = %flax_apply net(x)")
    assert notes(notebook) == held("`variables`")


def test_several_names_are_told_of_together(notebook):
    notebook(PLAIN)
    notebook("variables = %flax_init -q net(x)\nparams = best = variables['params']")
    notebook("best = jax.tree.map(lambda p: 2 * p, params)\nparams = jax.tree.map(lambda p: 3 * p, params)")
    out = notebook("y = %flax_apply net(x)")
    assert notes(notebook) == ["`params` and `best` hold other weights than net has, and this run used those of net"]
    assert out.endswith("  form: %flax_vars net = …")
    notebook("%flax_vars net = {'params': best}")
    notebook("y = %flax_apply net(x)")
    assert notes(notebook) == []


RIGHT = {
    "gradients of the same tree": "grads = jax.tree.map(lambda p: 3 * p, params)",
    "another init by hand": "mine = net.init(jax.random.key(7), x)",
    "the same values elsewhere": "params = jax.device_put(jax.tree.map(lambda p: p + 0, params))",
    "another dtype": "params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)",
    "another tree": "params = {'Dense_0': 3}",
    "statistics alone": "variables = {**variables, 'batch_stats': jax.tree.map(lambda p: 2 * p, variables['batch_stats'])}",
    "the model's own new init": "%flax_init -q net(x);",
    "statistics that runs write": "y = %flax_apply -q --train net(x)",
    "another model's": "%flaxmodel other = Net()\nvariables = %flax_init -q other(x)\nparams = variables['params']",
    "gone": "del variables, params",
    "unsortable": "params = {1: 2, 'a': 3}",
}


@pytest.mark.parametrize("what", RIGHT)
def test_what_is_right_is_not_told_of(net, what):
    net("params = variables['params']")
    net(RIGHT[what])
    net("y = %flax_apply net(x)")
    assert notes(net) == []


def test_with_other_variables_for_one_run_there_is_nothing_to_say(net):
    net(f"variables = {DOUBLE}")
    out = net("y = %flax_apply --variables variables net(x)")
    assert notes(net) == []
    assert "given for this run" in out
