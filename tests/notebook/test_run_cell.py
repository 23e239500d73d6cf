"""Bodies of cell magics run as real cells, in the shell itself."""

from __future__ import annotations

import ast
import inspect
import linecache
from collections.abc import Callable
from typing import Any

import pytest
from interrupts import interrupted_after

from flax_magics.errors import FlaxMagicsError
from flax_magics.line.call import CallExpression, parse_call
from flax_magics.notebook.run_cell import displayed_quietly, run_body, run_statements_with_call


class Commands:
    """Stand-ins for the real magics, and what they got."""

    def __init__(self, shell: Any) -> None:
        self.shell = shell
        self.assigned: tuple[str, ...]
        self.call: CallExpression
        self.assign: Callable[[Any], None] | None
        shell.register_magic_function(self.model, "cell", "flaxmodel")
        shell.register_magic_function(self.apply_cell, "cell", "flax_apply")
        shell.register_magic_function(self.apply, "line", "flax_apply")

    def model(self, line: str, cell: str) -> None:
        """`%%flaxmodel`"""
        self.assigned = run_body(self.shell, cell, line)

    def apply(self, line: str) -> Any:
        """`%flax_apply double(x)`"""
        args, _ = parse_call(line).evaluate(self.shell.user_ns)
        return None if displayed_quietly(self.shell, line) else args[0] * 2

    def apply_cell(self, line: str, cell: str) -> Any:
        """`%%flax_apply`"""
        self.call, self.assign = run_statements_with_call(self.shell, cell, line)
        args, _ = self.call.evaluate(self.shell.user_ns)
        return args[0] * 2 if self.assign is None else self.assign(args[0] * 2)


@pytest.fixture
def commands(shell: Any) -> Commands:
    return Commands(shell)


def run(shell: Any, cell: str) -> Any:
    """The result of a cell that must succeed."""
    result = shell.run_cell(cell, store_history=True)
    result.raise_error()
    return result


def refused(shell: Any, cell: str) -> str:
    """The message of a cell that must end in a FlaxMagicsError."""
    result = shell.run_cell(cell, store_history=True)
    assert isinstance(result.error_in_exec, FlaxMagicsError)
    return str(result.error_in_exec)


def test_the_body_runs_in_the_users_namespace(shell: Any, commands: Commands) -> None:
    run(shell, "%%flaxmodel net = Net()\nimport math\na = math.pi\nclass Net: pass\n")
    assert shell.user_ns["a"] > 3
    assert commands.assigned == ("math", "a", "Net")


def test_names_that_are_gone_again_are_not_reported(shell: Any, commands: Commands) -> None:
    run(shell, "%%flaxmodel\na = 1\nb = 2\ndel a\nfor i in []: pass")
    assert commands.assigned == ("b",)


def test_line_numbers_are_those_of_the_whole_cell(shell: Any, commands: Commands) -> None:
    body = "\n\nx = 1\n\ndef f():\n    raise KeyError(x)\n"
    run(shell, "%%flaxmodel net = Net(3)" + body)
    code = shell.user_ns["f"].__code__
    assert code.co_firstlineno == 5
    lines = linecache.getlines(code.co_filename)
    assert [line.rstrip() for line in lines] == [
        "# %%flaxmodel net = Net(3)" + body.split("\n")[0],
        *body.split("\n")[1:-1],
    ]
    with pytest.raises(KeyError) as caught:
        shell.user_ns["f"]()
    assert caught.traceback[-1].lineno == 5  # pytest counts from 0


def test_the_source_of_what_the_body_defines_can_be_read(shell: Any, commands: Commands) -> None:
    run(shell, "%%flaxmodel\n%precision 3\nclass Net:\n    def __call__(self):\n        return 1\n")
    assert inspect.getsource(shell.user_ns["Net"].__call__) == "    def __call__(self):\n        return 1\n"


def test_the_cell_is_named_as_ipython_names_it(shell: Any, commands: Commands) -> None:
    shell.execution_count = 7
    run(shell, "%%flaxmodel\ndef f(): pass\n")
    name = shell.user_ns["f"].__code__.co_filename
    assert name.startswith("<ipython-input-7-")
    if hasattr(shell.compile, "format_code_name"):
        assert shell.compile.format_code_name(name) == ("Cell", "In[7]")


def test_under_a_kernel_the_body_has_the_name_of_the_cell_that_was_typed(shell: Any, commands: Commands) -> None:
    import ipykernel.compiler

    kernel: Any = ipykernel.compiler
    shell.compile = kernel.XCachingCompiler()
    cell = "%%flaxmodel  \ndef f(): pass"
    run(shell, cell)
    assert shell.user_ns["f"].__code__.co_filename == kernel.get_file_name(cell)


def test_future_imports_hold_from_there_on(shell: Any, commands: Commands) -> None:
    run(shell, "%%flaxmodel\nfrom __future__ import annotations\ndef f(x: nowhere): pass\n")
    assert shell.user_ns["f"].__annotations__ == {"x": "nowhere"}
    run(shell, "def g(x: nowhere): pass\n")
    assert shell.user_ns["g"].__annotations__ == {"x": "nowhere"}


@pytest.mark.parametrize(
    ("interactivity", "body", "shown"),
    [
        ("last_expr", "1\n2\n3", ["3"]),
        ("last_expr", "1\n2\n3;", []),
        ("last_expr", "1\nx = 2", []),
        ("last_expr", "1\n3  # ;", ["3"]),
        ("last", "1\nfor i in [4]: i", ["4"]),
        ("last_expr_or_assign", "1\nx = 2", ["2"]),
        ("last_expr_or_assign", "1\nx = 2;", []),
        ("all", "1\n2\nx = 4\n3", ["1", "2", "3"]),
        ("all", "1\n2\n3;", []),
        ("none", "1\n2", []),
    ],
)
def test_expressions_are_displayed_as_in_any_cell(
    shell: Any, commands: Commands, interactivity: str, body: str, shown: list[str]
) -> None:
    outputs: list[str] = []
    shell.displayhook.write_format_data = lambda data, md_dict=None: outputs.append(data["text/plain"])
    shell.ast_node_interactivity = interactivity
    run(shell, f"%%flaxmodel\n{body}\n")
    assert outputs == shown
    expected: list[str] = []
    shell.displayhook.write_format_data = lambda data, md_dict=None: expected.append(data["text/plain"])
    run(shell, body)
    assert expected == shown


def test_a_displayed_value_is_the_cells_output(shell: Any, commands: Commands) -> None:
    result = run(shell, "%%flaxmodel\n40 + 2\n")
    assert result.result == 42
    assert shell.user_ns["Out"] == {1: 42}
    assert shell.user_ns["_"] == 42


def test_magics_and_commands_work_in_the_body(shell: Any, commands: Commands, bang: str) -> None:
    run(shell, f"%%flaxmodel\nx = 3\ny = %flax_apply double(x)\nz = {bang}echo hello\n%flax_apply double(x)\n")
    assert shell.user_ns["y"] == 6
    assert list(shell.user_ns["z"]) == ["hello"]
    assert commands.assigned == ("x", "y", "z")
    assert shell.user_ns["Out"] == {1: 6}


def test_the_users_ast_transformers_see_the_body(shell: Any, commands: Commands) -> None:
    class Double(ast.NodeTransformer):
        def visit_Constant(self, node: ast.Constant) -> ast.Constant:
            return ast.copy_location(ast.Constant(node.value * 2), node) if node.value == 2 else node

    shell.ast_transformers.append(Double())
    run(shell, "%%flaxmodel\nx = 2\n")
    assert shell.user_ns["x"] == 4


def test_a_failing_statement_fails_the_cell(shell: Any, commands: Commands) -> None:
    result = shell.run_cell("%%flaxmodel\nx = 1\n1 / 0\ny = 2\n")
    assert isinstance(result.error_in_exec, ZeroDivisionError)
    assert shell.user_ns["x"] == 1
    assert "y" not in shell.user_ns


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("x = 1\ny = 1 +", "line 3 of this cell: invalid syntax\n  y = 1 +\n         ^"),
        ("x = 1\nclass Net(\n    pass", "line 3 of this cell: '(' was never closed\n  class Net(\n           ^"),
        ("x = 1\nreturn 3", "line 3 of this cell: 'return' outside function\n  return 3\n  ^"),
        (
            "x = 1\nawait x",
            "`await` cannot be used at the top level of a %%flaxmodel cell.\n"
            "  await x\n  ^\n  await in a cell of its own, and use the value here",
        ),
        (
            "x = 1\nfor i in [1]:\n    y = [j async for j in x]",
            "`await` cannot be used at the top level of a %%flaxmodel cell.\n"
            "  y = [j async for j in x]\n      ^\n  await in a cell of its own, and use the value here",
        ),
    ],
)
def test_a_body_that_is_no_python_runs_not_at_all(shell: Any, commands: Commands, body: str, message: str) -> None:
    assert refused(shell, f"%%flaxmodel\n{body}\n") == message
    assert "x" not in shell.user_ns


def test_an_async_function_may_be_defined(shell: Any, commands: Commands) -> None:
    run(shell, "%%flaxmodel\nasync def f():\n    await g()\n    return [i async for i in h]\n")
    assert commands.assigned == ("f",)


@pytest.mark.parametrize(
    ("target", "read"),
    [
        ("y", lambda ns: ns["y"]),
        ("y = z", lambda ns: (ns["y"], ns["z"])[1]),
        ("y: int", lambda ns: ns["y"]),
        ("box['k']", lambda ns: ns["box"]["k"]),
        ("thing.field", lambda ns: ns["thing"].field),
    ],
)
def test_the_last_call_is_assigned_to_any_target(shell: Any, commands: Commands, target: str, read: Any) -> None:
    run(shell, "class Thing: pass\nthing = Thing()\nbox = {}")
    run(shell, f"%%flax_apply --train\nx = 3\nx = x + 1\n{target} = double(\n    x,\n)\n")
    assert read(shell.user_ns) == 8
    assert commands.call.call == "double(x)"
    assert shell.user_ns["x"] == 4
    assert not any(name.startswith("__flax") for name in shell.user_ns)


def test_the_value_may_be_unpacked_or_added(shell: Any, commands: Commands) -> None:
    run(shell, "%%flax_apply\na, *b = double([1, 2])\n")
    assert (shell.user_ns["a"], shell.user_ns["b"]) == (1, [2, 1, 2])
    run(shell, "total = 1")
    run(shell, "%%flax_apply\ntotal += double(3)\n")
    assert shell.user_ns["total"] == 7


def test_a_call_alone_is_displayed(shell: Any, commands: Commands) -> None:
    result = run(shell, "%%flax_apply\nx = 5\ndouble(x)\n")
    assert result.result == 10
    assert commands.assign is None
    assert not commands.call.quiet
    run(shell, "%%flax_apply\nx = 5\ndouble(x);\n")
    assert commands.call.quiet


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("# nothing", "%%flax_apply needs a call in the cell.\n  form: %%flax_apply\n        …"),
        (
            "ran = 1\ny",
            "the last statement of a %%flax_apply cell is the call.\n  y\n  ^\n"
            "  form: %%flax_apply\n        …\n        y = …",
        ),
        (
            "ran = 1\nfor i in x:\n    net(i)",
            "the last statement of a %%flax_apply cell is the call.\n  for i in x:\n  ^\n"
            "  form: %%flax_apply\n        …\n        y = …",
        ),
        (
            "ran = 1\ny = %flax_apply net(x)",
            "the last line of a %%flax_apply cell is the call itself, without a magic.\n"
            "  form: %%flax_apply\n        …\n        y = net(x)",
        ),
        (
            "ran = %flax_apply --train net(x)",
            "the last line of a %%flax_apply cell is the call itself, without a magic.\n"
            "  write: %%flax_apply --train\n         ran = net(x)",
        ),
        (
            "ran = 1\ny = Net(3)(x)",
            "`Net(3)` has no name: register it first.\n  write: %flaxmodel net = Net(3)\n         %flax_apply net(x)",
        ),
    ],
)
def test_a_cell_without_a_call_at_its_end_runs_not_at_all(
    shell: Any, commands: Commands, body: str, message: str
) -> None:
    assert refused(shell, f"%%flax_apply\n{body}\n") == message
    assert "ran" not in shell.user_ns


@pytest.mark.parametrize("history", [True, False])
@pytest.mark.parametrize(
    ("cell", "out"),
    [
        ("%flax_apply double(2)", {1: 4}),
        ("%flax_apply double(2);", {}),
        ("%flax_apply double(2);  # quietly", {}),
        ("x = 1\n%flax_apply double(2);", {}),
        ("%flax_apply double(2);\nx = 1", {}),
        ("%flax_apply double(2)  # ;", {1: 4}),
    ],
)
def test_a_semicolon_keeps_out_clean(
    shell: Any, commands: Commands, cell: str, out: dict[int, int], history: bool
) -> None:
    shell.run_cell(cell, store_history=history).raise_error()
    assert list(shell.user_ns["Out"].values()) == list(out.values())


@pytest.mark.parametrize(
    "cell",
    [
        "y = %flax_apply double(2);",
        "y = %flax_apply double(2);\ny",
        "a, y = 1, get_ipython().run_line_magic('flax_apply', 'double(2);')",
        "def f():\n    y = %flax_apply double(2);\n    return y\ny = f()",
        "y = [get_ipython().run_line_magic('flax_apply', 'double(2);') for _ in [1]][0]",
        "%%time\ny = %flax_apply double(2);",
        "%%flaxmodel\ny = %flax_apply double(2);",
    ],
)
def test_a_semicolon_takes_no_value_from_a_name(shell: Any, commands: Commands, cell: str) -> None:
    run(shell, cell)
    assert shell.user_ns["y"] == 4


def test_a_function_keeps_the_value_and_the_cell_displays_it(shell: Any, commands: Commands) -> None:
    cell = "def f():\n    y = %flax_apply double(2);\n    return y\nf()"
    assert run(shell, cell).result == 4


def test_an_interrupt_while_the_magics_of_a_cell_are_read_is_all_that_is_told(notebook):
    def interrupt(frame):
        raise KeyboardInterrupt

    with interrupted_after(0, interrupt):
        notebook.shell.run_cell("%flax_key")
    assert notebook.read() == ""
    assert notebook("%flax_key").startswith("root key ")
