"""`%%flaxmodel` and `%flaxmodel`: a real cell, what it registers, and what an edit changes."""

from __future__ import annotations

import inspect

import pytest
from by_hand import bits
from sharp_bits import CLASS, MODEL

from .conftest import net


def names(notebook) -> list[str]:
    return [] if notebook.session is None else list(notebook.session.models)


def test_the_cells_own_instances_are_registered_under_their_names(notebook):
    assert notebook(MODEL) == "my_model · MyModel(num_neurons=3, training=False) · registered"
    assert notebook.session.models["my_model"].module is notebook["my_model"]
    notebook(f"%%flaxmodel\n{CLASS}a = MyModel(1, False)\n_hidden = MyModel(9, False)\nb = MyModel(2, True)")
    assert names(notebook) == ["my_model", "a", "b"]


def test_the_assignment_on_the_line_is_made_after_the_cell(notebook):
    assert notebook(f"%%flaxmodel net = MyModel(4, training=True)\n{CLASS}") == (
        "net · MyModel(num_neurons=4, training=True) · registered"
    )
    assert notebook["net"].num_neurons == 4


def test_with_neither_the_last_class_is_registered_if_it_can_be_built_from_defaults(notebook):
    notebook(f"%%flaxmodel\n{CLASS}\nclass Net(nn.Module):\n  width: int = 3\n  def __call__(self, x):\n    return x\n")
    assert names(notebook) == ["Net"]
    assert notebook("%flax_apply -q Net(x);") == ""


def test_a_line_registers_what_is_there(notebook):
    notebook(CLASS)
    assert notebook("%flaxmodel net = MyModel(3, training=False)") == (
        "net · MyModel(num_neurons=3, training=False) · registered"
    )
    notebook("other = MyModel(5, True)")
    assert notebook("%flaxmodel other").startswith("other · MyModel(num_neurons=5, training=True)")
    assert notebook.fails("%flaxmodel MyModel") == (
        "FlaxMagicsError: MyModel needs num_neurons and training.\n"
        "  form: %flaxmodel my_model = MyModel(num_neurons=…, training=…)"
    )
    assert notebook.fails("%flaxmodel nett") == (
        "FlaxMagicsError: name 'nett' is not defined.\n  did you mean net?\n  write: %flaxmodel net"
    )
    assert notebook.fails("%flaxmodel net = MyModel") == (
        "FlaxMagicsError: `MyModel` is a class, and a model is an instance of it.\n"
        "  form: %flaxmodel net = MyModel(num_neurons=…, training=…)"
    )


@pytest.mark.filterwarnings("ignore:os.fork")  # JAX warns of the fork that `!command` is
def test_the_body_is_a_real_cell(notebook, tmp_path):
    out = notebook(
        "#@title My model\n\n%%flaxmodel net = MyModel(3, True)\n"
        f"%cd -q {tmp_path}\n!echo from the shell\nprint('printed')\n"
        f"{CLASS}\n'an expression'"
    )
    assert out.splitlines()[:2] == ["from the shell", "printed"]
    assert "'an expression'" in out
    assert out.splitlines()[-1] == "net · MyModel(num_neurons=3, training=True) · registered"
    source = inspect.getsource(inspect.unwrap(notebook["MyModel"].__call__))
    assert source == (
        "  @nn.compact\n  def __call__(self, x):\n    x = nn.Dense(self.num_neurons)(x)\n"
        "    return nn.Dropout(rate=0.5, deterministic=not self.training)(x)\n"
    )


def test_a_failing_body_fails_the_cell_at_its_line_and_registers_nothing(notebook):
    out = notebook.fails(f"%%flaxmodel\n{CLASS}\nmy_model = MyModel(3, False)\n1 / 0\n")
    assert "ZeroDivisionError: division by zero" in out
    assert "> 12 1 / 0" in out
    assert "flax_magics" not in out
    assert names(notebook) == []


def test_several_models_are_registered_all_or_none(notebook):
    notebook.fails(f"%%flaxmodel\n{CLASS}\na = MyModel(1, True)\nb = MyModel(1, True).bind({{}})\n")
    assert names(notebook) == []


def test_an_unchanged_cell_keeps_model_variables_and_programs(sharp_bits):
    sharp_bits("y = %flax_apply --train my_model(x)")
    model, cls = sharp_bits["my_model"], sharp_bits["MyModel"]
    variables = sharp_bits.session.models["my_model"].variables
    edited = MODEL.replace("    x = nn.Dense", "    # a comment\n\n    x  =  nn.Dense")
    assert sharp_bits(edited) == "my_model unchanged · variables and programs kept"
    assert sharp_bits["my_model"] is model
    assert sharp_bits["MyModel"] is cls
    assert sharp_bits.session.models["my_model"].variables is variables
    assert "reused" in sharp_bits("%flax_apply --train my_model(x);")


def test_a_changed_constant_elsewhere_is_a_change(notebook):
    notebook("WIDTH = 3")
    cell = net("nn.Dense(WIDTH)(x)")
    notebook(cell)
    notebook("%flax_apply Net(x);")
    notebook("WIDTH = 5")
    assert notebook(cell) == (
        "Net changed: Dense_0/bias [3]→[5], Dense_0/kernel [4,3]→[4,5] ·\n    variables dropped · next run initialises"
    )
    assert notebook("y = %flax_apply Net(x)").splitlines()[1] == "  out   float32[3,4,5]"


def test_an_edit_that_fits_keeps_the_variables_and_says_so_until_the_next_init(sharp_bits):
    sharp_bits("y = %flax_apply my_model(x)")
    edited = MODEL.replace("nn.Dense(self", "nn.Dense(features=self").replace(
        "num_neurons)(x)", "num_neurons, kernel_init=nn.initializers.ones)(x)"
    )
    variables = sharp_bits.session.models["my_model"].variables
    assert sharp_bits(edited) == "my_model changed · variables kept"
    assert sharp_bits.session.models["my_model"].variables is variables
    for _ in range(2):
        assert sharp_bits("%flax_apply my_model(x);").splitlines()[-1] == (
            "! variables from before the edit: %flax_init for new ones"
        )
    sharp_bits("%flax_init my_model(x);")
    assert sharp_bits.session.models["my_model"].variables["params"]["Dense_0"]["kernel"].min() == 1
    assert "before the edit" not in sharp_bits("%flax_apply my_model(x);")


def test_an_edit_of_the_forward_pass_alone_keeps_the_variables_without_a_word(sharp_bits):
    sharp_bits("y = %flax_apply my_model(x)")
    assert sharp_bits(MODEL.replace("return nn", "return -nn")) == "my_model changed · variables kept"
    out = sharp_bits("z = %flax_apply my_model(x)")
    assert ": MyModel.__call__ was edited\n" in out
    assert "before the edit" not in out
    assert bits(-sharp_bits["z"]) == bits(sharp_bits["y"])


def test_a_name_that_stands_for_another_module_now_is_run_as_it_stands(sharp_bits):
    sharp_bits("y = %flax_apply my_model(x)")
    sharp_bits("my_model = MyModel(num_neurons=7, training=False)")
    out = sharp_bits("y = %flax_apply my_model(x)")
    assert sharp_bits["y"].shape == (3, 4, 7)
    assert out.splitlines()[-2:] == [
        "! my_model is another module now, MyModel(num_neurons=7, training=False):",
        "  registered, variables dropped",
    ]


TRAINED = """\
import optax
def loss(net, x):
  return net(x).sum()
%flax_train -q --optimizer optax.sgd(0.1) --steps 3 loss(my_model, x);"""
DROPPED = "this edit dropped weights of my_model: trained, 3 steps"
BACK = "%flax_vars my_model = flax_magics.session().models['my_model'].previous"


def test_trained_weights_that_an_edit_drops_come_back_once_it_is_undone(sharp_bits):
    sharp_bits(TRAINED)
    kernel = sharp_bits.session.models["my_model"].variables["params"]["Dense_0"]["kernel"]
    undone = f"; it takes them again\n  once the edit is undone\n  form: …\n        {BACK}"
    assert sharp_bits(MODEL.replace("self.num_neurons", "5")) == (
        "my_model changed: Dense_0/bias [3]→[5], Dense_0/kernel [4,3]→[4,5] ·\n"
        f"    variables dropped · next run initialises\n! {DROPPED}{undone}"
    )
    sharp_bits("%flax_apply -q --train my_model(x);")  # what an init has made takes the place of none
    assert "replaced" not in sharp_bits(MODEL)
    assert "set in cell [8]" in sharp_bits(BACK)
    assert sharp_bits.session.models["my_model"].variables["params"]["Dense_0"]["kernel"] is kernel
    sharp_bits("my_model = MyModel(num_neurons=7, training=False)")
    assert sharp_bits("%flax_apply -q my_model(x);").endswith(
        f"! {DROPPED.replace('trained, 3 steps', 'set in cell [8]')}{undone}"
    )
    sharp_bits("my_model = MyModel(num_neurons=3, training=False)")
    sharp_bits(BACK)
    assert sharp_bits.session.models["my_model"].variables["params"]["Dense_0"]["kernel"] is kernel


def test_weights_beyond_the_limit_are_said_to_be_gone(sharp_bits):
    sharp_bits(TRAINED)
    sharp_bits("%config FlaxMagics.replay_bytes = 10")
    out = sharp_bits(MODEL.replace("self.num_neurons", "5")).replace("\n  ", " ")
    assert out.endswith(f"! {DROPPED}; they are not kept: 60 B are more than replay_bytes, 10 B")
    sharp_bits("%config FlaxMagics.replay_bytes = 256_000_000")


@pytest.mark.parametrize("before", ["%flax_apply -q my_model(x);", TRAINED], ids=["by the call", "by a loss"])
def test_a_switch_that_the_call_takes_now_drops_no_variables(sharp_bits, before):
    sharp_bits(before)
    variables = sharp_bits.session.models["my_model"].variables
    edited = MODEL.replace("(self, x)", "(self, x, train)").replace("not self.training", "not train")
    assert sharp_bits(edited) == "my_model changed · variables kept"
    sharp_bits("%flax_apply -q --train my_model(x);")
    assert sharp_bits(MODEL) == "my_model changed · variables kept"
    assert sharp_bits.session.models["my_model"].variables is variables


def test_where_it_cannot_be_told_that_they_fit_it_is_said(sharp_bits):
    sharp_bits(TRAINED)
    edited = MODEL.replace("(self, x)", "(self, x, scale)")
    assert sharp_bits(edited) == (
        "my_model changed: whether its variables fit cannot be told, as the last init's\n"
        "    call fails now (TypeError) · variables dropped · next run initialises\n"
        f"! {DROPPED}; it takes them again,\n  if they fit, once it is initialised by a call that it takes\n"
        f"  form: %flax_init my_model(…)\n        {BACK}"
    )
    sharp_bits(f"%flax_init my_model(x, 2.0);\n{BACK}")
    assert "set in cell" in sharp_bits("%flax_apply my_model(x, 2.0);")


def test_an_nnx_module_with_other_initial_values_takes_the_trained_ones_back(notebook):
    cell = "%%flaxmodel\nfrom flax import nnx\nnet = nnx.Linear(4, 2, rngs=nnx.Rngs({}))"
    notebook(cell.format(0))
    notebook(TRAINED.replace("my_model", "net"))
    kernel = notebook["net"].kernel[...]
    line = BACK.replace("my_model", "net")
    text = DROPPED.replace("my_model", "net")
    assert notebook(cell.format(1)).endswith(f"! {text}\n  write: {line}")
    notebook(line)
    assert (notebook["net"].kernel[...] == kernel).all()
    wider = notebook(cell.format(1).replace("4, 2", "4, 3"))
    assert f"! {text.replace('trained, 3 steps', 'set in cell')}" in wider
    assert wider.endswith(f"form: …\n        {line}")


def test_a_name_that_is_no_models_any_more_is_said_once(sharp_bits):
    sharp_bits("%flax_init -q my_model(x);")
    line = "%flax_apply my_model(x);"
    said = "and this run is of the model that is registered under it: a restarted kernel has none"
    back = "import flax_magics\nmy_model = flax_magics.session().models['my_model'].module"
    for unbind, what in (("del my_model", "was deleted"), ("my_model = x", "is an array (float32[3,4,4]) now")):
        sharp_bits(unbind)
        sharp_bits("%flax_apply -o run my_model(x);")
        assert [(note.text, note.advice) for note in sharp_bits["run"].notes if note.kind == "name"] == [
            (f"`my_model` {what}, {said}", [("write: ", back)])
        ]
        assert said[:20] not in sharp_bits(line)
        sharp_bits(back)
        assert said[:20] not in sharp_bits(line)


def test_a_loss_of_a_model_without_a_name_is_answered_with_it(sharp_bits):
    sharp_bits("%flax_init -q my_model(x);\ndef loss(net, x):\n  return net(x).sum()")
    sharp_bits("del my_model")
    back = "import flax_magics\n         my_model = flax_magics.session().models['my_model'].module"
    assert sharp_bits.fails("%flax_grad loss(my_model, x)") == (
        "FlaxMagicsError: `my_model` was deleted, and a loss is called with it: the model is registered still.\n"
        f"  write: {back}\n         %flax_grad loss(my_model, x)"
    )
    sharp_bits("my_model = 3")
    assert "! `my_model` is an int now" in sharp_bits("%flax_grad loss(my_model, x);")


def test_a_mistake_on_the_line_is_told_before_anything_runs(notebook):
    assert notebook.fails("%%flaxmodel net =\nran = True") == (
        "FlaxMagicsError: `net =` needs a value.\n  form: %%flaxmodel net = …"
    )
    assert "ran" not in notebook.shell.user_ns


def test_a_check_draws_and_initialises_nothing(notebook):
    notebook(f"%%flaxmodel --check 'net(x)' net = MyModel(3, training=True)\n{CLASS}")
    assert notebook.session.draws == 0
    assert notebook.session.models["net"].variables is None


def test_a_check_that_fails_registers_nothing(notebook):
    out = notebook.fails(f"%%flaxmodel --check 'net()' net = MyModel(3, training=True)\n{CLASS}")
    assert out == "FlaxMagicsError: net() needs `x`, which the call does not give.\n  it takes: net(x)"
    assert names(notebook) == []


def test_quiet_says_nothing(notebook):
    assert notebook(MODEL.replace("%%flaxmodel", "%%flaxmodel -q")) == ""


def test_a_class_defined_again_without_the_magic_is_run_as_it_stands(notebook):
    notebook(net("nn.Dense(2)(x)"))
    notebook("y = %flax_apply Net(x)")
    notebook(net("nn.Dense(6)(x)").partition("\n")[2])
    assert "Net is another module now" in notebook("y = %flax_apply Net(x)")
    assert notebook["y"].shape == (3, 4, 6)
