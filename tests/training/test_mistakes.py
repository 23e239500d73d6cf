"""Mistakes in a loss that Flax's own error, or zeros, would leave to be found: one message each, by its exact text."""

from __future__ import annotations

import pytest

NET = """%%flaxmodel net = Net()
class Net(nn.Module):
  @nn.compact
  def __call__(self, x{}):
    x = nn.BatchNorm(use_running_average={})(nn.Dense(2)(x))
    return nn.Dropout(0.5, deterministic={})(x)
"""
PLAIN = NET.format("", "True", "True")
SWITCHED = NET.format(", train", "not train", "not train")
DATA = "import optax\ny = jnp.ones((3, 4, 2))\nbatch = {'x': x}"
AS_IT_IS = "in a loss the model is the first argument, and is called as it is, without `apply` and variables"
LOSS = "def loss({}):\n  {}\n"


@pytest.fixture
def told(notebook):
    """Runs a net's cell and a loss, and gives what a command on it says after `FlaxMagicsError: `."""

    def told(net: str, loss: str, line: str = "%flax_grad loss(net, batch)") -> str:
        notebook(net)
        notebook(DATA)
        notebook(loss)
        state = notebook.session._state
        said = notebook.fails(line)
        assert notebook.session._state is state
        return said.partition("FlaxMagicsError: ")[2].rstrip()

    return told


@pytest.mark.parametrize(
    ("parameters", "body", "call", "edit"),
    [
        ("params, batch", "return net.apply({'params': params}, batch['x']).mean()",
         "net.apply({'params': params}, batch['x'])",
         "def loss(net, batch):\n                  … net(batch['x'])"),
        ("variables, batch", "y, _ = net.apply(variables, batch['x'], mutable=['batch_stats'])",
         "net.apply(variables, batch['x'], mutable=['batch_stats'])",
         "def loss(net, batch):\n                  … net(batch['x'])"),
        ("model, batch", "return net(batch['x']).mean()", "net(batch['x'])", "model(batch['x'])"),
        ("model, batch", "return model.apply({}, batch['x'], method='encode').mean()",
         "model.apply({}, batch['x'], method='encode')", "model.encode(batch['x'])"),
    ],
)  # fmt: skip
def test_a_call_in_flaxs_own_words(told, parameters, body, call, edit):
    alone = ", and gives the output alone" if "mutable" in call else ""
    assert (
        told(PLAIN, LOSS.format(parameters, body))
        == f"`loss` calls `{call}`: {AS_IT_IS}{alone}.\n  in your loss: {edit}"
    )


def test_a_loss_that_is_a_method(told):
    loss = (
        "class Losses:\n  def loss(self, params, batch):\n    return net.apply({'params': params}, batch['x']).mean()\n"
    )
    said = told(PLAIN, f"{loss}losses = Losses()", "%flax_grad losses.loss(net, batch)")
    edit = "def loss(self, net, batch):\n                  … net(batch['x'])"
    call = "net.apply({'params': params}, batch['x'])"
    assert said == f"`losses.loss` calls `{call}`: {AS_IT_IS}.\n  in your loss: {edit}"


def test_a_module_from_outside_that_has_a_setup(told):
    net = "%%flaxmodel net = Net()\nclass Net(nn.Module):\n  def setup(self):\n    self.dense = nn.Dense(2)\n"
    net += "  def __call__(self, x):\n    return self.dense(x)\n"
    said = told(net, LOSS.format("model, batch", "return net(batch['x']).mean()"))
    assert said == f"`loss` calls `net(batch['x'])`: {AS_IT_IS}.\n  in your loss: model(batch['x'])"


def test_an_error_of_the_model_or_of_a_teacher_stays_what_it_is(notebook):
    notebook(PLAIN)
    notebook(f"{DATA}\nvariables = %flax_init net(x)")
    notebook("def loss(model, batch):\n  return net.apply(variables, batch['x'][0, :, :2]).mean()")
    assert "ScopeParamShapeError" in notebook.fails("%flax_grad loss(net, batch)")
    notebook("def loss(model, batch):\n  return model(batch['y']).mean()")
    assert "KeyError" in notebook.fails("%flax_grad loss(net, batch)")


@pytest.mark.parametrize("command", ["%flax_grad", "%flax_train --optimizer optax.sgd(0.1) --steps 2"])
def test_a_switch_that_the_call_needs(told, command):
    said = told(SWITCHED, LOSS.format("model, batch", "return model(batch['x']).mean()"), f"{command} loss(net, batch)")
    assert said == (
        "`loss` calls `model(batch['x'])` without `train`, which it needs: a parameter of the loss with that name is given"
        " it.\n  in your loss: def loss(model, batch, train):\n                  … model(batch['x'], train=train)"
    )


def test_arrays_that_are_not_cut_into_batches(told):
    line = "%flax_train --optimizer optax.sgd(0.1) --batch 2 --steps 2"
    loss = LOSS.format("net, x, y, scale, *, power=1", "return scale * ((net(x) - y) ** power).mean()")
    assert told(PLAIN, loss, f"{line} loss(net, x, y + 1, 2.0, power=2)") == (
        "`loss` is given 2 rows of `x`, and all 3 of `y + 1`: only the first argument after the net is cut into batches.\n"
        "  form: def loss(net, batch, scale, power):\n          x, y = batch\n          …\n"
        f"        {line} loss(net, (x, y + 1), 2.0, power=2)"
    )


def test_a_loss_that_never_calls_the_net(notebook):
    notebook(PLAIN)
    notebook(f"{DATA}\nother = net\nvariables = %flax_init net(x)")
    notebook(LOSS.format("net, batch", "return other.apply(variables, batch['x']).mean()"))
    text = f"`loss` calls `other.apply(variables, batch['x'])`: {AS_IT_IS}"
    for line in ("%flax_grad -q -o run", "%flax_train -q -o run --optimizer optax.sgd(0.1) --steps 2"):
        notebook(f"{line} loss(net, batch);")
        [note] = notebook["run"].notes
        assert (note.kind, note.text, note.advice) == ("gradient", text, [("in your loss: ", "net(batch['x'])")])


def test_a_loss_that_leaves_what_the_net_gives_calls_it_all_the_same(notebook):
    notebook(PLAIN)
    notebook(f"{DATA}\nimport jax.numpy as jnp")
    notebook(LOSS.format("net, batch", "net(batch['x'])\n  return jnp.float32(3)"))
    notebook("%flax_train -q -o run --optimizer optax.sgd(0.1) --steps 2 loss(net, batch);")
    notes = [note.text for note in notebook["run"].notes if note.kind == "gradient"]
    assert notes == [f"{layer} has no gradient: the loss does not depend on it" for layer in ("BatchNorm_0", "Dense_0")]


def test_an_error_of_the_loss_shows_its_line(notebook):
    notebook(PLAIN)
    notebook(DATA)
    notebook(LOSS.format("net, batch", "y = net(batch['x'])\n  return y.total.mean()"))
    for line in ("%flax_grad", "%flax_train --optimizer optax.sgd(0.1) --steps 2"):
        said = notebook.fails(f"{line} loss(net, batch)")
        assert [row.split() for row in said.splitlines() if row.startswith("-") and "> " in row] == [
            ["---->", "3", "return", "y.total.mean()"]
        ]
        assert "in loss(net, batch)" in said


def test_an_nnx_module_whose_mode_the_loss_sets(notebook):
    notebook(
        "%%flaxmodel net = Net()\nfrom flax import nnx\nclass Net(nnx.Module):\n  def __init__(self, rngs):\n"
        "    self.linear = nnx.Linear(4, 2, rngs=rngs)\n    self.drop = nnx.Dropout(0.5, rngs=rngs)\n"
        "  def __call__(self, x):\n    return self.drop(self.linear(x))"
    )
    notebook(DATA)
    notebook(LOSS.format("net, batch", "net.eval()\n  return net(batch['x']).mean()"))
    train = "%flax_train --optimizer optax.sgd(0.1) --steps 2 loss(net, batch)"
    assert notebook.fails(train).endswith(
        "FlaxMagicsError: the loss sets `drop.deterministic` of the net, and a step keeps no other attributes.\n"
        "  the command sets the mode of the net: leave `.eval()` and `.train()` out of the loss"
    )
    notebook("%flax_grad -q -o run loss(net, batch);")
    assert [note.text for note in notebook["run"].notes] == [
        "`loss` sets `drop.deterministic` of the net, and so does the command: leave out `.eval()` and `.train()`"
    ]
    notebook(LOSS.format("net, batch", "net.seen = True\n  return net(batch['x']).mean()"))
    assert notebook.fails(train).endswith(
        "FlaxMagicsError: the loss sets `seen` of the net, and a step keeps no other attributes."
    )


def test_what_a_stop_gradient_keeps_from_the_loss(notebook):
    notebook(
        "%%flaxmodel net = Net()\nclass Net(nn.Module):\n  @nn.compact\n  def __call__(self, x):\n"
        "    x = jax.lax.stop_gradient(nn.Dense(3, name='backbone')(x))\n    return nn.Dense(2)(x)"
    )
    notebook(f"{DATA}\nlabels = jnp.zeros((3, 4), int)")
    # The cross entropy of optax has a stop_gradient of its own.
    notebook(LOSS.format("net, x", "return optax.softmax_cross_entropy_with_integer_labels(net(x), labels).mean()"))
    text = "backbone has no gradient: `jax.lax.stop_gradient` keeps it from the loss"
    notebook("%flax_grad -q -o run loss(net, x);")
    line = ", line 5: x = jax.lax.stop_gradient(nn.Dense(3, name='backbone')(x))"
    assert [note.text for note in notebook["run"].notes] == [text + line]
    notebook("%flax_train -q -o run --optimizer optax.sgd(0.1) --steps 2 loss(net, x);")
    assert [note.text for note in notebook["run"].notes] == [text]
