"""What a person sees of an error inside their own module: their frames, in their cell."""

from __future__ import annotations

import gc
import os
import re
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest

import flax_magics
from flax_magics.errors import FlaxMagicsError
from flax_magics.notebook.tracebacks import show_user_frames

# As if it were a part of the package: its frames must not be shown.
MAGIC = """
def magic(line):
    try:
        return eval(compile(line, __file__, "eval"), shell.user_ns)
    except BaseException as error:
        show_user_frames(error, shell, *hints)
        raise
"""
INTERNAL = ("flax_magics", os.sep + "flax" + os.sep, os.sep + "jax", "IPython" + os.sep, "run_line_magic")


def strip_ansi(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.fixture
def seen(shell: Any, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a cell that must fail, with `%flax_call EXPR` in it; gives what a person sees, without the rule on top."""
    names: dict[str, Any] = {"shell": shell, "show_user_frames": show_user_frames, "hints": ()}
    file = names["__file__"] = os.path.join(next(iter(flax_magics.__path__)), "pretended.py")
    exec(compile(MAGIC, file, "exec"), names)
    shell.register_magic_function(names["magic"], "line", "flax_call")

    def run(cell: str, hint: tuple[str, ...] = ()) -> str:
        names["hints"] = (hint,)
        capsys.readouterr()
        result = shell.run_cell(cell, store_history=True)
        assert not result.success
        text = capsys.readouterr().out
        return "\n".join(
            line.rstrip() for line in strip_ansi(text).splitlines() if not line.startswith("-----")
        ).strip()

    return run


def frames(text: str) -> list[str]:
    """The marked lines of a traceback: `6 raise KeyError`."""
    return [" ".join(line.split("> ", 1)[1].split()) for line in text.splitlines() if line.lstrip("-").startswith("> ")]


def test_the_users_frames_stay_and_those_of_the_magic_go(shell: Any, seen: Callable[..., str]) -> None:
    shell.run_cell("def inner(x):\n    return 1 / x\ndef outer(x):\n    return inner(x)", store_history=True)
    text = seen("%flax_call outer(0)")
    assert frames(text) == ["4 return inner(x)", "2 return 1 / x"]
    assert text.endswith("ZeroDivisionError: division by zero")
    assert not any(internal in text for internal in INTERNAL)


def test_functions_around_the_magic_stay(seen: Callable[..., str]) -> None:
    text = seen("def f():\n    %flax_call {}['a']\nf()")
    assert [line.split(" ", 1)[1] for line in frames(text)] == [
        "f()",
        "get_ipython().run_line_magic('flax_call', \"{}['a']\")",
    ]
    assert "pretended" not in text


def test_with_no_frame_of_the_users_the_message_stands_alone(seen: Callable[..., str]) -> None:
    assert seen("%flax_call abs()") == "TypeError: abs() takes exactly one argument (0 given)"


def test_hints_stand_below_the_message(shell: Any, seen: Callable[..., str]) -> None:
    assert seen("%flax_call abs('a')", ("write: this", "or that")).splitlines() == [
        "TypeError: bad operand type for abs(): 'str'",
        "write: this",
        "or that",
    ]


@pytest.mark.parametrize("mode", ["Plain", "Context", "Verbose", "Minimal"])
def test_the_shells_own_mode_is_kept(shell: Any, seen: Callable[..., str], mode: str) -> None:
    shell.InteractiveTB.set_mode(mode)
    shell.run_cell("def f(secret):\n    return 1 / secret", store_history=True)
    text = seen("%flax_call f(0)")
    assert text.endswith("ZeroDivisionError: division by zero")
    assert ("return 1 / secret" in text) is (mode != "Minimal")
    assert ("secret = 0" in text or "secret=0" in text) is (mode == "Verbose")
    assert "pretended" not in text


CHAINS = """
def cause():
    try:
        {}['a']
    except KeyError as error:
        raise ValueError('second') from error
def context():
    try:
        {}['a']
    except KeyError:
        raise ValueError('second')
def hidden():
    try:
        {}['a']
    except KeyError:
        raise ValueError('second') from None
def by_hand():
    raise ValueError('second') from KeyError('made')
"""


@pytest.mark.parametrize(
    ("call", "first", "between"),
    [
        ("cause()", "KeyError: 'a'", "The above exception was the direct cause of the following exception:"),
        ("context()", "KeyError: 'a'", "During handling of the above exception, another exception occurred:"),
        ("by_hand()", "KeyError: 'made'", "The above exception was the direct cause of the following exception:"),
    ],
)
def test_the_users_own_causes_stay(shell: Any, seen: Callable[..., str], call: str, first: str, between: str) -> None:
    shell.run_cell(CHAINS, store_history=True)
    text = seen(f"%flax_call {call}")
    assert text.index(first) < text.index(between) < text.index("ValueError: second")
    assert "pretended" not in text


def test_a_cause_that_the_user_hid_stays_hidden(shell: Any, seen: Callable[..., str]) -> None:
    shell.run_cell(CHAINS, store_history=True)
    assert "KeyError: 'a'" not in seen("%flax_call hidden()")


def test_causes_that_jax_attaches_go_and_what_lies_behind_them_stays(shell: Any, seen: Callable[..., str]) -> None:
    shell.run_cell(
        "class JaxStackTraceBeforeTransformation(Exception): pass\n"
        "def f():\n"
        "    try:\n"
        "        {}['a']\n"
        "    except KeyError as first:\n"
        "        error = ValueError('second')\n"
        "        error.__cause__ = JaxStackTraceBeforeTransformation()\n"
        "        error.__cause__.__cause__ = first\n"
        "        raise error",
        store_history=True,
    )
    text = seen("%flax_call f()")
    assert "JaxStackTraceBeforeTransformation:" not in text
    assert text.count("Traceback (most recent call last)") == 2
    assert "KeyError: 'a'" in text
    assert text.endswith("ValueError: second")


def test_notes_of_jax_go_and_the_users_stay(shell: Any, seen: Callable[..., str]) -> None:
    shell.run_cell(
        "def f():\n"
        "    error = ValueError('wrong')\n"
        "    error.add_note('--------------------\\nFor simplicity, JAX has removed its internal frames')\n"
        "    error.add_note('mine')\n"
        "    raise error",
        store_history=True,
    )
    text = seen("%flax_call f()")
    assert "simplicity" not in text.split("ValueError: wrong")[-1]
    assert len(sys.last_value.__notes__) == 2  # type: ignore[union-attr]


def test_the_exception_itself_is_left_as_it_was(shell: Any, seen: Callable[..., str]) -> None:
    shell.run_cell(CHAINS, store_history=True)
    seen("%flax_call context()")
    error = sys.last_value
    assert error is not None
    assert isinstance(error.__context__, KeyError)
    assert error.__cause__ is None
    assert not error.__suppress_context__
    names = []
    trace = error.__traceback__
    while trace is not None:
        names.append(trace.tb_frame.f_code.co_name)
        trace = trace.tb_next
    assert names[-2:] == ["<module>", "context"]
    assert "magic" in names


def test_one_exception_raised_twice_shows_its_hint_once(shell: Any, seen: Callable[..., str]) -> None:
    shell.run_cell("error = ValueError('again')\ndef f():\n    raise error", store_history=True)
    assert seen("%flax_call f()", ("hint one",)).count("hint one") == 1
    text = seen("%flax_call f()", ("hint two",))
    assert (text.count("hint one"), text.count("hint two")) == (0, 1)
    text = seen("%flax_call f()")
    assert "hint" not in text
    assert frames(text) == ["3 raise error"]


def test_the_hint_of_an_inner_magic_stays_on_the_way_up(shell: Any) -> None:
    error = ValueError("inner")
    try:
        try:
            raise error
        except ValueError:
            show_user_frames(error, shell, ("from inside",))
            raise
    except ValueError:
        show_user_frames(error, shell)
        assert error._render_traceback_()[-1] == "from inside"  # type: ignore[attr-defined]


def test_tb_shows_the_same_again(shell: Any, seen: Callable[..., str], capsys: pytest.CaptureFixture[str]) -> None:
    shell.run_cell("def f():\n    raise KeyError('b')", store_history=True)
    first = seen("%flax_call f()", ("a hint",))
    shell.run_cell("%tb")
    again = strip_ansi(capsys.readouterr().out)
    assert frames(again) == frames(first)
    assert again.rstrip().endswith("KeyError: 'b'\na hint")


def test_an_exception_with_slots_is_shown_as_ipython_shows_it(shell: Any) -> None:
    class Slotted(Exception):
        __slots__ = ()

        def __setattr__(self, name: str, value: object) -> None:
            raise AttributeError(name)

    error = Slotted()
    show_user_frames(error, shell)
    assert not hasattr(error, "_render_traceback_")


def test_an_exception_that_renders_itself_stays_as_it_is(shell: Any, seen: Callable[..., str]) -> None:
    error = FlaxMagicsError("short.")
    show_user_frames(error, shell, ("hint",))
    assert error._render_traceback_() == ["FlaxMagicsError: short."]


def test_without_a_shell_nothing_happens() -> None:
    error = ValueError()
    show_user_frames(error, None, ("hint",))
    assert not hasattr(error, "_render_traceback_")


def test_a_formatter_that_fails_leaves_the_message(shell: Any, seen: Callable[..., str]) -> None:
    shell.run_cell("def f():\n    raise KeyError('b')", store_history=True)
    shell.InteractiveTB.structured_traceback = lambda *args, **kwargs: 1 / 0
    assert seen("%flax_call f()", ("hint",)) == "KeyError: 'b'\nhint"


def test_no_cycle_keeps_an_exception_alive(shell: Any) -> None:
    class Wrong(Exception):
        pass

    gc.disable()
    try:
        error = Wrong()
        alive = weakref.ref(error)
        show_user_frames(error, shell, ("hint",))
        del error
        assert alive() is None
    finally:
        gc.enable()


FLAX_CELL = """\
import flax.linen as nn, jax, jax.numpy as jnp
class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(3)(x)
        return x @ jnp.ones((5, 5))
class Setup(nn.Module):
    def setup(self):
        self.dense = nn.Dense(wrong)
    def __call__(self, x):
        return self.dense(x)
def run(net, x, jit):
    variables = net.init(jax.random.key(0), x)
def jitted(net, x):
    return jax.jit(lambda x: net.init_with_output(jax.random.key(0), x)[0])(x)
def graded(net, x):
    return jax.grad(lambda x: net.init_with_output(jax.random.key(0), x)[0].sum())(x)
"""


class TestWithFlax:
    """Errors that Flax and JAX themselves raise, in their own words, deep inside their own frames."""

    @pytest.fixture(autouse=True)
    def cell(self, shell: Any) -> None:
        shell.run_cell(FLAX_CELL, store_history=True).raise_error()

    @pytest.mark.parametrize(
        "how", ["run(Net(), jnp.ones((2, 4)), 0)", "jitted(Net(), jnp.ones((2, 4)))", "graded(Net(), jnp.ones((2, 4)))"]
    )
    def test_wrong_shapes_in_the_module(self, seen: Callable[..., str], how: str) -> None:
        text = seen(f"%flax_call {how}")
        assert frames(text)[-1] == "6 return x @ jnp.ones((5, 5))"
        assert text.splitlines()[-1].startswith("TypeError: dot_general requires contracting dimensions")
        assert not any(internal in text for internal in INTERNAL)

    def test_a_name_missing_in_setup(self, seen: Callable[..., str]) -> None:
        text = seen("%flax_call run(Setup(), jnp.ones((2, 4)), 0)")
        assert frames(text)[-1] == "9 self.dense = nn.Dense(wrong)"
        assert text.splitlines()[-1].startswith("NameError: name 'wrong' is not defined")
        assert not any(internal in text for internal in INTERNAL)

    def test_variables_of_another_shape(self, seen: Callable[..., str]) -> None:
        call = "Net().apply(nn.Dense(3).init(jax.random.key(0), jnp.ones((1, 4))), jnp.ones((2, 4)))"
        text = seen(f"%flax_call {call}")
        assert frames(text)[-1] == "5 x = nn.Dense(3)(x)"
        assert "ScopeCollectionNotFound" in text or "ScopeParamNotFoundError" in text
        assert not any(internal in text for internal in INTERNAL)

    def test_an_argument_that_is_missing(self, seen: Callable[..., str]) -> None:
        text = seen("%flax_call Net().init(jax.random.key(0))")
        assert len(text.splitlines()) == 1
        assert text.startswith("TypeError:")
        assert "__call__() missing 1 required positional argument: 'x'" in text
