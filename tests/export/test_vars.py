"""`%flax_vars` in an export: the variables that a cell took, and those that it gave."""

from __future__ import annotations

from exporting import assert_same, exported

MODEL = """\
%%flaxmodel net = Net()
class Net(nn.Module):
  @nn.compact
  def __call__(self, x, train: bool = False):
    return nn.BatchNorm(use_running_average=not train)(nn.Dense(2)(x))
"""
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
    notebook(MODEL)
    notebook("variables = %flax_init net(x)")
    message = notebook.fails(TRAINED + "%flax_vars net = {'params': params}")
    notebook(message.partition("write: ")[2])
    notebook("%flax_apply net(x)\n%flax_vars net = {**variables, 'params': params}")
    notebook("%flax_apply --train net(x)")
    script = assert_same(notebook, tmp_path, "taken = %flax_vars net\nprint(sorted(taken))", "%flax_apply net(x)")
    assert "\nnet_variables = {**net_variables, **{'params': params}}\n" in script
    assert "\nnet_variables = {**variables, 'params': params}\n" in script
    assert "\ntaken = net_variables\nprint(sorted(taken))\n" in script


def test_an_nnx_module_is_updated(notebook, tmp_path):
    double = "state = %flax_vars net\n%flax_vars net = jax.tree.map(lambda leaf: leaf * 2, state)"
    script = assert_same(notebook, tmp_path, NNX, double, "%flax_apply net(x)")
    assert "\nstate = nnx.state(net)\nnnx.update(net, jax.tree.map(lambda leaf: leaf * 2, state))\n" in script


def test_runs_after_variables_that_no_line_gives_are_left_out(notebook):
    notebook(MODEL)
    notebook("variables = %flax_init net(x)")
    notebook(TRAINED + "%flax_vars net = {**variables, 'params': params}")
    notebook("%flax_init net(x)")
    notebook("%flax_vars net = flax_magics.session().models['net'].previous")
    notebook("y = %flax_apply net(x)")
    script = exported(notebook)
    assert "# Left out: its variables were set by a line that is left out.\n# y = %flax_apply net(x)\n" in script


def test_a_mode_that_nothing_set(notebook, tmp_path):
    model = MODEL.replace(", train: bool = False", "").replace("not train", "True")
    assert "Left out" not in assert_same(notebook, tmp_path, model, "y = %flax_apply --train net(x)")
