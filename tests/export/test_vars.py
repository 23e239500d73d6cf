"""`%flax_vars` in an export: the variables that a cell took, and those that it gave."""

from __future__ import annotations

import pytest
from exporting import NNX_NET, NORMED, assert_same, exported

TRAINED = "params = jax.tree.map(lambda leaf: leaf + 1, variables['params'])\n"
NNX = """\
from flax import nnx
class Net(nnx.Module):
  def __init__(self, rngs):
    self.linear = nnx.Linear(4, 2, rngs=rngs)
  def __call__(self, x): return self.linear(x)
%flaxmodel net = Net()
"""


def test_variables_that_were_given_as_a_message_writes_it_too_and_taken(notebook, tmp_path):
    notebook(NORMED)
    notebook("variables = %flax_init normed(x)")
    message = notebook.fails(TRAINED + "%flax_vars normed = {'params': params}")
    notebook(message.partition("write: ")[2])
    notebook("%flax_apply normed(x)\n%flax_vars normed = {**variables, 'params': params}")
    notebook("%flax_apply --train normed(x)")
    taken = "taken = %flax_vars normed\nprint(sorted(taken))"
    script = assert_same(notebook, tmp_path, taken, "%flax_apply normed(x)")
    assert "\nnormed_variables = {**normed_variables, **{'params': params}}\n" in script
    assert "\nnormed_variables = {**variables, 'params': params}\n" in script
    assert "\ntaken = normed_variables\nprint(sorted(taken))\n" in script


def test_an_nnx_module_is_updated(notebook, tmp_path):
    double = "state = %flax_vars net\n%flax_vars net = jax.tree.map(lambda leaf: leaf * 2, state)"
    script = assert_same(notebook, tmp_path, NNX, double, "%flax_apply net(x)")
    assert (
        "\nstate = nnx.state(nnx.clone(net))\nnnx.update(net, jax.tree.map(lambda leaf: leaf * 2, state))\n" in script
    )


def test_runs_after_variables_that_no_line_gives_are_left_out(notebook):
    notebook(NORMED)
    notebook("variables = %flax_init normed(x)")
    notebook("import flax_magics\n%flax_vars normed = flax_magics.session().variables('normed')")
    notebook("y = %flax_apply normed(x)")
    script = exported(notebook)
    assert "# Left out: its variables were set by a line that is left out.\n# y = %flax_apply normed(x)\n" in script


PREVIOUS = "%flax_vars {0} = flax_magics.session().models['{0}'].previous"
RUN = "%flax_apply {}(x)"


def test_weights_that_an_init_replaced_come_back(notebook, tmp_path):
    cells = ("variables = %flax_init normed(x)", TRAINED + "%flax_vars normed = {**variables, 'params': params}")
    cells = (NORMED, *cells, RUN.format("normed"), "%flax_init normed(x)", RUN.format("normed"))
    script = assert_same(notebook, tmp_path, *cells, PREVIOUS.format("normed"), RUN.format("normed"))
    assert script.count("previous_normed_variables") == 2
    assert "\nprevious_normed_variables = normed_variables\n" in script
    assert "\nnormed_variables = previous_normed_variables\n" in script


def test_weights_that_an_edit_dropped_come_back_once_it_is_undone(notebook, tmp_path):
    wider, narrow = NORMED.replace("Dense(3)", "Dense(5)"), NORMED
    cells = ("variables = %flax_init normed(x)", TRAINED + "%flax_vars normed = {**variables, 'params': params}")
    cells = (NORMED, *cells, wider, "%flax_apply --train normed(x)", narrow)
    script = assert_same(notebook, tmp_path, *cells, PREVIOUS.format("normed"), RUN.format("normed"))
    assert script.count("previous_normed_variables") == 2


def test_weights_of_an_nnx_module_come_back(notebook, tmp_path):
    double = "state = %flax_vars net\n%flax_vars net = jax.tree.map(lambda leaf: leaf * 2, state)"
    cells = (NNX, double, "%flax_init net(x)", RUN.format("net"), PREVIOUS.format("net"))
    script = assert_same(notebook, tmp_path, *cells, RUN.format("net"))
    assert "\nprevious_net = jax.tree.map(lambda leaf: leaf, nnx.state(net))\n" in script
    assert "\nnnx.update(net, previous_net)\n" in script


def test_weights_from_before_a_training_that_diverged_are_not_taken_for_an_inits(notebook):
    notebook(NORMED)
    notebook("variables = %flax_init normed(x)")
    notebook("%flax_vars normed = {**variables, 'params': variables['params']}")
    notebook("%flax_init -q normed(x)")
    notebook("import optax\ndef loss(net, x): return (net(x) ** 2).mean()")
    error = notebook.fails("%flax_train --optimizer optax.sgd(1e6) --steps 99 loss(normed, x)")
    assert error.endswith(PREVIOUS.format("normed"))
    notebook(PREVIOUS.format("normed"))
    said = "a training of `normed` that was not finite may have replaced them, too"
    assert said in " ".join(exported(notebook).replace("#", " ").split())


def test_weights_that_no_line_had_given_do_not_come_back(notebook):
    notebook(NORMED)
    notebook("variables = %flax_init normed(x)")
    notebook("import flax_magics\n%flax_vars normed = flax_magics.session().variables('normed')")
    notebook("%flax_init normed(x)\n" + PREVIOUS.format("normed"))
    script = exported(notebook)
    reason = "# Left out: its variables were set by a line that is left out.\n"
    assert f"{reason}# {PREVIOUS.format('normed')}\n" in script


def test_a_mode_that_nothing_set(notebook, tmp_path):
    model = NORMED.replace(", train=False", "").replace("not train", "True")
    assert "Left out" not in assert_same(notebook, tmp_path, model, "y = %flax_apply --train normed(x)")


@pytest.mark.usefixtures("digests_taken")
def test_variables_that_a_name_holds_are_not_those_that_later_runs_write(notebook, tmp_path):
    notebook("from flax import nnx")
    notebook(NNX_NET)
    for cell in (
        "kept = %flax_vars net",
        "y = %flax_apply --train net(x[0])",
        "made = %flax_init net(x[0])",
        "y = %flax_apply --train net(x[0])",
        "%flax_vars net = kept",
        "y = %flax_apply net(x[0])",
        "%flax_vars net = made",
    ):
        notebook(cell)
    assert_same(notebook, tmp_path, "y = %flax_apply net(x[0])")
