"""A Python expression of a command, evaluated as if it stood in the cell. And edits of command lines for advice.

A `Line` is a command with its call. Messages change an argument or an option of it, so that their advice is the user's
own complete line.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import linecache
import re
import traceback
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from types import CodeType, FunctionType
from typing import Any
from zlib import crc32

from ..base.tokens import assigned_names, index_of, point_at
from ..base.types import PyTree, Record
from ..errors import FlaxMagicsError, did_you_mean, nearest, written

_GATHER = "__flax_gather__"
"""Name under which the code of a call finds the function that collects its arguments."""
GAP = "_gap_"
"""Replaces `…`, which is no Python, while a call is parsed."""


class Expression(Record):
    """One Python expression, with what is needed to evaluate it.

    Attributes:
      text: the stripped text; errors and tracebacks point into it.
      tree: its syntax tree, with positions in `text`.
    """

    text: str
    tree: ast.expr

    @cached_property
    def _code(self) -> dict[tuple[bool, tuple[str, ...]], CodeType]:
        return {}

    @property
    def source(self) -> str:
        """The text of the expression itself: of `net = Net(3)` it is `Net(3)`."""
        return segment(self.text, self.tree)

    @cached_property
    def filename(self) -> str:
        """The filename of the compiled code; `linecache` has `text` under it, so that tracebacks show the line."""
        return f"<call {crc32(self.text.encode()):08x}>"

    def evaluate(self, user_ns: dict[str, object], local_ns: Mapping[str, object] | None = None) -> PyTree:
        """Evaluates the expression.

        Args:
          user_ns: the globals; a walrus binds here.
          local_ns: names of the enclosing function; lambdas and comprehensions see them, too.

        Raises:
          FlaxMagicsError: a name in the expression is not defined.
          Exception: whatever the user's code raises, with `text` in its traceback.
        """
        return self._run(lambda: self.tree, None, user_ns, local_ns)

    def construct(
        self, user_ns: dict[str, object], local_ns: Mapping[str, object] | None = None
    ) -> tuple[Any, tuple[PyTree, ...], dict[str, PyTree]]:
        """`(function, args, kwargs)` of an expression that is a call: evaluates all parts, but does not call."""
        assert isinstance(self.tree, ast.Call)
        (function, *args), kwargs = self._gathered([self.tree.func, *self.tree.args], user_ns, local_ns)
        return function, tuple(args), kwargs

    def _gathered(
        self, args: list[ast.expr], user_ns: dict[str, object], local_ns: Mapping[str, object] | None
    ) -> tuple[tuple[PyTree, ...], dict[str, PyTree]]:
        """Evaluates `args` and this call's keyword arguments, and returns what a called function would receive.

        A function that returns its own arguments is called in place of the user's, so that Python itself unpacks stars,
        keeps the order and refuses repeated keywords.
        """

        def gather(*args: object, **kwargs: object) -> tuple[tuple[PyTree, ...], dict[str, PyTree]]:
            return args, kwargs

        call = self.tree
        assert isinstance(call, ast.Call)
        # Python's messages name the function: `net() got multiple values for keyword argument 'x'`. Module "builtins"
        # is the one that they do not put in front.
        gather.__qualname__ = ast.unparse(call.func)
        gather.__module__ = "builtins"

        def tree() -> ast.expr:
            function = ast.copy_location(ast.Name(_GATHER, ast.Load()), call.func)
            return ast.copy_location(ast.Call(function, args, call.keywords), call)

        return self._run(tree, gather, user_ns, local_ns)  # type: ignore[no-any-return]

    def _run(
        self,
        tree: Callable[[], ast.expr],
        gather: Callable[..., object] | None,
        user_ns: dict[str, object],
        local_ns: Mapping[str, object] | None,
    ) -> Any:
        """Compiles and runs a tree that is made from this expression; `gather` is what `_GATHER` stands for in it."""
        local = {} if local_ns is None or local_ns is user_ns else local_ns
        names = tuple(name for name in self._names if name in local) if local else ()
        # At every evaluation: `linecache` may have been cleared since the code was compiled.
        linecache.cache[self.filename] = (len(self.text), None, self.text.splitlines(True), self.filename)
        # Evaluating and gathering compile differently, and so do other sets of local names.
        which = gather is None, names
        code = self._code.get(which)
        if code is None:
            code = self._code[which] = _compile(tree(), names, self.filename)
        try:
            return FunctionType(code, user_ns)(gather, *(local[name] for name in names))
        except NameError as error:
            frame, _ = list(traceback.walk_tb(error.__traceback__))[-1]
            if not error.name or frame.f_code.co_filename != self.filename:
                raise  # the name is missing in a function of the user's, not in the expression
            raise self._undefined(error.name, [*user_ns, *local]) from None

    @cached_property
    def _names(self) -> tuple[str, ...]:
        return tuple(sorted({node.id for node in ast.walk(self.tree) if isinstance(node, ast.Name)}))

    def _undefined(self, name: str, known: list[str]) -> FlaxMagicsError:
        """The short error for an undefined name in `text`, with the nearest known names."""
        hint = did_you_mean(name, (choice for choice in known if not choice.startswith("_")))
        if hint is None:
            near = nearest(name, (choice for choice in vars(builtins) if choice.islower()), 1)
            hint = f"did you mean {near[0]}?" if near else "no cell that was run has made it"
        used = next((n for n in ast.walk(self.tree) if isinstance(n, ast.Name) and n.id == name), None)
        if used is not None:
            hint = f"{point_at(self.text, start_of(self.text, used))}\n{hint}"
        return FlaxMagicsError(f"name '{name}' is not defined.", hint=hint)


def _compile(tree: ast.expr, names: tuple[str, ...], filename: str) -> CodeType:
    """Code of a function of (gather, *names) that returns the value of `tree`.

    It is a function because locals that `eval` gets are hidden from lambdas and comprehensions. Names bound by a walrus
    are declared `global`, since at the top of a cell a walrus binds there; except that one on a name of the enclosing
    function stays inside the expression.
    """
    arguments = ast.arguments([], [ast.arg(name) for name in (_GATHER, *names)], None, [], [], None, [])
    function = ast.FunctionDef("call", arguments, [ast.Return(tree)], [], None)
    function.type_params = []  # type: ignore[attr-defined]  # `compile` requires it since Python 3.12
    bound = sorted({*assigned_names(tree)} - {*names})
    if bound:
        function.body.insert(0, ast.Global(bound))
    for node in (function, *function.body):
        ast.copy_location(node, tree)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # already given when the text was parsed
        module = compile(ast.fix_missing_locations(ast.Module([function], [])), filename, "exec")
    code = next(constant for constant in module.co_consts if isinstance(constant, CodeType))
    # Named like top-level code, so that tracebacks show no function of ours.
    return code.replace(co_name="<module>", co_qualname="<module>")


def start_of(text: str, node: ast.expr | ast.stmt) -> int:
    """The index in `text` where `node` begins."""
    return index_of(text, node.lineno, node.col_offset)


def end_of(text: str, node: ast.expr | ast.stmt) -> int:
    """The index in `text` where `node` ends."""
    return index_of(text, node.end_lineno or node.lineno, node.end_col_offset or node.col_offset)


def segment(text: str, node: ast.expr | ast.stmt) -> str:
    """The part of `text` that `node` covers."""
    return text[start_of(text, node) : end_of(text, node)]


class Line(Record):
    """A command with its options and its call, for advice that shows an edited line.

    Attributes:
      command: such as `%flax_apply --train`.
      call: the call as `ast.unparse` formats it; arguments whose text is unknown (in a script) are `…`.
      signature: the signature of the called method.
    """

    command: str
    call: str
    signature: inspect.Signature

    def __str__(self) -> str:
        return f"{self.command} {self.call}"

    def without_option(self, flag: str, value: str = "") -> Line:
        """The line without an option of the command; see the function `without_option`."""
        return self._replace(command=without_option(self.command, flag, value))

    def with_argument(self, name: str, write: str | Callable[[str], str] | None) -> Line | None:
        """The line with the argument `name` replaced by `write`, a text or a function of the old text.

        None removes the argument; positional ones after it become keywords. Returns None where this is not possible,
        for instance because the call has starred arguments.
        """
        call = ast.parse(self.call.replace("…", GAP), mode="eval").body
        assert isinstance(call, ast.Call)
        if any(isinstance(arg, ast.Starred) for arg in call.args):
            return None
        names = positional_names(self.signature, len(call.args))
        items: list[tuple[str | None, ast.expr]] = [*zip(names, call.args, strict=True)]
        items += [(item.arg, item.value) for item in call.keywords]
        argument = next((value for place, value in items if place == name), None)
        if argument is None:
            return None
        if write is not None:
            text = write if isinstance(write, str) else write(ast.unparse(argument))
            edited = ast.parse(text.replace("…", GAP), mode="eval").body
            call.args = [edited if arg is argument else arg for arg in call.args]
            for item in call.keywords:
                item.value = edited if item.value is argument else item.value
        else:
            place = names.index(name) if argument in call.args else len(call.args)
            if not all(other.isidentifier() for other in names[place + 1 :]):  # `args[1]` of `*args` has no keyword
                return None
            call.args = call.args[:place]
            call.keywords = [ast.keyword(*item) for item in items[place:] if item[1] is not argument]
        return self._replace(call=ast.unparse(call).replace(GAP, "…"))


def without_option(command: str, flag: str, value: str = "") -> str:
    """`command` without the option `flag`; `value` is a regular expression for its value, empty for a flag."""
    pattern = rf"{flag}[\s=]+{value}" if value else flag
    return re.sub(rf"\s+{pattern}(?=\s|$)", "", command)


def as_array(line: Line, name: str, dtype: str) -> dict[str, str]:
    """Advice (`write` or `form`) to pass the argument `name` as an array of `dtype`."""
    return changed(line, name, lambda argument: f"jnp.asarray({argument}, '{dtype}')")


def changed(line: Line, name: str, write: Callable[[str], str]) -> dict[str, str]:
    """Advice that shows the line with the argument's text replaced by `write(text)`, which may use `jnp`.

    It is a form where the argument has no expression of its own in the call.
    """
    edited = line.with_argument(name, write)
    return {"form": write("…")} if edited is None else written(f"import jax.numpy as jnp\n{edited}")


def new_key(name: str) -> str:
    """A variable name for the PRNG key to pass as the argument `name`."""
    return f"new_{name}" if name.endswith("key") else f"{name}_key"


def positional_names(signature: inspect.Signature, n: int) -> list[str]:
    """Names of the parameters for `n` positional arguments: `args[0]` for `*args`, `argument 3` if too many."""
    names: list[str] = []
    for parameter in signature.parameters.values():
        if parameter.kind is parameter.VAR_POSITIONAL:
            names += [f"{parameter.name}[{i}]" for i in range(n - len(names))]
        elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    return (names + [f"argument {i}" for i in range(len(names), n)])[:n]


def with_arguments(call: str, arguments: Sequence[str]) -> str:
    """The text of a call with more arguments appended."""
    if not arguments:
        return call
    inside = call.rpartition(")")[0].rstrip().rstrip(",")
    return f"{inside}{'' if inside.endswith('(') else ', '}{', '.join(arguments)})"
