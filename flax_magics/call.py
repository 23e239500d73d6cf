"""`model.method(x, train=True)` read as Python: names, arguments, and where it is wrong.

What is read here is evaluated exactly as Python would in that place: order, stars, walrus, names of the enclosing
function. Only the call itself is left to the session.
"""

from __future__ import annotations

import ast
import keyword
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from .errors import FlaxMagicsError
from .expression import Expression, end_of, gathering, named, segment, start_of
from .source import pieces, point_at


class Argument(NamedTuple):
    """One argument as it is written: its text, and its name (None if positional, `*` or `**` if starred)."""

    name: str | None
    text: str


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
        if self._plain is not None:
            given = _look_up(*self._plain, user_ns, user_ns if local_ns is None else local_ns)
            if given is not None:
                return given

        def gather(*args: Any, **kwargs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return args, kwargs

        call = self.tree
        assert isinstance(call, ast.Call)
        result: tuple[tuple[Any, ...], dict[str, Any]] = self._run(
            lambda: gathering(call, call.args), named(gather, call), user_ns, local_ns
        )
        return result

    @cached_property
    def _plain(self) -> tuple[list[ast.Name | ast.Constant], dict[str, ast.Name | ast.Constant]] | None:
        """The arguments where every one is a name or a constant, as most are: these need no code to be run."""
        assert isinstance(self.tree, ast.Call)
        args = [arg for arg in self.tree.args if isinstance(arg, (ast.Name, ast.Constant))]
        kwargs = {
            item.arg: item.value
            for item in self.tree.keywords
            if item.arg is not None and isinstance(item.value, (ast.Name, ast.Constant))
        }
        whole = len(args) == len(self.tree.args) and len(kwargs) == len(self.tree.keywords)
        return (args, kwargs) if whole else None


class Assignment(NamedTuple):
    """`net = Net(3)` as a name and an expression, which is None for a bare `net`."""

    name: str
    expression: Expression | None


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
        Argument("*" if isinstance(arg, ast.Starred) else None, segment(text, _unstarred(arg))) for arg in tree.args
    ]
    arguments += [Argument(item.arg or "**", segment(text, item.value)) for item in tree.keywords]
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
def parse_assignment(text: str, command: str = "%flaxmodel", sample: str = "Net()") -> Assignment:
    """`net = Net(3)` or `net`, read.

    Args:
      sample: what stands for the value in a message that says what to write.

    Raises:
      FlaxMagicsError: for anything else; the message says what to write.
    """
    text, source, _ = _bare(text)
    if not source.strip():
        raise FlaxMagicsError(f"{command} needs a name.", write=f"{command} net = {sample}")
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError) as error:
        raise _bad_name(source, command, sample) or _syntax(text, error, command) from None
    if len(body) > 1:
        raise FlaxMagicsError("one model at a time.", write=_lines(command, (segment(text, node) for node in body)))
    match body[0]:
        case ast.Expr(ast.Name(name)):
            return Assignment(name, None)
        case ast.Assign([ast.Name(name)], value) | ast.AnnAssign(ast.Name(name), _, ast.expr() as value):
            _validate(value, text, command)
            return Assignment(name, Expression(text, value))
        case statement:
            raise _no_assignment(text, statement, command, sample)


def _look_up(
    args: list[ast.Name | ast.Constant],
    kwargs: dict[str, ast.Name | ast.Constant],
    user_ns: Mapping[str, Any],
    local_ns: Mapping[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The values of names and constants; None where a name is in neither namespace (a builtin, or a mistake)."""
    values = []
    for node in (*args, *kwargs.values()):
        if isinstance(node, ast.Constant):
            values.append(node.value)
        elif node.id in local_ns:
            values.append(local_ns[node.id])
        elif node.id in user_ns:
            values.append(user_ns[node.id])
        else:
            return None
    return tuple(values[: len(args)]), dict(zip(kwargs, values[len(args) :], strict=True))


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
        return FlaxMagicsError("one call at a time.", write=_lines(command, (segment(text, node) for node in body)))
    if isinstance(body[0], (ast.Assign, ast.AnnAssign)) and body[0].value is not None:
        value = body[0].value
        target = text[: start_of(text, value)]
        write = f"{target}{command} {text[start_of(text, value) : end_of(text, value)]}"
        return FlaxMagicsError(f"{command} takes the call alone, and gives its value.", write=write)
    return FlaxMagicsError(f"`{_short(text)}` is a statement, not a call.", write=f"{command} net(x)")


def _no_call(text: str, tree: ast.expr, command: str) -> FlaxMagicsError:
    if isinstance(tree, (ast.Name, ast.Attribute)):
        return FlaxMagicsError(f"`{_short(text)}` is not a call.", write=f"{command} {segment(text, tree)}(x)")
    write = f"{command} net(x)"
    if isinstance(tree, ast.Await):
        write = f"{command} {segment(text, tree.value)}"
    elif isinstance(tree, (ast.BinOp, ast.UnaryOp, ast.Compare, ast.Subscript, ast.Tuple, ast.List, ast.BoolOp)):
        calls = [
            node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(_root(node.func), ast.Name)
        ]
        if calls:
            write = _value_first(text, calls[0], command)
    return FlaxMagicsError(f"`{_short(text)}` is not one call.", write=write)


def _value_first(text: str, call: ast.expr, command: str) -> str:
    """Two lines: one that runs `call`, one that goes on with its value."""
    start, end = start_of(text, call), end_of(text, call)
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
    start, end = start_of(text, root), end_of(text, root)
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


def _bad_name(source: str, command: str, sample: str) -> FlaxMagicsError | None:
    """The error for an assignment whose name, sign or missing value Python refuses; None if it is something else."""
    walrus = re.match(r"(\w+)\s*:=\s*(.+)", source, re.DOTALL)
    if walrus:
        return FlaxMagicsError("write `=`, not `:=`.", write=f"{command} {walrus[1]} = {walrus[2]}")
    found = re.fullmatch(r"([^\s=()\[\]{}.,'\"]+)\s*(?:=(?!=)\s*(.*))?", source, re.DOTALL)
    if not found:
        return None
    name, value = found[1], found[2]
    if name.isidentifier() and not keyword.iskeyword(name):
        return None if value else FlaxMagicsError(f"`{name} =` needs a value.", write=f"{command} {name} = {sample}")
    clean = re.sub(r"\W", "_", name).lstrip("0123456789")
    clean = clean if clean.isidentifier() and not keyword.iskeyword(clean) else "net"
    kind = "a word of Python, not a name" if keyword.iskeyword(name) else "not a Python name"
    return FlaxMagicsError(f"`{name}` is {kind}.", write=f"{command} {clean}" + (f" = {value}" if value else ""))


def _no_assignment(text: str, statement: ast.stmt, command: str, sample: str) -> FlaxMagicsError:
    match statement:
        case ast.Assign([_, _, *_] as targets, value):
            names = [segment(text, target) for target in targets]
            write = _lines(command, (f"{name} = {segment(text, value)}" for name in names))
            return FlaxMagicsError("one name at a time: `a = b = …` would give one model two names.", write=write)
        case ast.Assign([ast.Tuple() | ast.List()]):
            return FlaxMagicsError("one name at a time.", write=f"{command} net = {sample}")
        case ast.Assign([target], value):
            name = _name_for(target, getattr(target, "attr", "").upper())
            message = f"`{_short(segment(text, target))}` is not a plain name."
            return FlaxMagicsError(message, write=f"{command} {name} = {segment(text, value)}")
        case ast.Expr(ast.Tuple(elements)):
            return FlaxMagicsError("one model at a time.", write=_lines(command, (segment(text, e) for e in elements)))
        case ast.Expr(ast.Compare(ast.Name(name), [ast.Eq()], [value])):
            return FlaxMagicsError("write `=`, not `==`.", write=f"{command} {name} = {segment(text, value)}")
        case ast.Expr(value):
            made = ""
            if isinstance(value, ast.Call):
                made = value.func.id if isinstance(value.func, ast.Name) else getattr(value.func, "attr", "")
            write = f"{command} {_name_for(value, made)} = {segment(text, value)}"
            return FlaxMagicsError(f"`{_short(text)}` has no name.", write=write)
        case _:
            return FlaxMagicsError(f"`{_short(text)}` is no name and no assignment.", write=f"{command} net = {sample}")
