"""Modules of the namespace that nobody has registered: their first run does, and says so in a word."""

from __future__ import annotations

from typing import Any

import pytest

CLASS = """class Net(nn.Module):
  features: int = 2
  @nn.compact
  def __call__(self, x):
    return nn.Dense(self.features)(x)
"""
NNX_CLASS = """from flax import nnx
class Own(nnx.Module):
  def __init__(self, features=2, *, rngs):
    self.features = features
    self.linear = nnx.Linear(4, features, rngs=rngs)
  def __call__(self, x):
    return self.linear(x)
"""


@pytest.mark.parametrize(
    ("cell", "first"),
    [
        (f"{CLASS}net = Net(3)", "new session, seed 0 · net registered: Net(features=3)"),
        (
            "net = nn.Sequential([nn.Dense(512, use_bias=False), nn.relu, nn.Dense(2)])",
            "new session, seed 0 · net registered: Sequential(layers=[Dense(…), relu, Dense(…)])",
        ),
        (f"{NNX_CLASS}net = Own(3, rngs=nnx.Rngs(0))", "new session, seed 0 · net registered: Own(features=3)"),
    ],
)
def test_the_first_run_registers_and_says_so_once(notebook: Any, cell: str, first: str) -> None:
    notebook(cell)
    shown = [notebook("%flax_apply net(x);"), notebook("%flax_apply net(x);"), notebook("%flax_apply net(x[:1]);")]
    assert shown[0].splitlines()[0] == first
    assert not any("registered" in text for text in shown[1:])
    assert notebook.session.models["net"].module is notebook["net"]


def test_in_a_session_that_has_run_it_is_a_line_of_its_own(notebook: Any) -> None:
    notebook(f"{CLASS}one, two = Net(), Net(3)\n%flax_apply -q one(x);")
    assert notebook("%flax_init two(x);").splitlines()[:2] == [
        "two registered: Net(features=3)",
        "two · init · cpu:0 · draw 2 of seed 0",
    ]


def test_where_the_run_fails_nothing_is_registered(notebook: Any) -> None:
    notebook(f"{CLASS}net = Net()")
    notebook.fails("%flax_apply net(x, 3)")
    notebook.fails("%flax_apply net('text')")
    notebook.fails("%flax_init net()")
    assert dict(notebook.session.models) == {}
    assert notebook.session.draws == 0


def test_a_summary_registers_nothing(notebook: Any) -> None:
    notebook(f"{CLASS}net = Net()")
    assert "total  params 10, 40 B" in notebook("%flax_summary net(x)")
    assert dict(notebook.session.models) == {}


def test_names_of_a_function_too(notebook: Any) -> None:
    notebook(f"{CLASS}def run(inner):\n  y = %flax_apply -q inner(x)\n  return y\ny = run(Net())")
    assert list(notebook.session.models) == ["inner"]
    assert notebook["y"].shape == (3, 4, 2)


def test_in_a_traced_function_the_message_is_the_one_of_any_model(notebook: Any) -> None:
    notebook(f"{CLASS}net = Net()")
    told = notebook.fails("@jax.jit\ndef f(x):\n  y = %flax_init net(x)\n  return y\nf(x)").splitlines()
    assert told[0].startswith("FlaxMagicsError: %flax_init net(x) stands in a function that JAX traces")
    assert told[1:] == ["  write: params_key = %flax_key params", "         variables = net.init(params_key, x)"]
    assert dict(notebook.session.models) == {}


def test_an_export_is_as_if_it_had_been_registered(notebook: Any) -> None:
    notebook(f"{CLASS}net = Net(3)")
    notebook("%flax_apply -o run net(x);")
    script = notebook("import flax_magics\nprint(flax_magics.session().export().text)")
    names: dict[str, Any] = {}
    exec(script, names)
    assert f"net(x)  {notebook['run'].digest}" in notebook._capsys.readouterr().out


def test_variables_of_a_file_that_wait_for_it(notebook: Any, tmp_path: Any) -> None:
    file = tmp_path / "a"
    notebook(f"{CLASS}net = Net()\n%flax_apply -q -o run net(x);\n%flax_save -q {file}")
    fresh = "from flax_magics import _session\n_session._current = None"
    notebook(f"{fresh}\n%flax_load -q {file}\nnet = Net()")
    out = notebook("%flax_apply -o again net(x);")
    assert "net has its variables from" in out
    assert (notebook["again"].output == notebook["run"].output).all()


def test_an_nnx_module_for_which_variables_wait_is_registered_by_a_line(notebook: Any, tmp_path: Any) -> None:
    file = tmp_path / "a"
    notebook(f"{NNX_CLASS}net = Own(rngs=nnx.Rngs(0))\n%flax_apply -q -o run net(x);\n%flax_save -q {file}")
    fresh = "from flax_magics import _session\n_session._current = None"
    notebook(f"{fresh}\n%flax_load -q {file}\nnet = Own(rngs=nnx.Rngs(1))")
    assert notebook.fails("%flax_apply net(x)") == (
        f"FlaxMagicsError: `net` is not registered yet, and its variables from `{file}` wait for that.\n"
        "  write: %flaxmodel net"
    )
    notebook("%flaxmodel -q net\n%flax_apply -q -o again net(x);")
    assert (notebook["again"].output == notebook["run"].output).all()


@pytest.mark.parametrize(
    ("cell", "instance"), [(CLASS, "Net(3)"), (NNX_CLASS, "Own(3, rngs=nnx.Rngs(0))")], ids=["linen", "nnx"]
)
def test_a_class_alone_gives_way_to_the_instance_that_is_used(notebook: Any, cell: str, instance: str) -> None:
    notebook(f"%%flaxmodel\n{cell}")
    name = instance.partition("(")[0]
    assert list(notebook.session.models) == [name]
    notebook(f"net = {instance}\n%flax_apply -q net(x);")
    assert list(notebook.session.models) == ["net"]
    notebook(f"%%flaxmodel\n{cell.replace('= 2', '= 5')}")  # the cell again, and then the instance's
    notebook(f"net = {instance}\n%flax_apply -q net(x);")
    assert list(notebook.session.models) == ["net"]


def test_a_class_that_was_run_under_its_name_stays(notebook: Any) -> None:
    notebook(f"%%flaxmodel\n{CLASS}")
    notebook("%flax_apply -q Net(x);\nnet = Net(3)\n%flax_apply -q net(x);")
    assert list(notebook.session.models) == ["Net", "net"]


@pytest.mark.parametrize("line", ["%flax_apply Net(x)", "%flax_init Net(x)", "%flax_summary Net(x)"])
def test_a_class_is_no_model(notebook: Any, line: str) -> None:
    notebook(CLASS)
    assert notebook.fails(line) == (
        "FlaxMagicsError: `Net` is a class, and a model is an instance of it.\n  write: %flaxmodel net = Net()"
    )
    assert dict(notebook.session.models) == {}
