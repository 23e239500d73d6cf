"""Cells come out of an export as they are, whatever Python is in them, and run as they ran."""

from __future__ import annotations

import sys
from types import FrameType

import pytest
from exporting import CHILD, NNX_NET, NORMED, assert_same, compared, digests_of, exported, printed
from interrupts import interrupted_when

from flax_magics.cells.journal import Journal
from flax_magics.notebook.magics import FlaxMagics
from flax_magics.notebook.notebook import Notebook

pytestmark = pytest.mark.usefixtures("digests_taken")

PYTHON = [
    "import math, flax_magics\nfrom collections import *\nimport dataclasses, functools\nimport numpy as np",
    """\
@dataclasses.dataclass
class Size:
  rows: int = 2
  columns: int = rows * 2
  names: list = dataclasses.field(default_factory=lambda: [k for k in 'ab'])

  class Meta:
    depth = 1
    deeper = depth + 1

  @property
  def area(self):
    return self.rows * self.columns

  @area.setter
  def area(self, value):
    self.rows = value // self.columns""",
    CHILD,
    """\
try:
  [][1]
except IndexError as error:
  told = str(error)
  print(type(error).__name__)
if (n := len(told)) > 3: print(n)
match (1, [2, 3], {'k': 4, 'rest': 5}):
  case (first, [second, *others], {'k': value, **more}) if first:
    print(first, second, others, value, more)
squares = {i: i * i for i in range(n) if (last := i) < 3}; print(squares, last)""",
    """\
count = 0
def counter():
  seen = 0
  def step():
    nonlocal seen
    global count
    seen += 1; count += seen
    return seen
  return step
step = counter(); step(), step()
print(count)
del count, step
@functools.lru_cache(maxsize=None)
def cached(n): return n if n < 2 else cached(n - 1) + cached(n - 2)
print(cached(20), OrderedDict(a=1), math.pi)
size = Size(); size.area = 12
print(size, size.area, Size.Meta.deeper)""",
    "with np.printoptions(precision=2) as options, np.errstate(all='ignore'): print(np.float32(1) / 3)",
    "y = %flax_apply child(x)  # the first\ny.shape;",
    "for i, (a, b) in enumerate([(1, 2)]):\n  z = %flax_apply child(x * a)\nelse:\n  print(i, a, b)\n_ = y\nprint(_.sum())",
]


def test_python_of_every_kind_is_written_as_it_is_and_prints_what_it_printed(notebook, tmp_path):
    outputs = [line for cell in PYTHON for line in notebook(cell).splitlines()]
    script, printed_lines = compared(notebook, tmp_path)
    lines = set(script.splitlines())
    missing = [line for cell in PYTHON for line in cell.splitlines() if line not in lines and "%flax" not in line]
    assert missing == ["import math, flax_magics"]
    assert "import math" in lines
    assert "Left out" not in script
    said = [line for line in printed_lines if not digests_of([line])]
    reported = ("  ", "!", "Out[", "new session")
    assert said == [line for line in outputs if line and "child" not in line and not line.startswith(reported)]


@pytest.mark.skipif(sys.version_info < (3, 12), reason="the syntax is Python 3.12's")
def test_type_aliases_and_parameters_are_written_as_they_are(notebook, tmp_path):
    cell = "type Pair[T] = tuple[T, T]\ndef first[T](pair: Pair[T]) -> T:\n    return pair[0]\nprint(first((1, 2)))"
    assert notebook(cell) == "1"
    script = exported(notebook)
    assert cell in script
    assert printed(script, tmp_path) == ["1"]


@pytest.mark.parametrize(
    ("cell", "lines"),
    [
        ("import math, flax_magics as fm\nprint(math.tau)", "import math\nprint(math.tau)\n"),
        (
            "import math; import flax_magics; s = flax_magics.session(); n = 1",
            "import math\n{of}s = flax_magics.session()\nn = 1\n",
        ),
        (
            "from flax_magics import Session as S, session\nnew = S(seed=3)\nn = 2",
            "# Left out: `S` is not there: it comes from flax_magics.\n# new = S(seed=3)\nn = 2\n",
        ),
        (
            "def tell():\n    import flax_magics\n    return flax_magics.session().seed\nn = tell()\nm = 3",
            "# Left out: it imports flax_magics.\n# def tell():\n#     import flax_magics\n"
            "#     return flax_magics.session().seed\n"
            "# Left out: `tell` is not there: it imports flax_magics.\n# n = tell()\nm = 3\n",
        ),
        (
            "try:\n    import flax_magics\n    there = True\nexcept ImportError:\n    there = False",
            "try:\n    there = True\nexcept ImportError:\n    there = False\n",
        ),
        (
            "import flax_magics\nfor i in range(2):\n    s = flax_magics.session()\n    k = i",
            "for i in range(2):\n    # Left out: `flax_magics` is not there: it comes from flax_magics.\n"
            "    # s = flax_magics.session()\n    k = i\n",
        ),
        (
            "import flax_magics\nif flax_magics.session().runs:\n    print(1)\nfm = 3\nprint(fm)",
            "# Left out: `flax_magics` is not there: it comes from flax_magics.\n"
            "# if flax_magics.session().runs:\n#     print(1)\nfm = 3\nprint(fm)\n",
        ),
        ("import flax_magics\nflax_magics = 3\nprint(flax_magics)", "flax_magics = 3\nprint(flax_magics)\n"),
        ("from __future__ import annotations\nn = 1", "n = 1\n"),
        (
            "print(_1 if 0 else 1)\nn = 1",
            "# Left out: `_1` is not there: it is the notebook's own.\n# print(_1 if 0 else 1)\nn = 1\n",
        ),
        (
            "[display(i) for i in range(2)]\nn = len(get_ipython().user_ns)",
            "[display(i) for i in range(2)]\n# Left out: `get_ipython` is not there: it is the notebook's own.\n"
            "# n = len(get_ipython().user_ns)\n",
        ),
    ],
)
def test_what_uses_flax_magics_or_the_notebook_is_a_comment_with_the_reason(notebook, tmp_path, cell, lines):
    notebook.shell.user_ns["_1"] = 1
    notebook(cell)
    script = exported(notebook)
    of = "# Left out: `flax_magics` is not there: it comes from flax_magics.\n# "
    assert script.endswith("\n\n" + lines.format(of=of)), script
    printed(script, tmp_path)
    assert ("from __future__ import annotations\n" in script) == ("__future__" in cell)


def test_a_cell_that_is_in_no_history_is_there(notebook, tmp_path):
    notebook.shell.run_cell("width = 3\nnet = nn.Dense(width)", store_history=False)
    script = assert_same(notebook, tmp_path, "%flaxmodel net\ny = %flax_apply net(x)")
    assert "\nwidth = 3\nnet = nn.Dense(width)\n" in script
    notebook.shell.run_cell("secret = 1", silent=True)
    assert "secret" not in exported(notebook)


def test_cells_that_failed_and_left_nothing_are_counted(notebook, tmp_path):
    notebook.fails("1 / 0")
    notebook("def half(x):\n    return x / 0")
    for cell in ("half(1)", "y = half(1)", "n = 1\nm = half(n)"):
        notebook.fails(cell)
    notebook("print(n)")
    script = exported(notebook)
    assert script.endswith(
        "\n\nn = 1\n# Left out: the rest of In [7], which failed with ZeroDivisionError.\n\nprint(n)\n\n"
        "# 3 cells that failed and left nothing are left out.\n"
    )
    assert printed(script, tmp_path) == ["1"]


def test_variables_that_a_draw_without_a_line_changed_are_not_used(notebook, tmp_path):
    train = "y = %flax_apply --train normed(x)"
    notebook(NORMED)
    notebook(train)
    notebook("%timeit -n1 -r1 get_ipython().run_line_magic('flax_apply', '-q --train normed(x)')")
    notebook(train)
    notebook(f"variables = %flax_init normed(x)\n{train}")
    runs = notebook.session.runs
    script = assert_same(notebook, tmp_path, kept=[runs[0], *runs[3:]])
    assert f"# Left out: its variables come from a draw that no line of the cells explains.\n# {train}\n" in script


WITH_LOSS = (
    NORMED
    + """
def loss(net, batch):
    return (net(batch, train=True) ** 2).mean()
"""
)
LEFT_AT_ONCE = [
    "y = %flax_apply --train normed(x)",
    "%%flax_apply --eval\nx2 = x * 2\ny = normed(x2)",
    "variables = %flax_init normed(x)",
    "latent = %flax_key latent",
    "ys = %flax_apply --samples 2 normed(x, train=True)",
    "y = %flax_apply --keys-of last normed(x)",
    "gradients = %flax_grad loss(normed, x)",
    "%flax_vars normed = jax.tree.map(lambda leaf: leaf * 2, normed.init(jax.random.key(1), x))",
    "%flax_key --seed 3",
    "%%flaxmodel net = Net(8, 3)\n" + NNX_NET.partition("\n")[2],
    "net = %flax_apply net(x[0])",
    "for i in range(5):\n    y = %flax_apply --train normed(x)\n    y = %flax_apply normed(x * i)",
    "y = [once(x * i) for i in range(3)]",
]


@pytest.mark.filterwarnings("ignore")
def test_what_a_line_committed_before_it_was_interrupted_is_the_lines(notebook, tmp_path):
    notebook("from flax import nnx")
    notebook(WITH_LOSS)
    notebook("def once(x):\n    y = %flax_apply --train normed(x)\n    return y")
    y = notebook.shell.user_ns["y"] = object()
    for turn, cell in [*((1, cell) for cell in LEFT_AT_ONCE), *((3, cell) for cell in LEFT_AT_ONCE[-2:])]:
        state, turns = notebook.session._state, 0

        def is_due(_: object) -> bool:
            nonlocal state, turns
            turns += notebook.session._state is not state
            state = notebook.session._state
            return turns == turn  # noqa: B023

        with interrupted_when(is_due):
            result = notebook.shell.run_cell(cell, store_history=True)
        assert isinstance(result.error_in_exec, KeyboardInterrupt), cell
        assert notebook["y"] is y or turn > 1
        notebook("y = %flax_apply --train normed(x)")
        y = notebook["y"]
    assert_same(notebook, tmp_path)


def test_a_cell_is_there_with_its_run_wherever_an_interrupt_ended_what_is_called_around_it(notebook, tmp_path):
    notebook(CHILD)
    hooks = FlaxMagics.end_cell, Notebook.begin_cell, Notebook.end_cell, Journal.begin, Journal.end, Journal._ended
    codes = [hook.__code__ for hook in hooks]
    lines, struck = 0, True
    while struck:
        seen, struck = 0, False

        def is_due(frame: FrameType) -> bool:
            nonlocal seen, struck
            seen += frame.f_code in codes
            struck = seen > lines  # noqa: B023
            return struck

        with interrupted_when(is_due):
            notebook.shell.run_cell("y = %flax_apply child(x)", store_history=True)
        notebook("y = %flax_apply child(x * 2)")
        lines += struck
    assert lines > 20
    assert len(notebook.session) == 2 * (lines + 1)
    assert notebook.session.export().unexported == ()
    assert_same(notebook, tmp_path)


def test_of_the_body_of_a_model_cell_the_script_has_what_ran(notebook, tmp_path):
    notebook.fails("%%flaxmodel 3 = net\nwidth = 5")
    notebook.fails("%%flaxmodel\ndepth = 2\nheight = 3")
    notebook("print('width' in globals(), 'height' in globals())")
    assert printed(exported(notebook), tmp_path) == ["False True"]


def test_a_loop_whose_history_another_session_replaced_is_left_out_whole(notebook, tmp_path):
    notebook(CHILD)
    notebook(f"%flax_save {tmp_path / 's.safetensors'}")
    notebook("for _ in range(2):\n    y = %flax_apply child(x)\nvariables = %flax_vars child")
    notebook(f"%flax_load {tmp_path / 's.safetensors'}")
    notebook("y = %flax_apply child(x)")
    script = exported(notebook)
    assert "# for _ in range(2):\n#     y = %flax_apply child(x)\n" in script
    assert "# variables = %flax_vars child\n" in script
    assert digests_of(printed(script, tmp_path)) == [notebook.session.runs[-1].digest]
