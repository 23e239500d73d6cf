"""Magic lines of this package, made ready for IPython's own transformers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flax_magics.notebook.run_cell import line_magic_transformer


def transformed(cell: str) -> str:
    """The cell after the transformer, which must keep its lines and change nothing the second time."""
    lines = cell.splitlines(keepends=True)
    result = line_magic_transformer(list(lines))
    assert sum(line.count("\n") for line in result) == cell.count("\n")
    assert line_magic_transformer(list(result)) == result
    return "".join(result)


@pytest.mark.parametrize(
    "cell",
    [
        "x = 1\n",
        "%flax_apply net(x)\n",
        "y = %flax_apply net(x);  # done (\n",
        "%%flaxmodel net = Net(3)\nclass Net: pass\n",
        "%%time\n%flax_apply net(x,\n  y)\n",
        "# comment\n%%time\n%flax_apply net(x,\n  y)\n",
        "# comment\nx = '%%flaxmodel'\n",
        '"""\n%flax_apply net(x,\n  y)\n"""\n',
        "f(\n%flax_apply net(x,\n)\n",
        "s = 'y = %flax_apply net('\n",
        "f(a=%flax_apply(\n1))\n",
        "y += %flax_apply net(\nx)\n",
        "y == %flax_apply net(\nx)\n",
        "%flax_apply --train \\\n  net(x)\n",
        "%flax_apply net('abc\n",
        "%timeit net(x,\n",
        "z = a %flax_b (\nc)\n",
    ],
)
def test_what_ipython_reads_well_stays_as_it_is(cell: str) -> None:
    assert transformed(cell) == cell


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        (
            "%flax_apply net(x,\n   y)\nz = 1\n",
            "get_ipython().run_line_magic('flax_apply', 'net(x,\\n'\n'   y)')\nz = 1\n",
        ),
        (
            "y = %flax_apply --train net(x,  # a (\n\n  'it\\'s')  ;  # done\n",
            "y = get_ipython().run_line_magic('flax_apply', '--train net(x,  # a (\\n'\n'\\n'\n"
            "\"  'it\\\\'s')  ;  # done\")\n",
        ),
        (
            "for i in x:\n    %flax_apply net(i,\n  j)\n    k = 1\n",
            "for i in x:\n    get_ipython().run_line_magic('flax_apply', 'net(i,\\n'\n'  j)')\n    k = 1\n",
        ),
        (
            "a, d['k'] = %flax_apply net(\nx)\n",
            "a, d['k'] = get_ipython().run_line_magic('flax_apply', 'net(\\n'\n'x)')\n",
        ),
        (
            "%flax_apply --train \\\n  net(x,\n  y)\n",
            "get_ipython().run_line_magic('flax_apply', '--train    net(x,\\n'\n'  y)'\n)\n",
        ),
        ('%flax_apply net("""a\nb""")\n', "get_ipython().run_line_magic('flax_apply', 'net(\"\"\"a\\n'\n'b\"\"\")')\n"),
        (
            "!echo it's (\nx = !echo '\n%flax_apply net(\nx)\n",
            "!echo it's (\nx = !echo '\nget_ipython().run_line_magic('flax_apply', 'net(\\n'\n'x)')\n",
        ),
        ("%flax_apply net(x,\ny = 1\n", "get_ipython().run_line_magic('flax_apply', 'net(x,\\n'\n'y = 1')\n"),
    ],
)
def test_a_call_goes_on_while_a_bracket_is_open(cell: str, expected: str) -> None:
    assert transformed(cell) == expected


@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("#@title A\n%%flaxmodel\nx = 1\n", "%%flaxmodel\n#@title A\nx = 1\n"),
        ("# a\n\n  # b\n%%flax_apply --train\nx\n", "%%flax_apply --train\n# a\n\n  # b\nx\n"),
        (
            "%%flaxmodel net = Net(\n  3,  # three\n)\nx = 1\n",
            "%%flaxmodel net = Net(  3,  )\n#   3,  # three\n# )\nx = 1\n",
        ),
        ("# a\n%%flaxmodel net = Net(\n  3)\nx = 1\n", "%%flaxmodel net = Net(  3)\n# a\n#   3)\nx = 1\n"),
        ("%%flaxmodel(\n)", "%%flaxmodel()\n# )"),
        ("%%flaxmodel net = Net('''a\nb''')\nx\n", "%%flaxmodel net = Net('''a\nb''')\nx\n"),
    ],
)
def test_the_magic_line_of_a_cell_comes_first_and_in_one_piece(cell: str, expected: str) -> None:
    assert transformed(cell) == expected


fragments = st.sampled_from(
    [*"x ()[]'\"#\\;,\n", "y = ", '"""', "%flax_apply", "%%flaxmodel", "!ls", "%time", "    ", "net(x)"]
)


@given(st.lists(fragments, max_size=25).map("".join))
def test_any_cell_keeps_its_lines_and_is_changed_but_once(cell: str) -> None:
    transformed(cell)


@given(st.lists(fragments.filter(lambda text: "flax" not in text), max_size=25).map("".join))
def test_a_cell_without_these_magics_is_not_touched(cell: str) -> None:
    lines = cell.splitlines(keepends=True)
    assert line_magic_transformer(lines) is lines


class TestInTheShell:
    """With IPython's own transformers around it."""

    @pytest.fixture
    def lines(self, shell: Any) -> list[str]:
        """What `%flax_apply` got."""
        got: list[str] = []
        shell.register_magic_function(got.append, "line", "flax_apply")
        shell.register_magic_function(lambda line, cell: got.extend([line, cell]), "cell", "flaxmodel")
        shell.input_transformers_cleanup.append(line_magic_transformer)
        return got

    def test_lines_arrive_as_they_were_written(self, shell: Any, lines: list[str]) -> None:
        shell.run_cell(
            "if True:\n    for i in [1]:\n        %flax_apply net(x,\n          y);\n        z = 3\n"
        ).raise_error()
        assert lines == ["net(x,\n          y);"]
        assert shell.user_ns["z"] == 3

    def test_a_title_may_stand_above(self, shell: Any, lines: list[str]) -> None:
        shell.run_cell("#@title Model\n%%flaxmodel net = Net(\n    3)\nx = 1\n").raise_error()
        assert lines == ["net = Net(    3)", "#@title Model\n#     3)\nx = 1\n"]

    def test_a_traceback_has_the_right_line(self, shell: Any, lines: list[str]) -> None:
        result = shell.run_cell("%flax_apply net(x,\n  y)\n\n1 / 0\n")
        trace = result.error_in_exec.__traceback__
        while trace.tb_next is not None:
            trace = trace.tb_next
        assert trace.tb_lineno == 4

    @pytest.mark.parametrize(
        ("cell", "status"),
        [
            ("%flax_apply net(x)", "complete"),
            ("%flax_apply net(x,", "incomplete"),
            ("y = %flax_apply --train net(x,", "incomplete"),
            ("%flax_apply --variables {'a':", "incomplete"),
            ("%flax_apply net(x,\n  y)", "complete"),
            ("for i in x:\n    %flax_apply net(x,", "incomplete"),
            ("for i in x:\n    %flax_apply net(x,\n y)", "incomplete"),
            ("for i in x:\n    %flax_apply net(x,\n y)\n", "complete"),
            ("%%flaxmodel net = Net(", "incomplete"),
            ("%%flaxmodel net = Net(\n  3)", "incomplete"),
            ("%%flaxmodel net = Net(\n  3)\nx = 1\n\n", "complete"),
        ],
    )
    def test_a_terminal_asks_for_more(self, shell: Any, lines: list[str], cell: str, status: str) -> None:
        assert shell.input_transformer_manager.check_complete(cell)[0] == status
        assert lines == []
