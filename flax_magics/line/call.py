"""Parsing of a command's call, `model.method(x, train=True)`, and the error messages for everything else.

The arguments are evaluated exactly as Python would do in that place: order, stars, walrus, names of the enclosing
function. Only the call itself is left to the session.
"""

from __future__ import annotations

import ast
import builtins
import itertools
import keyword
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from functools import cached_property, lru_cache

from ..base.tokens import ends_quietly, pieces, point_at, statements, variable_name
from ..base.types import PyTree
from ..errors import FlaxMagicsError, written
from .expression import Expression, end_of, segment, start_of

Argument = tuple[str | None, str]
"""One argument as written in the call: its keyword (None if positional, `*` or `**` if starred), and its text."""
Assignment = tuple[str, Expression | None]
"""`net = Net(3)` as a name and an expression; the expression is None for a bare `net`."""


class CallExpression(Expression):
    """A call of a plain name or of an attribute of one, parsed.

    Attributes:
      target: the name, such as `net`.
      method: the attributes after it: () for `net(x)`, ('encoder', 'embed') for `net.encoder.embed(x)`.
      quiet: the text ended in `;`, so that the notebook shows no output.
      command: the command with the options that were given, for messages: `%flax_apply --train`.
    """

    tree: ast.Call
    target: str
    method: tuple[str, ...]
    quiet: bool
    command: str

    @cached_property
    def call(self) -> str:
        """The call as `ast.unparse` formats it, such as `net(x, train=False)`."""
        return ast.unparse(self.tree)

    @property
    def arguments(self) -> tuple[Argument, ...]:
        """The arguments as written: positional ones first, then keywords."""
        args = [("*", arg.value) if isinstance(arg, ast.Starred) else (None, arg) for arg in self.tree.args]
        kwargs = [(item.arg or "**", item.value) for item in self.tree.keywords]
        return tuple((name, segment(self.text, value)) for name, value in (*args, *kwargs))

    def evaluate(
        self, user_ns: dict[str, object], local_ns: Mapping[str, object] | None = None
    ) -> tuple[tuple[PyTree, ...], dict[str, PyTree]]:
        """`(args, kwargs)` of the call, evaluated as Python would; the target is not looked up.

        See `Expression.evaluate` for arguments and errors.
        """
        # Names and constants are looked up without running code: this is on the path of every run in a loop.
        if self.is_plain:
            local = user_ns if local_ns is None else local_ns
            args: list[PyTree] = []
            kwargs: dict[str, PyTree] = {}
            try:
                for keyword, name, value in self._plain:
                    if name is not None:
                        value = local[name] if name in local else user_ns[name]
                    if keyword is None:
                        args.append(value)
                    else:
                        kwargs[keyword] = value
                return tuple(args), kwargs
            except KeyError:  # a builtin or an undefined name: running code finds the one and explains the other
                pass
        return self._gathered(self.tree.args, user_ns, local_ns)

    @cached_property
    def is_plain(self) -> bool:
        """Whether every argument is a name or a constant, as in most calls."""
        named = all(item.arg is not None for item in self.tree.keywords)
        values = (*self.tree.args, *(item.value for item in self.tree.keywords))
        return named and all(isinstance(value, (ast.Name, ast.Constant)) for value in values)

    @cached_property
    def _plain(self) -> list[tuple[str | None, str | None, object]]:
        """The arguments of a call that `is_plain`: the keyword of each, and its name or the constant."""
        written = [
            *((None, value) for value in self.tree.args),
            *((item.arg, item.value) for item in self.tree.keywords),
        ]
        return [(keyword, getattr(value, "id", None), getattr(value, "value", None)) for keyword, value in written]


@lru_cache(maxsize=256)
def parse_call(text: str, command: str = "%flax_apply", taken: frozenset[str] = frozenset()) -> CallExpression:
    """Parses `net(x)` or `net.method(x)`.

    Args:
      text: may span lines, and may end in `;` or a comment.
      command: the command for messages, with the options that were given.
      taken: names that advice does not bind: they hold something of the user's.

    Raises:
      FlaxMagicsError: the text is anything else; the message says what to write.
    """
    text, source, quiet = _bare(text)
    if not source.strip():
        raise _refused(f"{_name(command)} needs a call, such as net(x).", f"{command} …")
    try:
        tree = ast.parse(source, mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise _statement(text, source, command, taken) or syntax_error(text, error, _name(command)) from None
    if isinstance(tree, (ast.Name, ast.Attribute)):
        raise _refused(f"`{_short(text)}` is not a call.", f"{command} {segment(text, tree)}(…)")
    if not isinstance(tree, ast.Call):
        awaited = isinstance(tree, ast.Await) and root_name(tree.value) is not None
        line = f"{command} {segment(text, tree.value)}" if awaited else values_first(text, tree, command, taken=taken)  # type: ignore[attr-defined]
        raise _refused(f"`{_short(text)}` is not one call.", line)
    if not isinstance(_root(tree.func), ast.Name):
        raise _no_name(text, tree, command, taken)
    _validate(tree, text, command)
    target, *method = ast.unparse(tree.func).split(".")
    return CallExpression(text, tree, target=target, method=tuple(method), quiet=quiet, command=command)


def parse_expression(text: str, command: str) -> Expression:
    """Parses a single expression, such as the value of an option.

    Raises:
      FlaxMagicsError: it has a syntax error.
    """
    text = text.strip()
    try:
        tree = ast.parse(text, mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise syntax_error(text, error, _name(command)) from None
    _validate(tree, text, command)
    return Expression(text, tree)


@lru_cache(maxsize=64)
def parse_assignment(
    text: str, command: str = "%flaxmodel", sample: str = "net = Net(3)", taken: frozenset[str] = frozenset()
) -> Assignment:
    """Parses `net = Net(3)` or `net`.

    Args:
      sample: an example of the text, for the message about an empty one.
      taken: as in `parse_call`.

    Raises:
      FlaxMagicsError: the text is anything else; the message says what to write.
    """
    text, source, _ = _bare(text)
    if not source.strip():
        raise _refused(f"{command} needs a name, such as {sample}.", f"{command} …")
    try:
        body = ast.parse(source).body
    except (SyntaxError, ValueError) as error:
        raise _bad_name(source, command) or syntax_error(text, error, _name(command)) from None
    if len(body) > 1:
        raise _refused("one model at a time.", _registrations(text, body, command, taken))
    match body[0]:
        case ast.Expr(ast.Name(name)):
            return name, None
        case ast.Assign([ast.Name(name)], value) | ast.AnnAssign(ast.Name(name), _, ast.expr() as value):
            _validate(value, text, command)
            return name, Expression(text, value)
        case statement:
            raise _no_assignment(text, statement, command, taken)


def _bare(text: str) -> tuple[str, str, bool]:
    """(`text` stripped, the same without comments and a final `;`, whether it had the `;`)."""
    text = text.strip()
    # Comments become blanks of the same length: positions in the tree then hold for `text`, too.
    source = "".join(
        " " * (piece.end - piece.start) if piece.kind == "comment" else text[piece.start : piece.end]
        for piece in pieces(text)
    ).rstrip()
    quiet = ends_quietly(text)
    return text, source[:-1].rstrip() if quiet else source, quiet


def _refused(message: str, line: str) -> FlaxMagicsError:
    """The error for a text that cannot be parsed; `line` is what to write instead."""
    return FlaxMagicsError(message, **written(line))


def _short(text: str, limit: int = 40) -> str:
    line, *more = text.split("\n")
    return line if len(line) <= limit and not more else line[: limit - 1].rstrip() + "…"


def _name(command: str) -> str:
    """The command without its options: `%flax_apply` of `%flax_apply --train`."""
    return command.split(" ")[0]


def syntax_error(text: str, error: Exception, place: str) -> FlaxMagicsError:
    """A Python syntax error as a short message with a caret.

    `place` is the beginning of the message; a `{line}` in it is replaced by the line's number.
    """
    reason, line, column = str(error), 1, 1
    if isinstance(error, SyntaxError):
        reason, line, column = error.msg, error.lineno or 1, error.offset or 1
    lines = text.split("\n")
    line = min(line, len(lines))
    position = sum(len(above) + 1 for above in lines[: line - 1]) + min(max(column - 1, 0), len(lines[line - 1]))
    return FlaxMagicsError(f"{place.format(line=line)}: {reason}", hint=point_at(text, position))


def _validate(tree: ast.expr, text: str, command: str) -> None:
    """Raises the error for what only the compiler refuses, not `ast.parse`: `await`, `yield`, a repeated keyword."""
    try:
        compile(ast.Expression(tree), "<call>", "eval")
    except (SyntaxError, ValueError) as error:
        raise syntax_error(text, error, _name(command)) from None


def _statement(text: str, source: str, command: str, taken: frozenset[str]) -> FlaxMagicsError | None:
    """The error for text that parses as statements but is no expression; None if it does not parse."""
    body = statements(source)
    if not body:
        return None
    if len(body) > 1:
        calls = [node for node in body if isinstance(getattr(node, "value", None), ast.Call)]
        lines = [_run_first(text, node, command, taken) for node in calls]
        if len(calls) < len(body) or len({root for call in calls if (root := root_name(call.value))}) > 1:  # type: ignore[attr-defined]
            lines = [*lines[:1], "…"]  # whether the other statements call the model cannot be told
        return _refused("one call at a time.", "\n".join(lines))
    if isinstance(body[0], (ast.Assign, ast.AnnAssign)) and body[0].value is not None:
        message = f"{_name(command)} takes the call alone, and gives its value."
        return _refused(message, _run_first(text, body[0], command, taken))
    return _refused(f"`{_short(text)}` is a statement, not a call.", f"{command} …")


def _run_first(text: str, statement: ast.stmt, command: str, taken: frozenset[str]) -> str:
    """The lines to write for a statement: its call run by the command, its value assigned as before."""
    value: ast.expr = statement.value  # type: ignore[attr-defined]
    if root_name(value) is None:
        lines = values_first(text, statement, command, taken=taken)
        return lines if "\n" in lines else f"{text[start_of(text, statement) : start_of(text, value)]}{lines}"
    line = f"{command} {segment(text, value)}"
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    if len(targets) > 1:  # IPython's syntax is `a = %magic`, without a second target
        first, *others = (segment(text, target) for target in targets)
        return "\n".join([f"{first} = {line}", *(f"{other} = {first}" for other in others)])
    return text[start_of(text, statement) : start_of(text, value)] + line


def values_first(
    text: str,
    tree: ast.expr | ast.stmt,
    command: str,
    calls: list[ast.Call] | None = None,
    *,
    taken: Container[str] = (),
) -> str:
    """The lines to write for code around model calls: one command for each call, then `tree` with their values.

    Args:
      calls: the model's calls. Left out: all calls in `tree`, provided that they call one name, are not nested and run
        exactly once. Otherwise it cannot be told which name is the model, and the result is a form.
      taken: as in `parse_call`.
    """
    if calls is None:
        lazy = any(isinstance(node, (ast.Lambda, ast.comprehension)) for node in ast.walk(tree))
        calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and not _is_builtin(node)]
        inner = any(isinstance(node, ast.Call) for call in calls for node in list(ast.walk(call))[1:])
        if lazy or inner or len({root_name(call) for call in calls}) != 1 or root_name(calls[0]) is None:
            return f"{command} …"
    named_calls = list(
        zip(fresh_names("y", tree, taken), sorted(calls, key=lambda call: start_of(text, call)), strict=False)
    )
    rest = text[: end_of(text, tree)]
    for name, call in reversed(named_calls):  # from the end, so that earlier positions stay valid
        rest = f"{rest[: start_of(text, call)]}{name}{rest[end_of(text, call) :]}"
    lines = [f"{name} = {command} {segment(text, call)}" for name, call in named_calls]
    return "\n".join([*lines, rest[start_of(text, tree) :]])


def fresh_names(name: str, tree: ast.AST, taken: Container[str] = ()) -> Iterator[str]:
    """`name`, `name2`, `name3` …, without names that `tree` uses or that are taken."""
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    numbered = (name if n == 1 else f"{name}{n}" for n in itertools.count(1))
    return (each for each in numbered if each not in used and each not in taken)


def root_name(node: ast.expr) -> str | None:
    """The first name of a call: `net` of `net.encode(x)`. None for anything but a call of a name or its attributes."""
    root = _root(node.func) if isinstance(node, ast.Call) else None
    return root.id if isinstance(root, ast.Name) else None


def _is_builtin(node: ast.expr) -> bool:
    """Whether `node` is a call of a Python builtin, such as `print`."""
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and hasattr(builtins, node.func.id)


def _root(node: ast.expr) -> ast.expr:
    while isinstance(node, ast.Attribute):
        node = node.value
    return node


def _no_name(text: str, call: ast.Call, command: str, taken: frozenset[str]) -> FlaxMagicsError:
    """The error for a call of anything but a name or its attribute: `Net(3)(x)`, `nets[0](x)`, `net(x).sum()`."""
    root = _root(call.func)
    while isinstance(root, ast.Call) and isinstance(_root(root.func), ast.Call):  # `net(x).sum().item()`
        root = _root(root.func)
    # A capital tells `Net(3).encode(x)`, a construction, from `net(x).sum()`, a call whose value is used.
    if isinstance(root, ast.Call) and isinstance(call.func, ast.Attribute) and not _function_name(root)[:1].isupper():
        message = f"`{_short(text)}` is more than the model's call."
        return _refused(message, values_first(text, call, command, [root], taken=taken))
    # What is called there is a function, which no command registers.
    of_loss = _name(command) in ("%flax_grad", "%flax_train")
    name = next(fresh_names("loss" if of_loss else _name_for(root, root), call, taken))
    start, end = start_of(text, root), end_of(text, root)
    match root:
        case ast.Call(_, [ast.Name(loss)]) if of_loss and _function_name(root) in _TRANSFORMS:
            message = f"{_name(command)} takes the loss itself: gradients and the compiled program are its own to make."
            return _refused(message, f"{command} {text[:start]}{loss}{text[end:]}")
    rest = f"{text[:start]}{name}{text[end:]}"
    try:
        parse_call(rest, command, taken)
        run = f"{command} {rest}"
    except FlaxMagicsError as error:  # `Net(3)(x).sum()`: after naming the model there is still more than a call
        run = error.write or error.form or f"{command} …"
    first = "give it one" if of_loss else "register it"
    message = f"`{_short(text[start:end])}` has no name: {first} first."
    return _refused(message, f"{'' if of_loss else '%flaxmodel '}{name} = {text[start:end]}\n{run}")


_TRANSFORMS = ("grad", "value_and_grad", "jit")
"""What is written around a loss by hand: of `jax` or of `nnx`."""


def _function_name(node: ast.expr) -> str:
    """The last name of the called function: `Dense` of `nn.Dense(3)`. Empty if it has none."""
    function = getattr(node, "func", None)
    return str(getattr(function, "id", getattr(function, "attr", "")))


def _name_for(root: ast.expr, value: ast.expr) -> str:
    """A variable name for `value`: `my_net` for `MyNet(3)`, `a` if `root` is `nets['a']`, else `net`."""
    class_name = _function_name(value)
    name = variable_name(class_name) if class_name != class_name.lower() else ""
    if isinstance(root, ast.Subscript) and isinstance(root.slice, ast.Constant) and isinstance(root.slice.value, str):
        name = root.slice.value
    return name if name.isidentifier() and not keyword.iskeyword(name) else "net"


def _bad_name(source: str, command: str) -> FlaxMagicsError | None:
    """The error for `my-net = …`, `net := …` or `net =`, which Python refuses; None for another syntax error."""
    walrus = re.match(r"(\w+)\s*:=\s*(.+)", source, re.DOTALL)
    if walrus and _is_expression(walrus[2]):
        return _refused("write `=`, not `:=`.", f"{command} {walrus[1]} = {walrus[2]}")
    assignment = re.fullmatch(r"([^\s=()\[\]{}.,'\"]+)\s*(?:=(?!=)\s*(.*))?", source, re.DOTALL)
    if not assignment:
        return None
    name, value = assignment[1], assignment[2]
    if name.isidentifier() and not keyword.iskeyword(name):
        return None if value else _refused(f"`{name} =` needs a value.", f"{command} {name} = …")
    kind = "a word of Python, not a name" if keyword.iskeyword(name) else "not a Python name"
    line = f"{command} {plain_name(name, 'net')} = {value if value and _is_expression(value) else '…'}"
    return _refused(f"`{name}` is {kind}.", line)


def plain_name(text: str, otherwise: str) -> str:
    """`text` made a valid Python name: `my_net` for `my-net`; `otherwise` where that is not possible."""
    name = re.sub(r"\W+", "_", text).strip("_").lstrip("0123456789")
    return name if name.isidentifier() and not keyword.iskeyword(name) else otherwise


def _is_expression(text: str) -> bool:
    body = statements(text)
    return len(body) == 1 and isinstance(body[0], ast.Expr)


def _no_assignment(text: str, statement: ast.stmt, command: str, taken: frozenset[str]) -> FlaxMagicsError:
    """The error for a statement that is no single assignment to a name."""
    match statement:
        case ast.Assign([_, _, *_]):
            message = "one name at a time: `a = b = …` would give one model two names."
        case ast.Assign([ast.Tuple() | ast.List()]):
            message = "one name at a time."
        case ast.Assign([target]):
            message = f"`{_short(segment(text, target))}` is not a plain name."
        case ast.Expr(ast.Tuple()):
            message = "one model at a time."
        case ast.Expr(ast.Compare(ast.Name(), [ast.Eq()], [_])):
            message = "write `=`, not `==`."
        case ast.Expr():
            message = f"`{_short(text)}` has no name."
        case _:
            message = f"`{_short(text)}` is no name and no assignment."
    return _refused(message, _registrations(text, [statement], command, taken))


def _registrations(text: str, statements: Sequence[ast.stmt], command: str, taken: frozenset[str]) -> str:
    """The lines that register the models of `statements`, one each; a form where the models cannot be told."""
    lines = []
    for target, value in (pair for statement in statements for pair in _models(statement)):
        if target is None:
            return f"{command} … = …"
        if value is None:
            lines.append(segment(text, target))
            continue
        name = target.id if isinstance(target, ast.Name) else getattr(target, "attr", "")
        if not name:
            name = next(fresh_names(_name_for(target, value), value, taken))
        taken |= {name}
        lines.append(f"{name} = {segment(text, value)}")
    if command.startswith("%%") and len(lines) > 1:  # the cell registers what it assigns
        return "\n".join([command, "…", *(line for line in lines if "=" in line)])
    return "\n".join(f"{command} {line}" for line in lines)


def _models(statement: ast.stmt) -> list[tuple[ast.expr | None, ast.expr | None]]:
    """(target, value) of each model that a statement would register.

    The value is None for a bare name; target and value are the same node for a construction without a name. (None,
    None) where it cannot be told.
    """
    match statement:
        case ast.Assign([ast.Tuple(names) | ast.List(names)], ast.Tuple(values) | ast.List(values)):
            return list(zip(names, values, strict=False)) if len(names) == len(values) else [(None, None)]
        case ast.Assign([ast.Tuple() | ast.List()]):
            return [(None, None)]
        case ast.Assign(targets, value):
            return [(target, value) for target in targets]
        case ast.AnnAssign(target, _, ast.expr() as value):
            return [(target, value)]
        case ast.Expr(ast.Compare(ast.Name() as name, [ast.Eq()], [value])):
            return [(name, value)]
        case ast.Expr(ast.Tuple(elements)):
            return [pair for element in elements for pair in _models(ast.Expr(element))]
        case ast.Expr(ast.Name() as name):
            return [(name, None)]
        case ast.Expr(ast.Call() | ast.Subscript() | ast.Attribute() as value) if not _is_builtin(value):
            return [(value, value)]
    return [(None, None)]


def parse_variables(text: str) -> Assignment:
    """Reads the line of `%flax_vars`: `net`, or `net = EXPR`.

    Raises:
      FlaxMagicsError: it is something else.
    """
    match statements(text.strip()):
        case [ast.Expr(ast.Attribute() | ast.Subscript() | ast.Call() as tree)]:
            root: ast.expr = tree
            while isinstance(root, (ast.Attribute, ast.Subscript, ast.Call)):
                root = root.func if isinstance(root, ast.Call) else root.value
            if isinstance(root, ast.Name):
                message = f"%flax_vars takes the name of a model, not `{text}`."
                raise FlaxMagicsError(message, write=f"variables = %flax_vars {root.id}")
    return parse_assignment(text, "%flax_vars", "net")
