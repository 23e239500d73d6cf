"""A cell as Python text with its commands found: what the lines of an export take the place of.

IPython's own transformers make calls of `get_ipython()` out of magics and shell lines, in place and line by line, so what
is found here is what ran.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from ..call import ParsedCall, parse_call
from ..commands import COMMANDS
from ..errors import FlaxMagicsError
from ..expression import end_of, segment, start_of
from ..journal import Place
from ..options import Read, read
from ..source import ends_quietly, pieces

Transform = Callable[[str], str]

AS_BODY = ("time", "capture", "prun", "snakeviz", "memit", "mprun", "scalene", "timed")
"""Cell magics of others that run their body once, in the notebook's own namespace."""


@dataclass(frozen=True, eq=False)
class Site:
    """A place in a cell's text where a command stands.

    Attributes:
      statement: the statement that it is, in the cell's syntax tree.
      name: of the command, such as `flax_apply`.
      given: its options and what follows them, read.
      call: its call, where it takes one.
      target: what stands left of its value, with the sign: `y =`, `total +=`; empty if nothing does.
      path: the compound statements and functions that it is inside, outermost first.
      line: what stands after the command's name.
      above: lines that there were before the cell's text, where the code that ran counts them.
    """

    statement: ast.stmt
    name: str
    given: Read
    call: ParsedCall | None
    target: str
    path: tuple[ast.stmt, ...]
    line: str = ""
    above: int = 0

    def is_at(self, place: Place) -> bool:
        """Whether it is the line of that number, in a function of that name."""
        first, last = self.statement.lineno, self.statement.end_lineno or self.statement.lineno
        inside = self.in_function
        named = place.function.startswith("<") if inside is None else place.function == inside.name
        return named and first <= place.line - self.above <= last

    @property
    def draws(self) -> bool:
        """Whether a run comes of it."""
        if self.name == "flax_key":
            return bool(self.given.rest)
        return self.name in ("flax_apply", "flax_init")

    @property
    def in_function(self) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
        """The innermost function that it is inside."""
        for node in reversed(self.path):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                return node
        return None

    @property
    def mode(self) -> str:
        """The mode of its runs, as a Run says it; empty where a run has none."""
        if self.name != "flax_apply":
            return ""
        options = self.given.options
        return "train" if options["train"] else "eval" if options["eval"] else "as written"

    def matches(self, run: Any) -> bool:
        """Whether `run` may be one of this place."""
        command = self.name.removeprefix("flax_")
        if self.name == "flaxmodel":
            name = self.given.rest.partition("=")[0].strip()
            return run.command == "init" and is_build(run) and name in (run.model, MODELS)
        if run.command != command:
            return False
        if command == "key":
            return bool(run.call == self.given.rest)
        options = self.given.options
        if self.call is None or run.call not in (self.call.call, self.call.text):
            return False
        if bool(run.replayed) != (options["draw"] is not None):
            return False
        return (command == "init" and not is_build(run)) or (run.mode == self.mode and run.draws == options["draws"])


def is_build(run: Any) -> bool:
    """Whether a module was built on a model's line, whose call is the construction itself."""
    inside = run.call.rstrip().removesuffix(")").rstrip(", ")
    return run.command == "init" and bool(run.by_hand.partition(" = ")[2].startswith(inside))


@dataclass(frozen=True, eq=False)
class Foreign:
    """A place where a magic or shell line of others stands: it becomes a comment.

    Attributes:
      statement: see `Site`.
      shown: as it was written, one line each.
      code: Python that it ran, and that stands in its place; empty for none.
      names: what it assigned.
      ours: it loads or sets this package, and nothing stands for it.
    """

    statement: ast.stmt
    shown: tuple[str, ...]
    code: str = ""
    names: tuple[str, ...] = ()
    ours: bool = False


@dataclass(frozen=True, eq=False)
class Source:
    """A cell as Python.

    Attributes:
      text: of the cell, its cell magics opened.
      tree: its syntax.
      sites, foreign: where commands and the magics of others stand, by statement.
      above: lines of comment that stand for cell magics.
      opaque: it is no Python, and `above` is all that there is.
      raw: the text as IPython made it of the cell, before anything of it was replaced.
      offset: how many lines of `text` less there were where the code that ran counts them (see `Executed.line`).
    """

    text: str
    tree: ast.Module
    sites: dict[ast.stmt, Site] = field(default_factory=dict)
    foreign: dict[ast.stmt, Foreign] = field(default_factory=dict)
    above: tuple[str, ...] = ()
    opaque: bool = False
    offset: int = 0
    raw: str = ""

    @property
    def only_defines(self) -> bool:
        """Whether it is functions, classes and imports alone: run again it is the same once more."""
        plain = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
        return bool(self.tree.body) and all(isinstance(statement, plain) for statement in self.tree.body)


def read_cell(raw: str, transform: Transform) -> Source:
    """The cell `raw` as it was typed, read. A text that is no Python is opaque."""
    if not raw.strip():
        return Source("", ast.Module([], []))
    try:
        text = transform(raw)
        tree = ast.parse(text)
    except (SyntaxError, ValueError, FlaxMagicsError) as error:
        return Source("", ast.Module([], []), above=(*raw.rstrip().splitlines(), f"({error})"), opaque=True)
    magic = _cell_magic(tree)
    if magic is None:
        return _found(text, tree, (), 0)
    name, line, body = magic
    try:
        return _opened(name, line, body, transform)
    except FlaxMagicsError as error:  # a line that the command refused
        return Source("", ast.Module([], []), above=(f"%%{name} {line}", f"({error})"), opaque=True)


def _opened(name: str, line: str, body: str, transform: Transform) -> Source:
    """A cell magic's body as the cell that it is."""
    shown = f"%%{name} {line}".rstrip()
    if name == "flaxmodel":
        given = read(COMMANDS["%%flaxmodel"], line.rstrip("; "))
        inner = read_cell(body, transform)
        if inner.opaque:
            return inner
        register = f"\nget_ipython().run_line_magic('flaxmodel', {given.rest or MODELS!r})\n"
        below = inner.text.rstrip() + register
        return _found(below, ast.parse(below), inner.above, 1 + _blank(body))
    if f"%{name}" in COMMANDS:
        return _call_cell(name, line, body, transform)
    if name in AS_BODY:
        inner = read_cell(body, transform)
        names = line.split()[:1] if name == "capture" and not line.startswith("-") else []
        nowhere: ast.stmt = ast.Pass()
        gone = {nowhere: Foreign(nowhere, (), names=tuple(names))} if names else {}
        return Source(
            inner.text,
            inner.tree,
            inner.sites,
            {**inner.foreign, **gone},
            (shown, *inner.above),
            inner.opaque,
            inner.offset,
        )
    return Source("", ast.Module([], []), above=(shown, *body.rstrip().splitlines()), opaque=True)


MODELS = "*"
"""Stands on the line of a `%%flaxmodel` cell that has none of its own: the models that it defined."""


def _blank(body: str) -> int:
    """Empty lines at the top of a body, which IPython takes off."""
    return next((i for i, line in enumerate(body.splitlines()) if line.strip()), 0)


def _cell_magic(tree: ast.Module) -> tuple[str, str, str] | None:
    """Name, line and body of the cell magic that IPython's transformers made a call of."""
    match tree.body:
        case [ast.Expr(ast.Call(func, [ast.Constant(str(name)), ast.Constant(str(line)), ast.Constant(str(body))]))]:
            return (name, line, body) if _is_shell(func, "run_cell_magic") else None
    return None


def _is_shell(func: ast.expr, method: str) -> bool:
    match func:
        case ast.Attribute(ast.Call(ast.Name("get_ipython"), []), attr):
            return attr == method
    return False


def _call_cell(name: str, line: str, body: str, transform: Transform) -> Source:
    """`%%flax_apply` and its like: the last statement is the call, and becomes a line."""
    inner = read_cell(body, transform)
    if inner.opaque or not inner.tree.body:
        return inner
    last: Any = inner.tree.body[-1]
    value = getattr(last, "value", None)
    if not isinstance(value, ast.Call):
        return inner
    start, end = start_of(inner.text, last), end_of(inner.text, last)
    target = inner.text[start : start_of(inner.text, value)]
    semicolon = ";" if ends_quietly(inner.text) else ""
    written = f"{line} {segment(inner.text, value)}{semicolon}".strip()
    below = f"{inner.text[:start]}{target}get_ipython().run_line_magic({name!r}, {written!r})"
    # The call may have stood over several lines: those after it keep their numbers.
    below += "\n" * inner.text[start:end].count("\n") + "\n"
    return _found(below, ast.parse(below), inner.above, 1 + _blank(body))


def _found(text: str, tree: ast.Module, above: tuple[str, ...], offset: int) -> Source:
    sites: dict[ast.stmt, Site] = {}
    foreign: dict[ast.stmt, Foreign] = {}
    for statement, path in _statements(tree.body, ()):
        value = getattr(statement, "value", None)
        if not isinstance(statement, (ast.Expr, ast.Assign, ast.AnnAssign, ast.AugAssign)):
            continue
        if not isinstance(value, ast.Call) or not isinstance(value.func, ast.Attribute):
            continue
        target = ""
        if not isinstance(statement, ast.Expr):
            target = text[start_of(text, statement) : start_of(text, value)].strip()
        match value.args:
            case [ast.Constant(str(name)), ast.Constant(str(line))] if _is_shell(value.func, "run_line_magic"):
                command = COMMANDS.get(f"%{name}") or COMMANDS.get(f"%%{name}")
                if command is not None:
                    site = _site(statement, name, command, line, target, path, offset)
                    if site is not None:
                        sites[statement] = site
                        continue
                foreign[statement] = _magic(statement, name, line, target)
            case [ast.Constant(str(line))] if _is_shell(value.func, "system") or _is_shell(value.func, "getoutput"):
                shell = Foreign(statement, _shown(f"{target} !{line}"), names=_names(statement))
                foreign[statement] = Foreign(statement, (), ours=True) if "flax_magics" in line else shell
            case _ if _is_shell(value.func, value.func.attr):
                foreign[statement] = Foreign(
                    statement, _shown(f"{target} {ast.unparse(value)}"), names=_names(statement)
                )
    return Source(text, tree, sites, foreign, above, offset=offset, raw=text)


def reread(source: Source, text: str) -> Source:
    """The same cell with another text, of as many lines."""
    found = _found(text, ast.parse(text), source.above, source.offset)
    captured = {node: gone for node, gone in source.foreign.items() if not gone.shown and gone.names}
    return replace(source, text=text, tree=found.tree, sites=found.sites, foreign={**found.foreign, **captured})


def _site(
    statement: ast.stmt, name: str, command: Any, line: str, target: str, path: tuple[ast.stmt, ...], above: int
) -> Site | None:
    """The place of a command; None for a line that the command refuses (which ended the cell)."""
    try:
        given = read(command, line if command.takes == "call" else line.rstrip("; "))
        if given.help or (not given.rest and name in ("flax_apply", "flax_init")):
            return Site(statement, "help", given, None, target, path, line)
        bare = name == "flax_summary" and given.rest.rstrip("; ").isidentifier()
        call = parse_call(given.rest, command.name) if command.takes == "call" and not bare else None
    except FlaxMagicsError:
        return None
    return Site(statement, name, given, call, target, path, line, above)


def _magic(statement: ast.stmt, name: str, line: str, target: str) -> Foreign:
    shown = _shown(f"{target} %{name} {line}")
    if "flax_magics" in line or (name == "config" and "FlaxMagics" in line):
        return Foreign(statement, (), ours=True)
    if name == "time" and not target and not line.lstrip().startswith("-"):
        return Foreign(statement, (f"%{name}",), code=line.strip())
    return Foreign(statement, shown, names=_names(statement))


def _shown(text: str) -> tuple[str, ...]:
    return tuple(text.strip().splitlines())


def _names(statement: ast.stmt) -> tuple[str, ...]:
    return tuple(
        node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    )


def _statements(body: list[ast.stmt], path: tuple[ast.stmt, ...]) -> Iterator[tuple[ast.stmt, tuple[ast.stmt, ...]]]:
    """Every statement with those that it is inside, in the order of the text."""
    for statement in body:
        yield statement, path
        for inner in blocks(statement):
            yield from _statements(inner, (*path, statement))


def blocks(statement: ast.stmt) -> list[list[ast.stmt]]:
    """The blocks of a compound statement, in the order of the text."""
    found = [getattr(statement, name, []) for name in ("body", "handlers", "orelse", "finalbody", "cases")]
    out: list[list[ast.stmt]] = []
    for block in found:
        for item in [block] if block and isinstance(block[0], ast.stmt) else block:
            out.append(item if isinstance(item, list) else item.body)
    return out


def indent_of(text: str) -> str:
    """The indentation that the blocks of `text` have first, four spaces where it has none."""
    depth = 0
    start = True
    for piece in pieces(text):
        if piece.kind == "newline":
            start = True
        elif piece.kind == "space" and start and not depth:
            return text[piece.start : piece.end]
        else:
            start, depth = False, piece.depth
    return "    "
