"""What goes wrong in a first hour: each is one message, or an error of the user's own with the line to write beneath."""

from __future__ import annotations

import sys
import traceback
from typing import Any

import pytest

from .conftest import net

OBJECTS = """
class Normal:
  def __init__(self, mean):
    self.mean = mean
"""
LINEN_OBJECTS = f"""%%flaxmodel net = Net(){OBJECTS}class Net(nn.Module):
  @nn.compact
  def __call__(self, x):
    return Normal(nn.Dense(2)(x)), "linear"
"""
NNX_OBJECTS = f"""from flax import nnx{OBJECTS}class Net(nnx.Module):
  def __init__(self, rngs):
    self.linear = nnx.Linear(4, 2, rngs=rngs)
  def __call__(self, x):
    return Normal(self.linear(x)), "linear"
net = Net(nnx.Rngs(0))
"""
GONE = "are gone: your code has donated or deleted their arrays.\n"
COPIES = "  a jitted step with donate_argnums takes the arrays that it is given: give it copies of these"
DELETE = "for leaf in jax.tree_util.tree_leaves({}): leaf.delete()"
FLAT = net("nn.Dense(2)(x.reshape(x.shape[0], -1))").replace("%%flaxmodel", "%%flaxmodel net = Net()")
FLAT_OWN = """from flax import nnx
class Net(nnx.Module):
  def __init__(self, rngs):
    self.linear = nnx.Linear(16, 2, rngs=rngs)
  def __call__(self, batch, scale=1.0):
    x = batch['image']
    return self.linear(x.reshape(x.shape[0], -1)) * scale
net = Net(nnx.Rngs(0))
"""


class TestAnOutputThatIsNoTree:
    @pytest.mark.parametrize("cell", [LINEN_OBJECTS, NNX_OBJECTS], ids=["linen", "nnx"])
    def test_only_op_by_op(self, notebook: Any, cell: str) -> None:
        notebook(cell)
        assert notebook.fails("%flax_apply net(x)") == (
            "FlaxMagicsError: net(x) gives `Normal`, which is no tree of arrays: no compiled program can give it,"
            " op by op it can.\n  write: %flax_apply --eager net(x)"
        )
        assert notebook.fails("%flax_apply --samples 3 net(x)").endswith(
            "\n  write: for _ in range(3):\n             %flax_apply --eager net(x)"
        )
        notebook("%flax_apply --eager --repeat 2 -o run net(x);")
        assert (notebook["run"].shape, notebook["run"].output[0].mean.shape) == ("(Normal, 'linear')", (3, 4, 2))
        assert [values.path for values in notebook["run"].values] == ["[0]['Normal']['mean']"]

    @pytest.mark.parametrize("cell", [LINEN_OBJECTS, NNX_OBJECTS], ids=["linen", "nnx"])
    def test_its_numbers_are_what_a_digest_and_a_replay_compare(self, notebook: Any, cell: str) -> None:
        notebook(cell)
        notebook("%flax_apply --eager -o run net(x);")
        assert "identical" in notebook("%flax_replay last")
        notebook("run.output[0].mean = run.output[0].mean + 1")
        assert "[0]['Normal']['mean']" in notebook("%flax_replay last")
        notebook("%flax_apply --eager -o again net(x);\n%flax_apply --eager -o other net(x + 1);")
        assert notebook["run"].digest == notebook["again"].digest != notebook["other"].digest

    def test_a_summary_and_an_export_of_it(self, notebook: Any) -> None:
        notebook(LINEN_OBJECTS)
        assert "FLOPs  forward 216" in notebook("%flax_summary net(x)")
        notebook("%flax_apply --eager -o run net(x);")
        script = notebook("import flax_magics\nprint(flax_magics.session().export().text)")
        names: dict[str, Any] = {}
        exec(script, names)
        assert f"net(x)  {notebook['run'].digest}" in notebook._capsys.readouterr().out


class TestArraysThatAreGone:
    @pytest.mark.parametrize("line", ["%flax_apply net(x)", "%flax_apply --eager net(x)"])
    def test_those_that_a_name_has_others_of(self, notebook: Any, line: str) -> None:
        notebook("net = nn.Dense(2)\nvariables = %flax_init net(x)")
        notebook(f"trained = jax.tree_util.tree_map(jnp.ones_like, variables)\n{DELETE.format('variables')}")
        told = f"FlaxMagicsError: the weights of `net` (initialised in draw 1) {GONE}{COPIES}"
        assert (
            notebook.fails(line) == f"{told}\n  write: {line.replace('apply --eager', 'init').replace('apply', 'init')}"
        )
        notebook("variables = trained")
        for _ in range(2):
            assert notebook.fails(line) == f"{told}\n  write: %flax_vars net = variables"

    def test_those_of_a_module_of_ones_own(self, notebook: Any) -> None:
        notebook("from flax import nnx\nnet = nnx.Linear(4, 2, rngs=nnx.Rngs(0))\n%flax_apply net(x);")
        notebook(DELETE.format("nnx.state(net)"))
        assert notebook.fails("%flax_apply net(x)") == (
            f"FlaxMagicsError: the weights of `net` (held by net) {GONE}{COPIES}\n"
            "  its cell again after `del` makes new ones\n  write: del net"
        )

    @pytest.mark.parametrize(
        ("line", "what"),
        [
            ("%flax_apply --variables variables net(x)", "these variables of `net`"),
            ("%flax_apply net(gone)", "the values of argument 1 of net(gone)"),
            ("%flax_apply --eager net(inputs=gone)", "the values of argument inputs of net(inputs=gone)"),
        ],
    )
    def test_those_that_a_line_gives(self, notebook: Any, line: str, what: str) -> None:
        notebook("net = nn.Dense(2)\nvariables = %flax_init net(x)\ngone = x + 1")
        notebook(f"variables = jax.tree_util.tree_map(jnp.ones_like, variables)\n{DELETE.format('(variables, gone)')}")
        assert notebook.fails(line) == f"FlaxMagicsError: {what} {GONE}{COPIES}"

    def test_what_would_show_or_save_them(self, notebook: Any, tmp_path: Any) -> None:
        notebook(f"net = nn.Dense(2)\nvariables = %flax_init net(x)\n{DELETE.format('variables')}")
        told = (
            f"FlaxMagicsError: the weights of `net` (initialised in draw 1) {GONE}{COPIES}\n  form: %flax_init net(…)"
        )
        assert notebook.fails("%flax_vars net") == told
        assert notebook.fails(f"%flax_save {tmp_path / 'a'}") == told


SCANNED = """%%flaxmodel net = Net()
class Cell(nn.Module):
  @nn.compact
  def __call__(self, carry, x):
    return nn.Dropout(0.5, deterministic=False)({0}), x
class Net(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.scan(Cell, split_rngs={{{1}}}, variable_broadcast='params')()(x[0], x)
"""


class TestAStreamThatATransformHandsOnAlone:
    def test_an_init_falls_back_inside_of_it_too(self, notebook: Any) -> None:
        notebook(SCANNED.format("carry + x", "'dropout': True"))
        notebook("%flax_apply -o run net(x);")
        notebook("key = jax.random.split(jax.random.key(0), 3)[2]\nby_hand = net.apply({}, x, rngs={'dropout': key})")
        assert (notebook["by_hand"][0] == notebook["run"].output[0]).all()
        script = notebook("import flax_magics\nprint(flax_magics.session().export(plain=True).text)")
        assert "net.init({'params': params_key, 'dropout': params_key}, x)" in script
        assert notebook("%flax_init -o run net(x);")
        assert notebook["run"].by_hand == "net.init({'params': params_key, 'dropout': params_key}, x)"

    @pytest.mark.parametrize(
        ("body", "split", "stream"),
        [
            ("nn.Dense(4)(carry + x)", "'dropout': True", "params"),
            ("nn.Dense(4)(carry + x)", "'params': False", "dropout"),
            ("carry + x", "", "dropout"),
        ],
    )
    def test_what_it_keeps_out_is_blamed_on_it(self, notebook: Any, body: str, split: str, stream: str) -> None:
        notebook(SCANNED.format(body, split))
        out = notebook.fails("%flax_apply net(x)")
        assert f'needs PRNG for "{stream}": a lifted transform' in out
        assert out.endswith(f"in your model: split_rngs={{'{stream}': True, …}}")


class TestABatchAxisThatWasForgotten:
    @pytest.mark.parametrize(
        ("call", "write"),
        [
            ("%flax_apply net(x[0])", "%flax_apply net(x[0][None])"),
            ("%flax_apply --eager net(x=x[0] * 2)", "%flax_apply --eager net(x=(x[0] * 2)[None])"),
            ("%flax_summary net(x[0])", "%flax_summary net(x[0][None])"),
        ],
    )
    def test_what_init_saw_what_the_call_has_and_the_line(self, notebook: Any, call: str, write: str) -> None:
        notebook(FLAT)
        notebook("%flax_apply -q net(x);")
        told = notebook.fails(call).splitlines()
        assert told[-2:] == [
            "init saw x: float32[3,4,4], and this call has float32[4,4]: a batch axis is missing",
            f"write: {write}",
        ]
        notebook(write)

    def test_another_shape_is_told_without_a_line(self, notebook: Any) -> None:
        notebook(FLAT)
        notebook("%flax_apply -q net(x);")
        told = notebook.fails("%flax_apply net(x[:, :2])").splitlines()
        assert told[-1] == "init saw x: float32[3,4,4], and this call has float32[3,2,4]"
        notebook("%flax_apply -q net(x[:2]);")  # another batch

    def test_a_first_run_is_told_what_the_layer_takes_and_the_line_that_runs(self, notebook: Any) -> None:
        notebook(FLAT_OWN)
        features = "`linear` takes 16 features in the last axis, and was given float32"
        line = "%flax_apply net(jax.tree_util.tree_map(lambda leaf: leaf[None], {'image': x[0]}))"
        assert notebook.fails("%flax_apply net({'image': x[0]})").splitlines()[-4:] == [
            f"{features}[4,4]",
            "batch['image'] is float32[4,4]: with a batch axis in front, the model runs",
            "write: import jax",
            f"       {line}",
        ]
        assert notebook.fails("%flax_apply net({'image': x[:, 0]})").splitlines()[-1] == f"{features}[3,4]"
        notebook(f"import jax\n{line}")

    def test_a_first_run_of_a_linen_module(self, notebook: Any) -> None:
        notebook(FLAT.replace("return", "batch, height, width = x.shape\n    return"))
        told = notebook.fails("%flax_apply --eager net(x[0])").splitlines()
        assert told[-3:] == [
            "ValueError: not enough values to unpack (expected 3, got 2)",
            "x is float32[4,4]: with a batch axis in front, the model runs",
            "write: %flax_apply --eager net(x[0][None])",
        ]
        notebook(told[-1].removeprefix("write: "))

    def test_an_error_of_the_construction_is_left_alone(self, notebook: Any) -> None:
        notebook(f"features = 16\n{FLAT_OWN.replace('Linear(16', 'Linear(features + 0').rpartition('net = ')[0]}")
        notebook("%flaxmodel -q net = Net()")
        told = notebook.fails("features = '16'\n%flax_init net({'image': x[0]})").splitlines()
        assert told[-1] == 'TypeError: can only concatenate str (not "int") to str'

    def test_an_nnx_module_is_held_against_an_earlier_run(self, notebook: Any) -> None:
        notebook(FLAT_OWN)
        notebook("%flax_apply -q net({'image': x}, scale=2.0);")
        told = notebook.fails("%flax_apply net({'image': x[0]})").splitlines()
        line = "%flax_apply net(jax.tree_util.tree_map(lambda leaf: leaf[None], {'image': x[0]}))"
        assert told[-3:] == [
            "an earlier run had batch['image']: float32[3,4,4], and this call has float32[4,4]: a batch axis is missing",
            "write: import jax",
            f"       {line}",
        ]
        notebook(f"import jax\n{line}")


UNSET = "`deterministic` has no value, and no switch of the model's sets it"
EDIT = "in your model: "


class TestALayerWithoutItsSwitch:
    @pytest.mark.parametrize(
        ("body", "arguments", "field", "lines"),
        [
            (
                "nn.Dropout(0.5)(nn.Dense(2)(x))",
                "x",
                "",
                ["def __call__(self, x, train):", "return nn.Dropout(0.5)(nn.Dense(2)(x), deterministic=not train)"],
            ),
            (
                "nn.Dropout(0.5)(x) * 2",
                "x, mask=None",
                "",
                [
                    "def __call__(self, x, mask=None, train=False):",
                    "return nn.Dropout(0.5)(x, deterministic=not train) * 2",
                ],
            ),
            ("nn.Dropout(0.5)(x,)", "x, train=False", "", ["return nn.Dropout(0.5)(x, deterministic=not train)"]),
            (
                "nn.Dropout(0.5)(x)",
                "x, *, mask=None",
                "evaluates: bool = True\n",
                ["def __call__(self, …, train):", "return nn.Dropout(0.5)(x, deterministic=not train)"],
            ),
            (
                "nn.Dropout(0.5)(x)",
                "x",
                "training: bool = False\n",
                ["return nn.Dropout(0.5)(x, deterministic=not self.training)"],
            ),
        ],
    )
    def test_the_lines_of_the_model_as_they_are_to_be(
        self, notebook: Any, body: str, arguments: str, field: str, lines: list[str]
    ) -> None:
        notebook(net(body, arguments, field))
        told = [EDIT + lines[0], *(" " * len(EDIT) + line for line in lines[1:])]
        assert notebook.fails("%flax_apply --train Net(x)").splitlines()[-len(told) - 1 :] == [UNSET, *told]
        assert notebook.fails("%flaxmodel --check 'Net(x)' Net").splitlines()[-len(told) - 1 :] == [UNSET, *told]

    def test_a_method_on_one_line(self, notebook: Any) -> None:
        notebook(net("nn.Dropout(0.5)(x)").replace(":\n    return", ": return"))
        told = f"{EDIT}def __call__(self, x, train): return nn.Dropout(0.5)(x, deterministic=not train)"
        assert notebook.fails("%flax_apply --train Net(x)").splitlines()[-2:] == [UNSET, told]

    def test_a_call_over_lines_is_told_as_an_argument(self, notebook: Any) -> None:
        notebook(net("nn.Dropout(\n      0.5)(x)", "x, train=False"))
        assert notebook.fails("%flax_apply --train Net(x)").endswith(f"{UNSET}\n{EDIT}deterministic=not train")


AGENT = """class Agent:
  def __init__(self):
    self.actor = nn.Dense(2)
    self.parts = {'critic': nn.Dense(1)}
  def act(self, x):
    y = %flax_apply -q self.actor(x)
    return y
agent = Agent()
"""


class TestLinesThatAreNearlyRight:
    @pytest.mark.parametrize(
        ("line", "message"),
        [
            (
                "%flax_apply -q agent.actor(x)",
                "`agent.actor` is a model without a name of its own.\n"
                "  write: %flaxmodel actor = agent.actor\n         %flax_apply -q actor(x)",
            ),
            (
                "agent.act(x)",
                "`self.actor` is a model without a name of its own.\n"
                "  write: %flaxmodel actor = self.actor\n         %flax_apply -q actor(x)",
            ),
            (
                "%flax_init self.net(x)",
                "nothing is called `self` here, and `net` is a model.\n  write: %flax_init net(x)",
            ),
            (
                "%flax_apply train net(x)",
                "`train` is an option, and options begin with two dashes.\n  write: %flax_apply --train net(x)",
            ),
            (
                "%flax_apply eager repeat 2 net(x);",
                "`eager` is an option, and options begin with two dashes.\n  write: %flax_apply --eager --repeat 2 net(x);",
            ),
            (
                "%flax_key seed 3",
                "`seed` is an option, and options begin with two dashes.\n  write: %flax_key --seed 3",
            ),
            (
                "%flax_apply --variables net(x)",
                "--variables needs a value (EXPR), not net(x).\n  form: %flax_apply --variables … net(x)",
            ),
            (
                "%flax_apply --keys-of net(x)",
                "--keys-of needs a value (N), not net(x).\n  form: %flax_apply --keys-of … net(x)",
            ),
        ],
    )
    def test_the_line_to_write(self, notebook: Any, line: str, message: str) -> None:
        notebook(f"net = nn.Dense(2)\n{AGENT}")
        assert notebook.fails(line) == f"FlaxMagicsError: {message}"

    def test_a_part_that_is_registered_is_called_by_its_name(self, notebook: Any) -> None:
        notebook(f"{AGENT}\n%flaxmodel -q first = agent.actor")
        assert notebook.fails("%flax_apply agent.actor(x)").endswith("\n  write: %flax_apply first(x)")

    def test_a_name_that_stands_for_something_else_is_not_taken(self, notebook: Any) -> None:
        notebook(f"{AGENT}\nactor = 1")
        assert "%flaxmodel agent_actor = agent.actor" in notebook.fails("%flax_apply agent.actor(x)")


LEAKING = """leaks = []
class Leaking(nn.Module):
  @nn.compact
  def __call__(self, x):
    y = nn.Dense(2)(x)
    leaks.append(y * 2)
    return y
class Using(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(2)(x) + leaks[-1]
leaking, using = Leaking(), Using()
%flax_apply -q leaking(x);
"""


@pytest.mark.parametrize("cell", ["leaks[-1] + 1", "%flax_apply using(x)", "%flax_apply --eager using(x)"])
def test_a_tracer_that_leaked_is_told_without_our_frames(notebook: Any, cell: str) -> None:
    notebook(LEAKING)
    told = notebook.fails(cell)
    message = told[told.rindex("UnexpectedTracerError: ") :]
    created = message[message.index("The leaked intermediate value was created on line ") :]
    assert "(Leaking.__call__)" in created
    assert "flax_magics" not in created


class Debugger:
    """In the place of pdb: says at which line of which code it would begin."""

    def reset(self) -> None:
        """Nothing is kept."""

    def interaction(self, frame: object, where: Any) -> None:
        """Called with an exception or its traceback, by version."""
        last, line = list(traceback.walk_tb(getattr(where, "__traceback__", where)))[-1]
        name = last.f_code.co_name
        self.place = "<module>" if name.startswith("<cell line") else name, line  # as IPython 7 names a cell's code


@pytest.mark.parametrize(
    ("cell", "place"),
    [
        ("y = 1\n%flax_apply nothing(x)", ("<module>", 2)),
        ("def f(model):\n  y = 1\n  %flax_apply model(x)\nf(1)", ("f", 3)),
        ("y = 1\nflax_magics.session().apply('nothing', x)", ("<module>", 2)),
        ("%%flax_apply\nz = x\nnothing(z)", ("<module>", 1)),
    ],
)
@pytest.mark.parametrize("at_once", [False, True], ids=["debug", "pdb"])
def test_a_debugger_begins_in_the_users_code(
    notebook: Any, monkeypatch: pytest.MonkeyPatch, cell: str, place: tuple[str, int], *, at_once: bool
) -> None:
    notebook("import flax_magics")
    notebook.shell.run_cell("1 / 0")  # what IPython would begin with otherwise
    debugger = Debugger()
    monkeypatch.setattr(notebook.shell.InteractiveTB, "pdb", debugger)
    monkeypatch.setattr(notebook.shell, "call_pdb", at_once)
    notebook.fails(cell)
    if not at_once:
        notebook.shell.InteractiveTB.debugger(force=True)
    assert debugger.place == place
    assert sys.last_value is not None
