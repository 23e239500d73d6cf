"""`model.method(x, train=True)` read as Python: names, arguments, and where it is wrong.

What is read here is evaluated exactly as Python would in that place: order, stars, walrus, names of the enclosing
function. Only the call itself is left to the session.
"""

from __future__ import annotations

import ast
import builtins
import keyword
import linecache
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from types import CodeType, FunctionType
from typing import Any, NamedTuple
from zlib import crc32

from .errors import FlaxMagicsError, did_you_mean, nearest
from .source import index_of, pieces, point_at

_GATHER = "__flax_gather__"


class Argument(NamedTuple):
    """One argument as it is written: its text, and its name (None if positional, `*` or `**` if starred)."""

    name: str | None
    text: str


@dataclass(frozen=True, eq=False)
class Expression:
    """One Python expression, with what is needed to evaluate it.

    Attributes:
      text: what was written, white space around it taken off; errors and tracebacks point into it.
      tree: the expression; its positions are those in `text`.
    """

    text: str
    tree: ast.expr
    _code: dict[tuple[str, ...], CodeType] = field(default_factory=dict, init=False, repr=False)

    @property
    def source(self) -> str:
        """The expression's own text, as it was written."""
        return _segment(self.text, self.tree)

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

        def gather(*args: Any, **kwargs: Any) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
            return args[0], args[1:], kwargs

        call = self.tree
        assert isinstance(call, ast.Call)
        result: tuple[Any, tuple[Any, ...], dict[str, Any]] = self._run(
            lambda: _gathering(call, [call.func, *call.args]), _named(gather, call), user_ns, local_ns
        )
        return result

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
        code = self._code.get(names)
        if code is None:
            code = self._code[names] = _compile(tree(), names, self.filename)
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
                hint = f"{point_at(self.text, _start(self.text, node))}\n{hint}"
                break
        return FlaxMagicsError(f"name '{name}' is not defined.", hint=hint)


@dataclass(frozen=True, eq=False)
class ParsedCall(Expression):
    """A call on a plain name or on an attribute of one.

    Attributes:
      target: the name, such as `net`.
      method: the attributes after it: () for `net(x)`, ('encoder', 'embed') for `net.encoder.embed(x)`.
      arguments: as they are written, in order.
      call: the call in Python's normal form, such as `net(x, train=False)`.
      quiet: it ended in `;`.
    """

    target: str = ""
    method: tuple[str, ...] = ()
    arguments: tuple[Argument, ...] = ()
    call: str = ""
    quiet: bool = False

    @property
    def keywords(self) -> tuple[str, ...]:
        """Names of the keyword arguments that are written in the call."""
        return tuple(name for name, _ in self.arguments if name is not None and name.isidentifier())

    def evaluate(
        self, user_ns: dict[str, Any], local_ns: Mapping[str, Any] | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """`(args, kwargs)` of the call, evaluated as Python would; the target is not looked up.

        See `Expression.evaluate` for arguments and errors.
        """

        def gather(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return args, kwargs

        call = self.tree
        assert isinstance(call, ast.Call)
        result: tuple[tuple[Any, ...], dict[str, Any]] = self._run(
            lambda: _gathering(call, call.args), _named(gather, call), user_ns, local_ns
        )
        return result


class Assignment(NamedTuple):
    """`net = Net(3)` as a name and an expression, which is None for a bare `net`."""

    name: str
    expression: Expression | None


def _gathering(call: ast.Call, args: list[ast.expr]) -> ast.expr:
    """`call` with its arguments handed to the function named `_GATHER`."""
    function = ast.copy_location(ast.Name(_GATHER, ast.Load()), call.func)
    return ast.copy_location(ast.Call(function, args, call.keywords), call)


def _named(gather: Callable[..., Any], call: ast.Call) -> Callable[..., Any]:
    # Python names the function when it refuses a call: `net() got multiple values for keyword argument 'x'`.
    gather.__qualname__ = ast.unparse(call.func)
    gather.__module__ = "builtins"
    return gather


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
    own = [tree.target.id] if isinstance(tree, ast.NamedExpr) else []
    return own + [name for child in ast.iter_child_nodes(tree) for name in _walrus(child)]


@lru_cache(maxsize=256)
def parse_call(text: str, command: str = "%flax_apply") -> ParsedCall:
    """`net(x)` or `net.method(x)`, read.

    Args:
      text: may span lines, and may end in `;` or a comment.
      command: as messages write it, with the options that were given.

    Raises:
      FlaxMagicsError: for anything else; the message says what to write.
    """
    text, source, quiet = _bare(text)
    if not source.strip():
        raise FlaxMagicsError(f"{command} needs a call.", write=f"{command} net(x)")
    try:
        tree = ast.parse(source, mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise _statement(text, source, command) or _syntax(text, error, command) from None
    if not isinstance(tree, ast.Call):
        raise _no_call(text, tree, command)
    target, method = _path(text, tree, command)
    _validate(tree, text, command)
    arguments = [
        Argument("*" if isinstance(arg, ast.Starred) else None, _segment(text, _unstarred(arg))) for arg in tree.args
    ]
    arguments += [Argument(item.arg or "**", _segment(text, item.value)) for item in tree.keywords]
    return ParsedCall(
        text, tree, target=target, method=method, arguments=tuple(arguments), call=ast.unparse(tree), quiet=quiet
    )


def parse_expression(text: str, command: str) -> Expression:
    """Any one expression, read, such as the value of an option.

    Raises:
      FlaxMagicsError: a syntax error.
    """
    text = text.strip()
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise _syntax(text, error, command) from None
    _validate(tree, text, command)
    return Expression(text, tree)


@lru_cache(maxsize=64)
def parse_assignment(text: str, command: str = "%flaxmodel") -> Assignment:
    """`net = Net(3)` or `net`, read.

    Raises:
      FlaxMagicsError: for anything else; the message says what to write.
    """
    text, source, _ = _bare(text)
    if not source.strip():
        raise FlaxMagicsError(f"{command} needs a name.", write=f"{command} net = Net()")
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError) as error:
        raise _bad_name(source, command) or _syntax(text, error, command) from None
    if len(body) > 1:
        raise FlaxMagicsError("one model at a time.", write=_lines(command, (_segment(text, node) for node in body)))
    match body[0]:
        case ast.Expr(ast.Name(name)):
            return Assignment(name, None)
        case ast.Assign([ast.Name(name)], value) | ast.AnnAssign(ast.Name(name), _, ast.expr() as value):
            _validate(value, text, command)
            return Assignment(name, Expression(text, value))
        case statement:
            raise _no_assignment(text, statement, command)


def _bare(text: str) -> tuple[str, str, bool]:
    """`text` stripped; the same with blanks for comments and for a `;` at its end; whether it had the `;`."""
    text = text.strip()
    source, end = list(text), None
    for piece in pieces(text):
        if piece.kind == "comment":
            source[piece.start : piece.end] = " " * (piece.end - piece.start)
        elif piece.kind not in ("space", "newline", "join"):
            end = piece
    quiet = end is not None and end.kind == "word" and text[end.end - 1] == ";"
    if end is not None and quiet:
        source[end.end - 1] = " "
    return text, "".join(source).rstrip(), quiet


def _start(text: str, node: ast.expr | ast.stmt) -> int:
    return index_of(text, node.lineno, node.col_offset)


def _end(text: str, node: ast.expr | ast.stmt) -> int:
    return index_of(text, node.end_lineno or node.lineno, node.end_col_offset or node.col_offset)


def _segment(text: str, node: ast.expr | ast.stmt) -> str:
    return text[_start(text, node) : _end(text, node)]


def _unstarred(node: ast.expr) -> ast.expr:
    return node.value if isinstance(node, ast.Starred) else node


def _short(text: str, limit: int = 40) -> str:
    line, *more = text.split("\n")
    return line if len(line) <= limit and not more else line[: limit - 1].rstrip() + "…"


def _lines(command: str, texts: Any) -> str:
    return "\n".join(f"{command} {text}" for text in texts)


def _syntax(text: str, error: SyntaxError | ValueError, command: str) -> FlaxMagicsError:
    reason, line, column = str(error), 1, 1
    if isinstance(error, SyntaxError):
        reason, line, column = error.msg, error.lineno or 1, error.offset or 1
    lines = text.split("\n")
    line = min(line, len(lines))
    position = sum(len(before) + 1 for before in lines[: line - 1]) + min(max(column - 1, 0), len(lines[line - 1]))
    return FlaxMagicsError(f"{command}: {reason}", hint=point_at(text, position))


def _validate(tree: ast.expr, text: str, command: str) -> None:
    """What only the compiler finds: `await`, `yield`, a keyword given twice."""
    try:
        compile(ast.Expression(tree), "<call>", "eval")
    except (SyntaxError, ValueError) as error:
        raise _syntax(text, error, command) from None


def _statement(text: str, source: str, command: str) -> FlaxMagicsError | None:
    """The error for text that is Python, but no expression; None if it is no Python."""
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError):
        return None
    if len(body) > 1:
        return FlaxMagicsError("one call at a time.", write=_lines(command, (_segment(text, node) for node in body)))
    if isinstance(body[0], (ast.Assign, ast.AnnAssign)) and body[0].value is not None:
        value = body[0].value
        target = text[: _start(text, value)]
        write = f"{target}{command} {text[_start(text, value) : _end(text, value)]}"
        return FlaxMagicsError(f"{command} takes the call alone, and gives its value.", write=write)
    return FlaxMagicsError(f"`{_short(text)}` is a statement, not a call.", write=f"{command} net(x)")


def _no_call(text: str, tree: ast.expr, command: str) -> FlaxMagicsError:
    if isinstance(tree, (ast.Name, ast.Attribute)):
        return FlaxMagicsError(f"`{_short(text)}` is not a call.", write=f"{command} {_segment(text, tree)}(x)")
    write = f"{command} net(x)"
    if isinstance(tree, ast.Await):
        write = f"{command} {_segment(text, tree.value)}"
    elif isinstance(tree, (ast.BinOp, ast.UnaryOp, ast.Compare, ast.Subscript, ast.Tuple, ast.List, ast.BoolOp)):
        calls = [
            node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(_root(node.func), ast.Name)
        ]
        if calls:
            write = _value_first(text, calls[0], command)
    return FlaxMagicsError(f"`{_short(text)}` is not one call.", write=write)


def _value_first(text: str, call: ast.expr, command: str) -> str:
    """Two lines: one that runs `call`, one that goes on with its value."""
    start, end = _start(text, call), _end(text, call)
    return f"y = {command} {text[start:end]}\n{text[:start]}y{text[end:]}"


def _root(node: ast.expr) -> ast.expr:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node


def _path(text: str, call: ast.Call, command: str) -> tuple[str, tuple[str, ...]]:
    """The name that is called, and the attributes after it."""
    root, node, method = _root(call.func), call.func, []
    while isinstance(node, ast.Attribute):
        method.append(node.attr)
        node = node.value
    if isinstance(root, ast.Name):
        return root.id, tuple(reversed(method))
    made = ""
    if isinstance(root, ast.Call):
        function = root.func
        made = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
        if method and not made[:1].isupper():
            # `net(x).sum()`: the model is called, and then something is done with its value.
            message = f"`{_short(text)}` is more than the model's call."
            raise FlaxMagicsError(message, write=_value_first(text, root, command))
    name = _name_for(root, made)
    start, end = _start(text, root), _end(text, root)
    register = f"%flaxmodel {name} = {text[start:end]}"
    raise FlaxMagicsError(
        f"`{_short(text[start:end])}` has no name: register it first.",
        write=f"{register}\n{command} {text[:start]}{name}{text[end:]}",
    )


def _name_for(root: ast.expr, made: str) -> str:
    """A variable's name for what `root` gives: `net` for `Net(3)`, `a` for `nets['a']`."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", made).lower() if made != made.lower() else ""
    if isinstance(root, ast.Subscript) and isinstance(root.slice, ast.Constant) and isinstance(root.slice.value, str):
        name = root.slice.value
    return name if name.isidentifier() and not keyword.iskeyword(name) else "net"


def _bad_name(source: str, command: str) -> FlaxMagicsError | None:
    """The error for an assignment whose name, sign or missing value Python refuses; None if it is something else."""
    walrus = re.match(r"(\w+)\s*:=\s*(.+)", source, re.DOTALL)
    if walrus:
        return FlaxMagicsError("write `=`, not `:=`.", write=f"{command} {walrus[1]} = {walrus[2]}")
    found = re.fullmatch(r"([^\s=()\[\]{}.,'\"]+)\s*(?:=(?!=)\s*(.*))?", source, re.DOTALL)
    if not found:
        return None
    name, value = found[1], found[2]
    if name.isidentifier() and not keyword.iskeyword(name):
        return None if value else FlaxMagicsError(f"`{name} =` needs a value.", write=f"{command} {name} = Net()")
    clean = re.sub(r"\W", "_", name).lstrip("0123456789")
    clean = clean if clean.isidentifier() and not keyword.iskeyword(clean) else "net"
    kind = "a word of Python, not a name" if keyword.iskeyword(name) else "not a Python name"
    return FlaxMagicsError(f"`{name}` is {kind}.", write=f"{command} {clean}" + (f" = {value}" if value else ""))


def _no_assignment(text: str, statement: ast.stmt, command: str) -> FlaxMagicsError:
    match statement:
        case ast.Assign([_, _, *_] as targets, value):
            names = [_segment(text, target) for target in targets]
            write = _lines(command, (f"{name} = {_segment(text, value)}" for name in names))
            return FlaxMagicsError("one name at a time: `a = b = …` would give one model two names.", write=write)
        case ast.Assign([ast.Tuple() | ast.List()]):
            return FlaxMagicsError("one name at a time.", write=f"{command} net = Net()")
        case ast.Assign([target], value):
            name = _name_for(target, getattr(target, "attr", "").upper())
            message = f"`{_short(_segment(text, target))}` is not a plain name."
            return FlaxMagicsError(message, write=f"{command} {name} = {_segment(text, value)}")
        case ast.Expr(ast.Tuple(elements)):
            return FlaxMagicsError("one model at a time.", write=_lines(command, (_segment(text, e) for e in elements)))
        case ast.Expr(ast.Compare(ast.Name(name), [ast.Eq()], [value])):
            return FlaxMagicsError("write `=`, not `==`.", write=f"{command} {name} = {_segment(text, value)}")
        case ast.Expr(value):
            made = ""
            if isinstance(value, ast.Call):
                made = value.func.id if isinstance(value.func, ast.Name) else getattr(value.func, "attr", "")
            write = f"{command} {_name_for(value, made)} = {_segment(text, value)}"
            return FlaxMagicsError(f"`{_short(text)}` has no name.", write=write)
        case _:
            return FlaxMagicsError(f"`{_short(text)}` is no name and no assignment.", write=f"{command} net = Net()")
