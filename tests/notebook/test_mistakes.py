"""Every mistake: one short message that says what to write, and a session as it was before."""

from __future__ import annotations

import gc
import re
import weakref

import pytest

from flax_magics.base.digest import data_of

from .conftest import net

LIBRARY = ("site-packages", "/flax_magics/", "<flax_magics", "/jax/", "/flax/")


def state(notebook):
    session = notebook.session
    models = {name: (id(m.module), id(m.variables)) for name, m in session.models.items()}
    return data_of(session.root_key), session.draws, len(session), models


@pytest.mark.parametrize(
    "cell", ["%flax_apply --keys-of frst my_model(x)", "%flax_apply mymodel(x)", "%flaxmodel mymodel"]
)
def test_what_is_kept_of_an_error_holds_no_array_of_the_notebook(sharp_bits, cell):
    sharp_bits("y = %flax_apply -q my_model(x)")
    output = weakref.ref(sharp_bits["y"])
    sharp_bits.fails(cell)
    sharp_bits("y = None")
    gc.collect()
    assert output() is None


def test_nothing_registered_yet(notebook):
    notebook("net = nn.Dense(3)")
    assert notebook.fails("%flax_vars net") == (
        "FlaxMagicsError: `net` is not registered yet.\n  write: %flaxmodel net"
    )
    assert notebook.fails("%flax_apply model(x)") == (
        "FlaxMagicsError: no model is called `model`; no model is registered yet.\n  form: %flaxmodel model = …"
    )


@pytest.mark.parametrize(
    ("mistake", "write"),
    [
        ("%flax_apply Net(8)(x)", "%flaxmodel net2 = Net(8)\n         %flax_apply net2(x)"),
        ("%%flax_apply\nNet(8)(x)", "%flaxmodel net2 = Net(8)\n         %flax_apply net2(x)"),
        ("%flax_apply Net(x)", "%flaxmodel net2 = Net(width=…)"),
        ("%flaxmodel Net", "%flaxmodel net2 = Net(width=…)"),
        ("%flaxmodel Net(8)", "%flaxmodel net2 = Net(8)"),
        ("%flax_apply jnp.sum(net(x))", "y2 = %flax_apply net(x)\n         jnp.sum(y2)"),
    ],
)
def test_advice_leaves_the_names_of_models_and_data_alone(notebook, mistake, write):
    notebook(
        "%%flaxmodel net = Net(2)\nclass Net(nn.Module):\n  width: int\n  @nn.compact\n  def __call__(self, x):\n"
        "    return nn.Dense(self.width)(x)"
    )
    notebook("y = %flax_apply -q net(x)\ndel net")  # the model is registered, under a name that is free in Python
    assert notebook.fails(mistake).endswith(f": {write}")


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("%flax_train --optimizer adam --steps 2 loss(my_model, x)",
         "`adam` is not defined here, and optax has one.\n"
         "  write: import optax\n         %flax_train --optimizer optax.adam(1e-3) --steps 2 loss(my_model, x)"),
        ("%%flax_train --optimizer sgd(0.1) --steps 2\nloss(my_model, x)",
         "`sgd` is not defined here, and optax has one.\n"
         "  form: %%flax_train --optimizer optax.sgd(0.1) --steps 2\n        …"),
        ("%flax_train --optimizer adamm --steps 2 loss(my_model, x)",
         "name 'adamm' is not defined.\n  adamm\n  ^\n  no cell that was run has made it"),
        ("%flax_train --lr 1e-3 --steps 2 loss(my_model, x)",
         "%flax_train has no option --lr: the rate is the optimizer's, as in --optimizer optax.adam(1e-3).\n"
         "  write: %flax_train --optimizer optax.adam(1e-3) --steps 2 loss(my_model, x)"),
        ("%flax_train --optimizer optax.sgd(0.1) --learning_rate=0.1 --steps 2 loss(my_model, x)",
         "%flax_train has no option --learning_rate: the rate is the optimizer's, as in --optimizer optax.adam(0.1)."),
        ("%flax_export --file x.py", "%flax_export takes the file's name alone.\n  write: %flax_export x.py"),
        ("%flax_save --output=a", "%flax_save takes the file's name alone.\n  write: %flax_save a"),
        ("%flax_history 3",
         "%flax_history takes the name of a model, and the last runs by an option.\n  write: %flax_history --last 3"),
        ("%flax_mesh of", "`of` is no axis: did you mean off?\n  write: %flax_mesh off"),
        ("%flax_mesh data=3",
         "data=3 takes 3 devices, and there is 1 device (cpu:0).\n  write: %flax_mesh data=-1"),
        ("%flax_init x",
         "`x` is an array (float32[3,4,4]), and %flax_init takes the call of a model.\n  write: %flax_init my_model(x)"),
        ("%flax_grad x",
         "`x` is an array (float32[3,4,4]), and %flax_grad takes the call of a loss.\n  form: %flax_grad …(my_model, x)"),
        ("%flax_apply --train notyet(x)",
         "no model is called `notyet`; registered: my_model.\n  write: %flax_apply --train my_model(x)"),
    ],
)  # fmt: skip
def test_what_is_written_for_another_command_or_library(sharp_bits, mistake, message):
    sharp_bits("def loss(net, x):\n  return net(x).sum()")
    before = state(sharp_bits)
    assert sharp_bits.fails(mistake) == f"FlaxMagicsError: {message}"
    assert state(sharp_bits) == before


def test_wrong_shapes_show_the_users_frames_and_flax_own_message(sharp_bits):
    sharp_bits("%flax_apply my_model(x);")
    before = state(sharp_bits)
    out = sharp_bits.fails("%flax_apply my_model(x[..., :2])")
    assert "x = nn.Dense(self.num_neurons)(x)" in out
    assert 'For parameter "kernel" in "/Dense_0", the given initializer is expected to generate shape (2, 3)' in out
    assert not any(place in out for place in LIBRARY)
    assert state(sharp_bits) == before


def test_an_error_in_init_shows_the_users_frames(notebook):
    notebook(net("nn.Dense(2)(x) @ x"))
    out = notebook.fails("%flax_init Net(x)")
    assert "return nn.Dense(2)(x) @ x" in out
    assert re.search(r"> 5 +return nn.Dense\(2\)\(x\) @ x", out)
    assert not any(place in out for place in LIBRARY)
    assert notebook.session.draws == 0


def test_a_tracer_error_ends_with_the_hint(notebook):
    notebook(
        "%%flaxmodel\nclass Net(nn.Module):\n  @nn.compact\n  def __call__(self, x):\n    if x.sum() > 0:\n      return x\n"
        "    return -x\n"
    )
    out = notebook.fails("%flax_apply Net(x)")
    assert "if x.sum() > 0:" in out
    assert out.splitlines()[-2:] == [
        "the model looks at a value while it is traced; op by op it can",
        "write: %flax_apply --eager Net(x)",
    ]
    assert not any(place in out for place in LIBRARY if place != "<flax_magics")
    notebook("%flax_apply --eager Net(x);")


def test_out_of_memory_says_what_was_needed_and_what_to_try(notebook):
    notebook(
        "%%flaxmodel\nclass Net(nn.Module):\n  big: bool = False\n  @nn.compact\n  def __call__(self, x):\n"
        "    x = nn.Dense(2)(x)\n    return jnp.broadcast_to(x[0, 0, 0], (1 << 45,)) if self.big else x\n"
    )
    notebook("%flax_init Net(x);")
    notebook("Net = Net(big=True)")
    before = state(notebook)
    out = notebook.fails("%flax_apply Net(x)")
    first, *rest = out.splitlines()
    assert first == "FlaxMagicsError: out of memory on cpu:0 in Net(x)"
    assert any(line.startswith("  needed: arguments") and "outputs 141 TB" in line for line in rest)
    assert "  could not allocate 141 TB in one piece" in rest
    assert any(line.startswith("  free on cpu:0: ") for line in rest)
    tries = "  try: a smaller batch; bfloat16; nn.remat on the blocks; del what holds large arrays, and `Out`"
    assert rest[rest.index(tries) + 1].startswith("out of memory, so %flax_free ran")
    assert state(notebook) == before


def test_the_users_own_errors_pass_with_their_frames(sharp_bits):
    sharp_bits("def broken():\n  raise KeyError('mine')")
    out = sharp_bits.fails("%flax_apply my_model(broken())")
    assert "KeyError: 'mine'" in out
    assert "raise KeyError('mine')" in out
    assert not any(place in out for place in LIBRARY)


@pytest.mark.own_executables  # one that is there already cannot be interrupted
def test_an_interrupt_is_one_line_and_changes_nothing(sharp_bits):
    from unittest import mock

    sharp_bits("%flax_init my_model(x);")
    before = state(sharp_bits)
    with mock.patch("concurrent.futures.wait", side_effect=KeyboardInterrupt):
        out = sharp_bits.fails("%flax_apply my_model(x)")
    assert out == "KeyboardInterrupt: stopped while compiling my_model; the session is as it was before"
    assert state(sharp_bits) == before
