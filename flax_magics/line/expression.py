"""One Python expression: its text with positions, evaluated as Python would in the place where it stands."""

from __future__ import annotations

import ast
import builtins
import linecache
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import CodeType, FunctionType
from typing import Any
from zlib import crc32

from ..base.tokens import index_of, point_at
from ..errors import FlaxMagicsError, did_you_mean, nearest

_GATHER = "__flax_gather__"


@dataclass(frozen=True, eq=False)
class Expression:
    """One Python expression, with what is needed to evaluate it.

    Attributes:
      text: what was written, white space around it taken off; errors and tracebacks point into it.
      tree: the expression; its positions are those in `text`.
    """

    text: str
    tree: ast.expr
    _code: dict[tuple[bool, tuple[str, ...]], CodeType] = field(default_factory=dict, init=False, repr=False)

    @property
    def source(self) -> str:
        """The expression's own text, as it was written."""
        return segment(self.text, self.tree)

    @property
    def is_call(self) -> bool:
        """Whether it can be taken apart by `construct`."""
        return isinstance(self.tree, ast.Call)

    @cached_property
    def filename(self) -> str:
        """The name under which `text` stands in `linecache`, so that tracebacks show it."""
        return f"<call {crc32(self.text.encode()):08x}>"

    def evaluate(self, user_ns: dict[str, Any], local_ns: Mapping[str, Any] | None = None) -> Any:
        """The expression's value.

        Args:
          user_ns: the globals; a walrus binds here.
          local_ns: names of the enclosing function, which lambdas and comprehensions see too.

        Raises:
          FlaxMagicsError: for a name that is not defined.
          Exception: whatever the user's code raises, with `text` in its traceback.
        """
        return self._run(lambda: self.tree, None, user_ns, local_ns)

    def construct(
        self, user_ns: dict[str, Any], local_ns: Mapping[str, Any] | None = None
    ) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        """`(function, args, kwargs)` of an expression that is a call, everything evaluated but the call itself."""
        assert isinstance(self.tree, ast.Call)
        (function, *args), kwargs = self._gathered([self.tree.func, *self.tree.args], user_ns, local_ns)
        return function, tuple(args), kwargs

    def _gathered(
        self, args: list[ast.expr], user_ns: dict[str, Any], local_ns: Mapping[str, Any] | None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What a function would get that is called with `args` and with the keyword arguments of this call."""

        def gather(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return args, kwargs

        call = self.tree
        assert isinstance(call, ast.Call)
        # Python names the function when it refuses a call: `net() got multiple values for keyword argument 'x'`.
        gather.__qualname__ = ast.unparse(call.func)
        gather.__module__ = "builtins"

        def tree() -> ast.expr:
            function = ast.copy_location(ast.Name(_GATHER, ast.Load()), call.func)
            return ast.copy_location(ast.Call(function, args, call.keywords), call)

        gathered: tuple[tuple[Any, ...], dict[str, Any]] = self._run(tree, gather, user_ns, local_ns)
        return gathered

    def _run(
        self,
        tree: Callable[[], ast.expr],
        gather: Callable[..., Any] | None,
        user_ns: dict[str, Any],
        local_ns: Mapping[str, Any] | None,
    ) -> Any:
        local = {} if local_ns is None or local_ns is user_ns else local_ns
        names = tuple(name for name in self._names if name in local) if local else ()
        # Every time: linecache may have been cleared since the code was compiled.
        linecache.cache[self.filename] = (len(self.text), None, self.text.splitlines(True), self.filename)
        # The value and the call taken apart are two codes of one expression.
        which = gather is None, names
        code = self._code.get(which)
        if code is None:
            code = self._code[which] = _compile(tree(), names, self.filename)
        try:
            return FunctionType(code, user_ns)(gather, *(local[name] for name in names))
        except NameError as error:
            short = self._undefined(error, [*user_ns, *local])
            if short is None:
                raise
            raise short from None

    @cached_property
    def _names(self) -> tuple[str, ...]:
        return tuple(sorted({node.id for node in ast.walk(self.tree) if isinstance(node, ast.Name)}))

    def _undefined(self, error: NameError, known: list[str]) -> FlaxMagicsError | None:
        """The short error for a name that `text` itself uses; None if it was other code that looked for it."""
        trace = error.__traceback__
        while trace is not None and trace.tb_next is not None:
            trace = trace.tb_next
        name = error.name
        if trace is None or not name or trace.tb_frame.f_code.co_filename != self.filename:
            return None
        hint = did_you_mean(name, (choice for choice in known if not choice.startswith("_")))
        if hint is None:
            near = nearest(name, (choice for choice in vars(builtins) if choice.islower()), 1)
            hint = f"did you mean {near[0]}?" if near else "no cell that was run has made it"
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Name) and node.id == name:
                hint = f"{point_at(self.text, start_of(self.text, node))}\n{hint}"
                break
        return FlaxMagicsError(f"name '{name}' is not defined.", hint=hint)


def _compile(tree: ast.expr, names: tuple[str, ...], filename: str) -> CodeType:
    """Code of a function of (gather, *names) that returns `tree`.

    A function, because `eval` with separate locals hides them from lambdas and comprehensions. `global`, because a
    walrus at the top of a cell binds there; one on a name of the enclosing function cannot reach that function.
    """
    parameters = [ast.arg(name) for name in (_GATHER, *names)]
    function = ast.FunctionDef(
        "call", ast.arguments([], parameters, None, [], [], None, []), [ast.Return(tree)], [], None
    )
    function.type_params = []  # type: ignore[attr-defined]
    bound = sorted(set(_walrus(tree)) - set(names))
    if bound:
        function.body.insert(0, ast.Global(bound))
    for node in (function, *function.body):
        ast.copy_location(node, tree)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)  # given once, when the text was read
        module = compile(ast.fix_missing_locations(ast.Module([function], [])), filename, "exec")
    code = next(constant for constant in module.co_consts if isinstance(constant, CodeType))
    # Tracebacks then show the text without a function's name and arguments, as for any top-level line.
    return code.replace(co_name="<module>", co_qualname="<module>")


def _walrus(tree: ast.AST) -> list[str]:
    """Names that `:=` binds in the scope that `tree` itself is in (comprehensions bind there, lambdas do not)."""
    if isinstance(tree, ast.Lambda):
        return [
            name for default in (*tree.args.defaults, *tree.args.kw_defaults) if default for name in _walrus(default)
        ]
    bound = [tree.target.id] if isinstance(tree, ast.NamedExpr) else []
    return bound + [name for child in ast.iter_child_nodes(tree) for name in _walrus(child)]


def start_of(text: str, node: ast.expr | ast.stmt) -> int:
    """Where `node` begins, as an index into `text`."""
    return index_of(text, node.lineno, node.col_offset)


def end_of(text: str, node: ast.expr | ast.stmt) -> int:
    """Where `node` ends, as an index into `text`."""
    return index_of(text, node.end_lineno or node.lineno, node.end_col_offset or node.col_offset)


def segment(text: str, node: ast.expr | ast.stmt) -> str:
    """The text of `node`."""
    return text[start_of(text, node) : end_of(text, node)]
